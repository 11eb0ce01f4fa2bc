"""Figures of a bench: speedup against sparsity with the limits of the hardware, and what each product reaches.

All draw rows of ``hts bench kernels``. Numbers of tokens and sparsities are shades of one colour: colours of methods
mean methods alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.about import gpus, listed
from analysis.figures.labels import Label, Panel, write_labels
from analysis.figures.sparsities import along_sparsities, finish
from analysis.figures.style import (
    FAINT,
    INK,
    LETTER,
    SMALL,
    WIDTHS,
    Width,
    add_legend,
    in_paper_style,
    light_shades,
    new_figure,
    room,
    set_title,
)
from analysis.names import percent
from analysis.tables.kernels import DENSE, PRECISIONS, TILE, best_of_linears, geometric_means, is_dense, precisions

# Bytes of a 2:4 block for each of a dense one; instructions are half.
SPARSE_BYTES = 0.5625
_TOKENS = (1, 16, 64, 512, 4096)
_RIGHT = 20.0
# What `draw_precisions` shows.
FEW_BITS = ("fp8", "int4")
_SPARSITIES = (0.25, 0.45, 0.5)


def compute_limit(sparsity: Any) -> Any:
    """Speedup if a 2:4 tile took half the instructions and nothing else counted: ``1 / (1 - s)``."""
    return 1 / (1 - np.asarray(sparsity))


def memory_limit(sparsity: Any) -> Any:
    """Speedup if only the bytes of the weight counted: 2:4 tiles are twice the sparsity's share."""
    share = 2 * np.asarray(sparsity)
    return 1 / (1 - share + SPARSE_BYTES * share)


@in_paper_style
def draw_speedup(frame: pd.DataFrame, model: str = "llama-2-7b", width: Width = "single") -> Figure:
    """Geometric-mean speedup over a model's linears against sparsity, tiles of 128x128, for some numbers of tokens."""
    frame = _times(frame)
    chosen = frame[frame.model == model]
    hybrid = chosen[(chosen.implementation == "hybrid") & (chosen.tile == TILE)]
    means = geometric_means(hybrid, "speedup", ("tokens", "sparsity"))
    figure = new_figure(WIDTHS[width], 2.8, constrained=False)
    title = f"linears of {model}, tiles of {TILE}, timed on {gpus(frame.gpu)}"
    axes = figure.subplots(gridspec_kw=room(figure, title))
    shown = [tokens for tokens in _TOKENS if tokens in means.index.get_level_values("tokens")]
    labels = []
    for color, tokens in zip(_shades(len(shown)), shown, strict=True):
        line = means[tokens]
        labels.append(_draw_tokens(axes, line, tokens, color))
    grid = np.linspace(0, 0.5, 51)
    for limit, name, dashes in ((compute_limit, "compute limit", "--"), (memory_limit, "memory limit", ":")):
        axes.plot(100 * grid, limit(grid), color=FAINT, linewidth=0.9, linestyle=dashes, gid="limit")
        labels.append(Label(name, (50.0, float(limit(0.5))), "right", INK))
    axes.axhline(1, color=INK, linewidth=0.6, gid="dense")
    lowest = min((means[tokens].min() for tokens in shown), default=1.0)
    axes.set(xlabel="Sparsity (%)", ylabel="Speedup over dense", ylim=(min(0.9, lowest - 0.04), 2.05))
    where = along_sparsities(axes, _RIGHT)
    set_title(figure, title)
    write_labels(figure, [(axes, labels, where)])
    return figure


def _draw_tokens(axes: Axes, line: pd.Series, tokens: int, color: str) -> Label:
    """Speedups by sparsity with one number of tokens, and what that line is called."""
    axes.plot(100 * line.index, line.to_numpy(), color=color, marker="|", markersize=5, linewidth=1.1)
    name = f"{tokens} token" + ("s" if tokens > 1 else "")
    return Label(name, (100 * float(line.index[-1]), float(line.iloc[-1])), "right", color)


@in_paper_style
def draw_precisions(frame: pd.DataFrame, model: str = "llama-2-7b", width: Width = "double") -> Figure:
    """Geometric-mean speedup over a model's linears against sparsity, a line of panels for each precision of few bits.

    On the left over the fastest dense product in bfloat16, with a dash where each number of tokens has the dense one of
    its own precision; on the right over that one.
    """
    timed = frame[(frame.metric == "time") & (frame.model == model)]
    shown = [name for name in precisions(timed) if name in FEW_BITS]
    beside = width == "double"
    lines, columns = (len(shown), 2) if beside else (2 * len(shown), 1)
    figure = new_figure(WIDTHS[width], 0.6 + 1.9 * lines, constrained=False)
    title = f"linears of {model}, tiles of {TILE}, timed on {gpus(timed.gpu)}"
    place_of = room(figure, title, lines, columns, above=0.19, between=(0.36, 0.45))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, gridspec_kw=place_of)
    colors = dict(zip(_TOKENS, _shades(len(_TOKENS)), strict=True))
    panels: list[Panel] = []
    for place, axis in enumerate(axes.flat):
        precision, quantity = shown[place // 2], ("speedup", "own_speedup")[place % 2]
        name = PRECISIONS[precision]
        hybrid = timed[(timed.implementation == "hybrid") & (timed.precision == precision) & (timed.tile == TILE)]
        means = geometric_means(hybrid, quantity, ("tokens", "sparsity"))
        tokens = [count for count in _TOKENS if count in means.index.get_level_values("tokens")]
        dense = best_of_linears(timed[is_dense(timed, precision)], "speedup")
        labels = []
        for count in tokens:
            labels.append(_draw_tokens(axis, means[count], count, colors[count]))
            if quantity == "speedup" and count in dense:
                axis.plot([-4, -1], [dense[count]] * 2, color=colors[count], linewidth=2.2, gid="dense of its own")
        axis.axhline(1, color=INK, linewidth=0.6, gid="dense")
        over = f"bfloat16 (dashes: dense {name})" if quantity == "speedup" else name
        axis.set_title(f"{name} over dense {over}", loc="left")
        axis.margins(y=0.1)
        panels.append((axis, labels, along_sparsities(axis, _RIGHT, begin=-4)))
    finish(figure, axes, panels, title, "Speedup")
    return figure


@in_paper_style
def draw_roof(frame: pd.DataFrame, width: Width = "double") -> Figure:
    """What every product reaches: dense-equivalent TFLOP/s with 4096 tokens, and TB/s of weights with one.

    A line a product, a mark for each sparsity; the dashed lines are what a large dense product and a large copy reach.
    """
    frame = _times(frame)
    quantities = (
        (4096, "TFLOP/s, dense-equivalent", _tflops, "matmul_roof", "large dense product"),
        (1, "TB/s of weights", _terabytes, "copy_roof", "large copy"),
    )
    shapes = list(dict.fromkeys(zip(frame.model, frame.linear, strict=True)))
    beside = width == "double"
    height = max(1.8, 0.8 + 0.13 * len(shapes))
    figure = new_figure(WIDTHS[width], height if beside else 2 * height - 0.3, constrained=False)
    title = f"{listed(dict.fromkeys(frame.model))}, tiles of {TILE}, timed on {gpus(frame.gpu)}"
    left = 0.12 + LETTER * max((len(" ".join(shape)) for shape in shapes), default=0)
    lines, columns = (1, 2) if beside else (2, 1)
    place_of = room(figure, title, lines, columns, left, 0.1, bottom=0.58, above=0.14, between=(0.1, 0.5))
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False, gridspec_kw=place_of)
    for axis, (tokens, name, measure, roof, said) in zip(axes.flat, quantities, strict=True):
        _draw_reached(axis, frame[frame.tokens == tokens], shapes, measure)
        reached = float(frame[roof].median())
        axis.axvline(reached, color=INK, linewidth=0.8, linestyle="--", gid="roof")
        axis.set_xlim(0, 1.04 * max([reached, *(float(x) for line in axis.lines for x in line.get_xdata())]))
        place = ("data", "axes fraction")
        axis.annotate(
            said, (reached, 1), (0, 2), xycoords=place, textcoords="offset points", ha="center", size=SMALL, gid="label"
        )
        axis.set_xlabel(f"{name}, {tokens} token" + "s" * (tokens > 1))
    handles = [
        Line2D([], [], label=label, **_mark(color)) for (label, _), color in zip(_kinds(), _colors(), strict=True)
    ]
    set_title(figure, title)
    add_legend(figure, handles, 4 if beside else 2)
    return figure


def _times(frame: pd.DataFrame) -> pd.DataFrame:
    """The times in bfloat16: what else was timed beside them is in the tables."""
    return frame[(frame.metric == "time") & (frame.precision == "bf16")]


def _shades(count: int) -> Sequence[Any]:
    """From light to dark, all of them dark enough for a line on white, and none a method's."""
    return light_shades("#4a1486", count + 2)[2:]


def _kinds() -> list[tuple[str, float | None]]:
    return [("fastest dense", None), *((f"hybrid {percent(s)}" if s < 0.5 else "2:4", s) for s in _SPARSITIES)]


def _colors() -> list[Any]:
    return [INK, *_shades(len(_SPARSITIES))]


def _mark(color: Any) -> dict[str, Any]:
    return {"color": color, "marker": "|", "markersize": 6, "markeredgewidth": 1.6, "linestyle": "none"}


def _draw_reached(
    axis: Axes, frame: pd.DataFrame, shapes: Sequence[tuple[str, str]], measure: Callable[[pd.Series], float]
) -> None:
    dense = frame.implementation.isin(DENSE["bf16"]) & (frame.value == frame.dense)
    chosen = frame[dense | (frame.implementation.eq("hybrid") & frame.tile.eq(TILE))]
    chosen = chosen[chosen.tiles.isna() | chosen.tiles.eq("uneven") | chosen.sparsity.eq(0.5)]
    ends: dict[tuple[str, str], list[float]] = {}
    for (_, sparsity), color in zip(_kinds(), _colors(), strict=True):
        rows = chosen[chosen.implementation.isin(DENSE["bf16"]) if sparsity is None else chosen.sparsity.eq(sparsity)]
        first = rows.drop_duplicates(["model", "linear"])
        values = {(row["model"], row["linear"]): measure(row) for _, row in first.iterrows()}
        for shape, value in values.items():
            ends.setdefault(shape, []).append(value)
        heights = [height for height, shape in enumerate(shapes) if shape in values]
        axis.plot([values[shapes[height]] for height in heights], heights, zorder=3, **_mark(color))
    for height, shape in enumerate(shapes):
        if shape in ends:
            axis.plot([min(ends[shape]), max(ends[shape])], [height, height], color="0.8", linewidth=0.8, zorder=2)
    axis.set_yticks(range(len(shapes)), [f"{model} {linear}" for model, linear in shapes], size=SMALL)
    axis.set_ylim(len(shapes) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def _tflops(row: pd.Series) -> float:
    return float(2 * row.n * row.k * row.tokens / row.value / 1e6)


def _terabytes(row: pd.Series) -> float:
    packed = (
        isinstance(row["bytes"], float | int) and row["bytes"] == row["bytes"] and not isinstance(row.fallback, str)
    )
    return float((row["bytes"] if packed else 2 * row.n * row.k) / row.value / 1e6)
