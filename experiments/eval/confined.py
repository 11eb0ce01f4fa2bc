"""The interpreter in which `experiments.eval.sandbox` runs a program: confines itself, then runs what stdin holds.

It is started by its path, without packages, and so imports nothing but the standard library.
"""

import ctypes
import os
import struct
import sys

# System calls of x86-64 that a program which only computes needs. What is not here is refused, as the kernel gains
# calls: one that nobody thought of cannot reach other processes or change files. None of these acts on anything but the
# process itself and what it opened to read.
_ALLOWED = {
    "read write close readv writev pread64 preadv lseek": (0, 1, 3, 19, 20, 17, 295, 8),
    "stat fstat lstat newfstatat statx": (4, 5, 6, 262, 332),
    "access faccessat faccessat2 readlink readlinkat": (21, 269, 439, 89, 267),
    "getdents getdents64 getcwd chdir fchdir": (78, 217, 79, 80, 81),
    "dup dup2 dup3 pipe pipe2": (32, 33, 292, 22, 293),
    "poll ppoll select pselect6": (7, 271, 23, 270),
    "mmap mprotect munmap brk mremap madvise": (9, 10, 11, 12, 25, 28),
    "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending": (13, 14, 15, 127),
    "rt_sigtimedwait rt_sigsuspend sigaltstack pause": (128, 130, 131, 34),
    "nanosleep clock_nanosleep getitimer alarm setitimer restart_syscall": (35, 230, 36, 37, 38, 219),
    "gettimeofday time clock_gettime clock_getres times": (96, 201, 228, 229, 100),
    "getpid getppid gettid getpgrp getpgid getsid": (39, 110, 186, 111, 121, 124),
    "getuid getgid geteuid getegid getgroups getresuid getresgid": (102, 104, 107, 108, 115, 118, 120),
    "uname sysinfo getrlimit getrusage getrandom": (63, 99, 97, 98, 318),
    "sched_yield sched_getaffinity getcpu": (24, 204, 309),
    "exit exit_group": (60, 231),
}
# Those whose second argument must be one of these: fcntl also sends signals to other processes and takes locks, ioctl
# also changes files and types into terminals.
_ONE_OF = {
    72: (0, 1, 2, 3, 1030),  # fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC.
    16: (0x5401, 0x5451),  # ioctl: TCGETS, which asks for a terminal, and FIOCLEX.
}
# Those that open a file (open, openat), and which argument says how: to write is refused.
_OPENS = {2: 1, 257: 2}
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND if sys.platform == "linux" else 0
# Waiting for memory: without this bit (FUTEX_PRIVATE_FLAG) it may be memory that is shared with other processes.
_FUTEX, _PRIVATE = 202, 128

_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _NOT_PERMITTED = 0x7FFF0000, 0x80000000, 0x00050000 | 1
_X86_64, _X32 = 0xC000003E, 0x40000000


def _filter() -> bytes:
    """The filter as a program of BPF: eight bytes an instruction."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    def argument(number: int) -> bytes:
        """Load its lower half, which is all that the kernel reads of those asked for here."""
        return step(_LOAD, 16 + 8 * number)

    allow, refuse = step(_RETURN, _ALLOW), step(_RETURN, _NOT_PERMITTED)
    program = step(_LOAD, 4) + step(_EQUAL, _X86_64, 1, 0) + step(_RETURN, _KILL)
    program += step(_LOAD, 0) + step(_AT_LEAST, _X32, 0, 1) + step(_RETURN, _KILL)
    for number in sorted(number for group in _ALLOWED.values() for number in group):
        program += step(_EQUAL, number, 0, 1) + allow
    # What looks at an argument loses the call's number, and so decides: it does not come back here.
    decide = {n: argument(how) + step(_ANY_BIT, _TO_WRITE, 0, 1) + refuse + allow for n, how in _OPENS.items()}
    decide[_FUTEX] = argument(1) + step(_ANY_BIT, _PRIVATE, 0, 1) + allow + refuse
    for number, values in _ONE_OF.items():
        decide[number] = argument(1) + b"".join(step(_EQUAL, value, 0, 1) + allow for value in values) + refuse
    for number, steps in decide.items():
        program += step(_EQUAL, number, 0, len(steps) // 8) + steps
    return program + refuse


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
    text = sys.stdin.buffer.read()
    # Text can be made that takes the compiler long, or much memory: it is compiled within the limits too.
    _confine(cpu, memory)
    exec(compile(text, "program", "exec"), {"__name__": "__main__"})
    os.write(tell, token.encode())
    # Threads and handlers of exit that the program left behind are none of our business.
    os._exit(0)


if __name__ == "__main__":
    _run()
