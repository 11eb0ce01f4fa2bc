"""Rows, from wherever they are, published as tables (`analysis.rows.published`).

Publishing again changes nothing: tables are sorted, what can be derived is derived anew, and a file whose content would
be the same is left alone.
"""

import json
import lzma
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from analysis.rows.format import Damaged, Row, names
from analysis.rows.layout import DETAILS, FACTS, TRIALS
from analysis.rows.points import across_seeds, variants
from analysis.rows.published import ABOUT, digest_of, read, split, table
from patch.errors import UserError
from patch.files import replacing, write_atomic

# Stages of a trial by their names, trials by their hashes.
Stages = dict[str, dict[str, list[Row]]]


def stages_of(rows: Iterable[Row]) -> Stages:
    """Rows by trial and stage, without what says that nothing was measured."""
    found: Stages = {}
    for row in rows:
        if row["metric"] not in ("failure", "skipped") or row["value"] is not None:
            found.setdefault(row["trial"], {}).setdefault(row["stage"], []).append(row)
    return found


def published_stages(folder: Path) -> Stages:
    """What is published in a folder.

    Raises:
        Damaged: if it is not as it was written.
    """
    found: Stages = {}
    for _, rows in read(folder):
        if isinstance(rows, Damaged):
            raise rows
        found |= stages_of(row for _, row in rows)
    return found


def merged(published: Stages, new: Stages, allow_dirty: bool = False) -> Stages:
    """What is published already, and what is to be.

    Raises:
        UserError: if rows are of a working tree with changes that no revision has (unless that is allowed), are not of
            the trial whose name they bear, or say something else than what is published.
    """
    whole = {trial: dict(stages) for trial, stages in published.items()}
    for trial, stages in new.items():
        mine = whole.setdefault(trial, {})
        for stage, rows in stages.items():
            if stage in mine:
                if digest_of(mine[stage]) != digest_of(rows):
                    raise UserError(
                        f"{trial} {stage} is published with other facts: rows are never edited; remove the ones that "
                        "are wrong"
                    )
                continue
            definition, provenance = rows[0]["definition"], rows[0]["provenance"]
            if not names(trial, definition):
                raise UserError(f"{trial} {stage}: its definition has another hash: the rows were edited; remove them")
            first, others = next(iter(mine.items()), (stage, rows))
            if others[0]["definition"] != definition:
                raise UserError(
                    f"{trial} {stage} and {first} have the same trial in two definitions, of a recipe that ran in two "
                    "ways: a trial has one; remove the rows of one of them and measure those stages again"
                )
            if any(row["provenance"] != provenance or row["definition"] != definition for row in rows):
                raise UserError(f"{trial} {stage} was measured in several places: remove all but one of its files")
            if provenance.get("dirty") and not allow_dirty:
                raise UserError(
                    f"{trial} {stage} was measured with changes that revision {str(provenance.get('git'))[:10]} does "
                    "not have: measure it from a clean tree, or pass --dirty to publish it with a warning"
                )
            mine[stage] = rows
    return whole


def write(folder: Path, stages: Stages) -> list[Path]:
    """Write the tables of some trials; returns the files that changed."""
    order = sorted(stages, key=lambda trial: (_order(_definition(stages[trial])), trial))
    changed = []
    headlines: list[dict[str, Any]] = []
    lines = []
    about = _about({trial: stages[trial] for trial in order})
    for trial in order:
        details: list[Row] = []
        for stage in sorted(stages[trial]):
            first, more = split(stages[trial][stage])
            headlines += (about[trial] | _where(row) | row for row in first)
            details += more
        lines.append(json.dumps(_trial(trial, stages[trial]), separators=(",", ":")) + "\n")
        path = folder / DETAILS / f"{trial}.csv.xz"
        if details:
            changed += _write_packed(path, table(details, ()))
    studies = all("pruning" in _definition(stages[trial]) for trial in order)
    _spread(headlines)
    before = ("trial", *ABOUT) if studies else ("trial",)
    for path, text in ((folder / FACTS, table(headlines, before)), (folder / TRIALS, "".join(lines))):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)
            changed.append(path)
    return changed


def _write_packed(path: Path, text: str) -> list[Path]:
    # Another version of the library may pack the same text otherwise.
    if path.exists() and lzma.decompress(path.read_bytes()) == text.encode():
        return []
    with replacing(path) as temporary:
        temporary.write_bytes(lzma.compress(text.encode()))
    return [path]


def _definition(stages: Mapping[str, list[Row]]) -> dict[str, Any]:
    definition: dict[str, Any] = next(iter(stages.values()))[0]["definition"]
    return definition


def _order(definition: Mapping[str, Any]) -> tuple[Any, ...]:
    pruning = definition.get("pruning", definition)
    names = ("model", "method", "structure")
    return (
        *(str(pruning.get(name, "")) for name in names),
        pruning.get("tile") or [],
        -pruning.get("sparsity", 0),
        pruning.get("seed", 0),
    )


def _trial(trial: str, stages: Mapping[str, list[Row]]) -> dict[str, Any]:
    """A line of the list of trials; what all stages share of their provenance is said once."""
    provenances = [rows[0]["provenance"] for rows in stages.values()]
    shared = {
        name: value
        for name, value in provenances[0].items()
        if all(name in other and other[name] == value for other in provenances)
    }
    return {
        "trial": trial,
        "definition": _definition(stages),
        "provenance": shared,
        "stages": {
            stage: {
                "facts": len(stages[stage]),
                "digest": digest_of(stages[stage]),
                "provenance": {
                    name: value for name, value in stages[stage][0]["provenance"].items() if name not in shared
                },
            }
            for stage in sorted(stages)
        },
    }


def _about(stages: Stages) -> dict[str, dict[str, Any]]:
    """The columns that say what was measured, by trial."""
    definitions = {trial: _definition(mine) for trial, mine in stages.items()}
    pruned = {trial: definition for trial, definition in definitions.items() if "pruning" in definition}
    variant = variants(pruned)
    found: dict[str, dict[str, Any]] = {}
    for trial, definition in definitions.items():
        found[trial] = {}
        if trial in pruned:
            pruning = definition["pruning"]
            measured = (row["value"] for row in stages[trial].get("prune", ()) if row["metric"] == "sparsity")
            found[trial] = {name: pruning[name] for name in ("model", "method", "structure", "seed")} | {
                "variant": variant[trial],
                "tile": "x".join(map(str, pruning["tile"])) if pruning["tile"] else None,
                "target": pruning["sparsity"],
                "achieved": next(measured, None),
            }
    return found


def _where(row: Row) -> dict[str, Any]:
    provenance = row["provenance"]
    return {
        "gpu": provenance.get("gpu"),
        # Whole in the list of trials: thousands of lines have it.
        "revision": provenance["git"][:10] if provenance.get("git") else None,
        "dirty": provenance.get("dirty"),
        "time": provenance.get("time"),
    }


def _spread(headlines: list[dict[str, Any]]) -> None:
    """Put the standard deviation over seeds, and how many there are, beside facts that differ in seeds alone."""
    groups: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in headlines:
        if "pruning" in row["definition"]:
            seedless, seeds = across_seeds(row["definition"])
            labels = json.dumps(row["labels"], sort_keys=True)
            alike = groups.setdefault((seedless, row["stage"], row["metric"], row["unit"], labels), {})
            alike.setdefault(seeds, []).append(row)
    for by_seed in groups.values():
        values = [rows[0]["value"] for rows in by_seed.values()]
        for row in (row for rows in by_seed.values() for row in rows):
            row["seeds"] = len(values)
            if len(values) > 1 and all(value is not None and math.isfinite(value) for value in values):
                row["spread"] = float(f"{statistics.stdev(values):.6g}")
