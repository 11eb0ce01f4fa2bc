"""The frontier of a study: perplexity and mean accuracy against achieved sparsity."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.figures.style import (
    DASHED,
    INK,
    WIDTHS,
    Width,
    add_legend,
    new_figure,
    paper_style,
    save_figure,
    style_of,
)
from analysis.names import SOURCES, rank
from analysis.rows.points import Measured, Point, Text, gather, mean_tasks, tasks, texts
from analysis.tables.accuracy import task_heading
from analysis.tables.render import significant
from patch.errors import UserError
from patch.methods import METHODS, label_of

# What a panel needs, with its labels, in inches.
_PANEL_WIDTH = 1.2

FillStyle = Literal["full", "top", "bottom", "left", "right"]
FILLS: tuple[FillStyle, ...] = ("full", "top", "bottom", "left", "right")
"""How variants of a method are told apart: as many as there are."""


def plot_frontier(frame: pd.DataFrame, path: Path, width: Width = "double", text: Text | None = None) -> list[Path]:
    """Perplexity, and mean accuracy where there are tasks, against achieved sparsity; one column of panels per model.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        path: without suffix.
        width: of the figure; a single model has its panels side by side in ``double``, stacked in ``single``.
        text: which perplexity; the first of `analysis.rows.points.texts` by default.

    Raises:
        UserError: if the rows have no perplexity (of that text).
    """
    with paper_style():
        return save_figure(draw_frontier(frame, width, text), path)


def draw_frontier(frame: pd.DataFrame, width: Width = "double", text: Text | None = None) -> Figure:
    """The figure of `plot_frontier`."""
    text = _measured_text(frame, text)
    points = [point for point in gather(frame) if text in point.perplexity]
    models = list(dict.fromkeys(point.model for point in points))
    if WIDTHS[width] / len(models) < _PANEL_WIDTH:
        raise UserError(f"{len(models)} models do not fit into a {width} column: plot fewer, or wider")
    by_model = [[point for point in points if point.model == model] for model in models]
    steps = max(_band_steps(chosen, text) for chosen in by_model)
    with_accuracy = any(point.mean_accuracy for point in points)
    beside = with_accuracy and width == "double" and len(models) == 1
    # Rows: band, perplexity, accuracy.
    heights = [0.07 * steps + 0.03, 1] if steps else [1]
    rows = len(heights) if beside or not with_accuracy else len(heights) + 1
    ratios = [*heights, 1][:rows]
    figure = new_figure(WIDTHS[width], 0.4 + (2.3 if beside else 1.95 * sum(ratios)))
    grid = figure.add_gridspec(rows, 2 if beside else len(models), height_ratios=ratios)
    keyed: tuple[Axes, Legend] | None = None
    for place, (model, chosen) in enumerate(zip(models, by_model, strict=True)):
        panel = lowest = figure.add_subplot(grid[len(heights) - 1, place])
        band = figure.add_subplot(grid[0, place], sharex=panel) if steps else None
        draw_perplexity(panel, chosen, text, band)
        if with_accuracy:
            lowest = figure.add_subplot(grid[:, 1] if beside else grid[-1, place])
            draw_accuracy(lowest, chosen, accuracy_label(frame))
        for axis in (panel, lowest):
            axis.set_xlabel("Sparsity (%)" if beside or axis is lowest else "")
            if place:
                axis.set_ylabel("")
        if len(models) > 1:
            (band or panel).set_title(model)
        if place == 0 and (keys := [*_structure_handles(chosen), *variant_handles(chosen)]):
            keyed = panel, panel.legend(handles=keys, loc="upper left", borderaxespad=0.2, labelspacing=0.3)
    add_legend(figure, method_handles(points), 3 if width == "single" else 7)
    if keyed:
        figure.draw_without_rendering()
        _make_room(*keyed)
    return figure


def _make_room(panel: Axes, legend: Legend) -> None:
    """Raise the panel's upper end, on its log scale, until none of its points lies behind the legend at its top."""
    to_panel = panel.transAxes.inverted()
    box = legend.get_window_extent().transformed(to_panel)
    # Not the dense line and the sign of a broken axis, which are placed on the panel.
    drawn = [line.get_xydata() for line in panel.lines if line.get_transform() == panel.transData]
    heights = [y for points in drawn for x, y in to_panel.transform(panel.transData.transform(points)) if x <= box.x1]
    if heights and max(heights) > box.y0 - 0.03:
        low, high = panel.get_ylim()
        panel.set_ylim(low, low * (high / low) ** (max(heights) / (box.y0 - 0.03)))


def _measured_text(frame: pd.DataFrame, text: Text | None) -> Text:
    measured = texts(frame)
    if not measured:
        raise UserError("no perplexity to plot: run the study first")
    if text is not None and text not in measured:
        raise UserError(f"no perplexity of {text} to plot: there is {', '.join(map(str, measured))}")
    return text or measured[0]


def draw_perplexity(axis: Axes, points: Sequence[Point], text: Text, band: Axes | None = None) -> None:
    """Perplexity against sparsity in percent, for the points of one model that have it.

    Args:
        band: axes on top of ``axis``, with which they share sparsity. Points so far above the others that these would
            be squeezed together stand there instead, in order and with their values; without it all are drawn to scale.
    """
    values = {id(point): point.perplexity[text].value for point in points}
    ceiling = _ceiling(points, text) if band else math.inf
    inside = [point for point in points if values[id(point)] <= ceiling]
    fills = fills_of(points)
    _draw_points(axis, inside, lambda point: point.perplexity[text], lambda measured: measured.spread, fills)
    finite = [values[id(point)] for point in inside if math.isfinite(values[id(point)])]
    if finite:
        scale_perplexity(axis, min(finite), max(finite))
    name = SOURCES.get(text.source, text.source)
    axis.set_ylabel(f"{name} perplexity @{text.length}")
    _sparsity_axis(axis, points)
    if band:
        _draw_band(axis, band, [point for point in points if point not in inside], lambda point: values[id(point)])


def draw_accuracy(axis: Axes, points: Sequence[Point], label: str) -> None:
    """Mean accuracy in percent with its error, against sparsity in percent, for the points of one model.

    Points of equal sparsity that are not part of a curve are set side by side, so that their errors can be told apart.
    """
    shown = [point for point in points if point.mean_accuracy]

    def in_percent(point: Point) -> Measured:
        mean = point.mean_accuracy
        assert mean is not None
        stderr, spread = (None if part is None else 100 * part for part in (mean.stderr, mean.spread))
        return Measured(100 * mean.value, stderr, spread, mean.seeds)

    _draw_points(axis, shown, in_percent, lambda measured: measured.error, fills_of(points), _side_by_side(shown))
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_ylabel(label)
    _sparsity_axis(axis, points)


def _side_by_side(points: Iterable[Point]) -> dict[int, float]:
    """How far each point is moved along the axis, in percent, by its id."""
    coinciding: dict[int, list[Point]] = {}
    for point in points:
        if point.structure not in ("dense", "hybrid"):
            coinciding.setdefault(round(100 * _sparsity(point)), []).append(point)
    moved = {}
    for members in coinciding.values():
        gap = min(0.9, 3.6 / max(1, len(members) - 1))
        for place, point in enumerate(members):
            moved[id(point)] = gap * (place - (len(members) - 1) / 2)
    return moved


def accuracy_label(frame: pd.DataFrame) -> str:
    """What an axis of mean accuracies is called."""
    over = mean_tasks(tasks(frame))
    return f"{task_heading(over[0])}\naccuracy (%)" if len(over) == 1 else f"Mean accuracy, {len(over)} tasks (%)"


def _draw_points(
    axis: Axes,
    points: Sequence[Point],
    measure: Callable[[Point], Measured],
    error: Callable[[Measured], float | None],
    fills: Mapping[str, FillStyle],
    moved: Mapping[int, float] | None = None,
) -> None:
    """Dense models as lines across, series of hybrid points as curves, all others as markers."""
    series: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        series.setdefault((point.method, point.structure, point.tile, point.variant), []).append(point)
    for (method, structure, _, variant), members in series.items():
        style = style_of(method)
        members.sort(key=_sparsity)
        values = [measure(point) for point in members]
        if structure == "dense":
            for measured in values:
                axis.axhline(measured.value, color=style.color, linewidth=0.9, linestyle=DASHED, zorder=2, gid="dense")
            continue
        errors = [error(measured) for measured in values]
        axis.errorbar(
            [100 * _sparsity(point) + (moved or {}).get(id(point), 0) for point in members],
            [measured.value for measured in values],
            # NaN draws no bar.
            yerr=np.array(errors, dtype=float),
            elinewidth=0.7,
            capsize=1.5,
            capthick=0.7,
            zorder=style.zorder + (0.5 if structure == "unstructured" else 0),
            gid=f"{method} {structure}",
            **marking(method, structure, fills[variant]),
        )


def fills_of(points: Sequence[Point]) -> dict[str, FillStyle]:
    """How much of a marker is filled, by variant: all of those without one or where all have it, halves of the others.

    There are fewer halves than a study may have variants: those that no method has both of may share one.
    """
    fills: dict[str, FillStyle] = {}
    methods = _methods_of(points)
    for variant, its in methods.items():
        near = {fills[other] for other, theirs in methods.items() if other in fills and its & theirs}
        used = Counter(fills.values())
        free = [fill for fill in FILLS if fill not in near] or list(FILLS)
        alone = not variant or len(methods) == 1
        fills[variant] = "full" if alone else min(free, key=lambda fill: (used[fill], fill == "full"))
    return fills


def _methods_of(points: Sequence[Point]) -> dict[str, set[str]]:
    """The methods that have each variant."""
    return {
        variant: {point.method for point in points if point.variant == variant}
        for variant in sorted({point.variant for point in points})
    }


def variant_handles(points: Sequence[Point]) -> list[Line2D]:
    """What half-filled markers mean; that of the method which alone has a variant, grey where several do."""
    fills = fills_of(points)
    if len(fills) < 2:
        return []
    grey = {"color": "0.4", "marker": "o", "markersize": 4.2, "markerfacecolor": "0.4", "markeredgecolor": "0.4"}
    handles = []
    for variant, methods in _methods_of(points).items():
        if variant:
            look = marking(min(methods), "2:4", fills[variant]) | (grey if len(methods) > 1 else {})
            handles.append(Line2D([], [], label=variant, **look))
    return handles


def marking(method: str, structure: str, fill: FillStyle = "full") -> dict[str, Any]:
    """Hollow for unstructured, filled for structured, a line where sparsity can be chosen."""
    style = style_of(method)
    hollow = structure == "unstructured"
    outlined = hollow or fill != "full"
    return {
        "fillstyle": fill,
        "markerfacecoloralt": "white",
        "color": style.color,
        "marker": style.marker,
        "markersize": style.size,
        "markerfacecolor": "white" if hollow else style.color,
        "markeredgecolor": style.color if outlined else "white",
        "markeredgewidth": 1.0 if outlined else 0.4,
        "linestyle": "-" if structure == "hybrid" else "none",
        "linewidth": style.width,
    }


def method_handles(points: Sequence[Point]) -> list[Line2D]:
    methods = sorted({point.method for point in points}, key=lambda method: rank(METHODS, method))
    handles = []
    for method in methods:
        present = {point.structure for point in points if point.method == method}
        look = marking(method, "hybrid" if "hybrid" in present else "2:4")
        if method == "dense":
            look = {"color": INK, "linewidth": 0.9, "linestyle": DASHED}
        handles.append(Line2D([], [], label=label_of(method), **look))
    return handles


def _structure_handles(points: Sequence[Point]) -> list[Line2D]:
    """What hollow, filled and joined markers mean, where a method has several kinds."""
    kinds = {(point.method, point.structure) for point in points}
    if len(kinds) == len({method for method, _ in kinds}):
        return []
    present = {structure for _, structure in kinds}
    names = {"unstructured": "unstructured", "2:4": "2:4", "hybrid": "hybrid tiles"}
    neutral = {"color": "0.4", "marker": "o", "markersize": 4.2, "linewidth": 1.1}
    handles = []
    for structure, name in names.items():
        if structure in present:
            face, edge = ("white", "0.4") if structure == "unstructured" else ("0.4", "white")
            look = marking("dense", structure) | neutral | {"markerfacecolor": face, "markeredgecolor": edge}
            handles.append(Line2D([], [], label=name, **look))
    return handles


def _ceiling(points: Sequence[Point], text: Text) -> float:
    """The highest perplexity that is drawn to scale.

    Hybrid and learned points and the dense model decide how much is seen; other points are drawn with them up to half
    as much again, on a logarithmic scale.
    """
    values = [(point, point.perplexity[text].value) for point in points]
    finite = [(point, value) for point, value in values if math.isfinite(value)]
    core = [value for point, value in finite if point.structure == "hybrid" or point.method in ("dense", "maskllm")]
    if len(core) < 2:
        core = [value for point, value in finite if point.method != "magnitude"] or [value for _, value in finite]
    if not core:
        return 0.0
    low, high = min(core), max(core)
    ceiling = high * max(math.sqrt(high / low), 1.1)
    # A band for what would stretch the axis only a little is not worth the break.
    highest = max(value for _, value in finite)
    return highest if highest <= ceiling * 1.15 else ceiling


def _band_steps(points: Sequence[Point], text: Text) -> int:
    """How many points of one sparsity are above the scale, at most."""
    ceiling = _ceiling(points, text)
    above = [_column(point) for point in points if not point.perplexity[text].value <= ceiling]
    return max((above.count(column) for column in above), default=0)


def _column(point: Point) -> int:
    return round(100 * _sparsity(point))


def scale_perplexity(axes: Axes, low: float, high: float, along: Literal["x", "y"] = "y") -> None:
    """One axis from ``low`` to ``high``: linear for small ranges, logarithmic with plain numbers for others."""
    axis = axes.yaxis if along == "y" else axes.xaxis
    set_limits = axes.set_ylim if along == "y" else axes.set_xlim
    if high / low > 2:
        (axes.set_yscale if along == "y" else axes.set_xscale)("log")
        margin = (high / low) ** 0.06
        set_limits(low / margin, high * margin)
        axis.set_major_locator(FixedLocator(_log_ticks(low / margin, high * margin)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        margin = 0.07 * (high - low) or 0.05 * high
        set_limits(low - margin, high + margin)
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _log_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between ``low`` and ``high``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 4, 6), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 8:
            break
    return ticks


def _draw_band(axis: Axes, band: Axes, points: Sequence[Point], value: Callable[[Point], float]) -> None:
    """Points above the scale of ``axis``, in the band on top of it: one step each, and their values."""
    columns: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda point: (math.isnan(value(point)), value(point))):
        columns.setdefault(_column(point), []).append(point)
    for members in columns.values():
        for step, point in enumerate(members):
            at = (100 * _sparsity(point), step)
            look = marking(point.method, point.structure)
            band.plot(*at, gid=f"{point.method} {point.structure}", clip_on=False, **look)
            band.annotate(
                significant(value(point)), at, (-5, 0), textcoords="offset points", ha="right", va="center", size=6.5
            )
    band.set_ylim(-0.6, max((len(members) for members in columns.values()), default=1) - 0.4)
    band.set_yticks([])
    band.tick_params(axis="x", bottom=False, labelbottom=False)
    band.spines["bottom"].set_visible(False)
    band.grid(False)
    if not points:
        band.spines["left"].set_visible(False)
        return
    band.text(0.02, 0.5, "not to scale", transform=band.transAxes, va="center", size=6, style="italic", color="0.45")
    # The usual sign of a broken axis.
    for axes, end in ((axis, 1.0), (band, 0.0)):
        (sign,) = axes.plot(
            [0],
            [end],
            transform=axes.transAxes,
            marker=[(-1, -0.5), (1, 0.5)],
            markersize=5,
            color=INK,
            markeredgewidth=0.6,
            clip_on=False,
            linestyle="none",
            gid="break",
        )
        sign.set_in_layout(False)


def _sparsity_axis(axis: Axes, points: Sequence[Point]) -> None:
    top = max([50.0, *(100 * _sparsity(point) for point in points if point.structure != "dense")])
    axis.set_xlim(0, top + 4)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_xlabel("Sparsity (%)")


def _sparsity(point: Point) -> float:
    if point.achieved is None:
        raise UserError(f"trial {point.trials[0]} has no achieved sparsity: the rows of its prune stage are missing")
    return point.achieved
