"""Tables as the page shows them: what never changes is said once, and the first column names the row."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.rows.points import Measured
from analysis.tables.render import MISSING, Column, Table, Value, shown_cells

# What names a row, in the order of its parts; the first two make its first line.
_NAMING = ("method", "target_sparsity", "structure", "variant", "tile")
_FIRST_LINE = ("method", "target_sparsity")


def page_table(title: str, table: Table, origins: Mapping[tuple[int, int], str]) -> dict[str, Any]:
    """A table for the template: its cells with what they sort by, and the row that each number comes from."""
    lines = shown_cells(table)
    names = [column.name for column in table.columns]
    named = [names.index(part) for part in _NAMING if part in names] if "method" in names else []
    same = _constant(table, lines)
    rest = [place for place in range(len(names)) if place not in named and place not in same]
    headings = [_heading(table.columns[place]) for place in rest]
    rows = [[_cell(table, origins, row, place, line[place]) for place in rest] for row, line in enumerate(lines)]
    if named:
        headings.insert(0, {"text": "Method", "number": False})
        for row, line in enumerate(lines):
            parts = {names[place]: line[place] for place in named if place not in same and line[place] != MISSING}
            rows[row].insert(0, _name_cell(parts))
    said = [f"{table.columns[place].heading.removesuffix(' (%)')} {text}" for place, text in same.items()]
    return {"title": title, "headings": headings, "rows": rows, "same": said, "notes": table.notes}


def _constant(table: Table, lines: Sequence[Sequence[str]]) -> dict[int, str]:
    """What columns that are no measurement say where they say the same of every row that they say anything of."""
    if len(lines) < 2:
        return {}
    found = {}
    for place, column in enumerate(table.columns):
        texts = {line[place] for line in lines} - {MISSING}
        if len(texts) == 1 and column.name in ("model", "structure", "variant", "tile", "seeds"):
            found[place] = texts.pop()
    return found


def _heading(column: Column) -> dict[str, Any]:
    return {"text": column.heading, "number": column.kind != "text"}


def _name_cell(parts: Mapping[str, str]) -> dict[str, Any]:
    """The cell that names a row: method and sparsity, and below it what else tells it apart."""
    first = [parts["method"]]
    if (target := parts.get("target_sparsity", "0")) != "0":
        first.append(f"{target}%")
    more = [text for part, text in parts.items() if part not in _FIRST_LINE]
    text = " ".join(first)
    return {"text": text, "more": ", ".join(more), "sort": " ".join([text, *more]), "origin": "", "anchor": ""}


def _cell(table: Table, origins: Mapping[tuple[int, int], str], row: int, place: int, text: str) -> dict[str, Any]:
    missing = text == MISSING and table.columns[place].kind != "text"
    origin = origins.get((row, place), "")
    return {
        "text": "not measured" if missing else text,
        "more": "",
        "sort": sort_key(table.rows[row][place]),
        "best": (row, place) in table.best,
        "origin": origin,
        "anchor": anchor(origin.partition(", ")[0]),
        "missing": missing,
    }


def sort_key(value: Value) -> str:
    """What a column sorts by: the number, or the text."""
    if value is None or (isinstance(value, Measured) and math.isnan(value.value)):
        return ""
    if isinstance(value, str):
        return value
    # As JavaScript reads it.
    return "Infinity" if math.isinf(value.value) else repr(value.value)


def anchor(origin: str) -> str:
    """The place in the page of a row, by its file and line."""
    return "row-" + re.sub(r"\W+", "-", origin)
