"""The accuracy table of a study, as in the pruning papers: a line per pruned model, a column per text and task."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import pandas as pd

from analysis.names import PAPER_TASKS, SOURCES, TASKS, percent
from analysis.rows.paired import gap
from analysis.rows.points import Measured, Point, Task, Text, gather, mean_tasks, tasks, texts
from analysis.tables import published
from analysis.tables.render import MEASURED, Column, Table, Value
from patch.errors import UserError
from patch.methods import label_of

T = TypeVar("T")
Field = tuple[Column, Callable[[Point], Value]]


def accuracy_table(frame: pd.DataFrame, beside_published: bool = False, points: Sequence[Point] | None = None) -> Table:
    """One row per pruned model, with its sparsity, perplexities, accuracies and their mean.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        beside_published: add what the PATCH paper reports, labelled so: for the same models, or where it has none of
            them, of its models the factors over dense, and in which order the methods come.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if there are no rows, or they contradict each other.
    """
    if frame.empty:
        raise UserError("no rows to tabulate: run the study first")
    points = gather(frame) if points is None else points
    found = tasks(points)
    over = mean_tasks(found)
    fields = identity_fields(points)
    if any(_seeds(point) > 1 for point in points):
        fields.append((Column("seeds", "Seeds", "count"), lambda point: Measured(_seeds(point))))
    fields += [_perplexity_field(text) for text in texts(points)]
    fields += [_accuracy_field(task) for task in found]
    if len(over) > 1:
        mean = Column("mean_accuracy", f"Mean of {len(over)} (%)", "mean")
        fields.append((mean, lambda point: point.mean_accuracy))
    notes = _notes(points, found, over)
    if beside_published and any(_reported(point) for point in points):
        fields += _published_fields(found)
        notes.append(f"Published: {published.CITATION}. Not measured here; windows of {published.WINDOW} tokens.")
    elif beside_published and (text := next(iter(texts(points)), None)):
        fields += _other_models_fields(points, text)
        notes += _other_models_notes(points, text)
    columns = tuple(column for column, _ in fields)
    rows = tuple(tuple(value(point) for _, value in fields) for point in points)
    best = _best(columns, rows, points)
    sections, trials = tuple(point.model for point in points), tuple(point.trials for point in points)
    return Table(columns, rows, sections, best, tuple(notes), trials)


def identity_fields(points: Sequence[Point]) -> list[Field]:
    """The columns that say what was pruned how: those that tell these points apart, and the sparsity."""
    fields: list[Field] = [
        (Column("model", "Model", "text"), lambda point: point.model),
        (Column("method", "Method", "text"), lambda point: label_of(point.method)),
        (Column("structure", "Structure", "text"), lambda point: None if point.method == "dense" else point.structure),
        (Column("target_sparsity", "Target (%)", "percent"), lambda point: Measured(point.sparsity)),
        (Column("achieved_sparsity", "Achieved (%)", "percent"), lambda point: _optional(point.achieved)),
    ]
    if any(point.tile for point in points):
        fields.insert(3, (Column("tile", "Tile", "text"), lambda point: point.tile))
    if any(point.trained for point in points):
        fields.insert(
            3, (Column("weights", "Kept weights", "text"), lambda point: "trained" if point.trained else None)
        )
    if any(point.variant for point in points):
        fields.insert(3, (Column("variant", "Variant", "text"), lambda point: point.variant or None))
    return fields


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


def _perplexity_field(text: Text) -> Field:
    column = Column(f"perplexity {text}", heading(text), "perplexity")
    return column, lambda point: point.perplexity.get(text)


def _accuracy_field(task: Task) -> Field:
    return Column(f"accuracy {task}", f"{task_heading(task)} (%)", "accuracy"), lambda point: point.accuracy.get(task)


def _reported(point: Point) -> published.Published | None:
    # What is published left weights as they were.
    if point.trained:
        return None
    return published.find(point.model, point.method, point.structure, point.sparsity)


def _published_fields(of: Sequence[Task]) -> list[Field]:
    def perplexity(point: Point) -> Value:
        return Measured(found.perplexity) if (found := _reported(point)) else None

    def accuracy(point: Point) -> Value:
        return Measured(found.mean_accuracy) if (found := _reported(point)) else None

    def of_task(task: Task) -> Field:
        column = Column(f"published accuracy {task}", f"Published: {task_heading(task)} (%)", "reported accuracy")

        def value(point: Point) -> Value:
            return Measured(found.accuracy[task.name]) if (found := _reported(point)) else None

        return column, value

    text = Text("wikitext2/test", published.WINDOW)
    return [
        (Column(f"published perplexity {text}", f"Published: {heading(text)}", "reported perplexity"), perplexity),
        *(of_task(task) for task in of if task.name in PAPER_TASKS and task.limit is None),
        (Column("published mean_accuracy", "Published: mean of 8 (%)", "reported accuracy"), accuracy),
    ]


def _other_models_fields(points: Sequence[Point], text: Text) -> list[Field]:
    measured = [point for point in points if text in point.perplexity]
    dense = {point.model: point.perplexity[text].value for point in measured if point.is_original}

    def factor(point: Point) -> Value:
        found = point.perplexity.get(text)
        return Measured(found.value / dense[point.model]) if found and point.model in dense else None

    def reported(point: Point) -> Value:
        found = None if point.trained else published.over_dense(point.method, point.structure, point.sparsity)
        return "{:.2f} to {:.2f}".format(*found) if found and point.method != "dense" else None

    return [
        (Column(f"perplexity_over_dense {text}", f"{heading(text)} (x dense)", "ratio"), factor),
        (Column("published perplexity_over_dense", "Published, other models (x dense)", "text"), reported),
    ]


def _other_models_notes(points: Sequence[Point], text: Text) -> list[str]:
    """What is published, of which models, and whether what was measured by the published recipes is ordered alike."""
    order = [_placed("PATCH" if method == "patch" else label_of(method), at) for method, _, at in published.ORDER]
    notes = [
        f"Published: {published.CITATION}. Of other models, {', '.join(published.MODELS)}, whose masks learned on two "
        f"thousand million tokens; windows of {published.WINDOW}.",
        f"Published order of perplexity, on each of them: {' > '.join(order)}.",
    ]
    for model in dict.fromkeys(point.model for point in points):
        plain = [point for point in points if point.model == model and not point.variant and text in point.perplexity]
        found = {(point.method, point.structure, point.sparsity): point for point in plain}
        learners = {point.method for point in plain if published.name_of(point.method) == "patch"}
        for patch in sorted(learners) or ["patch-joint"]:
            names = [(patch if about[0] == "patch" else about[0], *about[1:]) for about in published.ORDER]
            same = [found[about] for about in names if about in found]
            measured = sorted(same, key=lambda point: -point.perplexity[text].value)
            if len(same) > 1:
                said = " > ".join(_placed(label_of(point.method), point.sparsity) for point in measured)
                verdict = "as published" if measured == same else "not as published"
                notes.append(f"Of {model}, by the published recipes: {said}, {verdict}.")
    return notes


def _placed(method: str, sparsity: float) -> str:
    """What a method is called in an order; only PATCH is in it at several sparsities."""
    return f"{method} {percent(sparsity)}" if method.startswith("PATCH") else method


def _notes(points: Sequence[Point], found: Sequence[Task], over: Sequence[Task]) -> list[str]:
    seeds = any(_seeds(point) > 1 for point in points)
    notes = ["Perplexity (PPL): lower is better; @ is the window in tokens.", "Numbers ± standard error."]
    if seeds:
        notes.append("Where there are several seeds: mean ± standard deviation over seeds.")
    notes.append("Bold: best at its sparsity by more than two standard errors of each difference, " + _paired(points))
    if any(point.trained for point in points):
        notes.append("Kept weights that were trained are compared with one another alone; all others are frozen.")
    if 1 < len(over) < len(found):
        left_out = [task_heading(task) for task in found if task not in over]
        notes.append(f"The mean is over the {len(over)} tasks of the PATCH paper, without {', '.join(left_out)}.")
    return notes


def _paired(points: Sequence[Point]) -> str:
    """Whether differences are those of the same windows and items: where rows have what each of them gave."""
    measured = [each for point in points for each in (*point.perplexity.values(), *point.accuracy.values())]
    having = sum(each.items is not None for each in measured)
    if having and having == len(measured):
        return "window by window and item by item."
    some = "partly " if having else ""
    return f"{some}as if each had been measured on a text of its own: the rows lack what each window and item gave."


def _best(
    columns: Sequence[Column], rows: Sequence[Sequence[Value]], points: Sequence[Point]
) -> frozenset[tuple[int, int]]:
    """The best value of each column among rows of one model at one sparsity, unstructured and trained ones apart.

    It is none where another is so near that their difference is within noise.
    """
    groups: dict[tuple[str, float, bool, bool], list[int]] = {}
    for row, point in enumerate(points):
        alike = point.model, point.sparsity, point.structure == "unstructured", point.trained
        groups.setdefault(alike, []).append(row)
    best = set()
    for place, column in enumerate(columns):
        if column.kind not in MEASURED:
            continue
        for members in groups.values():
            found = {row: value for row in members if isinstance(value := rows[row][place], Measured)}
            first = leader(found, lower_is_better=column.kind == "perplexity")
            if first is not None:
                best.add((first, place))
    return frozenset(best)


def leader(found: Mapping[T, Measured], lower_is_better: bool) -> T | None:
    """The one of several numbers that is better than every other beyond noise (`analysis.rows.paired.Gap.exceeds`)."""
    finite = {name: measured for name, measured in found.items() if math.isfinite(measured.value)}
    if len(finite) < 2:
        return None
    sign = 1 if lower_is_better else -1
    first = min(finite, key=lambda name: sign * finite[name].value)
    others = [measured for name, measured in finite.items() if name != first]
    ahead = (gap(finite[first], other) for other in others)
    return first if all(each.exceeds and sign * each.value > 0 for each in ahead) else None
