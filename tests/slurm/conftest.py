"""A real Slurm for the tests that are marked ``slurm``, and the ``hts`` command as a process that uses it."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEVCLUSTER = REPOSITORY / "slurm" / "devcluster"
NOT_ALLOWED = 77


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
        path.write_text("\n".join(lines) + "\n")
        return path


@pytest.fixture(scope="session")
def start_cluster() -> Iterator[Callable[..., DevCluster]]:
    """Bring up clusters in folders of their own; skips where the machine does not allow it."""
    started = []

    def start(port: int, *options: str) -> DevCluster:
        # The path of a socket may have 107 characters: pytest's own folders are too deep.
        folder = Path(tempfile.mkdtemp(prefix="hts-slurm-"))
        tests = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
        environment = os.environ | {
            "HTS_DEVCLUSTER": str(folder),
            "HTS_DEVCLUSTER_PORT": str(port),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": tests,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        cluster = DevCluster(folder, environment)
        up = subprocess.run([DEVCLUSTER, "up", *options], env=environment, stderr=subprocess.PIPE, text=True)
        if up.returncode == NOT_ALLOWED:
            shutil.rmtree(folder)
            pytest.skip(up.stderr.strip().splitlines()[-1])
        started.append(cluster)
        assert up.returncode == 0, up.stderr
        return cluster

    yield start
    for cluster in started:
        cluster.control("down")


@pytest.fixture(scope="session")
def cluster(start_cluster: Callable[..., DevCluster]) -> DevCluster:
    return start_cluster(18817)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words at random, enough for every stage of the forty trials."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words, rng = "the of and city river king war music year first".split(), random.Random(0)
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=80))}) + "\n" for _ in range(40)))
    return path


@dataclass(frozen=True)
class Forty:
    """The study ``forty`` with its results directory, driven as a user would."""

    cluster: DevCluster
    results: Path
    text: Path

    def start(self, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, REPOSITORY / "tests" / "forty_study.py", self.results, self.text, *arguments]
        return subprocess.Popen(
            [str(part) for part in command],
            env=self.cluster.environment | {"COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hts(self, *arguments: object) -> str:
        """The output of a command that succeeds."""
        out, err, code = self.outcome(*arguments)
        assert code == 0, err
        return out

    def outcome(self, *arguments: object) -> tuple[str, str, int]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        return out, err, process.returncode


def wait_until(what: str, condition: Callable[[], object], seconds: float = 300) -> None:
    """Poll until the condition holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"gave up waiting until {what}"
        time.sleep(0.5)
