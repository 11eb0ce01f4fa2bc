"""Python processes that start at once: forked from a server that has imported torch and transformers already.

Importing them takes a process several seconds, and tests of what happens between processes start many.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "transformers.models.llama.modeling_llama", "pandas", "safetensors.torch"]
)


class Python:
    """``python -c SOURCE ARGUMENTS...``, used as `subprocess.Popen` is; its output goes to files.

    Args:
        environment: beside this process's own.
        session: whether it leads a process group of its own.
    """

    def __init__(
        self, source: str, *arguments: object, environment: Mapping[str, str] | None = None, session: bool = False
    ) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="forked-")
        folder = Path(self._files.name)
        self._out, self._err = folder / "out", folder / "err"
        for path in (self._out, self._err):
            path.touch()
        about = (
            source,
            list(map(str, arguments)),
            os.environ | dict(environment or {}),
            list(sys.path),
            folder,
            session,
        )
        self._process = _CONTEXT.Process(target=_run, args=about, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Of an end by a signal its negative number; None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Torchrun:
    """``python -m torch.distributed.run ... -m MODULE ARGUMENTS...`` on this machine, used as `subprocess.Popen` is.

    Without torch's agent, where what is tested is what its processes do: each finds what the agent would tell it, and
    when one fails the others are ended.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        (size,) = (int(each.partition("=")[2]) for each in command if each.startswith("--nproc-per-node="))
        module, *arguments = command[command.index("-m", command.index("torch.distributed.run")) + 1 :]
        with socket.create_server(("127.0.0.1", 0)) as free:
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        common |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), **(environment or {})}
        source = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        self.processes = [
            Python(source, *arguments, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(size)
        ]

    def poll(self) -> int | None:
        codes = [process.poll() for process in self.processes]
        if any(codes):
            self.kill()
            return 1
        return None if None in codes else 0

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("torchrun", timeout)
            time.sleep(0.05)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


def _run(
    source: str, arguments: list[str], environment: Mapping[str, str], path: list[str], folder: Path, session: bool
) -> None:
    if session:
        os.setsid()
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), descriptor)
    # Print at once: what is killed cannot flush.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    sys.argv = ["-c", *arguments]
    exec(compile(source, "<forked>", "exec"), {"__name__": "__main__"})
