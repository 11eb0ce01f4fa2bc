"""A running development cluster, and the ``hts`` command as a process that uses it."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forked import Python

REPOSITORY = Path(__file__).parents[1]
DEVCLUSTER = REPOSITORY / "slurm" / "devcluster"


@dataclass(frozen=True)
class DevCluster:
    """A running cluster: its folder and the environment that reaches it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: object) -> str:
        """The output of a command of Slurm."""
        found = subprocess.run(
            [str(part) for part in command], env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    def control(self, *arguments: str) -> None:
        """Run the script itself."""
        subprocess.run([DEVCLUSTER, *arguments], env=self.environment, check=True, timeout=300)

    def file(self, path: Path, **changes: object) -> Path:
        """A cluster file for these tests: one core and 2 GiB a task, with top-level keys added."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in {"executor": "slurm", **changes}.items()]
        for stage in ("prune", "learn", "evaluate", "report"):
            lines += [f"[stages.{stage}]", "gpus = 0", "cpus = 1", "memory = 2", 'time = "0:20:00"']
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path


@dataclass(frozen=True)
class Forty:
    """The study ``forty`` with its results directory, driven as a user would."""

    cluster: DevCluster
    results: Path
    text: Path

    def start(self, *arguments: object) -> Python:
        source = "import forty_study; forty_study.main()"
        environment = self.cluster.environment | {"COLUMNS": "200"}
        return Python(source, self.results, self.text, *arguments, environment=environment)

    def hts(self, *arguments: object) -> str:
        """The output of a command that succeeds."""
        out, err, code = self.outcome(*arguments)
        assert code == 0, err
        return out

    def outcome(self, *arguments: object) -> tuple[str, str, int]:
        process = self.start(*arguments)
        code = process.wait()
        return process.stdout, process.stderr, code


def wait_until(what: str, condition: Callable[[], object], seconds: float = 300) -> None:
    """Poll until the condition holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"gave up waiting until {what}"
        time.sleep(0.5)
