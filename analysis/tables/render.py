"""Tables of measured numbers, and how they are rendered: Markdown, CSV, LaTeX, the terminal.

A `Table` holds numbers as measured; how many digits are shown is decided where it is rendered, and CSV has them all.

    >>> table = accuracy_table(load_rows(Path("results")))
    >>> print(render(table, "md"))
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from analysis.rows.points import Measured
from patch.errors import check_name

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Kind = Literal[
    "text", "count", "percent", "perplexity", "accuracy", "mean", "reported perplexity", "reported accuracy",
    "ratio", "number",
]  # fmt: skip
# Kinds with a standard error, or a spread over seeds.
MEASURED = ("perplexity", "accuracy", "mean")
Value = str | Measured | None

MISSING = "—"
# What a narrow terminal leaves out first; then it is the last column.
_FIRST_LEFT_OUT = ("tile", "achieved_sparsity", "structure", "disk")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: for machines, in CSV.
        heading: for readers.
        kind: how its values are shown (a ratio with two decimals, a number with four digits), and which is best: the
            lowest perplexity, the highest accuracy.
    """

    name: str
    heading: str
    kind: Kind


@dataclass(frozen=True)
class Table:
    """A table of numbers as measured.

    Attributes:
        columns: what the values of each row are.
        rows: one value per column; None where nothing was measured.
        sections: for each row, what it belongs to (its model); renderers set sections apart.
        best: (row, column) of the best value among rows at equal sparsity, where it is beyond doubt.
        trials: for each row, the hashes of the trials that it shows; none where rows are not of trials.
        notes: what a reader must know about the numbers, one sentence each.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    sections: tuple[str, ...]
    best: frozenset[tuple[int, int]]
    notes: tuple[str, ...]
    trials: tuple[tuple[str, ...], ...] = ()


def render(table: Table, format: str) -> str:
    """A table as text in ``md``, ``csv`` or ``latex``, without a final newline.

    Raises:
        UserError: for another format.
    """
    return _RENDERERS[check_name("table format", format, FORMATS)](table)


def only(table: Table, names: Sequence[str]) -> Table:
    """A table with some of its columns: those whose names begin so."""
    places = [place for place, column in enumerate(table.columns) if column.name.startswith(tuple(names))]
    return dataclasses.replace(
        table,
        columns=tuple(table.columns[place] for place in places),
        rows=tuple(tuple(row[place] for place in places) for row in table.rows),
        best=frozenset((row, places.index(place)) for row, place in table.best if place in places),
    )


def rows_of(table: Table, places: Sequence[int]) -> Table:
    """A table with some of its rows, by their places."""
    return dataclasses.replace(
        table,
        rows=tuple(table.rows[place] for place in places),
        sections=tuple(table.sections[place] for place in places),
        best=frozenset((places.index(row), column) for row, column in table.best if row in places),
        trials=tuple(table.trials[place] for place in places) if table.trials else (),
    )


def markdown(table: Table, notes: bool = True) -> str:
    """A GitHub table, aligned for reading as it is, with its notes below."""
    cells = [[_escape_markdown(column.heading) for column in table.columns]]
    for row, line in enumerate(shown_cells(table)):
        escaped = [_escape_markdown(text) for text in line]
        cells.append([f"**{text}**" if (row, place) in table.best else text for place, text in enumerate(escaped)])
    widths = [max(len(row[place]) for row in cells) for place in range(len(table.columns))]
    left = [column.kind == "text" for column in table.columns]
    sides = list(zip(widths, left, strict=True))
    lines = [
        "| " + " | ".join(_pad(text, *side) for text, side in zip(row, sides, strict=True)) + " |" for row in cells
    ]
    rule = "|".join("-" * (width + 1) + ("-" if flush else ":") for width, flush in sides)
    return "\n".join([lines[0], f"|{rule}|", *lines[1:], *(f"\n{note}" for note in table.notes if notes)])


def csv_text(table: Table) -> str:
    """Every digit: sparsities and accuracies as shares, with columns for standard error and spread over seeds."""
    parts = [(place, column, part) for place, column in enumerate(table.columns) for part in _csv_parts(column)]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([f"{column.name}_{part}" if part else column.name for _, column, part in parts])
    for row in table.rows:
        writer.writerow([_exact(row[place], part) for place, _, part in parts])
    return output.getvalue().rstrip("\n")


def latex(table: Table) -> str:
    """A ``tabular`` for the booktabs package, with the notes as comments."""
    alignment = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    lines = [
        r"% needs \usepackage{booktabs}",
        *(f"% {note}" for note in table.notes),
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        " & ".join(_escape_latex(column.heading) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    breaks = {place for place, (above, below) in enumerate(pairwise(table.sections), 1) if above != below}
    for row, line in enumerate(shown_cells(table)):
        escaped = [_escape_latex(text) for text in line]
        marked = [rf"\textbf{{{text}}}" if (row, place) in table.best else text for place, text in enumerate(escaped)]
        if row in breaks:
            lines.append(r"\midrule")
        lines.append(" & ".join(marked) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


_RENDERERS: dict[str, Callable[[Table], str]] = {"md": markdown, "csv": csv_text, "latex": latex}
FORMATS = tuple(_RENDERERS)


def rich_table(table: Table, width: int | None = None) -> "RichTable":
    """A table for the terminal, which is narrow: of several tasks only the mean is shown with its error.

    Args:
        width: of the terminal in characters; where the table is wider, the tasks are left out beside their mean, and
            then other columns, which the notes name.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    headings = ["\n".join(column.heading.split()) for column in table.columns]
    kinds = [column.kind for column in table.columns]
    terse = {"accuracy"} if "mean" in kinds else set()
    lines = [
        [text.partition(" ")[0] if kind in terse else text for kind, text in zip(kinds, line, strict=True)]
        for line in shown_cells(table)
    ]
    sections = list(dict.fromkeys(table.sections))
    places = [place for place, column in enumerate(table.columns) if column.name != "model" or len(sections) > 1]
    notes = list(table.notes)
    widths = [max(map(len, [*heading.split(), *cells])) for heading, *cells in zip(headings, *lines, strict=True)]
    if width is not None and terse and sum(widths[place] + 2 for place in places) > width:
        places = [place for place in places if kinds[place] not in terse]
        notes.append("The terminal is too narrow for the accuracy of each task.")
    # Never a part of a number: what does not fit is left out in full.
    names = [table.columns[place].name for place in places]
    dropped = [name for name in _FIRST_LEFT_OUT if name in names]
    dropped += [name for name in reversed(names[2:]) if name not in dropped]
    left_out: list[int] = []
    while width is not None and len(places) > 2 and sum(widths[place] + 2 for place in places) > width:
        left_out.append(next(place for place in places if table.columns[place].name == dropped[len(left_out)]))
        places.remove(left_out[-1])
    if left_out:
        missing = ", ".join(table.columns[place].heading for place in sorted(left_out))
        notes.append(f"The terminal is too narrow for: {missing}.")
    result = RichTable(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=sections[0] if len(sections) == 1 else None,
        title_justify="left",
        caption="\n".join(notes),
        caption_justify="left",
    )
    for place in places:
        result.add_column(headings[place], justify="left" if kinds[place] == "text" else "right", no_wrap=True)
    for row, line in enumerate(lines):
        cells = [RichText(line[place], style="bold" if (row, place) in table.best else "") for place in places]
        ends_section = row + 1 < len(lines) and table.sections[row] != table.sections[row + 1]
        result.add_row(*cells, end_section=ends_section)
    return result


def significant(number: float, digits: int = 4) -> str:
    """A perplexity to so many significant digits: ``12.08``, ``563.4``, ``6735``, ``1.235e6``, ``inf``."""
    if not math.isfinite(number):
        return str(number)
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    if not -digits < int(exponent) <= digits:
        return f"{mantissa}e{int(exponent)}"
    rounded = float(f"{mantissa}e{exponent}")
    return f"{rounded:.{max(0, digits - 1 - int(exponent))}f}"


def shown_cells(table: Table) -> list[list[str]]:
    return [[_show(column, value) for column, value in zip(table.columns, row, strict=True)] for row in table.rows]


def _show(column: Column, value: Value) -> str:
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if column.kind == "count":
        return f"{value.value:.0f}"
    if column.kind == "percent":
        return f"{100 * value.value:.2f}".rstrip("0").rstrip(".")
    if column.kind == "perplexity":
        return _show_perplexity(value)
    if column.kind in ("reported perplexity", "ratio"):
        return f"{value.value:.2f}"
    if column.kind == "number":
        return significant(value.value)
    digits = 1 if column.kind == "accuracy" else 2
    error = f" ± {100 * value.error:.{digits}f}" if value.error is not None else ""
    return f"{100 * value.value:.{digits}f}{error}"


def _show_perplexity(value: Measured) -> str:
    text = significant(value.value)
    if value.error is None or not math.isfinite(value.value):
        return text
    # The error to the same place as the value.
    if "e" not in text:
        return f"{text} ± {value.error:.{len(text.partition('.')[2])}f}"
    return f"{text} ± {significant(value.error, 2)}"


def _pad(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _escape_markdown(text: str) -> str:
    return re.sub(r"([|*_\\`<])", r"\\\1", text)


_LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "±": r"$\pm$",
    MISSING: "---",
}


def _escape_latex(text: str) -> str:
    if text in ("inf", "nan"):
        return {"inf": r"$\infty$", "nan": "nan"}[text]
    return "".join(_LATEX.get(mark, mark) for mark in text)


def _csv_parts(column: Column) -> tuple[str, ...]:
    return ("", "stderr", "std_over_seeds") if column.kind in MEASURED else ("",)


def _exact(value: Value, part: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    number = {"": value.value, "stderr": value.stderr, "std_over_seeds": value.spread}[part]
    return "" if number is None else repr(number)
