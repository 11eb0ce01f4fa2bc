"""What Slurm says: its queue, its accounting where there is some, its limits, and whether it would take a job.

Every question is one command, whatever the number of jobs: a sweep must not be a burden to the controller.
"""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.run.store import Store
from patch.errors import UserError
from slurm import batches
from slurm.batches import Batch
from slurm.cluster import Cluster, Resources, parse_time

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")

# States of nodes that wait for an administrator.
_OUT_OF_SERVICE = ("down", "drained", "draining", "fail", "failing", "inval", "maint", "unknown")

# More tasks at a time than any array has.
NO_CAP = 10**7

# One field of squeue, wide enough for any value: squeue cuts what is longer.
_FIELDS = ("ArrayJobID:24", "ArrayTaskID:24", "State:24", "RestartCnt:12", "Name:200", "Reason:200")


@dataclass(frozen=True)
class ArrayTask:
    """One task of an array, as Slurm sees it.

    Attributes:
        job: of the array.
        state: Slurm's word, such as ``PENDING`` or ``OUT_OF_MEMORY``.
        restarts: how often it was requeued.
        reason: why it waits, such as ``Dependency`` or ``Resources``.
    """

    job: str
    state: str
    restarts: int = 0
    reason: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is in the queue and has not begun."""
        return self.state in _WAITING

    @property
    def runs(self) -> bool:
        """Whether it holds its node."""
        return self.state in _RUNNING

    @property
    def is_over(self) -> bool:
        """Whether it has left the queue, however it ended."""
        return not (self.waits or self.runs)


def require() -> None:
    """Raise a UserError if this machine has no Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError("no Slurm here (sbatch is not on the PATH): go to a login node, or use --cluster local")


def tasks(asked: Collection[Batch]) -> dict[tuple[str, int], ArrayTask]:
    """The tasks of some batches by batch id and array index, from the queue and, of those that left it, the accounting.

    Tasks that neither knows are not in the answer: they are over.

    Raises:
        UserError: with Slurm's message, if the queue cannot be read: then nobody knows what runs.
    """
    mine = {batch.name: batch for batch in asked if batch.executor == "slurm"}
    if not mine:
        return {}
    require()
    found: dict[tuple[str, int], ArrayTask] = {}
    # An array's tasks that wait are one entry to the controller: --array unfolds them in squeue itself.
    lines = _ask("squeue", "--noheader", "--array", "--states=all", f"--name={','.join(mine)}", "-O", ",".join(_FIELDS))
    for line in lines.splitlines():
        job, index, state, restarts, name, *reason = line.split()
        if name in mine and (index.isdecimal() or index == "N/A"):
            place = (mine[name].id, int(index) if index.isdecimal() else 0)
            found[place] = ArrayTask(job, state, int(restarts), " ".join(reason))
    left = {
        batch.job: batch
        for batch in mine.values()
        if batch.job is not None and any((batch.id, index) not in found for index in range(len(batch.steps)))
    }
    for job, position, state in _accounted(list(left)):
        found.setdefault((left[job].id, position), ArrayTask(job, state))
    return found


def _accounted(jobs: Sequence[str]) -> list[tuple[str, int, str]]:
    """Job, index and state of tasks from the accounting; nothing where a cluster keeps none."""
    if not jobs or shutil.which("sacct") is None:
        return []
    command = ["sacct", "-nPX", "-S", "2000-01-01", "-o", "JobID,State", "-j", ",".join(jobs)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        return []
    found = []
    for line in outcome.stdout.splitlines():
        id, _, state = line.partition("|")
        job, _, index = id.partition("_")
        # What was cancelled before it started is listed as 12_[3-7]: there is nothing to tell about its tasks.
        if index.isdecimal() or not index:
            found.append((job, int(index or 0), state.split()[0]))
    return found


def live(store: Store) -> list[tuple[Batch, list[str]]]:
    """The batches that are not over, each with the ids of its steps that wait or run.

    Raises:
        UserError: if Slurm cannot be asked about its jobs: then nobody knows what waits and runs.
    """
    known = [batch for batch in batches.load_all(store) if not batch.over]
    by_batch: dict[str, dict[int, ArrayTask]] = {}
    for (id, index), task in tasks(known).items():
        if not task.is_over:
            by_batch.setdefault(id, {})[index] = task
    found = []
    for batch in known:
        mine = by_batch.get(batch.id, {})
        if batch.executor != "slurm":
            steps = list(batch.steps) if batches.runs_here(batch) else []
        else:
            steps = [batch.steps[index] for index in mine]
        if steps:
            # The job is not recorded if its submitter died at once.
            job = batch.job or next(iter(mine.values())).job
            found.append((dataclasses.replace(batch, job=job), steps))
    return found


def held(store: Store) -> set[str]:
    """The names of the leases that some process owns, but for those of jobs that Slurm no longer has.

    A lease takes two minutes to expire; of a job that was cancelled, Slurm knows at once.
    """
    leases = store.leased()
    jobs = sorted({owner.job for owner in leases.values() if owner.job is not None})
    gone: set[str] = set()
    if jobs and shutil.which("squeue"):
        command = ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(jobs)}"]
        outcome = subprocess.run(command, capture_output=True, text=True)
        # Of a single job that it does not know any more, squeue makes an error.
        if outcome.returncode == 0 or "Invalid job id" in outcome.stderr:
            gone = set(jobs) - set(outcome.stdout.split())
    return {name for name, owner in leases.items() if owner.job not in gone}


def max_array_size() -> int:
    """How many tasks one array may have.

    Raises:
        UserError: with Slurm's message, if it cannot be asked.
    """
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    return int(match.group(1)) if match else 1001


def cancel(jobs: Collection[str]) -> None:
    """Cancel jobs and arrays, waiting and running.

    Raises:
        UserError: with Slurm's message, if it refuses.
    """
    if jobs:
        _ask("scancel", *jobs)


def check(cluster: Cluster, stage: str, resources: Resources) -> None:
    """Ask Slurm whether it would take a job of these resources, and hold the time against the partition's limit.

    Raises:
        UserError: with what was asked for, and Slurm's message.
    """
    asked = f"stage {stage} ({_describe(cluster, resources)})"
    command = ["sbatch", "--test-only", *options(cluster, resources), "--wrap", "true"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise UserError(f"Slurm would not take {asked}: {_message(outcome.stderr)}")
    # Where limits are not enforced at submission, such a job would wait for ever.
    limit = max((part.limit for part in partition(cluster)), default=resources.minutes)
    if resources.minutes > limit:
        raise UserError(f"{asked} asks for more than the partition's limit of {limit} minutes: lower --time")


@dataclass(frozen=True)
class Part:
    """Nodes of a partition that are in one state.

    Attributes:
        limit: on a job's time, in minutes.
        nodes: as Slurm writes them, such as ``node[1-4]``.
        state: Slurm's word, such as ``idle``, ``drained`` or ``mixed``.
    """

    limit: int
    nodes: str
    state: str

    @property
    def serves(self) -> bool:
        """Whether its nodes run jobs, or will without anyone's doing."""
        # Slurm marks words, such as ``idle~`` for a node that is powered down until it is needed.
        return self.state.rstrip("*~#!%$@^-+") not in _OUT_OF_SERVICE


def partition(cluster: Cluster) -> list[Part]:
    """The cluster's partition, or Slurm's default one; nothing where it has no nodes.

    Raises:
        UserError: with Slurm's message, if it cannot be asked.
    """
    lines = _ask("sinfo", "--noheader", "-o", "%P|%l|%N|%T", *([f"-p{cluster.partition}"] if cluster.partition else []))
    rows = [[field.strip() for field in line.split("|")] for line in lines.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    chosen = [row for row in rows if cluster.partition or row[0].endswith("*")] or rows
    return [Part(parse_time(limit), nodes, state) for _, limit, nodes, state in chosen if nodes]


def options(cluster: Cluster, resources: Resources) -> list[str]:
    """The options of sbatch that ask for these resources on this cluster."""
    values = parameters(cluster, resources)
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def parameters(cluster: Cluster, resources: Resources) -> dict[str, Any]:
    """What asks for these resources on this cluster, by submitit's names; None leaves it to Slurm."""
    return {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "gpus_per_node": resources.gpus or None,
        "cpus_per_task": resources.cpus or None,
        "mem": f"{round(1024 * resources.memory)}M" if resources.memory else None,
        "time": resources.minutes,
        "nodes": resources.nodes,
    }


def _describe(cluster: Cluster, resources: Resources) -> str:
    return " ".join(options(cluster, resources))


def _ask(*command: str) -> str:
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise UserError(f"{command[0]} failed: {_message(outcome.stderr)}")
    return outcome.stdout


def _message(stderr: str) -> str:
    """Slurm's own message, once: its commands say some things twice."""
    lines = dict.fromkeys(re.sub(r"^\w+: (error: )?", "", line).strip() for line in stderr.splitlines())
    return "; ".join(line for line in lines if line) or "no message"
