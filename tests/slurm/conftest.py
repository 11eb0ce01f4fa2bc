"""A real Slurm for the tests that are marked ``slurm``."""

import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dev_cluster import DEVCLUSTER, REPOSITORY, DevCluster

NOT_ALLOWED = 77


@pytest.fixture(scope="session")
def start_cluster() -> Iterator[Callable[..., DevCluster]]:
    """Bring up clusters in folders of their own; skips where the machine does not allow it."""
    started = []

    def start(*options: str) -> DevCluster:
        # The path of a socket may have 107 characters: pytest's own folders are too deep.
        folder = Path(tempfile.mkdtemp(prefix="hts-slurm-"))
        tests = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
        environment = os.environ | {
            "HTS_DEVCLUSTER": str(folder),
            "HTS_DEVCLUSTER_PORT": str(_free_ports()),
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
    return start_cluster()


def _free_ports() -> int:
    """The first of four neighbouring ports that nobody listens on."""
    while True:
        first = random.randrange(20_000, 30_000, 4)
        try:
            for port in range(first, first + 4):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words at random, enough for every stage of the forty trials but the last, whose text lies beside it."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words, rng = ["the", "of", "and", "city", "river", "king", "war", "music", "year", "first"], random.Random(0)
    path.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=80))}) + "\n" for _ in range(40)))
    path.with_name("short.jsonl").write_text(json.dumps({"text": "the river"}) + "\n")
    return path
