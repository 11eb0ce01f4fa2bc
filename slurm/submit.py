"""A study into jobs: whatever is neither done, nor running, nor in the queue.

One process submits at a time to a results directory: a second one waits, and then finds everything submitted.
"""

import dataclasses
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from experiments.run.store import Store
from experiments.studies.trial import Trial, key
from patch import leases
from patch.errors import UserError, one_line
from slurm import batches, plan, queue
from slurm.batches import Batch
from slurm.cluster import ALONE, Cluster, Launch, Resources
from slurm.plan import Step
from slurm.task import LAUNCHER, RunStep, RunTrials, Work, WriteReport

# First line of each job: srun gives up after ten seconds without the controller, and Slurm takes the job for failed: a
# task that started while an administrator restarted it would be lost.
AWAIT_CONTROLLER = "for attempt in $(seq 60); do scontrol ping > /dev/null && break; sleep 5; done"


@dataclass(frozen=True)
class Sweep:
    """What is submitted together.

    Attributes:
        study: its name.
        trials: all of them, done or not.
        cluster: where.
        work: what every job is told.
    """

    study: str
    trials: tuple[Trial, ...]
    cluster: Cluster
    work: Work

    @property
    def store(self) -> Store:
        """The results directory, where all is recorded."""
        return Store(self.work.results)


def todo(sweep: Sweep, busy: Collection[str], retry_failed: bool) -> list[tuple[Step, ...]]:
    """What has to be submitted.

    Args:
        busy: ids of steps that are in the queue or running.
        retry_failed: whether failed trials are tried again.
    """
    store = sweep.store
    known = plan.steps(sweep.trials)
    leased = queue.held(store)
    wanted = set()
    can_time = _can_time(sweep)
    for step in known.values():
        if step.kind != "evaluate" or plan.is_done(step, store, can_time) or step.lease in leased:
            continue
        if not retry_failed and store.failure(step.trials[0]):
            continue
        lost = False
        for id in (*step.needs, step.id):
            # What is in the queue and stands on something that was lost will not start: it is submitted again too.
            if not _is_made(known[id], store, leased) and (lost or id not in busy):
                lost = True
                wanted.add(id)
    return plan.ordered(known, wanted)


def submit(sweep: Sweep, retry_failed: bool = False) -> list[tuple[Batch, list[submitit.Job]]]:
    """Submit what is missing, and record it.

    Returns:
        The batches, each with its jobs; the debug executor runs them when they are asked for their outcome.

    Raises:
        UserError: with Slurm's message if it refuses; what was submitted before stays submitted.
    """
    store = sweep.store
    with store.lease("sweep"):
        live = queue.live(store)
        _tidy(store, [batch for batch, _ in live])
        busy = {step: batch for batch, steps in live for step in steps}
        groups = todo(sweep, busy, retry_failed)
        for steps in groups:
            for step in steps:
                if step.kind == "evaluate":
                    store.clear_failure(step.trials[0])
        if sweep.cluster.executor == "local":
            return _processes(sweep, groups)
        submitted = [pair for steps in groups for pair in _arrays(sweep, steps, busy)]
        if submitted and sweep.cluster.executor == "slurm":
            # A report that still waits would be written twice.
            waiting = {batch for batch, _ in live if batch.study == sweep.study and batch.kind == "report"}
            queue.cancel([batch.job for batch in waiting if batch.job])
            submitted.append(_report(sweep, busy))
        return submitted


def _tidy(store: Store, live: Collection[Batch]) -> None:
    """Complete, close or forget the records of submitters that died and of jobs that are over.

    To be called by the one process that submits: another one's record may lack its job because it is submitting.
    """
    found = {batch.id: batch for batch in live}
    for batch in batches.load_all(store):
        if batch.over or found.get(batch.id) == batch:
            continue
        if batch.id in found:
            batches.save(store, found[batch.id])
        elif batch.job is None:
            batches.forget(store, batch)
        else:
            batches.close(store, batch)


def _can_time(sweep: Sweep) -> bool:
    """Whether evaluations get a GPU, as far as is known here; what was skipped for want of one is missing then."""
    if not (sweep.work.device or "cuda").startswith("cuda"):
        return False
    if sweep.cluster.executor == "slurm":
        return sweep.cluster.stages["evaluate"].gpus > 0
    return sweep.work.machine().can_time


def _is_made(step: Step, store: Store, leased: Collection[str]) -> bool:
    """Whether a checkpoint is there or under way."""
    return step.kind != "evaluate" and (step.lease in leased or plan.is_done(step, store))


def _arrays(
    sweep: Sweep, steps: tuple[Step, ...], busy: dict[str, Batch]
) -> Iterator[tuple[Batch, list[submitit.Job]]]:
    """Submit steps of one kind, in as few arrays as the limit on their size allows; ``busy`` learns of them."""
    kind, needed = steps[0].kind, plan.needs(steps)
    size = queue.max_array_size() if sweep.cluster.executor == "slurm" else len(steps)
    before: set[str] = set()
    for start in range(0, len(steps), size):
        some = steps[start : start + size]
        after = _jobs(needed, busy) | before
        batch, jobs = _submit(sweep, kind, [step.id for step in some], after, _run_step(sweep, kind), some)
        busy |= dict.fromkeys(batch.steps, batch)
        if sweep.cluster.parallel and batch.job:
            # The cap holds within one array: the next one waits for this one.
            before = {batch.job}
        yield batch, jobs


def _run_step(sweep: Sweep, kind: str) -> RunStep:
    resources = sweep.cluster.stages[kind]
    # The debug executor does everything in this process.
    alone = kind != "learn" or sweep.cluster.executor == "debug"
    return RunStep(sweep.work, ALONE if alone else resources.launch)


def _report(sweep: Sweep, busy: dict[str, Batch]) -> tuple[Batch, list[submitit.Job]]:
    ids = {f"evaluate-{key(trial)}" for trial in sweep.trials}
    return _submit(
        sweep, "report", ["report"], _jobs(ids, busy), WriteReport(sweep.work), [sweep.study], [sweep.trials]
    )


def _jobs(ids: Collection[str], busy: Mapping[str, Batch]) -> set[str]:
    """The jobs of Slurm that hold some steps."""
    return {batch.job for id in ids if (batch := busy.get(id)) and batch.job and batch.executor == "slurm"}


def _submit(
    sweep: Sweep,
    kind: str,
    ids: Sequence[str],
    after: Collection[str],
    call: Callable[..., Any],
    *arguments: Sequence[Any],
) -> tuple[Batch, list[submitit.Job]]:
    """Submit one array, recorded before and after."""
    store, executor = sweep.store, sweep.cluster.executor
    unique = secrets.token_hex(4)
    name = f"hts-{sweep.study}-{kind}-{unique}"
    batch = Batch(unique, sweep.study, executor, kind, name, tuple(ids), time.time())
    if executor == "debug":
        batch = dataclasses.replace(batch, job=str(os.getpid()), **_here(os.getpid()))
    batches.save(store, batch)
    folder = batches.folder(store, batch)
    try:
        jobs: list[submitit.Job] = _executor(sweep.cluster, kind, name, after, folder).map_array(call, *arguments)
    except (FailedJobError, FailedSubmissionError) as error:
        batches.forget(store, batch)
        with suppress(OSError):
            folder.rmdir()
        raise UserError(f"Slurm would not take the {kind} stage: {one_line(error)}") from error
    if executor == "slurm":
        batch = dataclasses.replace(batch, job=jobs[0].job_id.partition("_")[0])
        batches.save(store, batch)
    return batch, jobs


def _executor(cluster: Cluster, kind: str, name: str, after: Collection[str], folder: Path) -> submitit.Executor:
    if cluster.executor == "debug":
        return submitit.DebugExecutor(folder)
    resources: Resources = cluster.stages[kind]
    python = shlex.join([sys.executable, "-I", "-S", "-c", LAUNCHER])
    executor = submitit.SlurmExecutor(folder, max_num_timeout=cluster.timeouts, python=python)
    parameters = queue.parameters(cluster, resources) | {
        # However the jobs before it ended: those that failed have rows that say so.
        "dependency": f"afterany:{':'.join(sorted(after))}" if after else None,
        # submitit's own default is 256.
        "array_parallelism": cluster.parallel or queue.NO_CAP,
    }
    executor.update_parameters(
        job_name=name,
        ntasks_per_node=1,
        signal_delay_s=cluster.signal,
        # Of several nodes the first one decides when the job is over.
        srun_args=["--kill-on-bad-exit=1", "--wait=30"] if resources.nodes > 1 else [],
        setup=[AWAIT_CONTROLLER, *cluster.setup],
        # For losses of a node; where requeueing is not the cluster's default, Slurm must be told.
        additional_parameters={"requeue": True},
        **{name: value for name, value in parameters.items() if value is not None},
    )
    return executor


def _processes(sweep: Sweep, groups: Sequence[tuple[Step, ...]]) -> list[tuple[Batch, list[submitit.Job]]]:
    """Start processes of this machine that share the trials; each takes the GPUs of one learning, in turn."""
    import torch

    ids = [step.id for steps in groups for step in steps]
    wanted = {id for id in ids if id.startswith("evaluate-")}
    trials = tuple(trial for trial in sweep.trials if f"evaluate-{key(trial)}" in wanted)
    if not trials:
        return []
    gpus = torch.cuda.device_count()
    launch = Launch(1, sweep.cluster.stages["learn"].launch.per_node)
    started = []
    for index in range(sweep.cluster.parallel or 1):
        unique = secrets.token_hex(4)
        batch = Batch(unique, sweep.study, "local", "all", f"hts-{sweep.study}-{unique}", tuple(ids), time.time())
        executor = submitit.LocalExecutor(batches.folder(sweep.store, batch))
        mine = tuple((index * launch.per_node + place) % gpus for place in range(launch.per_node)) if gpus else ()
        executor.update_parameters(
            timeout_min=365 * 24 * 60,
            setup=list(sweep.cluster.setup),
            **({"gpus_per_node": len(mine), "visible_gpus": mine} if gpus else {}),
        )
        job = executor.submit(RunTrials(sweep.work, launch), trials)
        batch = dataclasses.replace(batch, job=job.job_id, **_here(int(job.job_id)))
        batches.save(sweep.store, batch)
        started.append((batch, [job]))
    return started


def _here(pid: int) -> dict[str, Any]:
    return {"host": leases.here(), "started": leases.start_ticks(pid)}
