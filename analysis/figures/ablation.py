"""Many variants of one method at one sparsity, which no frontier could tell apart: one line each, best first."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.frontier import FILLS, marking, scale_perplexity
from analysis.figures.style import DASHED, INK, WIDTHS, Width, new_figure, paper_style, save_figure
from analysis.names import percent
from analysis.rows.points import Point, gather, texts
from analysis.tables.accuracy import heading
from analysis.tables.render import significant
from patch.errors import UserError
from patch.methods import label_of

Group = tuple[str, str, float, str | None]


def ablated(points: Sequence[Point]) -> dict[Group, list[Point]]:
    """By (model, method, target sparsity, tile), points of more variants than markers can show."""
    groups: dict[Group, list[Point]] = {}
    for point in points:
        groups.setdefault((point.model, point.method, point.sparsity, point.tile), []).append(point)
    return {group: members for group, members in groups.items() if len({m.variant for m in members}) > len(FILLS)}


def plot_ablation(frame: pd.DataFrame, path: Path, width: Width = "single") -> list[Path]:
    """Perplexity of each variant with its spread over seeds, lowest on top, and that of the dense model.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        path: without suffix.

    Raises:
        UserError: if no method has so many variants at one sparsity.
    """
    with paper_style():
        return save_figure(draw_ablation(frame, width), path)


def draw_ablation(frame: pd.DataFrame, width: Width = "single") -> Figure:
    """The figure of `plot_ablation`."""
    points = gather(frame)
    groups = ablated(points)
    if not groups:
        raise UserError("no ablation to plot: no method has more than a few variants at one sparsity")
    text = texts(frame)[0]
    counts = [len(members) for members in groups.values()]
    figure = new_figure(WIDTHS[width], 0.6 * len(groups) + 0.17 * sum(counts))
    grid = figure.add_gridspec(len(groups), 1, height_ratios=counts)
    for place, ((model, method, sparsity, tile), members) in enumerate(groups.items()):
        axis = figure.add_subplot(grid[place, 0])
        shown = sorted((m for m in members if text in m.perplexity), key=lambda m: -m.perplexity[text].value)
        look = marking(method, "hybrid") | {"linestyle": "none"}
        for height, point in enumerate(shown):
            measured = point.perplexity[text]
            axis.errorbar([measured.value], [height], xerr=measured.spread, elinewidth=0.7, capsize=1.5, **look)
            axis.annotate(
                significant(measured.value),
                (measured.value + (measured.spread or 0), height),
                (5, 0),
                textcoords="offset points",
                va="center",
                size=6.5,
                color=INK,
            )
        dense = [p.perplexity[text].value for p in points if p.method == "dense" and p.model == model]
        values = [p.perplexity[text].value for p in shown]
        # Room on the right for the number beside the last point.
        scale_perplexity(axis, min(values + dense), max(values) * 1.15, along="x")
        for value in dense:
            axis.axvline(value, color=INK, linewidth=0.9, linestyle=DASHED, zorder=2, gid="dense")
        axis.set_yticks(range(len(shown)), [point.variant or "unchanged" for point in shown])
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.grid(axis="y", visible=False)
        axis.set_title(" ".join(filter(None, (model, label_of(method), percent(sparsity), tile))), loc="left")
        axis.set_xlabel(heading(text).replace("PPL", "perplexity") + (", dense dashed" if dense else ""))
    return figure
