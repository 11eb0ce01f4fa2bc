"""How much the tile shape matters: perplexity, and mean accuracy where there are tasks, by tile shape."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.about import about
from analysis.figures.frontier import accuracy_label
from analysis.figures.labels import Label, Panel, write_labels
from analysis.figures.series import MOST_CURVES, marking
from analysis.figures.style import DASHED, INK, SMALL, WIDTHS, Width, in_paper_style, new_figure, set_title, text_ink
from analysis.names import percent
from analysis.rows.points import Measured, Point, gather, texts, tile_order
from analysis.tables.accuracy import heading
from patch.errors import UserError
from patch.methods import label_of

# Fewer shapes are no sweep over shapes.
_FEWEST = 3
# Free columns for names on the right, in shapes.
_RIGHT = 0.36
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


@in_paper_style
def draw_tile_shapes(frame: pd.DataFrame, width: Width = "single", points: Sequence[Point] | None = None) -> Figure:
    """Perplexity against the tile shape, a line per method and sparsity, with that of the dense model.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if no three points differ in nothing but their tile shape, or more do than one panel can show.
    """
    points = gather(frame) if points is None else points
    groups = swept(points)
    if not groups:
        raise UserError("no sweep over tile shapes to plot: run a study such as smollm2-tiles first")
    if len(groups) > MOST_CURVES:
        raise UserError(f"{len(groups)} sweeps over tile shapes are too many for one figure: plot fewer")
    text = texts(points)[0]
    shapes = sorted({point.tile for members in groups.values() for point in members if point.tile}, key=tile_order)
    drawn = [point for members in groups.values() for point in members]
    models = {model for model, *_ in groups}
    dense = [point for point in points if point.is_original and point.model in models]
    accurate = all(point.mean_accuracy for point in drawn)
    figure = new_figure(WIDTHS[width], 0.6 + (3.6 if accurate else 2.0))
    axes = figure.subplots(2 if accurate else 1, 1, sharex=True, squeeze=False)[:, 0]
    measures: list[tuple[Callable[[Point], Measured | None], float]] = [(lambda p: p.perplexity.get(text), 1.0)]
    axes[0].set_ylabel(heading(text).replace("PPL", "perplexity"))
    if accurate:
        measures.append((lambda point: point.mean_accuracy, 100.0))
        axes[1].set_ylabel(accuracy_label(points))
    edge = len(shapes) - 1 + 0.15
    written: list[Panel] = []
    for axis, (value, factor) in zip(axes, measures, strict=True):
        labels = _draw(axis, groups, shapes, value, factor)
        for point in dense:
            if (measured := value(point)) is not None:
                axis.axhline(factor * measured.value, color=INK, linestyle=DASHED, linewidth=0.8, gid="dense")
                labels.append(Label("Dense", (edge, factor * measured.value), "right", INK))
        axis.set_xlim(-0.4, len(shapes) * (1 + _RIGHT) - 0.5)
        written.append((axis, labels, {"right": (edge + 0.1, len(shapes) * (1 + _RIGHT) - 0.5)}))
    crowded: Mapping[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(shapes) > 5 else {}
    axes[-1].set_xticks(range(len(shapes)), shapes, size=SMALL, **crowded)
    axes[-1].set_xlabel("Tile (rows x columns)")
    set_title(figure, about(frame))
    write_labels(figure, written)
    return figure


def _draw(
    axis: Axes,
    groups: Mapping[Group, Sequence[Point]],
    shapes: Sequence[str],
    value: Callable[[Point], Measured | None],
    factor: float,
) -> list[Label]:
    """The curves; returns their names."""
    labels = []
    for (model, method, sparsity, variant), members in groups.items():
        found = [(shapes.index(str(point.tile)), measured) for point in members if (measured := value(point))]
        places, heights = [place for place, _ in found], [factor * measured.value for _, measured in found]
        errors = [factor * (measured.error or math.nan) for _, measured in found]
        axis.errorbar(places, heights, yerr=errors, elinewidth=0.6, gid=method, **marking(method, "hybrid"))
        name = [model] * (len({each[0] for each in groups}) > 1) + [label_of(method), percent(sparsity)]
        text = " ".join([*name, f"({variant})"] if variant else name)
        labels.append(Label(text, (places[-1], heights[-1]), "right", text_ink(method)))
    return labels
