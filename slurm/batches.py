"""What was submitted: one file per job array, in the results directory.

::

    <results>/sweeps/<study>/<batch>.json    which task of which job is which step
    <results>/sweeps/<study>/<batch>/        submitit's files: what each task is given, and its log

The file is written before the job is submitted, without its number and under a name that only this job has: if the
submitting process dies in between, the next one finds the job in the queue by its name.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.rows import layout
from experiments.run.store import Store
from patch import leases
from patch.errors import one_line
from patch.files import from_json, write_atomic

logger = logging.getLogger(__name__)


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
    """Every batch of every study of a results directory, oldest first: studies may share steps.

    What cannot be read is told and left out: at worst its steps are submitted again, and a job that finds its step done
    or under way leaves it alone.
    """
    found = []
    for path in sorted((store.root / layout.SWEEPS).glob("*/*.json")):
        try:
            found.append(_batch(from_json(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning("%s: no record of jobs (%s): left out; remove it", path, one_line(error))
    yield from sorted(found, key=lambda batch: batch.submitted)


def _batch(values: dict[str, Any]) -> Batch:
    # What is called kind was once written as stage.
    kind = values.pop("stage", None) or values["kind"]
    batch = Batch(**values | {"kind": kind, "steps": tuple(values["steps"])})
    words = (batch.id, batch.study, batch.executor, batch.name, batch.host, *batch.steps)
    number = batch.job is None or (isinstance(batch.job, str) and batch.job.isdecimal())
    if not all(isinstance(word, str) for word in words) or not isinstance(batch.submitted, int | float) or not number:
        raise ValueError("a field is not what it should be")
    return batch


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
