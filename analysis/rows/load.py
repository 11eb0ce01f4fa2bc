"""Measured rows as one table.

A results directory holds a journal, ``rows/<trial>/<stage>.jsonl``. Rows are never edited, so anything that does not
read exactly as it was written is an error that names the file and the line, not something to skip.

    >>> frame = load_rows(Path("runs/rows"))
    >>> frame[frame.metric == "perplexity"][["model", "method", "achieved", "value"]]
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows.format import Row, check_row
from analysis.rows.jsonl import numbered
from patch.errors import UserError

_DTYPES = {
    "trial": "object",
    "model": "object",
    "method": "object",
    "structure": "object",
    "sparsity": "float64",
    "tile": "object",
    "seed": "Int64",
    "stage": "object",
    "metric": "object",
    "value": "float64",
    "unit": "object",
    "stderr": "float64",
    "p20": "float64",
    "p80": "float64",
    "runs": "int64",
    "source": "object",
    "length": "Int64",
    "task": "object",
    "layer": "object",
    "step": "Int64",
    "achieved": "float64",
    "limit": "Int64",
    "gpu": "object",
    "git": "object",
    "dirty": "object",
    "software": "object",
    "time": "object",
    "checkpoint": "object",
    "labels": "object",
    "definition": "object",
    "origin": "object",
}
COLUMNS = tuple(_DTYPES)
_canonical = json.JSONEncoder(sort_keys=True).encode
_LABELS = ("source", "length", "task", "layer", "step")

# What is done with what cannot be read: told, and left out.
OnDamage = Callable[[str], None]


def load_rows(root: Path, trials: Collection[str] | None = None, on_damage: OnDamage | None = None) -> pd.DataFrame:
    """Every row below a directory, or of one file.

    Args:
        root: a directory, searched for ``*.jsonl`` at any depth, or a file.
        trials: hashes of the trials that are wanted; all by default.
        on_damage: called with a line about each file that cannot be read; its trial is left out, in full. Without, the
            first such file is an error.

    Returns:
        One line per row, in the order of file names, with the columns `COLUMNS`. ``sparsity`` is the target and
        ``achieved`` what the trial's prune stage measured (NaN where it has no rows). ``tile`` reads ``64x64`` or is
        None. ``source``, ``length``, ``task``, ``layer`` and ``step`` are the labels of those names. ``limit`` is how
        many items of a task were evaluated, where not all. ``dirty`` says whether the working tree had changes that
        are not in ``git``. ``checkpoint`` is the content hash of what was measured, None in rows that are older than
        it. ``definition`` is the trial's, as JSON data. ``origin`` is ``file:line``, relative to ``root``. No rows
        give an empty table.

    Raises:
        UserError: naming file and line, if ``root`` is not there, a row is of a newer schema, is not a whole JSON
            object, lacks a field, or contradicts another row about the same fact.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"no rows at {root}: run a study first, or name the results directory that has them")
    table = _Table()
    refused = set()
    for path in _files(root, trials):
        name = path.name if root.is_file() else str(path.relative_to(root))
        try:
            rows = numbered(_bytes(path), str(path))
            table.add(
                rows if trials is None else [(n, row) for n, row in rows if row.get("trial") in trials], path, name
            )
        except UserError as error:
            if on_damage is None:
                raise
            on_damage(str(error))
            refused.add(path.parent.name)
    return table.frame(refused)


def records(frame: pd.DataFrame) -> Iterator[Any]:
    """The lines of a table as named tuples, whose fields the type checker cannot know."""
    return iter(frame.itertuples())


def _files(root: Path, trials: Collection[str] | None) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for path in sorted(root.rglob("*.jsonl")):
        # Folders are named after trials; what is not wanted need not be read, which with learning curves takes seconds.
        other = trials is not None and re.fullmatch("[0-9a-f]{12}", path.parent.name) and path.parent.name not in trials
        if not other:
            yield path


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


class _Table:
    """Rows as the lines of a table, each fact once."""

    def __init__(self) -> None:
        self._facts: dict[tuple[str, ...], dict[str, Any]] = {}
        self._definitions: dict[str, tuple[Row, str]] = {}

    def add(self, rows: list[tuple[int, Row]], path: Path, name: str) -> None:
        """Add the rows of a file, with their line numbers.

        Raises:
            UserError: if one is damaged, or contradicts another.
        """
        above: Row | None = None
        about: dict[str, Any] = {}
        where_measured: dict[str, Any] = {}
        for number, row in rows:
            where = f"{path}:{number}"
            check_row(row, where, above)
            # Most rows share these objects with the one above.
            if above is None or row["definition"] is not above["definition"] or row["trial"] != above["trial"]:
                definition, first = self._definitions.setdefault(row["trial"], (row["definition"], where))
                if definition != row["definition"]:
                    raise UserError(f"{where}: trial {row['trial']} has another definition than at {first}")
                about = _about(definition)
            if above is None or row["provenance"] is not above["provenance"]:
                where_measured = _where_measured(row["provenance"])
            above = row
            labels = row["labels"]
            record = about | where_measured | {label: labels.get(label) for label in _LABELS}
            record |= {field: row[field] for field in _MEASURED}
            record["origin"] = f"{name}:{number}"
            earlier = self._facts.setdefault(_identity(row), record)
            if earlier is not record and _outcome(earlier) != _outcome(record):
                raise UserError(
                    f"{where}: {row['metric']} of trial {row['trial']} is {row['value']}, but {earlier['value']} at "
                    f"{earlier['origin']}: remove the one that is wrong"
                )

    def frame(self, without: Collection[str] = ()) -> pd.DataFrame:
        """The table, but for some trials."""
        facts = [fact for fact in self._facts.values() if fact["trial"] not in without]
        columns = {name: [fact.get(name) for fact in facts] for name in COLUMNS}
        frame = pd.DataFrame({name: pd.Series(columns[name], dtype=dtype) for name, dtype in _DTYPES.items()})
        achieved = frame[(frame.stage == "prune") & (frame.metric == "sparsity")].set_index("trial").value
        frame["achieved"] = frame.trial.map(achieved).astype("float64")
        return frame


_MEASURED = ("trial", "stage", "metric", "value", "unit", "stderr", "p20", "p80", "runs", "labels")


def _about(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say what was measured; of a bench the model alone."""
    pruning = definition.get("pruning", definition)
    tile = pruning.get("tile")
    return {
        **{name: pruning.get(name) for name in ("model", "method", "structure", "sparsity", "seed")},
        "tile": "x".join(str(side) for side in tile) if tile else None,
        "limit": definition.get("evaluation", {}).get("limit"),
        "definition": definition,
    }


def _where_measured(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: provenance.get(name) for name in ("gpu", "git", "dirty", "time", "checkpoint")},
        "software": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
    }


# These are outcomes, though they stand among the labels.
_OUTCOMES = ("tile_map", "window_losses", "items")


def _identity(row: Row) -> tuple[str, ...]:
    """What a row is about; rows that agree in this state the same fact."""
    labels = {name: value for name, value in row["labels"].items() if name not in _OUTCOMES}
    return row["trial"], row["stage"], row["metric"], _canonical(labels)


def _outcome(record: dict[str, Any]) -> tuple[Any, ...]:
    numbers = (record["value"], record["stderr"])
    # nan is not equal to itself.
    readable = ("nan" if number is not None and math.isnan(number) else number for number in numbers)
    return (*readable, *(record["labels"].get(name) for name in _OUTCOMES))
