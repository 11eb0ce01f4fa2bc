"""What is looked at before anything is submitted: a mistake should cost a line of text, not a night in the queue."""

import grp
import logging
import os
import pwd
import socket
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from analysis.rows import layout
from experiments.data import registry
from experiments.run import pipeline
from experiments.run.runtime import code_allowed
from experiments.run.sources import Sources
from experiments.run.store import Store
from experiments.studies import cost
from experiments.studies.trial import Trial
from patch.errors import UserError
from slurm import plan, queue
from slurm.cluster import Cluster
from slurm.plan import Step

logger = logging.getLogger(__name__)

# Allowance of one job for its start: imports, loading the model.
_START_SECONDS = 60

_NETWORK = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "smb",
    "cifs",
    "afs",
    "fuse",
    "panfs",
    "orangefs",
)


def check_sources(trials: Iterable[Trial], store: Store, data: Path | None) -> None:
    """What is measured already must be of the texts that the others would be measured on.

    Raises:
        UserError: naming the first that holds something else now.
    """
    sources = Sources(data)
    for trial in trials:
        pipeline.check_sources(trial, store, sources)


def check_definitions(trials: Iterable[Trial], data: Path | None, cluster: Cluster) -> None:
    """Models reachable, tiles that fit, texts and tasks there, memory within the GPU.

    Raises:
        UserError: naming the first thing that does not fit.
    """
    trials = list(trials)
    pipeline.validate(trials, data, code_allowed())
    for model in dict.fromkeys(trial.pruning.model for trial in trials if not trial.evaluation.grid):
        registry.fingerprint(model)
    for step in plan.steps(trials).values():
        launch = cluster.stages[step.kind].launch
        if (recipe := step.pruning.passes) and (size := recipe.microbatch) % launch.size:
            raise UserError(
                f"{step.label} cannot divide its microbatch of {size} among {launch.size} processes "
                f"({launch.nodes} nodes of {launch.per_node} GPUs): choose a number that divides it with --gpus learn=N"
            )
        needed = memory(step, cluster)
        if cluster.gpu_memory and needed and needed > cluster.gpu_memory and cluster.stages[step.kind].gpus:
            raise UserError(
                f"{step.label} needs about {needed:.0f} GiB of GPU memory, and this cluster's GPUs have "
                f"{cluster.gpu_memory:g} (gpu_memory): leave it out with --where, or take another model or recipe"
            )


def check_cluster(cluster: Cluster, stages: Iterable[str], results: Path) -> None:
    """Slurm is here and would take every stage, and its nodes see the results directory.

    Raises:
        UserError: with Slurm's own message where it has one.
    """
    if cluster.executor != "debug" and not cluster.trust_writers:
        _check_writers(results.absolute())
    if cluster.executor != "slurm":
        return
    queue.require()
    if "%" in str(results.absolute()):
        raise UserError(
            f"the results directory {results} has a % in its path, which Slurm expands in the names of logs: "
            "name another one with --results"
        )
    for stage in sorted(set(stages)):
        for name, count in (("GPUs", cluster.stages[stage].gpus), ("nodes", cluster.stages[stage].nodes)):
            if count > 1 and stage != "learn":
                option = f"--{name.lower()} {stage}=1"
                raise UserError(f"stage {stage} asks for {count} {name}, and uses one: give {option}")
        if cluster.stages[stage].nodes < 1:
            raise UserError(f"stage {stage} asks for no node: give --nodes {stage}=1")
        if 60 * (minutes := cluster.stages[stage].minutes) <= cluster.signal:
            raise UserError(
                f"stage {stage} has a time limit of {minutes} minutes, and is told to stop {cluster.signal} seconds"
                f" before that (signal): give --time {stage}=M with more minutes"
            )
        queue.check(cluster, stage, cluster.stages[stage])
    parts = queue.partition(cluster)
    if not any(part.serves for part in parts):
        states = ", ".join(f"{part.nodes} {part.state}" for part in parts) or "it has none"
        logger.warning("no node of %s is in service (%s): jobs will wait", cluster.partition or "the partition", states)
    if cluster.shared_results:
        return
    place = next(parent for parent in (results.absolute(), *results.absolute().parents) if parent.exists())
    kind = _file_system(place)
    nodes = {part.nodes for part in parts}
    others = ",".join(sorted(nodes)) if nodes != {socket.gethostname().partition(".")[0]} else ""
    if others and not kind.startswith(_NETWORK):
        raise UserError(
            f"the results directory {results} is on this machine's own disk ({kind}), and jobs would run on {others}: "
            "name one on a shared file system with --results, or, if those nodes do see this one, "
            "write shared_results = true into the cluster's file"
        )
    if not os.access(place, os.W_OK):
        raise UserError(f"the results directory {results} cannot be written: name another one with --results")


def memory(step: Step, cluster: Cluster) -> float | None:
    """GiB of memory that a step takes of each GPU, or None if its model's shapes are not known."""
    evaluation = step.trials[0].evaluation if step.kind == "evaluate" else None
    return cost.memory(step.pruning, evaluation, cluster.stages[step.kind].launch.size)


def gpu_hours(steps: Iterable[Step], cluster: Cluster) -> tuple[float, int]:
    """Estimated GPU hours of some steps, and how many of them could not be estimated."""
    hours, unknown = 0.0, 0
    for step in steps:
        if not cluster.stages[step.kind].gpus:
            continue
        if step.kind == "evaluate":
            hours += cost.grid_seconds(step.trials[0].evaluation.grid) / 3600
            flops = cost.evaluation_flops(step.pruning.model, step.trials[0].evaluation)
        else:
            flops = cost.pruning_flops(step.pruning)
        if flops is None:
            unknown += 1
        hours += ((flops or 0.0) / (1e12 * cluster.gpu_tflops) + _START_SECONDS) / 3600
    return hours, unknown


def _check_writers(results: Path) -> None:
    """Jobs unpickle what lies in the results directory: whoever can write there runs code as its owner."""
    for folder in (results, results / layout.SWEEPS, *sorted((results / layout.SWEEPS).glob("*/"))):
        try:
            about = folder.stat()
        except FileNotFoundError:
            continue
        mode = about.st_mode
        # What lies in a sticky folder is its owner's to replace.
        shared = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_my_own_group(about.st_gid))
        if about.st_uid not in (0, os.getuid()) or (shared and not mode & stat.S_ISVTX):
            raise UserError(
                f"{folder} can be written by others, who could run code as you: jobs unpickle what lies there. "
                f"chmod go-w {folder}, name another directory with --results, or, if you trust them, "
                "write trust_writers = true into the cluster's file"
            )


def _is_my_own_group(gid: int) -> bool:
    """Whether it is the group of this user alone that many systems make for each."""
    try:
        group, me = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return gid == me.pw_gid and group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}


def _file_system(path: Path) -> str:
    """The type of the file system that holds ``path``, as the kernel names it."""
    command = ["stat", "--file-system", "--format=%T", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
