"""A results directory as a trial's life sees it: what is there, what is complete, who works on what.

`analysis.rows.layout` says what lies where. Files appear under their names only when complete (temporary file, fsync,
rename), so a killed process leaves nothing that a later one could mistake for a result.
"""

import json
import logging
import os
import re
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.rows import layout, published
from analysis.rows.format import Damaged, Fact, Row, as_rows, check_row, names
from analysis.rows.jsonl import numbered, to_lines
from experiments.studies.trial import Pruning, Trial, definition, key
from patch.errors import UserError, one_line
from patch.files import write_atomic
from patch.leases import Owner, lease, live

logger = logging.getLogger(__name__)

FAILURE = "failure"
# The metric of the one row of a stage that the machine could not measure; it says why.
SKIPPED = "skipped"


@dataclass(frozen=True)
class Store:
    """A results directory."""

    root: Path

    def make(self) -> None:
        """Have the directory, before there is anything to write.

        Raises:
            UserError: if it is not there and cannot be made, or nothing can be written to it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be made ({error.strerror}): name another with --results"
            raise UserError(f"results directory {self.root}: {problem}") from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise UserError(f"results directory {self.root}: cannot be written to: name another with --results")

    def listed(self, folder: str) -> list[str]:
        """The names in one of its folders (`analysis.rows.layout`); none if it is not there yet."""
        try:
            return os.listdir(self.root / folder)
        except FileNotFoundError:
            return []

    def rows_path(self, trial: Trial, stage: str) -> Path:
        return self.root / layout.ROWS / key(trial) / (re.sub(r"[^\w.@-]", "-", stage) + ".jsonl")

    def has_rows(self, trial: Trial, stage: str) -> bool:
        """Whether a stage is complete; a file that was cut off or changed is as good as none.

        Of what is published the list of trials says so; its facts are checked where they are read.

        Raises:
            UserError: if it is of a newer schema.
        """
        return self._written(trial, stage) is not None or stage in self._published.get(key(trial), ())

    def read_rows(self, trial: Trial, stage: str) -> list[Row]:
        """The rows of a stage, from its own file or as they were published; none if it is not complete.

        Raises:
            UserError: if they are of a newer schema, or what is published is damaged.
        """
        found = self._written(trial, stage)
        if found is None and stage in self._published.get(key(trial), ()):
            found = [row for row in self._published_rows(key(trial)) if row["stage"] == stage]
        return found or []

    def _published_rows(self, trial: str) -> list[Row]:
        """Those of one trial, kept until another is asked for: its stages are read one by one."""
        if trial not in self._last_read:
            self._last_read.clear()
            for _, rows in published.read(self.root, [trial]):
                if isinstance(rows, UserError):
                    raise rows
                self._last_read[trial] = [row for _, row in rows]
        return self._last_read.get(trial, [])

    def _written(self, trial: Trial, stage: str) -> list[Row] | None:
        path, name = self.rows_path(trial, stage), key(trial)
        above: Row | None = None
        rows = []
        try:
            for number, row in numbered(path.read_bytes(), str(path)):
                check_row(row, f"{path}:{number}", above)
                if above is None and not names(name, row["definition"]):
                    return None
                rows.append(above := row)
        except (FileNotFoundError, Damaged):
            return None
        return rows if all(row["trial"] == name for row in rows) else None

    @cached_property
    def _last_read(self) -> dict[str, list[Row]]:
        return {}

    @cached_property
    def _published(self) -> Mapping[str, Collection[str]]:
        return published.stages(self.root)

    def started(self) -> set[str]:
        """The trials that have rows, or failed."""
        return {*self.listed(layout.ROWS), *self._published}

    def was_skipped(self, trial: Trial, stage: str) -> bool:
        """Whether a stage is complete only because the machine could not measure it."""
        return any(row["metric"] == SKIPPED for row in self.read_rows(trial, stage))

    def packed_path(self, content: str) -> Path:
        return self.root / layout.PACKED / content[:12]

    def checkpoint_path(self, pruning: Pruning) -> Path:
        return self.root / layout.CHECKPOINTS / key(pruning)

    def work_path(self, pruning: Pruning) -> Path:
        return self.root / layout.WORK / key(pruning)

    def write_rows(self, trial: Trial, stage: str, facts: Sequence[Fact], provenance: dict[str, Any]) -> None:
        """Complete a stage: one row per fact, and the trial's definition beside them."""
        path = self.rows_path(trial, stage)
        about = path.with_name(layout.DEFINITION)
        if not about.exists():
            write_atomic(about, json.dumps(definition(trial), indent=1) + "\n")
        if path.exists() and self._written(trial, stage) is None:
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            logger.warning("%s was cut off or changed: set aside as %s and measured again", path, aside.name)
        write_atomic(path, to_lines(as_rows(key(trial), definition(trial), stage, facts, provenance)))

    def write_failure(self, trial: Trial, during: str, error: BaseException, provenance: dict[str, Any]) -> None:
        """Record that an attempt at a trial failed: one row with the error in one line and its traceback.

        Args:
            during: what was being done.
        """
        text, kind = one_line(error), type(error).__name__
        labels = {"during": during, "error": kind if text == kind else f"{kind}: {text}"}
        trace = "".join(traceback.format_exception(error))
        self.write_rows(trial, FAILURE, [Fact("failure", None, "1", labels | {"traceback": trace})], provenance)

    def failure(self, trial: Trial) -> dict[str, Any] | None:
        """The labels of a failed trial's row (``during``, ``error``, ``traceback``); None if it has not failed."""
        path = self.rows_path(trial, FAILURE)
        try:
            labels: dict[str, Any] = numbered(path.read_bytes(), str(path))[0][1]["labels"]
            return {"during": str(labels["during"]), "error": str(labels["error"]), **labels}
        except FileNotFoundError:
            return None
        except (UserError, LookupError, TypeError):
            return {"during": "unknown", "error": f"failed, but {path} cannot be read", "traceback": ""}

    def clear_failure(self, trial: Trial) -> None:
        """Forget the failure of a trial that is tried again."""
        self.rows_path(trial, FAILURE).unlink(missing_ok=True)

    @contextmanager
    def lease(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Own the lease ``name``; yields whether it is owned (always, when waiting).

        Works between processes of one machine, and of several that share the directory. Leases of processes that died
        are taken over: at once on the same machine, after `patch.leases.TERM` seconds on another.
        """
        with lease(self.root / layout.LOCKS / f"{name}.lock", wait) as mine:
            yield mine

    def leased(self) -> dict[str, Owner]:
        """All leases that some process owns now, by name."""
        return live(self.root / layout.LOCKS)
