"""Rows as lines of JSON: the first line whole, of the others what differs from the line above.

A trial's rows agree in its definition and in where they were measured, which is nine tenths of their text.
"""

import json
from collections.abc import Iterable
from typing import Any

SCHEMA = 2

Row = dict[str, Any]


def to_lines(rows: Iterable[Row]) -> str:
    """The text of a file of rows, each with a field ``schema``."""
    lines: list[str] = []
    above: dict[str, str] = {}
    for row in rows:
        texts = {name: json.dumps(value) for name, value in row.items()}
        # A row with other fields than the one above is written whole.
        told = texts.items() if texts.keys() != above.keys() else [(n, t) for n, t in texts.items() if above[n] != t]
        lines.append("{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in told) + "}\n")
        above = texts
    return "".join(lines)


def whole(line: str | bytes, above: Row | None) -> Any:
    """The row that a line stands for; a line of another kind is what it is.

    Args:
        above: the row of the line above it in the same file.

    Raises:
        ValueError: if the line is not JSON.
    """
    row = json.loads(line)
    inherits = isinstance(row, dict) and "schema" not in row and above is not None
    return above | row if inherits and above is not None else row


def from_lines(text: str) -> list[Row]:
    """The rows of a file."""
    rows: list[Row] = []
    for line in text.splitlines():
        rows.append(whole(line, rows[-1] if rows else None))
    return rows
