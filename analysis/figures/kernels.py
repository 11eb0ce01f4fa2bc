"""Figures of a bench: speedup against sparsity with the limits of the hardware, and what each product reaches.

Both read rows of ``hts bench kernels`` and write ``<path>.png`` and ``<path>.pdf``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.figures.style import INK, PALETTE, WIDTHS, Width, new_figure, paper_style, save_figure
from analysis.tables.kernels import DENSE, geometric_mean

# Bytes of a 2:4 block for each of a dense one; instructions are half.
SPARSE_BYTES = 0.5625
MARKERS = ("o", "s", "^", "D", "v")


def compute_limit(sparsity: Any) -> Any:
    """Speedup if a 2:4 tile took half the instructions and nothing else counted: ``1 / (1 - s)``."""
    return 1 / (1 - np.asarray(sparsity))


def memory_limit(sparsity: Any) -> Any:
    """Speedup if only the bytes of the weight counted: 2:4 tiles are twice the sparsity's share."""
    share = 2 * np.asarray(sparsity)
    return 1 / (1 - share + SPARSE_BYTES * share)


def plot_speedup(frame: pd.DataFrame, path: Path, model: str = "llama-2-7b", width: Width = "single") -> list[Path]:
    """Geometric-mean speedup over a model's linears against sparsity, tiles of 128x128, for some numbers of tokens."""
    hybrid = frame[(frame.model == model) & (frame.implementation == "hybrid") & (frame.tile == "128x128")]
    means = hybrid.groupby(["tokens", "sparsity"]).speedup.apply(geometric_mean)
    with paper_style():
        figure = new_figure(WIDTHS[width], 2.6)
        axes = figure.subplots()
        grid = np.linspace(0, 0.5, 51)
        axes.plot(100 * grid, compute_limit(grid), color=INK, lw=0.8, ls="--", label="compute limit")
        axes.plot(100 * grid, memory_limit(grid), color=INK, lw=0.8, ls=":", label="memory limit")
        shown = [tokens for tokens in (1, 16, 64, 512, 4096) if tokens in means.index.get_level_values("tokens")]
        for color, marker, tokens in zip(PALETTE, MARKERS, shown, strict=False):
            line = means[tokens]
            label = f"{tokens} token" + ("s" if tokens > 1 else "")
            axes.plot(100 * line.index, line.to_numpy(), color=color, marker=marker, ms=3, lw=1, label=label)
        axes.axhline(1, color=INK, lw=0.6)
        lowest = min((means[tokens].min() for tokens in shown), default=1.0)
        axes.set(xlabel="Sparsity (%)", ylabel="Speedup over dense", ylim=(min(0.9, lowest - 0.04), 2.0))
        axes.legend(frameon=False, fontsize=6, loc="upper left")
        return save_figure(figure, path)


def plot_roof(frame: pd.DataFrame, path: Path, width: Width = "double") -> list[Path]:
    """What every product reaches: dense-equivalent TFLOP/s with 4096 tokens, and TB/s of weights with one."""
    with paper_style():
        figure = new_figure(WIDTHS[width], 2.6)
        many, few = figure.subplots(1, 2)
        _bars(many, frame[frame.tokens == 4096], "TFLOP/s, dense-equivalent", _tflops, "4096 tokens")
        _roof(many, float(frame.matmul_roof.median()), "large dense product")
        _bars(few, frame[frame.tokens == 1], "TB/s of weights", _terabytes, "1 token")
        _roof(few, float(frame.copy_roof.median()), "large copy")
        handles, labels = many.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=6)
        return save_figure(figure, path)


def _roof(axes: Axes, height: float, label: str) -> None:
    axes.axhline(height, color=INK, lw=0.8, ls="--")
    place = ("axes fraction", "data")
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    axes.annotate(
        label, (1, height), (0, 2), xycoords=place, textcoords="offset points", ha="right", size=6, bbox=behind
    )


def _bars(axes: Axes, frame: pd.DataFrame, ylabel: str, measure: Any, title: str) -> None:
    dense = frame.implementation.isin(DENSE) & (frame.value == frame.dense)
    chosen = frame[dense | (frame.implementation.eq("hybrid") & frame.tile.eq("128x128"))]
    chosen = chosen[chosen.tiles.isna() | chosen.tiles.eq("uneven") | chosen.sparsity.eq(0.5)]
    shapes = list(dict.fromkeys(zip(chosen.model, chosen.linear, strict=True)))
    kinds = [("fastest dense", None), ("hybrid 25%", 0.25), ("hybrid 45%", 0.45), ("2:4", 0.5)]
    for number, (label, sparsity) in enumerate(kinds):
        rows = chosen[chosen.implementation.isin(DENSE) if sparsity is None else chosen.sparsity.eq(sparsity)]
        values = {key: measure(group.iloc[0]) for key, group in rows.groupby(["model", "linear"])}
        places = np.arange(len(shapes)) + 0.2 * (number - 1.5)
        axes.bar(places, [values.get(shape, np.nan) for shape in shapes], 0.19, color=PALETTE[number], label=label)
    names = [f"{model} {linear}" for model, linear in shapes]
    axes.set_xticks(np.arange(len(shapes)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=5)
    axes.set(ylabel=ylabel)
    axes.set_title(title, fontsize=7)
    axes.grid(axis="x", visible=False)


def _tflops(row: pd.Series) -> float:
    return 2 * row.n * row.k * row.tokens / row.value / 1e6


def _terabytes(row: pd.Series) -> float:
    packed = (
        isinstance(row["bytes"], float | int) and row["bytes"] == row["bytes"] and not isinstance(row.fallback, str)
    )
    return (row["bytes"] if packed else 2 * row.n * row.k) / row.value / 1e6
