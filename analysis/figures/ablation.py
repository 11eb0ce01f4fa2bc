"""Many variants of one method at one sparsity, which no frontier could tell apart: one line each, best first."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.about import about
from analysis.figures.labels import wrapped
from analysis.figures.scales import scale_perplexity
from analysis.figures.series import DENSE_POINT, MOST_CURVES, marking, series_of
from analysis.figures.style import (
    DASHED,
    INK,
    LETTER,
    SMALL,
    WIDTHS,
    Width,
    in_paper_style,
    new_figure,
    room,
    set_title,
)
from analysis.names import percent
from analysis.rows.points import Point, gather, texts
from analysis.tables.accuracy import heading
from analysis.tables.render import significant
from patch.errors import UserError
from patch.methods import label_of

# Characters to a line of a variant's name.
_NAMES = {"single": 32, "double": 60}
Group = tuple[str, str, float, str | None, bool]


def ablated(points: Sequence[Point]) -> dict[Group, list[Point]]:
    """By (model, method, target sparsity, tile, trained), points of variants that are compared at that sparsity alone.

    They are where more variants than a panel can show curves of are at one sparsity, or where there are several and no
    method is at more sparsities than one.
    """
    groups: dict[Group, list[Point]] = {}
    for point in points:
        about = point.model, point.method, point.sparsity, point.tile, point.trained
        groups.setdefault(about, []).append(point)
    several = {group: members for group, members in groups.items() if len({m.variant for m in members}) > 1}
    if any(each.is_curve for each in series_of(points)):
        return {group: members for group, members in several.items() if len(members) > MOST_CURVES}
    return several


@in_paper_style
def draw_ablation(frame: pd.DataFrame, width: Width = "single", points: Sequence[Point] | None = None) -> Figure:
    """Perplexity of each variant with its spread over seeds, lowest on top, and that of the dense model.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if no method has several variants at one sparsity.
    """
    points = gather(frame) if points is None else points
    groups = ablated(points)
    if not groups:
        raise UserError("no ablation to plot: no method has several variants at one sparsity")
    text = texts(points)[0]
    named = {point.trials: wrapped(point.variant or "unchanged", _NAMES[width]) for m in groups.values() for point in m}
    lines = [max(named[point.trials].count("\n") + 1 for point in members) for members in groups.values()]
    heights = [(0.06 + 0.1 * most) * len(members) + 0.1 for most, members in zip(lines, groups.values(), strict=True)]
    figure = new_figure(WIDTHS[width], 0.35 + 0.35 * len(groups) + sum(heights), constrained=False)
    title = about(frame)
    longest = max(len(line) for name in named.values() for line in name.splitlines())
    place_of = room(figure, title, len(groups), left=0.12 + LETTER * longest, right=0.12, above=0.14, between=(0, 0.26))
    grid = figure.add_gridspec(len(groups), 1, height_ratios=heights, **place_of)
    models = {model for model, *_ in groups}
    shown_values = [
        point.perplexity[text].value for members in groups.values() for point in members if text in point.perplexity
    ]
    all_dense = [p.perplexity[text].value for p in points if p.is_original and p.model in models]
    for place, ((model, method, sparsity, _, trained), members) in enumerate(groups.items()):
        axis = figure.add_subplot(grid[place, 0])
        shown = sorted((m for m in members if text in m.perplexity), key=lambda m: -m.perplexity[text].value)
        look = marking(method, "hybrid") | (DENSE_POINT if method == "dense" else {}) | {"linestyle": "none"}
        for height, point in enumerate(shown):
            measured = point.perplexity[text]
            axis.errorbar([measured.value], [height], xerr=measured.spread, elinewidth=0.7, **look)
            axis.annotate(
                significant(measured.value),
                (measured.value + (measured.spread or 0), height),
                (5, 0),
                textcoords="offset points",
                va="center",
                size=SMALL,
                color=INK,
            )
        # Room on the right for the number beside the last point; all panels to one scale.
        scale_perplexity(axis, min(shown_values + all_dense), max(shown_values) * 1.15, along="x")
        for value in (p.perplexity[text].value for p in points if p.is_original and p.model == model):
            axis.axvline(value, color=INK, linewidth=0.9, linestyle=DASHED, zorder=2, gid="dense")
            if place == 0:
                axis.annotate(
                    "dense", (value, 1), (2, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                    size=SMALL, color=INK,
                )  # fmt: skip
        axis.set_yticks(range(len(shown)), [named[point.trials] for point in shown], size=SMALL)
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.grid(axis="y", visible=False)
        subject = [model] * (len(models) > 1) + [label_of(method)] + [percent(sparsity)] * (method != "dense")
        subject += ["trained"] * trained
        axis.set_title(" ".join(subject), loc="right")
        axis.tick_params(labelbottom=place == len(groups) - 1)
        if place == len(groups) - 1:
            axis.set_xlabel(heading(text).replace("PPL", "perplexity"))
    set_title(figure, title)
    return figure
