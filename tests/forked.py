"""Python processes that start at once: forked from a server that has imported torch and transformers already.

Importing them takes a process several seconds, and tests of what happens between processes start many.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
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
