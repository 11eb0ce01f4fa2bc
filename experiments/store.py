"""The results directory: rows, checkpoints, half-done learning, and the locks that keep processes apart.

::

    <root>/rows/<trial>/definition.json        what the trial is
    <root>/rows/<trial>/<stage>.jsonl          one measured fact a line; there when the stage is complete, never edited
    <root>/checkpoints/<pruning>/              the hybrid checkpoint that the trials of this pruning evaluate
    <root>/work/<pruning>/                     learner state of an unfinished pruning, and its TensorBoard log
    <root>/locks/                              advisory locks; the kernel releases those of a process that dies

Files appear under their names only when complete (temporary file, fsync, rename), so a killed process leaves nothing
that a later one could mistake for a result.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.definitions import Pruning, Trial, definition, key

SCHEMA = 1


def write_atomic(path: Path, text: str) -> None:
    """Write a text file that is either there in full or not at all.

    Raises:
        OSError: if the disk is full or the place cannot be written; no partial file stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Fact:
    """One measured number, before it knows which trial it belongs to."""

    metric: str
    value: float | None
    unit: str
    labels: dict[str, Any]
    stderr: float | None = None


@dataclass(frozen=True)
class Store:
    """A results directory."""

    root: Path

    def rows_path(self, trial: Trial, stage: str) -> Path:
        return self.root / "rows" / key(trial) / (re.sub(r"[^\w.@-]", "-", stage) + ".jsonl")

    def has_rows(self, trial: Trial, stage: str) -> bool:
        return self.rows_path(trial, stage).exists()

    def checkpoint_path(self, pruning: Pruning) -> Path:
        return self.root / "checkpoints" / key(pruning)

    def work_path(self, pruning: Pruning) -> Path:
        return self.root / "work" / key(pruning)

    def write_rows(self, trial: Trial, stage: str, facts: Sequence[Fact], provenance: dict[str, Any]) -> None:
        """Complete a stage: one row per fact, and the trial's definition beside them."""
        path = self.rows_path(trial, stage)
        common = {"schema": SCHEMA, "trial": key(trial), "definition": definition(trial), "stage": stage}
        lines = [
            json.dumps(
                common
                | {"metric": fact.metric, "value": fact.value, "unit": fact.unit, "labels": fact.labels}
                | {"stderr": fact.stderr, "p20": None, "p80": None, "runs": 1, "provenance": provenance}
            )
            for fact in facts
        ]
        about = path.with_name("definition.json")
        if not about.exists():
            write_atomic(about, json.dumps(definition(trial), indent=1) + "\n")
        write_atomic(path, "".join(line + "\n" for line in lines))

    @contextmanager
    def claim(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock ``name``; yields whether it is held (always, when waiting).

        Advisory ``flock``: works between processes of one machine and, on a file system that serves it (NFS, Lustre
        with ``-o flock``), between machines. A process that dies loses its locks at once.
        """
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock", timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def is_claimed(self, name: str) -> bool:
        """Whether some process holds the lock ``name`` now."""
        if not (self.root / "locks" / f"{name}.lock").exists():
            return False
        with self.claim(name, wait=False) as free:
            return not free
