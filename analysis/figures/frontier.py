"""The frontier of a study: perplexity and mean accuracy against achieved sparsity, each curve named at its end."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FixedLocator, MaxNLocator

from analysis.figures.about import about
from analysis.figures.broken_axis import draw_band, steps_of
from analysis.figures.labels import Label, Panel, write_labels
from analysis.figures.scales import ceiling, scale_perplexity
from analysis.figures.series import Series, looks, names, panels, series_of, sparsity
from analysis.figures.style import (
    DASHED,
    INK,
    WIDTHS,
    Width,
    in_paper_style,
    new_figure,
    room,
    set_title,
    style_of,
    text_ink,
)
from analysis.names import SOURCES
from analysis.rows.points import Measured, Point, Text, gather, mean_tasks, tasks, texts
from analysis.tables.accuracy import task_heading
from patch.errors import UserError

# Heights of a panel and of a step of the band above it, in inches.
_PANEL, _STEP = 2.0, 0.15
# Beside it, its label and a digit of its numbers.
_LABEL, _DIGIT = 0.24, 0.05
# Free columns for names, in percent of sparsity: what has no tiles begins at 50%.
_GAP = 2.0
_RIGHT = 22.0
Measure = Callable[[Point], Measured | None]


@dataclass(frozen=True)
class Group:
    """The series of one model that share a panel."""

    model: str
    series: tuple[Series, ...]
    trained: bool = False

    @property
    def title(self) -> str:
        """What it shows, where there are several."""
        return f"{self.model}, kept weights trained" if self.trained else self.model

    @property
    def points(self) -> list[Point]:
        return [point for each in self.series for point in each.points]


def frontier_of(points: Sequence[Point]) -> bool:
    """Whether some points have a frontier to show: a method at several sparsities, or one-shot methods side by side."""
    pruned = [point for point in points if point.method != "dense"]
    return any(each.is_curve for each in series_of(pruned)) or not any(point.variant for point in pruned)


@in_paper_style
def draw_frontier(
    frame: pd.DataFrame, width: Width = "double", text: Text | None = None, points: Sequence[Point] | None = None
) -> Figure:
    """Perplexity, and mean accuracy where there are tasks, against achieved sparsity.

    A panel has at most five curves: variants beyond them go to further panels on the same scale, as do models. Both
    quantities stand side by side in ``double``, one below the other in ``single``. Error bars are the spread over seeds
    where there are several, standard errors otherwise.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        width: of the figure.
        text: which perplexity; the first of `analysis.rows.points.texts` by default.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if the rows have no perplexity (of that text).
    """
    gathered = gather(frame) if points is None else points
    text = _measured_text(gathered, text)
    points = [point for point in gathered if text in point.perplexity]
    groups = _groups(points)
    with_accuracy = any(point.mean_accuracy for point in points if not point.is_original)
    several = len({group.title for group in groups}) > 1
    columns = min(2, len(groups) * (1 + with_accuracy)) if width == "double" else 1
    cells = [(group, measured) for group in groups for measured in (("ppl", "acc") if with_accuracy else ("ppl",))]
    rows = math.ceil(len(cells) / columns)
    steps = {id(group): _steps(group, points, text) for group in groups}
    band = max(steps.values(), default=0) * _STEP + (0.08 if any(steps.values()) else 0)
    figure = new_figure(WIDTHS[width], 0.25 + (_PANEL + 0.35) * rows + band, constrained=False)
    title = about(frame)
    beside = _LABEL + _DIGIT * max(_digits(points, text), 4)
    named = 0.19 if several else 0.0
    second_line = 0.1 if with_accuracy and "\n" in accuracy_label(gathered) else 0.0
    between = (beside + 0.06 + second_line, 0.23 + named)
    grid = figure.add_gridspec(
        rows, columns, **room(figure, title, rows, columns, beside, above=named, between=between)
    )
    written: list[Panel] = []
    for place, (group, measured) in enumerate(cells):
        cell = grid[place // columns, place % columns]
        of_model = [point for point in points if point.model == group.model]
        if measured == "acc":
            panel, above = figure.add_subplot(cell), None
            draw_accuracy(panel, group.series, accuracy_label(gathered))
            _share_scale(panel, of_model, _mean_in_percent)
            written.append(_labels(group, panel, _mean_in_percent))
        else:
            panel, above = _with_band(figure, cell, steps[id(group)])
            draw_perplexity(panel, group.series, text, above, of_model)
            written.append(_labels(group, panel, lambda point: point.perplexity[text]))
        if several:
            own, whole = panel.get_position(), (above or panel).get_position()
            panel.set_title(group.title, loc="left", weight="bold", y=(whole.y1 - own.y0) / own.height)
        if place // columns == rows - 1 or place + columns >= len(cells):
            panel.set_xlabel("Sparsity (%)")
    set_title(figure, title)
    write_labels(figure, written)
    return figure


def _digits(points: Sequence[Point], text: Text) -> int:
    """Of the longest number on an axis of perplexity."""
    drawn = [value for point in points if (value := point.perplexity[text].value) <= ceiling(points, text)]
    return max((len(f"{value:.0f}") for value in drawn), default=1)


def _groups(points: Sequence[Point]) -> list[Group]:
    """Panels of each model; what was trained has panels of its own, with the dense model."""
    found = []
    for model in dict.fromkeys(point.model for point in points):
        for trained in (False, True):
            members = [point for point in points if point.model == model and point.trained == trained]
            if trained and members:
                members = [p for p in points if p.model == model and p.is_original] + _without_common(members)
            if members:
                found += [Group(model, tuple(series), trained) for series in panels(series_of(members))]
    return found


def _without_common(points: Sequence[Point]) -> list[Point]:
    """The points without what is said of every variant of them, such as the text that all were trained on."""
    parts = [point.variant.split(", ") for point in points]
    common = set(parts[0]).intersection(*parts)
    return [
        dataclasses.replace(point, variant=", ".join(part for part in of_it if part not in common))
        for point, of_it in zip(points, parts, strict=True)
    ]


def _with_band(figure: Figure, cell: SubplotSpec, steps: int) -> tuple[Axes, Axes | None]:
    """A panel, and the band above it where there are steps."""
    if not steps:
        return figure.add_subplot(cell), None
    inner = cell.subgridspec(2, 1, height_ratios=[_STEP * steps + 0.05, _PANEL], hspace=0.02)
    panel = figure.add_subplot(inner[1])
    return panel, figure.add_subplot(inner[0], sharex=panel)


def _steps(group: Group, points: Sequence[Point], text: Text) -> int:
    limit = ceiling([point for point in points if point.model == group.model], text)
    return steps_of([point for point in group.points if not point.perplexity[text].value <= limit])


def _measured_text(points: Sequence[Point], text: Text | None) -> Text:
    measured = texts(points)
    if not measured:
        raise UserError("no perplexity to plot: run the study first")
    if text is not None and text not in measured:
        raise UserError(f"no perplexity of {text} to plot: there is {', '.join(map(str, measured))}")
    return text or measured[0]


def draw_perplexity(
    axis: Axes,
    series: Sequence[Series],
    text: Text,
    band: Axes | None = None,
    scaled_to: Sequence[Point] | None = None,
) -> None:
    """Perplexity against sparsity in percent, for the series of one model, all of whose points have it.

    Args:
        band: axes on top of ``axis``, with which they share sparsity. Points so far above the others that these would
            be squeezed together stand there instead, in order and with their values; without it all are drawn to scale.
        scaled_to: points that decide the scale, those of the series by default.
    """
    points = [point for each in series for point in each.points]
    everything = scaled_to or points
    limit = ceiling(everything, text) if band else math.inf
    above = [point for point in points if not point.perplexity[text].value <= limit]

    def measure(point: Point) -> Measured | None:
        return point.perplexity[text] if point.perplexity[text].value <= limit else None

    _draw_series(axis, series, measure)
    # What stands in the bands of other panels is no reason for room here.
    others = [value for p in everything if (value := p.perplexity[text].value) <= ceiling(everything, text)]
    own = [p.perplexity[text].value for p in points]
    finite = [value for value in (*others, *own) if math.isfinite(value) and value <= limit]
    if finite:
        scale_perplexity(axis, min(finite), max(finite))
    axis.set_ylabel(f"{SOURCES.get(text.source, text.source)} perplexity @{text.length}")
    _sparsity_axis(axis, series)
    if band:
        draw_band(axis, band, above, lambda point: point.perplexity[text].value, names(series), series)


def draw_accuracy(axis: Axes, series: Sequence[Series], label: str) -> None:
    """Mean accuracy in percent with its error, against sparsity in percent, for the series of one model."""
    _draw_series(axis, series, _mean_in_percent)
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_ylabel(label)
    _sparsity_axis(axis, series)


def _mean_in_percent(point: Point) -> Measured | None:
    mean = point.mean_accuracy
    if mean is None:
        return None
    stderr, spread = (None if part is None else 100 * part for part in (mean.stderr, mean.spread))
    return Measured(100 * mean.value, stderr, spread, mean.seeds)


def _share_scale(axis: Axes, points: Sequence[Point], measure: Measure) -> None:
    """The same scale in all panels of a model."""
    found = [measured for point in points if (measured := measure(point))]
    ends = [
        measured.value + sign * (measured.error or 0) * (1 if point.method != "dense" else 0)
        for point in points
        if (measured := measure(point))
        for sign in (-1, 1)
    ]
    if found:
        margin = 0.05 * (max(ends) - min(ends)) or 1.0
        axis.set_ylim(min(ends) - margin, max(ends) + margin)


def accuracy_label(points: Sequence[Point]) -> str:
    """What an axis of mean accuracies is called."""
    over = mean_tasks(tasks(points))
    return f"{task_heading(over[0])}\naccuracy (%)" if len(over) == 1 else f"Mean accuracy, {len(over)} tasks (%)"


def _draw_series(axis: Axes, series: Sequence[Series], measure: Measure) -> None:
    """Dense models as lines across, hybrid series as curves, all others as markers; each at its true sparsity."""
    appearance = looks(series)
    for each in series:
        found = [(point, measured) for point in each.points if (measured := measure(point))]
        style = style_of(each.method)
        if each.structure == "dense":
            for _, measured in found:
                axis.axhline(measured.value, color=style.color, linewidth=0.9, linestyle=DASHED, zorder=2, gid="dense")
        elif found:
            axis.errorbar(
                [100 * sparsity(point) for point, _ in found],
                [measured.value for _, measured in found],
                # NaN draws no bar.
                yerr=np.array([measured.error for _, measured in found], dtype=float),
                elinewidth=0.6,
                capsize=0,
                zorder=style.zorder + (0.5 if each.structure == "unstructured" else 0),
                gid=f"{each.method} {each.structure}",
                **appearance[each],
            )


def _labels(group: Group, axis: Axes, measure: Measure) -> Panel:
    """The names of a panel's series: of curves where there is room beside their ends, of all else on the right."""
    called = names(group.series)
    right = _most_sparse(group.series)
    written = []
    low, high = axis.get_ylim()
    for each in group.series:
        found = [(point, measured.value) for point in each.points if (measured := measure(point))]
        found = [(point, value) for point, value in found if low <= value <= high]
        if not found:
            continue
        if each.structure == "dense":
            written.append(Label(called[each], (right + _GAP / 2, found[0][1]), "right", INK))
            continue
        left = each.is_curve and _names_fit_left(group.series)
        point, value = found[0] if left else found[-1]
        written.append(
            Label(called[each], (100 * sparsity(point), value), "left" if left else "right", text_ink(each.method))
        )
    first = min((100 * sparsity(each.points[0]) for each in group.series if each.is_curve), default=0.0)
    return axis, written, {"left": (first - _GAP, 0.0), "right": (right + _GAP, right + _RIGHT)}


def _names_fit_left(series: Sequence[Series]) -> bool:
    return min((sparsity(each.points[0]) for each in series if each.is_curve), default=0.0) >= 0.2


def _most_sparse(series: Sequence[Series]) -> float:
    return max([50.0, *(100 * sparsity(each.points[-1]) for each in series if each.structure != "dense")])


def _sparsity_axis(axis: Axes, series: Sequence[Series]) -> None:
    top = _most_sparse(series)
    axis.set_xlim(0, top + _RIGHT)
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in range(0, 101, 10) if tick <= top]))
