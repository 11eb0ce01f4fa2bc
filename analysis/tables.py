"""The accuracy table of a study, as in the pruning papers: a line per pruned model, a column per text and task.

    >>> table = accuracy_table(load_rows(Path("results/smollm2/rows")))
    >>> print(render(table, "md"))

A `Table` holds numbers as measured; how many digits are shown is decided where it is rendered, and CSV has them all.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import pandas as pd

from analysis import published
from analysis.names import METHODS, SOURCES, TASKS
from analysis.points import Measured, Point, Task, Text, gather, mean_tasks, tasks, texts
from patch.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Kind = Literal["text", "count", "percent", "perplexity", "accuracy", "mean", "reported perplexity", "reported accuracy"]
_MEASURED = ("perplexity", "accuracy", "mean")
Value = str | Measured | None

MISSING = "—"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: for machines, in CSV.
        heading: for readers.
        kind: how its values are shown, and which is best: the lowest perplexity, the highest accuracy.
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
        best: (row, column) of the best value among rows at equal sparsity.
        second: likewise of the second best, where there are three or more; LaTeX underlines it.
        notes: what a reader must know about the numbers, one sentence each.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    sections: tuple[str, ...]
    best: frozenset[tuple[int, int]]
    notes: tuple[str, ...]
    second: frozenset[tuple[int, int]] = frozenset()


def accuracy_table(frame: pd.DataFrame, beside_published: bool = False) -> Table:
    """One row per pruned model, with its sparsity, perplexities, accuracies and their mean.

    Args:
        frame: as from `analysis.rows.load_rows`.
        beside_published: add what the PATCH paper reports for the same models, labelled so.

    Raises:
        UserError: if there are no rows, or they contradict each other.
    """
    if frame.empty:
        raise UserError("no rows to tabulate: run the study first")
    points = gather(frame)
    over = mean_tasks(tasks(frame))
    fields: list[tuple[Column, Callable[[Point], Value]]] = [
        (Column("model", "Model", "text"), lambda point: point.model),
        (Column("method", "Method", "text"), lambda point: METHODS.get(point.method, point.method)),
        (Column("structure", "Structure", "text"), lambda point: None if point.method == "dense" else point.structure),
        (Column("target_sparsity", "Target (%)", "percent"), lambda point: Measured(point.sparsity)),
        (Column("achieved_sparsity", "Achieved (%)", "percent"), lambda point: _optional(point.achieved)),
    ]
    if any(point.tile for point in points):
        fields.insert(3, (Column("tile", "Tile", "text"), lambda point: point.tile))
    if any(point.variant for point in points):
        fields.insert(3, (Column("variant", "Variant", "text"), lambda point: point.variant or None))
    if any(_seeds(point) > 1 for point in points):
        fields.append((Column("seeds", "Seeds", "count"), lambda point: Measured(_seeds(point))))
    fields += [_perplexity_field(text) for text in texts(frame)]
    found = tasks(frame)
    fields += [_accuracy_field(task) for task in found]
    if len(over) > 1:
        mean = Column("mean_accuracy", f"Mean of {len(over)} (%)", "mean")
        fields.append((mean, lambda point: point.mean_accuracy))
    notes = _notes(points, found, over)
    if beside_published:
        fields += _published_fields()
        notes.append(_published_note(points))
    columns = tuple(column for column, _ in fields)
    rows = tuple(tuple(value(point) for _, value in fields) for point in points)
    best, second = _best(columns, rows, points)
    return Table(columns, rows, tuple(point.model for point in points), best, tuple(notes), second)


def published_table(models: Collection[str] = published.MODELS) -> Table:
    """What the PATCH paper reports for the named models."""
    fields = [
        Column("model", "Model", "text"),
        Column("method", "Method", "text"),
        Column("structure", "Structure", "text"),
        Column("target_sparsity", "Target (%)", "percent"),
        *(column for column, _ in _published_fields()),
    ]
    results = [result for result in published.RESULTS if result.model in models]
    rows = tuple(
        (
            result.model,
            METHODS[result.method],
            None if result.method == "dense" else result.structure,
            Measured(result.sparsity),
            Measured(result.perplexity),
            Measured(result.mean_accuracy),
        )
        for result in results
    )
    notes = (f"All numbers as published: {published.CITATION}.",)
    return Table(tuple(fields), rows, tuple(result.model for result in results), frozenset(), notes)


def render(table: Table, format: str) -> str:
    """A table as text in ``md``, ``csv`` or ``latex``, without a final newline.

    Raises:
        UserError: for another format.
    """
    if format not in _RENDERERS:
        raise UserError(f"unknown table format '{format}': choose {', '.join(_RENDERERS)}")
    return _RENDERERS[format](table)


def markdown(table: Table) -> str:
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
    return "\n".join([lines[0], f"|{rule}|", *lines[1:], *(f"\n{note}" for note in table.notes)])


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
        marked = [
            rf"\textbf{{{text}}}"
            if (row, place) in table.best
            else rf"\underline{{{text}}}"
            if (row, place) in table.second
            else text
            for place, text in enumerate(escaped)
        ]
        if row in breaks:
            lines.append(r"\midrule")
        lines.append(" & ".join(marked) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


_RENDERERS: dict[str, Callable[[Table], str]] = {"md": markdown, "csv": csv_text, "latex": latex}


def rich_table(table: Table, width: int | None = None) -> "RichTable":
    """A table for the terminal, which is narrow: of several tasks only the mean is shown with its error.

    Args:
        width: of the terminal in characters; where the table is wider, the tasks are left out beside their mean.
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


def heading(text: Text) -> str:
    """What the perplexity of a text is called: ``WikiText-2 PPL @2048``."""
    return f"{SOURCES.get(text.source, text.source)} PPL @{text.length}"


def task_heading(task: Task) -> str:
    """What a task is called, with how many of its items were evaluated where not all: ``PIQA (first 100)``."""
    name = TASKS.get(task.name, task.name)
    return name if task.limit is None else f"{name} (first {task.limit})"


def _optional(number: float | None) -> Measured | None:
    return None if number is None else Measured(number)


def _seeds(point: Point) -> int:
    measured = [*point.perplexity.values(), *point.accuracy.values()]
    return max((quantity.seeds for quantity in measured), default=1)


def _perplexity_field(text: Text) -> tuple[Column, Callable[[Point], Value]]:
    column = Column(f"perplexity {text}", heading(text), "perplexity")
    return column, lambda point: point.perplexity.get(text)


def _accuracy_field(task: Task) -> tuple[Column, Callable[[Point], Value]]:
    return Column(f"accuracy {task}", f"{task_heading(task)} (%)", "accuracy"), lambda point: point.accuracy.get(task)


def _published_fields() -> list[tuple[Column, Callable[[Point], Value]]]:
    def reported(point: Point) -> published.Published | None:
        return published.find(point.model, point.method, point.structure, point.sparsity)

    def perplexity(point: Point) -> Value:
        return Measured(found.perplexity) if (found := reported(point)) else None

    def accuracy(point: Point) -> Value:
        return Measured(found.mean_accuracy) if (found := reported(point)) else None

    text = Text("wikitext2/test", published.WINDOW)
    return [
        (Column(f"published perplexity {text}", f"Published: {heading(text)}", "reported perplexity"), perplexity),
        (Column("published mean_accuracy", "Published: mean of 8 (%)", "reported accuracy"), accuracy),
    ]


def _published_note(points: Iterable[Point]) -> str:
    if any(published.find(point.model, point.method, point.structure, point.sparsity) for point in points):
        return f"Published: {published.CITATION}. Not measured here; windows of {published.WINDOW} tokens."
    return f"No numbers are published for these models and sparsities; there are for {', '.join(published.MODELS)}."


def _notes(points: Sequence[Point], found: Sequence[Task], over: Sequence[Task]) -> list[str]:
    seeds = any(_seeds(point) > 1 for point in points)
    notes = ["Perplexity (PPL): lower is better; @ is the window in tokens."]
    if found:
        notes.append("Accuracies ± standard error.")
    if seeds:
        notes.append("Where there are several seeds: mean ± standard deviation over seeds.")
    if 1 < len(over) < len(found):
        left_out = [task_heading(task) for task in found if task not in over]
        notes.append(f"The mean is over the {len(over)} tasks of the PATCH paper, without {', '.join(left_out)}.")
    return notes


def _best(
    columns: Sequence[Column], rows: Sequence[Sequence[Value]], points: Sequence[Point]
) -> tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]]]:
    """The best and the second best value of each column among rows of one model at one sparsity; unstructured apart."""
    groups: dict[tuple[str, float, bool], list[int]] = {}
    for row, point in enumerate(points):
        groups.setdefault((point.model, point.sparsity, point.structure == "unstructured"), []).append(row)
    best, second = set(), set()
    for place, column in enumerate(columns):
        if column.kind not in _MEASURED:
            continue
        for members in groups.values():
            numbers = {
                row: value.value
                for row in members
                if isinstance(value := rows[row][place], Measured) and math.isfinite(value.value)
            }
            if len(numbers) > 1:
                top, *others = sorted(set(numbers.values()), reverse=column.kind != "perplexity")
                best |= {(row, place) for row, number in numbers.items() if number == top}
                if len(numbers) > 2 and others:
                    second |= {(row, place) for row, number in numbers.items() if number == others[0]}
    return frozenset(best), frozenset(second)


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
    if column.kind == "reported perplexity":
        return f"{value.value:.2f}"
    digits = 1 if column.kind == "accuracy" else 2
    error = f" ± {100 * value.error:.{digits}f}" if value.error is not None else ""
    return f"{100 * value.value:.{digits}f}{error}"


def _show_perplexity(value: Measured) -> str:
    text = significant(value.value)
    if value.spread is None:
        return text
    # The spread to the same place as the value.
    if math.isfinite(value.value) and "e" not in text:
        return f"{text} ± {value.spread:.{len(text.partition('.')[2])}f}"
    return f"{text} ± {significant(value.spread)}"


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
    return ("", "stderr", "std_over_seeds") if column.kind in _MEASURED else ("",)


def _exact(value: Value, part: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    number = {"": value.value, "stderr": value.stderr, "std_over_seeds": value.spread}[part]
    return "" if number is None else repr(number)
