"""What masks look like: which tiles are dense, and how sparse each linear is across the depth of the model."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, MultipleLocator

from analysis.figures.style import PALETTE, WIDTHS, Width, add_legend, new_figure, paper_style, save_figure, trial_looks
from analysis.rows.load import records
from analysis.rows.points import trial_labels
from patch.errors import UserError

_DENSE_TILE, _SPARSE_TILE = PALETTE[0], "#f3e3c3"

# A model of at most so many blocks has its tile maps drawn; of a deeper one only the share of dense tiles is legible.
_MAPPED_BLOCKS = 6


def plot_tile_maps(frame: pd.DataFrame, trial: str, path: Path, width: Width = "single") -> list[Path]:
    """Which tiles of a trial's weights are dense.

    A model of up to six blocks has its true maps drawn, all to one scale: a row per block, a column per kind of linear.
    Of a deeper model the share of dense tiles is shown per block and kind.

    Raises:
        UserError: if the trial has no tile maps.
    """
    with paper_style():
        return save_figure(draw_tile_maps(frame, trial, width), path)


def draw_tile_maps(frame: pd.DataFrame, trial: str, width: Width = "single") -> Figure:
    """The figure of `plot_tile_maps`."""
    maps = _tile_maps(frame, trial)
    label = trial_labels(frame)[trial]
    blocks = {weight.block for weight in maps}
    return _draw_maps(maps, label, width) if len(blocks) <= _MAPPED_BLOCKS else _draw_shares(maps, label, width)


@dataclass(frozen=True, eq=False)
class TileMap:
    """The tile map of one weight.

    Attributes:
        block: index of the decoder block.
        kind: which of its linears, such as ``q`` or ``down``.
        shape: ``(N, K)`` of the weight.
        tile: ``(rows, cols)``.
        dense: bool ``[R, C]``, True where a tile is dense.
    """

    block: int
    kind: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    dense: np.ndarray

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Where tiles begin and end along rows and columns, in elements."""
        steps = zip(self.dense.shape, self.tile, self.shape, strict=True)
        rows, cols = (np.minimum(np.arange(count + 1) * side, size) for count, side, size in steps)
        return rows, cols


def draw_tile_map(axis: Axes, weight: TileMap) -> None:
    """One weight's map, rows down and columns to the right, in elements."""
    rows, cols = weight.edges
    grid = max(weight.dense.shape) <= 48
    axis.pcolormesh(
        cols,
        rows,
        weight.dense.astype(float),
        cmap=matplotlib.colors.ListedColormap([_SPARSE_TILE, _DENSE_TILE]),
        vmin=0,
        vmax=1,
        edgecolors="white" if grid else "none",
        linewidth=0.35 if grid else 0,
        rasterized=not grid,
    )
    axis.set_xlim(0, weight.shape[1])
    axis.set_ylim(weight.shape[0], 0)
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _draw_maps(maps: Sequence[TileMap], label: str, width: Width) -> Figure:
    kinds, blocks = _kinds(maps), sorted({weight.block for weight in maps})
    wide = {kind: max(weight.shape[1] for weight in maps if weight.kind == kind) for kind in kinds}
    tall = {block: max(weight.shape[0] for weight in maps if weight.block == block) for block in blocks}
    title, lines = _title(label, maps, width)
    left, right, gap, line, head, foot = 0.42, 0.03, 0.07, 0.13, 0.19 + 0.12 * lines, 0.26
    scale = (WIDTHS[width] - left - right - gap * (len(kinds) - 1)) / sum(wide.values())
    height = head + foot + sum(tall[block] * scale + line for block in blocks) + gap * (len(blocks) - 1)
    figure = new_figure(WIDTHS[width], height, constrained=False)

    def inches(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        return x / WIDTHS[width], 1 - (y + h) / height, w / WIDTHS[width], h / height

    y = head
    for block in blocks:
        x = left
        for kind in kinds:
            for weight in maps:
                if (weight.block, weight.kind) == (block, kind):
                    n, k = weight.shape
                    axis = figure.add_axes(inches(x, y + line, k * scale, n * scale), label=f"{block} {kind}")
                    draw_tile_map(axis, weight)
                    axis.set_title(f"{100 * weight.dense.mean():.0f}%", size=6, pad=1.5)
            if block == blocks[0]:
                middle = x + wide[kind] * scale / 2
                figure.text(*inches(middle, head, 0, 0)[:2], kind, ha="center", va="bottom", size=7)
            x += wide[kind] * scale + gap
        figure.text(*inches(0.02, y + line, 0, 0)[:2], f"block {block}", ha="left", va="top", size=7)
        y += line + tall[block] * scale + gap
    figure.text(*inches(0.02, 0.02, 0, 0)[:2], title, ha="left", va="top", size=7.5)
    rows, cols = maps[0].tile
    handles = [
        Patch(color=_DENSE_TILE, label=f"dense {rows}x{cols} tile"),
        Patch(facecolor=_SPARSE_TILE, edgecolor="0.75", linewidth=0.4, label="2:4 tile"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, borderpad=0.2, handlelength=1.0)
    return figure


def _title(label: str, maps: Sequence[TileMap], width: Width) -> tuple[str, int]:
    """What the maps are of, in as many lines as the figure's width needs, and their number."""
    lines = textwrap.wrap(f"{label}: {_overall(maps)}", round(15 * WIDTHS[width]))
    return "\n".join(lines), len(lines)


def _draw_shares(maps: Sequence[TileMap], label: str, width: Width) -> Figure:
    kinds, blocks = _kinds(maps), sorted({weight.block for weight in maps})
    shares = pd.DataFrame(np.nan, index=blocks, columns=kinds)
    for weight in maps:
        shares.loc[weight.block, weight.kind] = 100 * weight.dense.mean()
    title, lines = _title(label, maps, width)
    figure = new_figure(WIDTHS[width], 0.68 + 0.12 * lines + 0.145 * len(blocks))
    axis = figure.subplots()
    sns.heatmap(
        shares,
        ax=axis,
        vmin=0,
        vmax=100,
        cmap=sns.light_palette(_DENSE_TILE, as_cmap=True),
        annot=True,
        fmt=".0f",
        annot_kws={"size": 6},
        linewidths=0.4,
        linecolor="white",
        cbar_kws={"label": "Dense tiles (%)", "pad": 0.02, "aspect": 40},
    )
    every = 1 if len(blocks) <= 40 else 5
    axis.set_yticks(np.arange(0, len(blocks), every) + 0.5, [str(block) for block in blocks[::every]], rotation=0)
    for cell in axis.texts:
        cell.set_color("white" if float(cell.get_text()) > 70 else "0.1")
    axis.tick_params(length=0)
    axis.set_xlabel("")
    axis.set_ylabel("Block")
    axis.set_title(title, loc="left", size=7.5)
    axis.xaxis.set_ticks_position("top")
    return figure


def _tile_maps(frame: pd.DataFrame, trial: str) -> list[TileMap]:
    rows = frame[(frame.trial == trial) & (frame.metric == "tile_map")]
    if rows.empty:
        having = sorted(frame.trial[frame.metric == "tile_map"].unique())
        raise UserError(f"trial {trial} has no tile maps; there are of {', '.join(having) or 'none'}")
    maps = []
    for row in records(rows):
        block, kind = _place(row.layer)
        dense = np.array([[mark == "1" for mark in line] for line in row.labels["tile_map"]])
        sides = [int(side) for side in row.tile.split("x")]
        maps.append(TileMap(block, kind, (row.labels["rows"], row.labels["cols"]), (sides[0], sides[1]), dense))
    return maps


def _place(layer: str) -> tuple[int, str]:
    """Block and kind of a weight's full name: ``model.layers.3.self_attn.q_proj`` is ``(3, "q")``."""
    parts = layer.split(".")
    block = next((int(part) for part in parts if part.isdecimal()), 0)
    return block, parts[-1].removesuffix("_proj")


def _kinds(maps: Iterable[TileMap]) -> list[str]:
    return list(dict.fromkeys(weight.kind for weight in maps))


def _overall(maps: Sequence[TileMap]) -> str:
    dense = sum(int(weight.dense.sum()) for weight in maps)
    return f"{100 * dense / sum(weight.dense.size for weight in maps):.1f}% of tiles dense"


def plot_layer_sparsity(frame: pd.DataFrame, trials: Sequence[str], path: Path, width: Width = "double") -> list[Path]:
    """Sparsity of each linear across the depth of the model: a panel per kind of linear, a line per trial.

    Raises:
        UserError: if a trial has no rows per layer.
    """
    with paper_style():
        return save_figure(draw_layer_sparsity(frame, trials, width), path)


def draw_layer_sparsity(frame: pd.DataFrame, trials: Sequence[str], width: Width = "double") -> Figure:
    """The figure of `plot_layer_sparsity`."""
    rows = frame[frame.trial.isin(trials) & (frame.metric == "layer_sparsity")]
    if missing := sorted(set(trials) - set(rows.trial)):
        raise UserError(f"trial {', '.join(missing)} has no sparsity per layer: rows of its prune stage are missing")
    places = [_place(layer) for layer in rows.layer]
    rows = rows.assign(block=[block for block, _ in places], kind=[kind for _, kind in places])
    kinds = list(dict.fromkeys(rows.kind))
    columns = 4 if width == "double" else 2
    count = math.ceil(len(kinds) / columns)
    figure = new_figure(WIDTHS[width], 1.3 * count + 0.2)
    axes = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False)
    labels = trial_labels(frame[frame.trial.isin(trials)])
    looks = trial_looks(rows, labels)
    markers = {} if rows.block.nunique() <= 12 else {"marker": ""}
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for trial in labels:
            line = rows[(rows.trial == trial) & (rows.kind == kind)].sort_values("block")
            axis.plot(line.block, 100 * line.value, **(looks[trial] | markers))
        axis.set_title(kind, pad=2)
        axis.set_ylim(-2, max(52, 100 * rows.value.max() + 2))
        axis.yaxis.set_major_locator(MultipleLocator(10))
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    for place, axis in enumerate(axes.flat):
        axis.tick_params(labelbottom=place + columns >= len(kinds))
    for axis in axes[-1]:
        axis.set_xlabel("Block")
    figure.supylabel("Sparsity (%)", size=7.5)
    handles = [Line2D([], [], label=labels[trial], **(looks[trial] | markers)) for trial in labels]
    vacant = axes.flat[len(kinds) :]
    for axis in vacant:
        axis.set_axis_off()
    if len(vacant) and len(handles) <= 7:
        legend = vacant[0].legend(handles=handles, loc="center", handlelength=2.4)
        if legend.get_window_extent().width <= figure.bbox.width / columns:
            return figure
        legend.remove()
    add_legend(figure, handles, columns)
    return figure
