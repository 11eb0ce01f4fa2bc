"""How much the tile shape matters: perplexity, and mean accuracy where there are tasks, by tile shape."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.frontier import FillStyle, accuracy_label, fills_of, marking, method_handles, variant_handles
from analysis.figures.style import DASHED, INK, WIDTHS, Width, add_legend, new_figure, paper_style, save_figure
from analysis.names import percent
from analysis.rows.points import Measured, Point, gather, texts, tile_order
from analysis.tables.accuracy import heading
from patch.errors import UserError

# Fewer shapes are no sweep over shapes.
_FEWEST = 3
Group = tuple[str, str, float, str]


def swept(points: Sequence[Point]) -> dict[Group, list[Point]]:
    """Points that differ in nothing but their tile shape, smallest tile first, by what they have in common.

    Returns:
        By (model, method, target sparsity, variant), where there are three shapes or more.
    """
    groups: dict[Group, list[Point]] = {}
    for point in points:
        if point.structure == "hybrid" and point.tile:
            groups.setdefault((point.model, point.method, point.sparsity, point.variant), []).append(point)
    return {
        group: sorted(members, key=lambda point: tile_order(point.tile))
        for group, members in groups.items()
        if len({point.tile for point in members}) >= _FEWEST
    }


def plot_tile_shapes(frame: pd.DataFrame, path: Path, width: Width = "single") -> list[Path]:
    """Perplexity against the tile shape, a line per method and sparsity, with that of the dense model.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        path: without suffix.

    Raises:
        UserError: if no three points differ in nothing but their tile shape.
    """
    with paper_style():
        return save_figure(draw_tile_shapes(frame, width), path)


def draw_tile_shapes(frame: pd.DataFrame, width: Width = "single") -> Figure:
    """The figure of `plot_tile_shapes`."""
    points = gather(frame)
    groups = swept(points)
    if not groups:
        raise UserError("no sweep over tile shapes to plot: run a study such as smollm2-tiles first")
    text = texts(frame)[0]
    shapes = sorted({point.tile for members in groups.values() for point in members if point.tile}, key=tile_order)
    drawn = [point for members in groups.values() for point in members]
    models = {model for model, *_ in groups}
    dense = [point for point in points if point.method == "dense" and point.model in models]
    accurate = all(point.mean_accuracy for point in drawn)
    figure = new_figure(WIDTHS[width], 0.5 + (3.6 if accurate else 2.0))
    axes = figure.subplots(2 if accurate else 1, 1, sharex=True, squeeze=False)[:, 0]
    fills = fills_of(drawn)
    # The error of a text is shared by all shapes: only the spread over seeds says whether they differ.
    _draw(axes[0], groups, shapes, lambda point: _without_stderr(point.perplexity.get(text)), fills, 1.0)
    axes[0].set_ylabel(heading(text).replace("PPL", "perplexity"))
    if accurate:
        _draw(axes[1], groups, shapes, lambda point: point.mean_accuracy, fills, 100.0)
        axes[1].set_ylabel(accuracy_label(frame))
    for point in dense:
        values = (point.perplexity.get(text), point.mean_accuracy)
        for axis, value, factor in zip(axes, values, (1.0, 100.0), strict=False):
            if value is not None:
                axis.axhline(factor * value.value, color=INK, linestyle=DASHED, linewidth=0.8)
    crowded: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(shapes) > 6 else {}
    axes[-1].set_xticks(range(len(shapes)), shapes, **crowded)
    axes[-1].set_xlabel("Tile (rows x columns)")
    handles = method_handles(drawn)
    if dense:
        handles.insert(0, Line2D([], [], label="Dense", color=INK, linestyle=DASHED, linewidth=0.8))
    add_legend(figure, [*handles, *variant_handles(drawn)], 3)
    return figure


def _without_stderr(measured: Measured | None) -> Measured | None:
    return measured and dataclasses.replace(measured, stderr=None)


def _draw(
    axis: Axes,
    groups: dict[Group, list[Point]],
    shapes: Sequence[str],
    value: Callable[[Point], Measured | None],
    fills: dict[str, FillStyle],
    factor: float,
) -> None:
    for (model, method, sparsity, variant), members in groups.items():
        found = [(shapes.index(str(point.tile)), measured) for point in members if (measured := value(point))]
        places, heights = [place for place, _ in found], [factor * measured.value for _, measured in found]
        errors = [factor * (measured.error or math.nan) for _, measured in found]
        look = marking(method, "hybrid", fills[variant])
        axis.errorbar(places, heights, yerr=errors, elinewidth=0.7, capsize=1.5, **look)
        label = percent(sparsity) if len({each[0] for each in groups}) == 1 else f"{model} {percent(sparsity)}"
        axis.annotate(label, (places[-1], heights[-1]), (5, 0), textcoords="offset points", va="center", color=INK)
    axis.margins(x=0.12)
