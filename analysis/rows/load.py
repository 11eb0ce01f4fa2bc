"""Measured rows, one JSON object per line, as one table.

A results directory holds ``rows/<trial>/<stage>.jsonl``. Rows are never edited, so anything that does not read exactly
as it was written is an error that names the file and the line, not something to skip.

    >>> frame = load_rows(Path("results/rows"))
    >>> frame[frame.metric == "perplexity"][["model", "method", "achieved", "value"]]
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows.jsonl import SCHEMA, whole
from patch.errors import UserError

_DTYPES = {
    "trial": "object",
    "model": "object",
    "method": "object",
    "structure": "object",
    "sparsity": "float64",
    "tile": "object",
    "seed": "int64",
    "stage": "object",
    "metric": "object",
    "value": "float64",
    "unit": "object",
    "stderr": "float64",
    "source": "object",
    "length": "Int64",
    "task": "object",
    "layer": "object",
    "step": "Int64",
    "achieved": "float64",
    "limit": "Int64",
    "gpu": "object",
    "git": "object",
    "software": "object",
    "time": "object",
    "checkpoint": "object",
    "labels": "object",
    "definition": "object",
    "origin": "object",
}
COLUMNS = tuple(_DTYPES)

# The fields of a row and of its definition that the columns are made of, and what JSON they may be.
_NUMBER = (int, float)
_OPTIONAL_NUMBER = (*_NUMBER, type(None))
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "trial": (str,),
    "definition": (dict,),
    "stage": (str,),
    "metric": (str,),
    "value": _OPTIONAL_NUMBER,
    "unit": (str,),
    "stderr": _OPTIONAL_NUMBER,
    "labels": (dict,),
    "provenance": (dict,),
}
_DEFINITION_FIELDS: Mapping[str, tuple[type, ...]] = {"pruning": (dict,), "evaluation": (dict,)}
_PRUNING_FIELDS: Mapping[str, tuple[type, ...]] = {
    "model": (str,),
    "method": (str,),
    "structure": (str,),
    "sparsity": _NUMBER,
    "tile": (list, type(None)),
    "seed": (int,),
}


def load_rows(root: Path, trials: Collection[str] | None = None) -> pd.DataFrame:
    """Every row below a directory, or of one file.

    Args:
        root: a directory, searched for ``*.jsonl`` at any depth, or a file.
        trials: hashes of the trials that are wanted; all by default.

    Returns:
        One line per row, in the order of file names, with the columns `COLUMNS`. ``sparsity`` is the target and
        ``achieved`` what the trial's prune stage measured (NaN where it has no rows). ``tile`` reads ``64x64`` or is
        None. ``source``, ``length``, ``task``, ``layer`` and ``step`` are the labels of those names. ``limit`` is how
        many items of a task were evaluated, where not all. ``checkpoint`` is the content hash of what was measured,
        None in rows that are older than it. ``definition`` is the trial's, as JSON data. ``origin`` is
        ``file:line``, relative to ``root``. No rows give an empty table.

    Raises:
        UserError: naming file and line, if ``root`` is not there, a row is of a newer schema, is not a whole JSON
            object, lacks a field, or contradicts another row about the same fact.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"no rows at {root}: run a study first, or name the results directory that has them")
    facts: dict[tuple[str, ...], dict[str, Any]] = {}
    definitions: dict[str, tuple[dict[str, Any], str]] = {}
    for path in _files(root, trials):
        for number, row in _read(path):
            if trials is not None and row["trial"] not in trials:
                continue
            where = f"{path}:{number}"
            definition, first = definitions.setdefault(row["trial"], (row["definition"], where))
            if definition != row["definition"]:
                raise UserError(f"{where}: trial {row['trial']} has another definition than at {first}")
            origin = f"{path.name if root.is_file() else path.relative_to(root)}:{number}"
            record = _record(row, definition, origin)
            earlier = facts.setdefault(_identity(row), record)
            if earlier is not record and _outcome(earlier) != _outcome(record):
                raise UserError(
                    f"{where}: {row['metric']} of trial {row['trial']} is {row['value']}, but {earlier['value']} at "
                    f"{earlier['origin']}: remove the one that is wrong"
                )
    frame = pd.DataFrame(list(facts.values()), columns=list(COLUMNS)).astype(_DTYPES)
    achieved = frame[(frame.stage == "prune") & (frame.metric == "sparsity")].set_index("trial").value
    frame["achieved"] = frame.trial.map(achieved).astype("float64")
    return frame


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


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    above: dict[str, Any] | None = None
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = whole(line, above)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not a whole JSON row ({error}): the file was cut off or edited; remove it and run "
                "the study again, which measures only what is missing"
            ) from error
        _check(row, f"{path}:{number}")
        above = row
        yield number, row


def _check(row: Any, where: str) -> None:
    schema = row.get("schema") if isinstance(row, dict) else None
    if not isinstance(schema, int):
        raise UserError(f"{where}: no row of measurements, for it names no schema: remove the file from the rows")
    if schema > SCHEMA:
        raise UserError(
            f"{where}: row of schema {schema}, but this version reads up to schema {SCHEMA}: "
            "update hybrid-tile-sparsity, or name a results directory that this version wrote"
        )
    _check_fields(row, _FIELDS, where)
    _check_fields(row["definition"], _DEFINITION_FIELDS, f"{where}: definition")
    _check_fields(row["definition"]["pruning"], _PRUNING_FIELDS, f"{where}: definition.pruning")


def _check_fields(part: dict[str, Any], fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    for name, types in fields.items():
        if name not in part:
            raise UserError(f"{where}: no field '{name}'")
        if not isinstance(part[name], types):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise UserError(f"{where}: field '{name}' is {part[name]!r}, not {wanted}")


def _record(row: dict[str, Any], definition: dict[str, Any], origin: str) -> dict[str, Any]:
    pruning, labels, provenance = definition["pruning"], row["labels"], row["provenance"]
    return {
        **{name: row[name] for name in ("trial", "stage", "metric", "value", "unit", "stderr", "labels")},
        **{name: pruning[name] for name in ("model", "method", "structure", "sparsity", "seed")},
        **{name: labels.get(name) for name in ("source", "length", "task", "layer", "step")},
        **{name: provenance.get(name) for name in ("gpu", "git", "time", "checkpoint")},
        "software": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
        "tile": "x".join(str(side) for side in pruning["tile"]) if pruning["tile"] else None,
        "limit": definition["evaluation"].get("limit"),
        "definition": definition,
        "origin": origin,
    }


def _identity(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about; rows that agree in this state the same fact."""
    # A tile map is the outcome, though it stands among the labels.
    labels = {name: value for name, value in row["labels"].items() if name != "tile_map"}
    return row["trial"], row["stage"], row["metric"], json.dumps(labels, sort_keys=True)


def _outcome(record: dict[str, Any]) -> tuple[Any, ...]:
    numbers = (record["value"], record["stderr"])
    # nan is not equal to itself.
    readable = ("nan" if number is not None and math.isnan(number) else number for number in numbers)
    return (*readable, record["labels"].get("tile_map"))
