"""Perplexity against the GPU hours that a mask took: what to run with the hours that one has."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.figures.about import about
from analysis.figures.labels import Label, Panel, write_labels
from analysis.figures.scales import scale_perplexity
from analysis.figures.series import marking
from analysis.figures.style import DASHED, INK, WIDTHS, Width, in_paper_style, new_figure, room, set_title, text_ink
from analysis.names import percent
from analysis.rows.points import Point, Text, gather, texts
from analysis.rows.spent import Spent, spent
from analysis.tables.accuracy import heading
from patch.errors import UserError
from patch.methods import METHODS, label_of

# Round numbers of hours, and what they are called.
_TICKS = {
    1 / 3600: "1 s",
    10 / 3600: "10 s",
    1 / 60: "1 min",
    1 / 6: "10 min",
    1.0: "1 h",
    10.0: "10 h",
    100.0: "100 h",
}


def costed(frame: pd.DataFrame, points: Sequence[Point], text: Text) -> dict[float, list[tuple[Point, Spent]]]:
    """By target sparsity, masks of tiles whose cost is known, where a learned or trained one stands beside others."""
    took = {trials: each for trials, each in spent(frame, points).items() if not each.alone}
    groups: dict[float, list[tuple[Point, Spent]]] = {}
    for point in points:
        if point.structure in ("2:4", "hybrid") and point.trials in took and text in point.perplexity:
            groups.setdefault(point.sparsity, []).append((point, took[point.trials]))
    kinds = {
        sparsity: {(METHODS[p.method].family if p.method in METHODS else "", p.trained) for p, _ in members}
        for sparsity, members in groups.items()
    }
    return {sparsity: groups[sparsity] for sparsity in sorted(groups, reverse=True) if len(kinds[sparsity]) > 1}


@in_paper_style
def draw_cost(frame: pd.DataFrame, width: Width = "double", points: Sequence[Point] | None = None) -> Figure:
    """A panel a sparsity: perplexity against GPU hours, both to logarithmic scales, all panels to the same ones.

    Markers of masks whose kept weights were trained are hollow, with a line from what they were made of.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if nothing that was made on GPUs can be compared, or there are several models.
    """
    points = gather(frame) if points is None else points
    if len({point.model for point in points}) != 1 or not texts(points):
        raise UserError("cost is drawn of one model with perplexity: choose rows of one")
    text = texts(points)[0]
    groups = costed(frame, points, text)
    if not groups:
        raise UserError("no cost to plot: no learned mask was made on a GPU beside another one")
    figure = new_figure(WIDTHS[width], 0.6 + 1.75 * len(groups), constrained=False)
    place_of = room(figure, about(frame), len(groups), above=0.19, between=(0, 0.26))
    axes = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False, gridspec_kw=place_of)[:, 0]
    dense = [point.perplexity[text].value for point in points if point.is_original and text in point.perplexity]
    values = [point.perplexity[text].value for members in groups.values() for point, _ in members] + dense
    hours = [each.gpu_hours for members in groups.values() for _, each in members]
    low, high = min(hours) / 1.6, max(hours) * 1.6
    # Free columns for names on the right.
    far = high * (high / low) ** 0.55
    written: list[Panel] = []
    for axis, (sparsity, members) in zip(axes, groups.items(), strict=True):
        labels = []
        for point, took in members:
            look = marking(point.method, point.structure) | {"linestyle": "none"}
            if point.trained:
                look |= {"markerfacecolor": "white", "markeredgecolor": look["color"], "markeredgewidth": 1.0}
                for other, earlier in members:
                    if took.made_of in other.trials:
                        xs, ys = [earlier.gpu_hours, took.gpu_hours], [_value(p, text) for p in (other, point)]
                        axis.plot(xs, ys, color=look["color"], linewidth=0.7, zorder=2, gid="made of")
            axis.plot([took.gpu_hours], [_value(point, text)], gid=f"{point.method} cost", zorder=4, **look)
            name = " ".join([label_of(point.method), f"({point.variant})" if point.variant else ""]).strip()
            labels.append(Label(name, (took.gpu_hours, _value(point, text)), "right", text_ink(point.method)))
        for value in dense:
            axis.axhline(value, color=INK, linewidth=0.9, linestyle=DASHED, zorder=1, gid="dense")
            labels.append(Label("Dense", (high, value), "right", INK))
        axis.set_xscale("log")
        axis.set_xlim(low, far)
        scale_perplexity(axis, min(values), max(values))
        axis.set_title("2:4" if sparsity == 0.5 else percent(sparsity), loc="right")
        written.append((axis, labels, {"left": (low, low), "right": (high, far)}))
    shown = {hour: name for hour, name in _TICKS.items() if low <= hour <= high}
    axes[-1].xaxis.set_major_locator(FixedLocator(list(shown)))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda hour, _: shown.get(hour, "")))
    axes[-1].xaxis.set_minor_locator(NullLocator())
    axes[-1].set_xlabel("GPU time to make the mask")
    axes[len(axes) // 2].set_ylabel(heading(text).replace("PPL", "perplexity"))
    set_title(figure, about(frame))
    write_labels(figure, written)
    return figure


def _value(point: Point, text: Text) -> float:
    return point.perplexity[text].value
