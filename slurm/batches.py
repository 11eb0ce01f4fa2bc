"""What was submitted: one file per job array, in the results directory.

::

    <results>/sweeps/<study>/<batch>.json    which task of which job is which step
    <results>/sweeps/<study>/<batch>/        submitit's files: what each task is given, and its log

The file is written before the job is submitted, without its number and under a name that only this job has: if the
submitting process dies in between, the next one finds the job in the queue by its name.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.rows import layout
from experiments.run.store import Store
from patch import leases
from patch.files import write_atomic


@dataclass(frozen=True)
class Batch:
    """One submitted job or array of jobs.

    Attributes:
        id: unique, and part of ``name``.
        study: the study it was submitted for.
        executor: ``slurm``, ``local`` or ``debug``.
        kind: of its steps, ``report``, or ``all``; names the resources of the cluster that it has.
        name: of the job.
        steps: ids of `plan.Step`, by array index; of a local process, all steps that it may take up.
        submitted: seconds since the epoch.
        job: Slurm's number of the job or array, or the process id; None until it is known.
        over: none of its tasks waits or runs, or ever will.
        host: for local processes, where ``job`` means something (see `patch.leases`).
        started: for local processes, the process's start (see `patch.leases`).
    """

    id: str
    study: str
    executor: str
    kind: str
    name: str
    steps: tuple[str, ...]
    submitted: float
    job: str | None = None
    host: str = ""
    started: int | None = None
    over: bool = False


def folder(store: Store, batch: Batch) -> Path:
    """Where submitit keeps the files of a batch."""
    return store.root / layout.SWEEPS / batch.study / batch.id


def save(store: Store, batch: Batch) -> None:
    """Write the record of a batch, in place of an earlier one."""
    write_atomic(folder(store, batch).with_suffix(".json"), json.dumps(asdict(batch)) + "\n")


def forget(store: Store, batch: Batch) -> None:
    """Remove the record of a batch that turned out never to have been submitted."""
    folder(store, batch).with_suffix(".json").unlink(missing_ok=True)


def load_all(store: Store) -> Iterator[Batch]:
    """Every batch of every study of a results directory, oldest first: studies may share steps."""
    found = []
    for path in (store.root / layout.SWEEPS).glob("*/*.json"):
        values = json.loads(path.read_text())
        # What is called kind was once written as stage.
        kind = values.pop("stage", None) or values["kind"]
        found.append(Batch(**values | {"kind": kind, "steps": tuple(values["steps"])}))
    yield from sorted(found, key=lambda batch: batch.submitted)


def runs_here(batch: Batch) -> bool:
    """Whether the process of a batch runs on this machine."""
    return batch.job is not None and bool(leases.is_alive(batch.host, int(batch.job), batch.started))


def log_path(store: Store, batch: Batch, index: int) -> Path:
    """The log of one task; its errors lie beside it under ``.err``."""
    task = f"{batch.job}_{index}" if batch.executor == "slurm" and len(batch.steps) > 1 else str(batch.job)
    return folder(store, batch) / f"{task}_0_log.out"


def close(store: Store, batch: Batch) -> None:
    """Record that a batch is over, so that nobody asks about it again."""
    save(store, dataclasses.replace(batch, over=True))
