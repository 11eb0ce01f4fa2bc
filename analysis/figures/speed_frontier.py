"""Accuracy against speed of the same checkpoints: what a reader gives up for how much."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figures.about import gpus, listed
from analysis.figures.frontier import accuracy_label
from analysis.figures.labels import Label, Panel, write_labels
from analysis.figures.scales import scale_perplexity
from analysis.figures.series import DENSE_POINT, marking
from analysis.figures.style import (
    FAINT,
    INK,
    SMALL,
    WIDTHS,
    Width,
    add_legend,
    in_paper_style,
    new_figure,
    room,
    set_title,
    style_of,
    text_ink,
)
from analysis.names import SOURCES, rank, workload_name
from analysis.rows.points import Measured, Point, gather, texts
from analysis.rows.same_checkpoint import timed_on
from analysis.tables.packed import unfused, workloads
from analysis.tables.speed_frontier import Placed, more_of, pareto, placed, placed_on_shapes, workloads_of
from patch.errors import UserError
from patch.methods import METHODS, label_of

# What lies in the middle of the marker of a point of fewer bits, in white.
_PRECISION_MARKS: dict[str, dict[str, Any]] = {
    "FP8": {"marker": ".", "markersize": 1.7},
    "INT8": {"marker": "+", "markersize": 2.8, "markeredgewidth": 0.7},
    "INT4": {"marker": "_", "markersize": 3.2, "markeredgewidth": 1.0},
}
_FRONT: dict[str, Any] = {"color": FAINT, "linewidth": 0.9}
# What is slower than this share of the next faster one stands at the edge of the panel, with its speed.
_FAR = 0.75


@in_paper_style
def draw_speed_frontier(
    frame: pd.DataFrame, width: Width = "double", shape: str | None = None, points: Sequence[Point] | None = None
) -> Figure:
    """Perplexity, and mean accuracy where there are tasks, against end-to-end speedup, a column of panels per workload.

    A point is one checkpoint; the line is the Pareto front. In ``single`` there are two workloads to a row.

    Args:
        frame: as from `analysis.rows.load.load_rows`, of one model.
        shape, points: as `placed`.

    Raises:
        UserError: if nothing was timed, or not all of it on one kind of GPU.
    """
    timed = workloads(frame)
    if not timed:
        raise UserError("no speed to plot: run a frontier study on a GPU first")
    gpu = timed_on(frame)
    gathered = gather(frame) if points is None else points
    by_workload = {workload: placed(frame, workload, shape, gathered) for workload in timed}
    shown = [each.point for each in by_workload[timed[0]]]
    tiles = _timed_tiles(frame, shape) if shape else {point.tile for point in shown if point.tile}
    on = f"tile statistics on {shape} shapes, " if shape else ""
    models = listed(dict.fromkeys(point.model for point in shown))
    tiled = f"tiles of {listed(sorted(tiles))}" if tiles else "no tiles"
    title = f"{models}, {on}{tiled}, timed on one {gpus([gpu])}"
    if unfused(frame[frame.stage.str.startswith("carried:" if shape else "speed:")]):
        title += "; superseded: the dense model was not fused"
    return _draw_frontiers(by_workload, gathered, title, width)


@in_paper_style
def draw_front_on_shapes(points: Sequence[Point], timed: pd.DataFrame, shape: str, width: Width = "double") -> Figure:
    """As `draw_speed_frontier`, at the speed of a larger model (`analysis.tables.speed_frontier.placed_on_shapes`).

    Args:
        points: of one model, as from `analysis.rows.points.gather`.
        timed: as from `analysis.tables.kernels.load_bench`, of whole models.
        shape: the larger model.
    """
    own = timed[timed.model == shape]
    packed = own[(own.implementation == "hybrid") & (own.metric == "time")]
    by_workload = {work: placed_on_shapes(points, own, work) for work in workloads_of(packed)}
    models = listed(dict.fromkeys(point.model for point in points))
    tile = listed(dict.fromkeys(packed.tile))
    title = f"quality of {models}, speed of {shape} with random weights and tiles of {tile}, {gpus(packed.gpu)}"
    return _draw_frontiers(by_workload, points, title, width)


def _draw_frontiers(
    by_workload: Mapping[str, Sequence[Placed]], gathered: Sequence[Point], title: str, width: Width
) -> Figure:
    timed = list(by_workload)
    text = texts(gathered)[0]
    shown = [each.point for each in by_workload[timed[0]]]
    quantities: list[tuple[str, Callable[[Point], Measured | None], float]] = [
        (f"{SOURCES.get(text.source, text.source)}\nperplexity @{text.length}", lambda p: p.perplexity.get(text), 1.0)
    ]
    # A point alone is beside nothing.
    if sum(point.mean_accuracy is not None for point in shown) > 1:
        quantities.append((accuracy_label(gathered).replace(", ", ",\n"), lambda p: p.mean_accuracy, 100.0))
    blocks = math.ceil(len(timed) / (4 if width == "double" else 2))
    columns = math.ceil(len(timed) / blocks)
    rows = blocks * len(quantities)
    figure = new_figure(WIDTHS[width], 0.75 + 1.75 * rows, constrained=False)
    more_rows = 0.145 * (add_legend(figure, _key(shown), 7 if width == "double" else 3) - 1)
    figure.set_figheight(figure.get_figheight() + more_rows)
    # Between blocks stand the name of an axis and the titles of the next panels.
    between = (0.36, 0.12 if blocks == 1 else 0.66)
    beside = {"left": 0.62, "right": 0.09, "bottom": 0.62 + more_rows, "above": 0.19}
    place_of = room(figure, title, rows, columns, **beside, between=between)
    grid = figure.add_gridspec(rows, columns, **place_of)
    written: list[Panel] = []
    for place, workload in enumerate(timed):
        block, column = divmod(place, columns)
        for number, (label, measure, factor) in enumerate(quantities):
            axis = figure.add_subplot(grid[block * len(quantities) + number, column])
            here = [(each, found, factor) for each in by_workload[workload] if (found := measure(each.point))]
            written.append(_draw(axis, here, lower_is_better=factor == 1.0))
            axis.set_ylabel(label if column == 0 else "")
            if number == 0:
                axis.set_title(workload_name(workload))
            if number == len(quantities) - 1:
                axis.set_xlabel("Speedup over dense")
            else:
                axis.tick_params(labelbottom=False)
    set_title(figure, title)
    write_labels(figure, written)
    return figure


def _timed_tiles(frame: pd.DataFrame, shape: str) -> set[str]:
    rows = frame[(frame.stage == f"carried:{shape}") & (frame.metric == "speedup")]
    return {"x".join(map(str, labels["tile"])) for labels in rows.labels if labels.get("tile")}


def _key(points: Sequence[Point]) -> list[Line2D]:
    """What markers and the line mean."""
    handles = []
    for method in sorted({point.method for point in points}, key=lambda method: rank(METHODS, method)):
        look = marking(method, "2:4") | (DENSE_POINT if method == "dense" else {})
        # What is true of all of a method's points is said with its name, such as a recipe's.
        said = {more_of(point) for point in points if point.method == method}
        name = " ".join((label_of(method), *(said if len(said) == 1 else ()))).strip()
        handles.append(Line2D([], [], label=name, **(look | {"linestyle": "none"})))
    if any(point.structure == "unstructured" for point in points):
        hollow = marking("", "unstructured") | {"color": "0.4", "markeredgecolor": "0.4", "marker": "o"}
        handles.append(Line2D([], [], label="unstructured", **hollow))
    for precision, mark in _PRECISION_MARKS.items():
        if any(point.precision == precision for point in points):
            look = {"color": "0.4", "linestyle": "none", "markersize": 2 * mark["markersize"]}
            handles.append(Line2D([], [], label=f"{precision} (in white)", **(mark | look)))
    handles.append(Line2D([], [], label="Pareto front", **_FRONT))
    return handles


def _draw(axis: Axes, measured: Sequence[tuple[Placed, Measured, float]], lower_is_better: bool) -> Panel:
    """Points with their errors, and the frontier of those that are results; what is far slower gets its speed said."""
    labels: list[Label] = []
    results: list[tuple[float, float]] = []
    ends: list[float] = []
    edge = _edge([each.speedup for each, _, _ in measured])
    for each, quality, factor in measured:
        value, bar = factor * quality.value, None if quality.error is None else factor * quality.error
        style = style_of(each.point.method)
        look = marking(each.point.method, each.point.structure) | {"linestyle": "none"}
        if each.point.method == "dense":
            look |= DENSE_POINT
        x = each.speedup
        if not each.agrees:
            look |= {"markerfacecolor": "none", "markeredgecolor": look["color"], "markeredgewidth": 0.8}
            axis.annotate("wrong", (x, value), (3, 3), textcoords="offset points", color=INK, size=SMALL)
        elif math.isfinite(value):
            results.append((x, value))
            # On a logarithmic scale no bar may reach zero.
            ends += [max(value - (bar or 0.0), value / 2), value + (bar or 0.0)]
        if x < edge:
            x = edge
            labels.append(Label(f"{each.speedup:.2f}x", (x, value), "right", text_ink(each.point.method)))
        axis.errorbar([x], [value], yerr=bar, elinewidth=0.6, zorder=style.zorder, **look)
        if each.point.precision in _PRECISION_MARKS:
            white = _PRECISION_MARKS[each.point.precision] | {"color": "white", "linestyle": "none"}
            axis.plot([x], [value], zorder=style.zorder + 0.1, gid=each.point.precision, **white)
    front = pareto(results, lower_is_better)
    axis.step([x for x, _ in front], [y for _, y in front], where="pre", zorder=1, gid="pareto", **_FRONT)
    axis.axvline(1.0, color="0.8", linewidth=0.7, zorder=0)
    if lower_is_better and ends:
        scale_perplexity(axis, min(ends), max(ends))
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    low, high = axis.get_xlim()
    if any(each.speedup < edge for each, _, _ in measured):
        low = edge - 0.06 * (high - edge)
        axis.set_xlim(low, high)
    return axis, labels, {"right": (edge + 0.08 * (high - low), edge + 0.4 * (high - low))}


def _edge(speedups: Sequence[float]) -> float:
    """Where what is far slower than all others is drawn, with room for its speed beside them; zero if nothing is."""
    ordered = sorted(speedups, reverse=True)
    gap = next((place for place in range(1, len(ordered)) if ordered[place] < _FAR * ordered[place - 1]), 0)
    if not gap:
        return 0.0
    fastest, slowest = ordered[0], ordered[gap - 1]
    return slowest - 0.65 * max(fastest - slowest, 0.1)
