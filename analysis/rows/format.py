"""One format for everything that is measured: accuracy, kernels, whole models, learning speed, tests on a GPU.

A *fact* is one number; a *row* is a fact with what it is about and where it was measured, as plain JSON data::

    schema      version of this format
    trial       12 hex digits that name what was measured: the digest of its definition
    definition  what was measured, in full: a study's trial (``pruning`` and ``evaluation``) or the shapes of a bench
    stage       which part of the work measured it, such as ``prune``, ``task:piqa``, ``speed:decode@1x1``
    metric      what it is, such as ``perplexity`` or ``time``
    value       the number; null where there is none
    unit        of the number; ``1`` for shares and counts
    labels      what tells it from other facts of the same metric and stage: text, step, layer, implementation
    stderr      standard error of what was estimated from a sample, or null
    p20, p80    percentiles of the runs whose median the number is, or null
    runs        how many there were
    provenance  ``git`` revision, whether the tree was ``dirty``, machine, GPU and clocks, library versions, UTC time,
                wall seconds, digests of the texts that were read, content hash of the checkpoint

Rows lie on disk in two forms, both read by `analysis.rows.load`. Running processes write a *journal*
(`analysis.rows.jsonl`): a file for each stage of each trial, never edited. What is shared is *published*
(`analysis.rows.published`): flat tables that any program opens.
"""

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from typing import Any

from patch.errors import UserError
from patch.learn.recipe import HOW_IT_RUNS

# Labels that are outcomes, and do not tell one fact from another: what each window, item or tile gave.
OUTCOMES = ("tile_map", "window_losses", "items")

# Labels of facts about one layer or one step of learning, of which most rows are.
PARTS = ("layer", "step")

# The first word of the stages that measure a packed checkpoint.
PACKED_STAGES = ("pack", "packed", "speed", "carried")
# Those of all stages (`experiments.run.pipeline.stages`), in the order in which they run.
STAGE_KINDS = ("prune", "perplexity", "task", *PACKED_STAGES, "kernels", "model")

# 1: whole rows. 2: a row leaves out what it shares with the one above. 3: a journal file ends with its digest.
SCHEMA = 3

Row = dict[str, Any]


class Damaged(UserError):
    """Rows that are not as they were written."""


@dataclass(frozen=True)
class Fact:
    """One measured number, before it knows what it belongs to.

    Attributes:
        stderr: standard error, of what was estimated.
        p20, p80, runs: percentiles and number of the runs whose median ``value`` is.
    """

    metric: str
    value: float | None
    unit: str
    labels: dict[str, Any]
    stderr: float | None = None
    p20: float | None = None
    p80: float | None = None
    runs: int = 1


def as_rows(
    trial: str, definition: Mapping[str, Any], stage: str, facts: Iterable[Fact], provenance: Mapping[str, Any]
) -> list[Row]:
    """Facts of one stage as rows.

    Args:
        trial: the digest that names ``definition``.
    """
    common = {"schema": SCHEMA, "trial": trial, "definition": definition, "stage": stage}
    return [
        common
        | {"metric": fact.metric, "value": fact.value, "unit": fact.unit, "labels": fact.labels}
        | {"stderr": fact.stderr, "p20": fact.p20, "p80": fact.p80, "runs": fact.runs, "provenance": provenance}
        for fact in facts
    ]


def identity(row: Row) -> tuple[Hashable, ...]:
    """What a row of a trial is about; rows that agree in this state the same fact."""
    labels = [_told(*label) for label in row["labels"].items() if label[0] not in OUTCOMES]
    return row["stage"], row["metric"], *(labels if len(labels) < 2 else sorted(labels))


def _told(name: str, value: Any) -> tuple[Hashable, ...]:
    """A label, as nothing but its like: of most, which are texts and whole numbers, without spelling out JSON."""
    kind = type(value)
    if kind is str or kind is int:
        return name, kind.__name__, value
    return name, "", _canonical(value)


_canonical = json.JSONEncoder(sort_keys=True).encode


def digest(plain: Any) -> str:
    """The first 12 hex digits of the SHA-256 of plain data's canonical JSON."""
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def name_of(definition: Any) -> str:
    """The 12 hex digits that name a definition: its digest, but for how a recipe runs."""
    return digest(_substance(definition))


def names(trial: str, definition: Any) -> bool:
    """Whether ``trial`` is the name of a definition; benches of learning are named by how it runs, too."""
    return trial in (name_of(definition), digest(definition))


def _substance(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _substance(part) for name, part in value.items() if name not in HOW_IT_RUNS}
    if isinstance(value, list | tuple):
        return [_substance(part) for part in value]
    return value


SPREAD = ("p20", "p80", "runs")


def lifted(row: Row) -> Row:
    """A row of before that has the spread of its runs among its labels, as rows have it now; others as they are."""
    labels = row.get("labels")
    if not isinstance(labels, dict) or "p20" not in labels or row.get("p20") is not None:
        return row
    spread = {name: labels[name] for name in SPREAD if name in labels}
    return row | spread | {"labels": {name: value for name, value in labels.items() if name not in SPREAD}}


# What JSON the fields of a row, and of the definition of a study's trial, may be.
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
    "p20": _OPTIONAL_NUMBER,
    "p80": _OPTIONAL_NUMBER,
    "runs": (int,),
    "labels": (dict,),
    "provenance": (dict,),
}
_values_of = itemgetter(*_FIELDS)
# What types all fields of a row may be of, so that most rows are looked at once.
_KINDS = frozenset(product(*_FIELDS.values()))
_DEFINITION_FIELDS: Mapping[str, tuple[type, ...]] = {"pruning": (dict,), "evaluation": (dict,)}
_PRUNING_FIELDS: Mapping[str, tuple[type, ...]] = {
    "model": (str,),
    "method": (str,),
    "structure": (str,),
    "sparsity": _NUMBER,
    "tile": (list, type(None)),
    "seed": (int,),
}


def check_schema(row: Any, where: str) -> None:
    """Check that something is a row of a format that this version knows.

    Raises:
        Damaged: naming ``where`` it is, if it is none.
        UserError: if it is newer.
    """
    schema = row.get("schema") if isinstance(row, dict) else None
    if type(schema) is int and schema == SCHEMA:
        return
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise Damaged(f"{where}: no row of measurements, for it names no schema: remove the file from the rows")
    if schema > SCHEMA:
        raise UserError(
            f"{where}: row of schema {schema}, but this version reads up to schema {SCHEMA}: "
            "update hybrid-tile-sparsity, or name a results directory that this version wrote"
        )
    if schema < 1:
        raise Damaged(f"{where}: row of schema {schema}, which no version wrote: the file was edited; remove it")


def check_row(row: Any, where: str, above: Row | None = None) -> None:
    """Check that something is a row with all its fields.

    Args:
        above: a row that was checked; what a row shares with it need not be checked again.

    Raises:
        Damaged: naming ``where`` it is, and the field.
        UserError: if it is newer.
    """
    check_schema(row, where)
    if not (row.keys() >= _FIELDS.keys() and tuple(map(type, _values_of(row))) in _KINDS):
        _check_fields(row, _FIELDS, where, above)
    definition = row["definition"]
    if above is not None and definition is above["definition"]:
        return
    if "pruning" in definition or "evaluation" in definition:
        _check_fields(definition, _DEFINITION_FIELDS, f"{where}: definition")
        _check_fields(definition["pruning"], _PRUNING_FIELDS, f"{where}: definition.pruning")


def _check_fields(part: Row, fields: Mapping[str, tuple[type, ...]], where: str, above: Row | None = None) -> None:
    for name, types in fields.items():
        if name not in part:
            raise Damaged(f"{where}: no field '{name}'")
        value = part[name]
        # Most are of just such a type.
        if type(value) in types or (above is not None and value is above.get(name)):
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise Damaged(f"{where}: field '{name}' is {value!r}, not {wanted}")
