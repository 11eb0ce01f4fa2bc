"""What the sweep commands of ``hts`` do and print."""

import os
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.run.store import Store
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Trial, key
from patch.errors import UserError, check_name, one_line
from slurm import batches, checks, plan, queue
from slurm.cluster import Cluster
from slurm.status import STATES, Status, examine

if TYPE_CHECKING:
    from slurm.submit import Sweep

# Submission alone needs submitit, which an installation without the `slurm` extra lacks: the rest works there too.

# Seconds between two looks of ``--watch``: squeue is a burden to the controller of a large cluster.
_WATCH = 15.0

_STYLES = {"done": "green", "running": "cyan", "failed": "red", "requeued": "yellow", "missing": "dim"}


def studies_table(cluster: Cluster) -> Table:
    """The studies: trials, steps that run once for all of them, and estimated GPU hours."""
    table = Table("study", "trials", "steps", "GPU hours", "what it shows", box=None, pad_edge=False)
    for name, study in STUDIES.items():
        trials = study.trials()
        steps = plan.steps(trials)
        table.add_row(
            name, str(len(trials)), str(len(steps)), _hours(*checks.gpu_hours(steps.values(), cluster)), study.title
        )
    return table


def dry_run(sweep: "Sweep", retry_failed: bool, console: Console) -> None:
    """Check everything that `sweep` checks, and print what it would submit."""
    groups = _checked(sweep, retry_failed, {step for _, steps in queue.live(sweep.store) for step in steps})
    table = Table("stage", "after", "tasks", "arrays", "GPUs", "time", "GPU hours", box=None, pad_edge=False)
    size = queue.max_array_size() if sweep.cluster.executor == "slurm" else None
    for steps in groups:
        kind, count = steps[0].kind, len(steps)
        resources = sweep.cluster.stages[kind]
        arrays = -(-count // size) if size else 1
        hours = _hours(*checks.gpu_hours(steps, sweep.cluster))
        before = ", ".join(sorted({need.partition("-")[0] for need in plan.needs(steps)})) or "-"
        table.add_row(
            kind, before, str(count), str(arrays), str(resources.gpus * resources.nodes), resources.time, hours
        )
        for step in steps:
            needed = checks.memory(step, sweep.cluster)
            console.print(step.label + (f" (about {needed:.1f} GiB of GPU memory)" if needed else ""))
    console.print(table)
    every = [step for steps in groups for step in steps]
    total = _hours(*checks.gpu_hours(every, sweep.cluster))
    console.print(f"{len(every)} tasks for {len(sweep.trials)} trials, about {total} GPU hours; nothing was submitted")


def sweep(sweep: "Sweep", retry_failed: bool, console: Console) -> None:
    """Check, submit what is missing, and say what was submitted.

    Raises:
        UserError: if something does not fit, before anything is submitted; or if trials failed in this process.
    """
    from slurm import submit

    _checked(sweep, retry_failed, set())
    sweep.store.make()
    submitted = submit.submit(sweep, retry_failed)
    for batch, _ in submitted:
        what = f"process {batch.job}" if batch.executor == "local" else f"job {batch.job}: {batch.kind}"
        console.print(f"submitted {what}, {len(batch.steps)} tasks")
    failed = 0
    if sweep.cluster.executor == "debug":
        for batch, jobs in submitted:
            for job in jobs:
                if error := job.exception():
                    failed += 1
                    console.print(Text.assemble(("failed", "red"), f" {one_line(error)}"), soft_wrap=True)
            batches.close(sweep.store, batch)
    console.print(_summary(examine(sweep.trials, sweep.store)))
    if failed:
        raise UserError(f"{failed} tasks failed; once the cause is gone, --retry-failed runs them again")


def status(trials: Sequence[Trial], store: Store, console: Console, watch: bool, each: bool) -> None:
    """Print where a study stands, once or until nothing runs or waits."""
    found = examine(trials, store)
    if not watch:
        console.print(_view(found, each))
        return
    with Live(_view(found, each), console=console, auto_refresh=False) as live:
        while any(found.counts()[state] for state in ("running", "pending", "requeued")) or found.problem:
            time.sleep(_WATCH)
            found = examine(trials, store)
            live.update(_view(found, each), refresh=True)


def logs(trials: Sequence[Trial], store: Store, id: str | None, lines: int, console: Console) -> None:
    """Print the ends of the logs of trials that run, failed, or ended without a result."""
    if id is not None:
        check_name("trial", id, [key(trial) for trial in trials])
    shown = set()
    for state in examine(trials, store).trials:
        if id not in (None, key(state.trial)) or state.log is None or state.log in shown:
            continue
        shown.add(state.log)
        for path in (state.log, state.log.with_suffix(".err")):
            if path.is_file() and (text := path.read_text(errors="replace").splitlines()[-lines:]):
                about = f" ({key(state.trial)}, {state.state}): {path}"
                console.print(Text.assemble((state.trial.label, "bold"), about), soft_wrap=True)
                console.print("\n".join(text), soft_wrap=True)
    if not shown:
        console.print("nothing runs, and nothing failed or ended without a result")


def cancel(study: str, store: Store, console: Console) -> None:
    """Cancel all jobs and kill all local processes that were submitted for a study."""
    # No new jobs meanwhile.
    with store.lease("sweep"):
        found = [batch for batch, _ in queue.live(store) if batch.study == study]
        queue.cancel([batch.job for batch in found if batch.executor == "slurm" and batch.job])
        for batch in found:
            if batch.executor == "local" and batch.job:
                _kill(int(batch.job))
    console.print(f"cancelled {len(found)} job arrays and processes of {study}")


def _kill(pid: int) -> None:
    """Kill submitit's process and the worker that it started, which lets a polite signal pass."""
    import psutil

    process = psutil.Process(pid)
    processes = [*process.children(recursive=True), process]
    for each in processes:
        each.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)


def _checked(sweep: "Sweep", retry_failed: bool, busy: set[str]) -> list[tuple[plan.Step, ...]]:
    """What is to be submitted, after all checks."""
    from slurm import submit

    checks.check_definitions(sweep.trials, sweep.work.data, sweep.cluster)
    checks.check_sources(sweep.trials, sweep.store, sweep.work.data)
    groups = submit.todo(sweep, busy, retry_failed)
    checks.check_cluster(sweep.cluster, {steps[0].kind for steps in groups} | {"report"}, sweep.work.results)
    return groups


def _hours(hours: float, unknown: int) -> str:
    return f"{hours:,.1f}" + (f" + {unknown} unknown" if unknown else "")


def _view(found: Status, each: bool) -> Group:
    parts: list[Table | Text] = [_trials_table(found) if each else _groups_table(found)]
    parts.append(Text(_summary(found)))
    notes = [trial for trial in found.trials if trial.state in ("failed", "missing") and trial.note]
    if notes:
        parts.append(Text(f"last error: {notes[-1].trial.label}: {notes[-1].note}"))
    if untimed := sum(trial.state == "done" and bool(trial.note) for trial in found.trials):
        parts.append(Text(f"{untimed} of those done are not timed: run them again on a GPU", style="yellow"))
    if found.problem:
        parts.append(Text(f"what waits and runs is not known: {found.problem}", style="yellow"))
    return Group(*parts)


def _groups_table(found: Status) -> Table:
    """Counts of states per model and method."""
    groups: dict[str, dict[str, int]] = {}
    for trial in found.trials:
        name = f"{os.path.basename(trial.trial.pruning.model)} {trial.trial.pruning.method}"
        counts = groups.setdefault(name, dict.fromkeys(STATES, 0))
        counts[trial.state] += 1
    table = Table("", "trials", *STATES, box=None, pad_edge=False)
    for name, counts in groups.items():
        cells = [Text(str(count), _STYLES.get(state, "")) if count else "·" for state, count in counts.items()]
        table.add_row(name, str(sum(counts.values())), *cells)
    return table


def _trials_table(found: Status) -> Table:
    table = Table("trial", "id", "state", "requeued", "note", box=None, pad_edge=False)
    for trial in found.trials:
        cells = (trial.state, str(trial.restarts or ""), trial.note)
        table.add_row(trial.trial.label, key(trial.trial), *cells, style=_STYLES.get(trial.state))
    return table


def _summary(found: Status) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in found.counts().items() if count) or "no trials"
    if found.seconds_left is None:
        return counts
    hours, minutes = divmod(round(found.seconds_left / 60), 60)
    return f"{counts}; about {f'{hours} h {minutes} min' if hours else f'{minutes} min'} left"
