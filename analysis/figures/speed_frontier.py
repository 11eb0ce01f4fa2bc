"""Accuracy against speed of the same checkpoints: what a reader gives up for how much."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figures.frontier import (
    FillStyle,
    accuracy_label,
    fills_of,
    marking,
    method_handles,
    scale_perplexity,
    variant_handles,
)
from analysis.figures.style import INK, WIDTHS, Width, add_legend, new_figure, paper_style, save_figure
from analysis.names import SOURCES, workload_name, workload_of
from analysis.rows.points import Measured, Point, gather, texts
from analysis.rows.same_checkpoint import timed_on
from analysis.tables.packed import workloads, wrong
from patch.errors import UserError
from patch.methods import label_of

# A model in its own right here, not a line across.
_DENSE: dict[str, Any] = {
    "marker": "*",
    "markersize": 7.0,
    "color": INK,
    "markerfacecolor": INK,
    "markeredgecolor": "white",
}


@dataclass(frozen=True)
class Placed:
    """A point and its speed.

    Attributes:
        point: what was pruned how, and its accuracy.
        speedup: of a workload over the dense model.
        agrees: whether the packed model computes what the unpacked one does; a point that does not is no result.
    """

    point: Point
    speedup: float
    agrees: bool


def placed(frame: pd.DataFrame, workload: str, shape: str | None = None) -> list[Placed]:
    """The points that were timed on a workload; of several seeds, the mean speedup.

    Args:
        shape: of another model's shapes, on which tile statistics were timed (`analysis.tables.packed.carried_shapes`);
            the dense model has its place there, too.

    Raises:
        UserError: if rows of one point are of different checkpoints (`analysis.rows.same_checkpoint`).
    """
    stage = f"carried:{shape}" if shape else f"speed:{workload}"
    rows = frame[(frame.stage == stage) & (frame.metric == "speedup")]
    if shape:
        rows = rows[[workload_of(labels) == workload for labels in rows.labels]]
    speeds = rows.groupby("trial").value.mean()
    bad = wrong(frame)
    found = []
    for point in gather(frame):
        timed = [float(speeds[trial]) for trial in point.trials if trial in speeds.index]
        if shape and point.method == "dense":
            timed = [1.0]
        if timed:
            found.append(Placed(point, sum(timed) / len(timed), not bad & set(point.trials)))
    return found


def pareto(points: Sequence[tuple[float, float]], lower_is_better: bool) -> list[tuple[float, float]]:
    """Those of (speedup, quality) that no other beats in both, by rising speedup."""
    sign = 1 if lower_is_better else -1
    kept: list[tuple[float, float]] = []
    for speedup, quality in sorted(points, key=lambda each: (-each[0], sign * each[1])):
        if not kept or sign * quality < sign * kept[-1][1]:
            kept.append((speedup, quality))
    return kept[::-1]


def plot_speed_frontier(
    frame: pd.DataFrame, path: Path, width: Width = "double", shape: str | None = None
) -> list[Path]:
    """Perplexity, and mean accuracy where there are tasks, against end-to-end speedup, a column of panels per workload.

    Args:
        frame: as from `analysis.rows.load.load_rows`, of one model.
        path: without suffix.
        shape: as `placed`.

    Raises:
        UserError: if nothing was timed, or not all of it on one kind of GPU.
    """
    with paper_style():
        return save_figure(draw_speed_frontier(frame, width, shape), path)


def draw_speed_frontier(frame: pd.DataFrame, width: Width = "double", shape: str | None = None) -> Figure:
    """The figure of `plot_speed_frontier`."""
    timed = workloads(frame)
    if not timed:
        raise UserError("no speed to plot: run a frontier study on a GPU first")
    timed_on(frame)
    by_workload = {workload: placed(frame, workload, shape) for workload in timed}
    with_accuracy = any(each.point.mean_accuracy for each in by_workload[timed[0]])
    rows = 2 if with_accuracy else 1
    figure = new_figure(WIDTHS[width], 0.4 + 1.9 * rows)
    grid = figure.add_gridspec(rows, len(timed))
    text = texts(frame)[0]
    points = [each.point for each in by_workload[timed[0]]]
    fills = fills_of(points)
    for column, workload in enumerate(timed):
        top = figure.add_subplot(grid[0, column])
        here = [each for each in by_workload[workload] if text in each.point.perplexity]
        _draw(top, [(each, each.point.perplexity[text], 1.0) for each in here], fills, lower_is_better=True)
        top.set_title(workload_name(workload))
        lowest = top
        if with_accuracy:
            lowest = figure.add_subplot(grid[1, column], sharex=top)
            top.tick_params(labelbottom=False)
            means = [(each, each.point.mean_accuracy) for each in by_workload[workload]]
            _draw(lowest, [(each, mean, 100.0) for each, mean in means if mean], fills, lower_is_better=False)
        lowest.set_xlabel("Speedup over dense" + (f",\n{shape} shapes" if shape else ""))
        if column == 0:
            top.set_ylabel(f"{SOURCES.get(text.source, text.source)} perplexity @{text.length}")
            if with_accuracy:
                lowest.set_ylabel(accuracy_label(frame))
    pruned = [point for point in points if point.method != "dense"]
    handles = method_handles(pruned)
    if len(pruned) < len(points):
        handles.insert(0, Line2D([], [], label=label_of("dense"), linestyle="none", **_DENSE))
    if any(point.structure == "unstructured" for point in points):
        hollow = marking("", "unstructured") | {"color": "0.4", "markeredgecolor": "0.4", "marker": "o"}
        handles.append(Line2D([], [], label="unstructured", **hollow))
    handles += variant_handles(points)
    add_legend(figure, handles, 3 if width == "single" else 7)
    return figure


def _draw(
    axis: Axes,
    measured: Sequence[tuple[Placed, Measured, float]],
    fills: Mapping[str, FillStyle],
    lower_is_better: bool,
) -> None:
    """Points with their errors, and the frontier of those that are results."""
    results: list[tuple[float, float]] = []
    ends: list[float] = []
    for each, quality, factor in measured:
        value, bar = factor * quality.value, None if quality.error is None else factor * quality.error
        look = marking(each.point.method, each.point.structure, fills.get(each.point.variant, "full"))
        look |= {"linestyle": "none"}
        if each.point.method == "dense":
            look |= _DENSE
        if not each.agrees:
            look |= {"markerfacecolor": "none", "markeredgecolor": look["color"], "markeredgewidth": 0.8}
            axis.annotate("wrong", (each.speedup, value), (3, 3), textcoords="offset points", color=INK)
        elif math.isfinite(value):
            results.append((each.speedup, value))
            # On a logarithmic scale no bar may reach zero.
            ends += [max(value - (bar or 0.0), value / 2), value + (bar or 0.0)]
        axis.errorbar([each.speedup], [value], yerr=bar, elinewidth=0.7, capsize=1.5, zorder=3, **look)
    edge = pareto(results, lower_is_better)
    axis.step(
        [x for x, _ in edge], [y for _, y in edge], where="pre", color="0.6", linewidth=0.8, zorder=1, gid="pareto"
    )
    axis.axvline(1.0, color="0.8", linewidth=0.7, zorder=0)
    if lower_is_better and ends:
        scale_perplexity(axis, min(ends), max(ends))
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
