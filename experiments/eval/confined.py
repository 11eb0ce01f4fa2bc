"""The interpreter in which `experiments.eval.sandbox` runs a program: confines itself, then runs what stdin holds.

It is started by its path, without packages, and so imports nothing but the standard library.
"""

import ctypes
import os
import struct
import sys

# Numbers of system calls of x86-64 that are refused.
_REFUSED = {
    "sockets": (41, 42, 43, 44, 46, 49, 50, 53, 288, 299, 307),
    "processes": (56, 57, 58, 59, 322, 435),
    "signals": (62, 129, 200, 234, 297, 424),
    "others' memory": (101, 310, 311, 312, 434, 438),
    "changes of files": (76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 188, 189, 190),
    "more of them": (197, 198, 199, 235, 258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 285, 316, 437, 452),
    "mounts and namespaces": (155, 161, 165, 166, 167, 168, 272, 308, 428, 429, 430, 431, 432, 433, 442),
    "shared memory and queues": (29, 30, 31, 64, 68, 240, 319),
    "limits": (105, 106, 113, 114, 116, 117, 119, 157, 160, 302),
    "the kernel": (103, 134, 153, 159, 164, 169, 170, 171, 172, 173, 175, 176, 179, 227, 246, 248, 249, 250),
    "more of it": (298, 300, 304, 313, 317, 320, 321, 323, 425, 426, 427, 443, 444, 445, 446),
}
# Those that open a file, and which argument says how: to write is refused.
_OPENS = {2: 1, 257: 2}
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND if sys.platform == "linux" else 0

_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _NOT_PERMITTED = 0x7FFF0000, 0x80000000, 0x00050000 | 1
_X86_64, _X32 = 0xC000003E, 0x40000000


def _filter() -> bytes:
    """The filter as a program of BPF: eight bytes an instruction."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    refuse = step(_RETURN, _NOT_PERMITTED)
    program = step(_LOAD, 4) + step(_EQUAL, _X86_64, 1, 0) + step(_RETURN, _KILL)
    program += step(_LOAD, 0) + step(_AT_LEAST, _X32, 0, 1) + step(_RETURN, _KILL)
    for number in sorted({number for group in _REFUSED.values() for number in group}):
        program += step(_EQUAL, number, 0, 1) + refuse
    for number, argument in _OPENS.items():
        # The lower half of the argument; what follows does not come back here.
        how = step(_LOAD, 16 + 8 * argument) + step(_ANY_BIT, _TO_WRITE, 0, 1) + refuse + step(_RETURN, _ALLOW)
        program += step(_EQUAL, number, 0, len(how) // 8) + how
    return program + step(_RETURN, _ALLOW)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _confine(cpu: int, memory: int) -> None:
    import resource

    for limit, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(limit, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    content = ctypes.create_string_buffer(_filter())
    program = _Program((len(content) - 1) // 8, ctypes.cast(content, ctypes.c_void_p))
    no_new_privileges, set_filter, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_filter, filter_mode, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


def _run() -> None:
    tell, cpu, memory = map(int, sys.argv[1:4])
    token, sys.argv[1:] = sys.argv[4], []
    program = compile(sys.stdin.buffer.read(), "program", "exec")
    _confine(cpu, memory)
    exec(program, {"__name__": "__main__"})
    os.write(tell, token.encode())
    # Threads and handlers of exit that the program left behind are none of our business.
    os._exit(0)


if __name__ == "__main__":
    _run()
