"""Learning one mask in several processes: how they are started, told to stop, and what came of them.

Every node of a job has one task, which runs ``torch.distributed.run`` with a process for each of its GPUs; they meet at
the first node of the allocation. The processes lease and write as `experiments.run.pipeline` says: rank 0 alone.

Slurm's signals reach every process of a job. The launcher keeps them from torch's agent, which would pass them on a
second time, and from processes that are still starting: the task alone takes them, and has the agent interrupt its
processes, which save and end. Only then does the signal take its course, and the job is requeued.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from experiments.run.runtime import Machine
from experiments.run.signals import deferred_signals
from patch.learn.descent import Stopped
from slurm.cluster import Launch

_KEPT_BACK = (signal.SIGTERM, signal.SIGUSR2)


class Interrupted(Exception):
    """They were told to stop: no failure."""


class RankFailed(RuntimeError):
    """The first error of one of the processes; its traceback there is a note of this one."""


Learn = Callable[[Machine], object]


def command(launch: Launch, environment: Mapping[str, str]) -> list[str]:
    """torch's launcher for this node's share of the processes; what they run is to be appended."""
    if launch.nodes == 1:
        meeting = ["--standalone"]
    else:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        # Jobs that share a node must not meet at the same port.
        port = 20_000 + int(environment["SLURM_JOB_ID"]) % 10_000
        meeting = [f"--node-rank={environment['SLURM_NODEID']}", f"--master-addr={hosts.stdout.split()[0]}"]
        meeting.append(f"--master-port={port}")
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.per_node}", *meeting),
    ]


def run(launch: Launch, learn: Learn, machine: Callable[[int], Machine]) -> None:
    """Call ``learn`` in every process, each with its own machine, and wait until all have ended.

    Args:
        learn: pickled; what it returns is lost.
        machine: from the number of processes on this node, pickled too, to what it is given, but for its ranks.

    Raises:
        RankFailed: if a process of this node raised.
        Interrupted: if this process was told to stop, and they were in turn.
        subprocess.CalledProcessError: if they ended in another way, such as by a signal.
    """
    with tempfile.TemporaryDirectory(prefix="hts-ranks-") as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((learn, machine, launch.per_node)))
        arguments = [*command(launch, os.environ), "-m", "slurm.torchrun", str(folder)]
        with deferred_signals() as told:
            code = _wait(arguments, told)
            stopped = told()
        # A signal of Slurm's before a preemption has taken its course: submitit has requeued the job, and left.
        if stopped and code:
            raise Interrupted("the processes that learn were told to stop")
        if error := _first_error(folder):
            raise error
        if code:
            raise subprocess.CalledProcessError(code, arguments)


def _wait(arguments: list[str], told: Callable[[], bool]) -> int:
    """The exit status of torch's agent, which is interrupted when this process is told to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_BACK)
    try:
        # The mask is inherited.
        agent = subprocess.Popen(arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        interrupted = False
        while (code := agent.poll()) is None:
            if told() and not interrupted:
                agent.send_signal(signal.SIGINT)
                interrupted = True
            time.sleep(0.2)
        return code
    finally:
        if agent.poll() is None:
            # Told a second time: no patience.
            agent.send_signal(signal.SIGINT)
            try:
                agent.wait(5)
            except subprocess.TimeoutExpired:
                agent.kill()


def _first_error(folder: Path) -> RankFailed | None:
    """The earliest of the errors that this node's processes wrote down: others follow from it."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("error-*.json")]
    if not found:
        return None
    first = min(found, key=lambda each: each["time"])
    error = RankFailed(f"rank {first['rank']}: {first['error']}")
    error.add_note(first["traceback"])
    return error


def main() -> None:
    """What each process runs."""
    from patch.learn.distributed import joined

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    try:
        with _noted(folder, rank):
            learn, machine, per_node = pickle.loads((folder / "call").read_bytes())
            here: Machine = machine(per_node)
        with _noted(folder, rank), joined(here.device) as ranks, _noted(folder, rank):
            learn(Machine(here.device, here.data, here.progress if rank == 0 else _quiet, ranks))
    except Stopped as stopped:
        raise SystemExit(str(stopped)) from stopped


@contextmanager
def _noted(folder: Path, rank: int) -> Iterator[None]:
    """Write down an error, the first of this process; before it leaves the group, which makes errors of the others."""
    path = folder / f"error-{rank}.json"
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if path.exists():
            raise
        about = {"rank": rank, "time": time.time(), "error": f"{type(error).__name__}: {error}"}
        path.write_text(json.dumps(about | {"traceback": traceback.format_exc()}))
        raise


def _quiet(label: str, done: int, total: int) -> None:
    """Progress is for rank 0 to report."""


if __name__ == "__main__":
    main()
