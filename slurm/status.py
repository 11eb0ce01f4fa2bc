"""How far a study is: the state of each trial, from the results directory and, where there is one, Slurm's queue."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.rows import layout
from experiments.run import pipeline
from experiments.run.store import Store
from experiments.studies.trial import Trial, key
from patch.errors import UserError
from slurm import batches, plan, queue
from slurm.batches import Batch
from slurm.plan import Step
from slurm.queue import ArrayTask

STATES = ("done", "running", "pending", "requeued", "failed", "missing")


@dataclass(frozen=True)
class TrialState:
    """Where a trial stands.

    Attributes:
        state: one of `STATES`: ``requeued`` waits again after it had started, ``missing`` is not submitted.
        step: the first of its steps that is not done; None if all are.
        log: of that step, as it was submitted last; None if it was not.
        submitted: when that was, in seconds since the epoch.
        restarts: how often Slurm requeued that step.
        note: why it waits or failed, how its last attempt ended, or what is not timed though it is done.
    """

    trial: Trial
    state: str
    step: Step | None = None
    log: Path | None = None
    submitted: float = 0.0
    restarts: int = 0
    note: str = ""


@dataclass(frozen=True)
class Status:
    """Where a study stands.

    Attributes:
        trials: in the study's order.
        problem: why Slurm could not be asked, if so: then nobody knows what waits and what runs.
        seconds_left: at the pace since the oldest sweep that is not over; None if it cannot be told.
    """

    trials: tuple[TrialState, ...]
    problem: str | None
    seconds_left: float | None

    def counts(self) -> dict[str, int]:
        """How many trials are in each state."""
        return {state: sum(trial.state == state for trial in self.trials) for state in STATES}


def examine(trials: Sequence[Trial], store: Store) -> Status:
    """Look at the results directory and ask Slurm, once."""
    known = plan.steps(trials)
    started = store.started()
    made = set(store.listed(layout.CHECKPOINTS))
    done = {
        id
        for id, step in known.items()
        if (step.hash in started and plan.is_done(step, store) if step.kind == "evaluate" else step.hash in made)
    }
    relevant = [batch for batch in batches.load_all(store) if any(id in known for id in batch.steps)]
    open_ = [batch for batch in relevant if not done.issuperset(batch.steps)]
    problem = None
    tasks: dict[tuple[str, int], ArrayTask] = {}
    try:
        tasks = queue.tasks(open_)
    except UserError as error:
        problem = str(error)
    # A step's last submission: the batch, and its place there.
    places = {id: (batch, index) for batch in open_ for index, id in enumerate(batch.steps)}
    leased = queue.held(store)
    states = []
    for evaluate in (step for step in known.values() if step.kind == "evaluate"):
        [trial] = evaluate.trials
        if evaluate.id in done:
            states.append(TrialState(trial, "done", note=_untimed(trial, store)))
            continue
        chain = [known[id] for id in (*evaluate.needs, evaluate.id) if id not in done]
        failure = store.failure(trial) if evaluate.hash in started else None
        batch, index = places.get(chain[0].id, (None, 0))
        task = tasks.get((batch.id, index)) if batch else None
        state, note = _state(chain, batch, task, leased, failure)
        log, submitted = (batches.log_path(store, batch, index), batch.submitted) if batch else (None, 0.0)
        restarts = task.restarts if task else 0
        states.append(TrialState(trial, state, chain[0], log, submitted, restarts, note))
    return Status(tuple(states), problem, _seconds_left(states, store))


def _state(
    chain: list[Step], batch: Batch | None, task: ArrayTask | None, leased: set[str], failure: dict[str, str] | None
) -> tuple[str, str]:
    """State and note of a trial that is not done.

    Args:
        chain: the steps that it still has to take.
        batch: the last submission of the first of them.
        task: what Slurm says about that; None where nobody knows, or if it was not Slurm.
    """
    step, evaluate = chain[0], chain[-1]
    if (task and task.runs) or step.lease in leased or evaluate.lease in leased:
        return "running", step.label
    if task and task.waits:
        return "requeued" if task.restarts or task.state != "PENDING" else "pending", task.reason
    if failure:
        return "failed", failure["error"]
    if batch and batch.executor == "local" and batches.runs_here(batch):
        return "pending", ""
    return "missing", f"{step.label} ended {_how(task)}" if batch else ""


def _untimed(trial: Trial, store: Store) -> str:
    """What is left of a trial that is done as far as a machine without a GPU could."""
    if not trial.evaluation.packed and not trial.evaluation.grid:
        return ""
    left = len(pipeline.missing_stages(trial, store, can_time=True))
    return f"{left} of {len(pipeline.stages(trial))} stages are not timed: run it again on a GPU" if left else ""


def _how(task: ArrayTask | None) -> str:
    return task.state if task and task.state != "COMPLETED" else "without a result"


def _seconds_left(states: Sequence[TrialState], store: Store) -> float | None:
    """Trials that are under way, at the pace at which trials were completed since the sweep began."""
    ahead = sum(state.state in ("running", "pending", "requeued") for state in states)
    open_ = {state.submitted for state in states if state.log and state.state != "missing"}
    if not ahead or not open_:
        return None
    began = min(open_)
    completed = 0
    for state in states:
        if state.state == "done":
            folder = store.root / layout.ROWS / key(state.trial)
            completed += folder.is_dir() and folder.stat().st_mtime > began
    return ahead * (time.time() - began) / completed if completed else None
