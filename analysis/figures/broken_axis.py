"""The band on top of a panel for points that are too high for its scale: in order, with their values."""

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes

from analysis.figures.series import Series, marking, sparsity
from analysis.figures.style import FAINT, INK, SMALL
from analysis.rows.points import Point
from analysis.tables.render import significant


def steps_of(points: Sequence[Point]) -> int:
    """How many of some points have one sparsity, at most."""
    columns = [_column(point) for point in points]
    return max((columns.count(column) for column in columns), default=0)


def _column(point: Point) -> int:
    return round(100 * sparsity(point))


def draw_band(
    axis: Axes,
    band: Axes,
    points: Sequence[Point],
    value: Callable[[Point], float],
    names: Mapping[Series, str],
    series: Sequence[Series],
) -> None:
    """Points above the scale of ``axis``, in the band on top of it: one step each, with name and value."""
    name_of = {id(point): names[each] for each in series for point in each.points}
    columns: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda point: (math.isnan(value(point)), value(point))):
        columns.setdefault(_column(point), []).append(point)
    for members in columns.values():
        for step, point in enumerate(members):
            at = (100 * sparsity(point), step)
            band.plot(
                *at, gid=f"{point.method} {point.structure}", clip_on=False, **marking(point.method, point.structure)
            )
            said = f"{name_of[id(point)]} {significant(value(point))}"
            band.annotate(
                said, at, (-5, 0), textcoords="offset points", ha="right", va="center", size=SMALL, gid="label"
            )
    band.set_ylim(-0.6, max((len(members) for members in columns.values()), default=1) - 0.4)
    band.set_yticks([])
    band.tick_params(axis="x", bottom=False, labelbottom=False)
    band.spines["bottom"].set_visible(False)
    band.grid(False)
    if not points:
        band.spines["left"].set_visible(False)
        return
    band.text(0.02, 0.5, "not to\nscale", transform=band.transAxes, va="center", size=6, style="italic", color=FAINT)
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
