"""The journal: rows as lines of JSON, the first line whole, of the others what differs from the line above.

A trial's rows agree in its definition and in where they were measured, which is nine tenths of their text. The last
line says how many rows there are and the SHA-256 of the lines above it, so that a file that was cut off or changed is
told from a whole one. Files that were written before there was such a line are read without.
"""

import hashlib
import json
from collections.abc import Iterable

from analysis.rows.format import Damaged, Row, check_schema, lifted
from patch.files import from_json

# The first schema whose files end with their digest.
_ENDED = 3
_ENDING = {"rows", "sha256"}
_AGAIN = "the file was cut off or edited; remove it and run the study again, which measures only what is missing"


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
    text = "".join(lines)
    ending = {"rows": len(lines), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return text + json.dumps(ending) + "\n"


def numbered(data: bytes, name: str) -> list[tuple[int, Row]]:
    """The rows of a file's bytes with their line numbers.

    Args:
        name: of the file, for messages.

    Raises:
        Damaged: naming file and line, if it is not as it was written.
        UserError: likewise, if it is of a newer schema.
    """
    lines = data.splitlines(keepends=True)
    rows: list[tuple[int, Row]] = []
    above: Row | None = None
    read, ending = 0, None
    for number, line in enumerate(lines, 1):
        read += len(line)
        if not line.strip():
            continue
        where = f"{name}:{number}"
        if ending is not None:
            raise Damaged(f"{where}: rows after the end: {_AGAIN}")
        try:
            row = from_json(line)
        except ValueError as error:
            raise Damaged(f"{where}: not a whole JSON row ({error}): {_AGAIN}") from error
        if isinstance(row, dict) and row.keys() == _ENDING:
            ending = row
            if row["rows"] != len(rows) or row["sha256"] != hashlib.sha256(data[: read - len(line)]).hexdigest():
                raise Damaged(f"{where}: the rows above are not those that were written: {_AGAIN}")
            continue
        if isinstance(row, dict) and "schema" not in row and above is not None:
            row = above | row
        check_schema(row, where)
        rows.append((number, lifted(row)))
        above = row
    if ending is None and (above is None or above["schema"] >= _ENDED):
        raise Damaged(f"{name}: its end is missing: {_AGAIN}")
    return rows


def from_lines(text: str) -> list[Row]:
    """The rows of a file's text.

    Raises:
        Damaged: if it is not as it was written.
    """
    return [row for _, row in numbered(text.encode(), "rows")]
