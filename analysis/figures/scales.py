"""Axes of perplexity and sparsity: limits, round numbers, and what is too high to be drawn to scale."""

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.rows.points import Point, Text


def scale_perplexity(axes: Axes, low: float, high: float, along: Literal["x", "y"] = "y") -> None:
    """One axis from ``low`` to ``high``: linear for small ranges, logarithmic with plain numbers for others."""
    axis = axes.yaxis if along == "y" else axes.xaxis
    set_limits = axes.set_ylim if along == "y" else axes.set_xlim
    if high / low > 2:
        (axes.set_yscale if along == "y" else axes.set_xscale)("log")
        margin = (high / low) ** 0.06
        set_limits(low / margin, high * margin)
        axis.set_major_locator(FixedLocator(_log_ticks(low / margin, high * margin, 8 if along == "y" else 6)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        margin = 0.07 * (high - low) or 0.05 * high
        set_limits(low - margin, high + margin)
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """A few round numbers between ``low`` and ``high``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 4, 6), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= most:
            break
    return ticks


def ceiling(points: Sequence[Point], text: Text) -> float:
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
    limit = high * max(math.sqrt(high / low), 1.1)
    # A band for what would stretch the axis only a little is not worth the break.
    highest = max(value for _, value in finite)
    return highest if highest <= limit * 1.15 else limit
