"""Running Python that a model wrote: without network, processes or files to write, and with limits on time and memory.

The program runs in an interpreter of its own, in an empty directory that is removed afterwards, with an empty
environment and no packages beside the standard library. Before its text is compiled, a filter of system calls
(seccomp) is laid over that interpreter, which nothing can take off again. It allows the calls that computing and
reading need, with harmless arguments, and refuses all others: no sockets, no new processes or threads, no other
program, no signals to other processes and no changes of them, and nothing that opens a file to write or changes the
file system. Limits of the kernel end what takes too much time or memory. What the program prints goes nowhere. It
passes if it ends without an error; one that exits by itself has not ended.

It may read what its user may read, though there is nowhere to tell it; what it reads from another process's pipe or
terminal is gone there. A program that inspects its runner could fake its pass: that is not guarded against. The filter
is of Linux on x86-64; elsewhere nothing is run.

    >>> passes("assert 1 + 1 == 2")
    True
"""

import contextlib
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from experiments.eval import confined
from patch.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu: seconds of processor time.
        wall: seconds, the interpreter's start included.
        memory: bytes of address space.
    """

    cpu: int = 10
    wall: float = 30.0
    memory: int = 1024 * MIB


def check_available() -> None:
    """Raise if programs cannot be confined here.

    Raises:
        UserError: saying why.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UserError(f"generated code is run on Linux on x86-64 alone, not {sys.platform} on {platform.machine()}")
    if not passes("assert 1 + 1 == 2") or passes("import socket; socket.socket()"):
        raise UserError("generated code cannot be confined here: the kernel refuses a filter of system calls (seccomp)")


def passes(program: str, limits: Limits | None = None) -> bool:
    """Whether a program runs to its end without an error, within the limits."""
    limits = limits or Limits()
    token = secrets.token_hex(16)
    told, tell = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="hts-sandbox-") as folder:
            # The interpreter without packages (-S), environment and the directory of this file (-I).
            command = [sys.executable, "-I", "-S", "-B", confined.__file__, str(tell)]
            process = subprocess.Popen(
                [*command, str(limits.cpu), str(limits.memory), token],
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[tell],
                start_new_session=True,
            )
            os.close(tell)
            tell = -1
            try:
                process.communicate(program.encode("utf-8", "surrogatepass"), timeout=limits.wall)
            except subprocess.TimeoutExpired:
                return False
            finally:
                _end(process)
        # Written by the interpreter once the program was over; the pipe holds what little that is.
        return os.read(told, 1024) == token.encode()
    finally:
        os.close(told)
        if tell >= 0:
            os.close(tell)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever still runs of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
