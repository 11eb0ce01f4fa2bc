"""Measured rows as one table.

A results directory holds a journal, ``rows/<trial>/<stage>.jsonl``, and what was published of it as tables. Rows are
never edited, so anything that does not read exactly as it was written is an error that names the file and the line, not
something to skip.

    >>> frame = load_rows(Path("results"))
    >>> frame[frame.metric == "perplexity"][["model", "method", "achieved", "value"]]
"""

import gc
import math
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.rows import bench_schema1, layout, published
from analysis.rows.format import OUTCOMES, PARTS, Damaged, Row, check_row, identity
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
    "sources": "object",
    "base": "object",
    "labels": "object",
    "definition": "object",
    "origin": "object",
}
COLUMNS = tuple(_DTYPES)
# What a results directory has beside the rows of its studies.
_OTHER_FOLDERS = frozenset(
    (
        layout.BENCH,
        layout.CHECKPOINTS,
        layout.DETAILS,
        layout.LOCKS,
        layout.PACKED,
        layout.REPORTS,
        layout.SWEEPS,
        layout.TOKENS,
        layout.WORK,
    )
)

_LABELS = ("source", "length", "task", "layer", "step")

# What is done with what cannot be read: told, and left out.
OnDamage = Callable[[str], None]


def load_rows(
    root: Path, trials: Collection[str] | None = None, on_damage: OnDamage | None = None, parts: bool = True
) -> pd.DataFrame:
    """Every row below a directory, or of one file.

    Args:
        root: a results directory, or a part of one: what is published there, and files of lines at any depth; or one
            such file.
        trials: hashes of the trials that are wanted; all by default.
        on_damage: called with a line about each file that cannot be read; its trial is left out, in full. Without, the
            first such file is an error.
        parts: whether rows of layers and steps are wanted. They are nine of ten and as quickly checked, but take longer
            to make a table of: without, the first of each metric stands for them, file by file.

    Returns:
        One line per row, published ones first, then in the order of file names, with the columns `COLUMNS`.
        ``sparsity`` is the target and ``achieved`` what the trial's prune stage measured (NaN where it has no rows).
        ``tile`` reads ``64x64`` or is None. ``source``, ``length``, ``task``, ``layer`` and ``step`` are the labels of
        those names. ``limit`` is how many items of a task were evaluated, where not all. ``dirty`` says whether the
        working tree had changes that are not in ``git``. ``checkpoint`` is the content hash of what was measured, None
        in rows that are older than it. ``sources`` maps the names of the texts and tasks that were read to the SHA-256
        of what they held, None in older rows. ``base`` is the content hash of the checkpoint whose mask this one has,
        in the rows of making it alone. ``definition`` is the trial's, as JSON data. ``origin`` is ``file:line``,
        relative to ``root``. No rows give an empty table.

    Raises:
        UserError: naming file and line, if ``root`` is not there, a row is of a newer schema, is not a whole JSON
            object, lacks a field, or contradicts another row about the same fact.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"no rows at {root}: run a study first, or name the results directory that has them")
    table = _Table()
    refused: set[str] = set()
    with uncollected():
        for trial, rows in _chunks(root, trials, parts):
            try:
                if isinstance(rows, UserError):
                    raise rows
                table.add(rows, root)
            except UserError as error:
                if on_damage is None:
                    raise
                on_damage(str(error))
                refused.add(trial)
        return table.frame(refused)


@contextmanager
def uncollected() -> Iterator[None]:
    """Rows are plain data without cycles: looking for these among all that was read, again and again, takes longer."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def stored_rows(root: Path) -> Iterator[Row]:
    """Every row below a directory, as `load_rows` finds them, the published ones first; or of one file.

    Raises:
        UserError: if one cannot be read, or a stage was published with other facts than it has.
    """
    known: dict[tuple[str, str], str] = {}
    if root.is_dir():
        for _, rows in published.read(root):
            if isinstance(rows, UserError):
                raise rows
            yield from (row for _, row in rows)
        for trial, stages in published.stages(root).items():
            known |= {(trial, stage): told["digest"] for stage, told in stages.items()}
    again: dict[tuple[str, str], list[Row]] = {}
    for row in journal_rows(root):
        about = row["trial"], row["stage"]
        if about in known:
            again.setdefault(about, []).append(row)
        else:
            yield row
    for (trial, stage), rows_again in again.items():
        if published.digest_of(rows_again) != known[trial, stage]:
            raise UserError(f"{root}: {trial} {stage} is published with other facts: remove the ones that are wrong")


def journal_rows(root: Path) -> Iterator[Row]:
    """Those of `stored_rows` that running processes wrote.

    Raises:
        UserError: if one cannot be read.
    """
    return _rows(_lines(root, None))


def _rows(chunks: "Iterable[_Chunk]") -> Iterator[Row]:
    for _, rows in chunks:
        if isinstance(rows, UserError):
            raise rows
        yield from (row for _, row in rows)


def records(frame: pd.DataFrame) -> Iterator[Any]:
    """The lines of a table as named tuples, whose fields the type checker cannot know."""
    return iter(frame.itertuples())


# The folder or trial of some rows, and the rows with where each is, or why they cannot be read.
_Chunk = tuple[str, published.Numbered | UserError]


def _chunks(root: Path, trials: Collection[str] | None, parts: bool) -> Iterator[_Chunk]:
    if root.is_dir():
        try:
            yield from published.read(root, trials, parts)
        except Damaged as problem:
            yield "", problem
    for folder, rows in _lines(root, trials):
        yield folder, rows if parts or isinstance(rows, UserError) else _first_parts(rows)


def _first_parts(rows: published.Numbered) -> published.Numbered:
    """Rows without those of layers and steps, but for the first of each metric."""
    kept: dict[Hashable, tuple[str, Row]] = {}
    for place, (origin, row) in enumerate(rows):
        labels = row.get("labels")
        part = isinstance(labels, dict) and not labels.keys().isdisjoint(PARTS)
        kept.setdefault(("part", str(row.get("metric"))) if part else place, (origin, row))
    return list(kept.values())


def _lines(root: Path, trials: Collection[str] | None) -> Iterator[_Chunk]:
    for path in _journal(root, trials):
        name = path.name if root.is_file() else str(path.relative_to(root))
        try:
            data = path.read_bytes()
            one = bench_schema1.numbered(data, path) if bench_schema1.is_one(data) else numbered(data, str(path))
        except OSError as error:
            yield path.parent.name, UserError(f"{path}: cannot be read: {error.strerror}")
        except UserError as problem:
            yield path.parent.name, problem
        else:
            wanted = [(f"{name}:{line}", row) for line, row in one if trials is None or row.get("trial") in trials]
            yield path.parent.name, wanted


def _journal(root: Path, trials: Collection[str] | None) -> Iterator[Path]:
    """The files of lines below a directory, by name, but for what a results directory has beside its rows."""
    if root.is_file():
        yield root
        return
    for folder, folders, files in os.walk(root):
        # Folders are named after trials; what is not wanted need not be read, which with learning curves takes seconds.
        folders[:] = sorted(
            name
            for name in folders
            if name not in _OTHER_FOLDERS
            and (trials is None or name in trials or not re.fullmatch("[0-9a-f]{12}", name))
        )
        for file in sorted(files):
            if file.endswith(".jsonl") and file != layout.TRIALS:
                yield Path(folder) / file


class _Table:
    """Rows as the lines of a table, each fact once."""

    def __init__(self) -> None:
        self._facts: dict[tuple[Hashable, ...], _Fact] = {}
        self._definitions: dict[str, tuple[Row, str]] = {}

    def add(self, rows: published.Numbered, root: Path) -> None:
        """Add rows with where each is, below ``root``.

        Raises:
            UserError: if one is damaged, or contradicts another.
        """
        above: Row | None = None
        about: dict[str, Any] = {}
        where_measured: dict[str, Any] = {}
        folder = root.parent if root.is_file() else root
        for origin, row in rows:
            where = f"{folder}/{origin}"
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
            fact = row, about, where_measured, origin
            earlier, _, _, place = self._facts.setdefault((row["trial"], *identity(row)), fact)
            if earlier is not row and _outcome(earlier) != _outcome(row):
                raise UserError(
                    f"{where}: {row['metric']} of trial {row['trial']} is {row['value']}, but {earlier['value']} at "
                    f"{place}: remove the one that is wrong"
                )

    def frame(self, without: Collection[str] = ()) -> pd.DataFrame:
        """The table, but for some trials."""
        facts = [fact for fact in self._facts.values() if fact[0]["trial"] not in without]
        rows, about, where_measured, origins = zip(*facts, strict=True) if facts else ((), (), (), ())
        labels = [row["labels"] for row in rows]
        columns: dict[str, Any] = {"origin": origins, "achieved": np.full(len(facts), math.nan)}
        for names, parts in ((_MEASURED, rows), (_LABELS, labels)):
            columns |= {name: [part.get(name) for part in parts] for name in names}
        columns |= _repeated(about, _ABOUT) | _repeated(where_measured, _WHERE)
        frame = pd.DataFrame({name: pd.Series(columns[name], dtype=dtype) for name, dtype in _DTYPES.items()})
        achieved = frame[(frame.stage == "prune") & (frame.metric == "sparsity")].set_index("trial").value
        frame["achieved"] = frame.trial.map(achieved).astype("float64")
        return frame


def _repeated(parts: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """Columns of what many rows share, each object read once."""
    distinct = {id(part): part for part in parts}
    places = {each: place for place, each in enumerate(distinct)}
    of_row = np.fromiter((places[id(part)] for part in parts), dtype=np.intp, count=len(parts))
    return {
        name: pd.Series([part.get(name) for part in distinct.values()], dtype=_DTYPES[name]).take(of_row).array
        for name in names
    }


# A row, what its definition says, where it was measured, and where it is.
_Fact = tuple[Row, Mapping[str, Any], Mapping[str, Any], str]

_MEASURED = ("trial", "stage", "metric", "value", "unit", "stderr", "p20", "p80", "runs", "labels")
_ABOUT = ("model", "method", "structure", "sparsity", "seed", "tile", "limit", "definition")
_WHERE = ("gpu", "git", "dirty", "time", "checkpoint", "sources", "base", "software")


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
        **{name: provenance.get(name) for name in ("gpu", "git", "dirty", "time", "checkpoint", "sources", "base")},
        "software": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
    }


def _outcome(row: Row) -> tuple[Any, ...]:
    numbers = (row["value"], row["stderr"])
    # nan is not equal to itself.
    readable = ("nan" if number is not None and math.isnan(number) else number for number in numbers)
    return (*readable, *(row["labels"].get(name) for name in OUTCOMES))
