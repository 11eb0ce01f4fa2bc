"""Which tiles of each weight are dense, drawn tile by tile."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.figures.about import about
from analysis.figures.places import places_of
from analysis.figures.style import WIDTHS, Width, in_paper_style, new_figure
from analysis.rows.load import records
from analysis.rows.points import trial_labels
from patch.errors import UserError

# No method has these colours.
_DENSE_TILE, _SPARSE_TILE = "#33415c", "#e8e2d4"

# A model of at most so many blocks has its tile maps drawn; those of a deeper one are not legible.
_MAPPED_BLOCKS = 6


@in_paper_style
def draw_tile_maps(frame: pd.DataFrame, trial: str, width: Width = "single") -> Figure:
    """Which tiles of a trial's weights are dense, all maps to one scale: a row per block, a column per kind of linear.

    Raises:
        UserError: if the trial has no tile maps, or its model is too deep for them to be legible.
    """
    maps = _tile_maps(frame, trial)
    if not legible(frame.layer[(frame.trial == trial) & (frame.metric == "tile_map")]):
        raise UserError(f"trial {trial} has too many blocks, or experts, for tile maps: draw its sparsity per layer")
    return _draw_maps(maps, f"{trial_labels(frame)[trial]}, {about(frame[frame.trial == trial])}", width)


def legible(layers: Iterable[str]) -> bool:
    """Whether the tile maps of a model of these weights, at least one, are: few blocks, and no experts in them."""
    places = places_of(layers).values()
    return 0 < len({block for block, _ in places}) <= _MAPPED_BLOCKS and len(set(places)) == len(places)


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


def draw_tile_map(axis: Axes, weight: TileMap, corner: tuple[float, float] = (0.0, 0.0)) -> None:
    """One weight's map, rows down and columns to the right, in elements from a corner."""
    rows, cols = weight.edges
    grid = max(weight.dense.shape) <= 48
    axis.pcolormesh(
        corner[0] + cols,
        corner[1] + rows,
        weight.dense.astype(float),
        cmap=matplotlib.colors.ListedColormap([_SPARSE_TILE, _DENSE_TILE]),
        vmin=0,
        vmax=1,
        edgecolors="white" if grid else "none",
        linewidth=0.35 if grid else 0,
        rasterized=not grid,
        gid=f"{weight.block} {weight.kind}",
    )


def _draw_maps(maps: Sequence[TileMap], label: str, width: Width) -> Figure:
    """All maps on one pair of axes, in elements: many small axes take seconds."""
    kinds, blocks = _kinds(maps), sorted({weight.block for weight in maps})
    wide = {kind: max(weight.shape[1] for weight in maps if weight.kind == kind) for kind in kinds}
    tall = {block: max(weight.shape[0] for weight in maps if weight.block == block) for block in blocks}
    title, lines = _title(label, maps, width)
    left, right, gap, line, head, foot = 0.42, 0.03, 0.07, 0.13, 0.19 + 0.12 * lines, 0.26
    scale = (WIDTHS[width] - left - right - gap * (len(kinds) - 1)) / sum(wide.values())
    height = head + foot + sum(tall[block] * scale + line for block in blocks) + gap * (len(blocks) - 1)
    figure = new_figure(WIDTHS[width], height, constrained=False)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(-left / scale, WIDTHS[width] / scale - left / scale)
    axis.set_ylim(height / scale, 0)
    y = head
    for block in blocks:
        x = 0.0
        for kind in kinds:
            for weight in maps:
                if (weight.block, weight.kind) == (block, kind):
                    draw_tile_map(axis, weight, (x, (y + line) / scale))
                    middle = x + weight.shape[1] / 2
                    share = f"{100 * weight.dense.mean():.0f}%"
                    axis.text(middle, (y + line - 0.02) / scale, share, ha="center", va="bottom", size=6)
            if block == blocks[0]:
                axis.text(x + wide[kind] / 2, head / scale, kind, ha="center", va="bottom", size=7)
            x += wide[kind] + gap / scale
        axis.text((0.02 - left) / scale, (y + line) / scale, f"block {block}", ha="left", va="top", size=7)
        y += line + tall[block] * scale + gap
    figure.text(0.02 / WIDTHS[width], 1 - 0.02 / height, title, ha="left", va="top", size=7.5)
    rows, cols = maps[0].tile
    handles = [
        Patch(color=_DENSE_TILE, label=f"dense {rows}x{cols} tile"),
        Patch(facecolor=_SPARSE_TILE, edgecolor="0.75", linewidth=0.4, label="2:4 tile"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, borderpad=0.2, handlelength=1.0)
    return figure


def _title(label: str, maps: Sequence[TileMap], width: Width) -> tuple[str, int]:
    """What the maps are of, in as many lines as the figure's width needs, and their number."""
    lines = textwrap.wrap(f"{label}: {_overall(maps)}", round(17 * WIDTHS[width]))
    return "\n".join(lines), len(lines)


def _tile_maps(frame: pd.DataFrame, trial: str) -> list[TileMap]:
    rows = frame[(frame.trial == trial) & (frame.metric == "tile_map")]
    if rows.empty:
        having = sorted(frame.trial[frame.metric == "tile_map"].unique())
        raise UserError(f"trial {trial} has no tile maps; there are of {', '.join(having) or 'none'}")
    maps = []
    places = places_of(rows.layer)
    for row in records(rows):
        block, kind = places[row.layer]
        dense = np.array([[mark == "1" for mark in line] for line in row.labels["tile_map"]])
        sides = [int(side) for side in row.tile.split("x")]
        maps.append(TileMap(block, kind, (row.labels["rows"], row.labels["cols"]), (sides[0], sides[1]), dense))
    return maps


def _kinds(maps: Iterable[TileMap]) -> list[str]:
    return list(dict.fromkeys(weight.kind for weight in maps))


def _overall(maps: Sequence[TileMap]) -> str:
    dense = sum(int(weight.dense.sum()) for weight in maps)
    return f"{100 * dense / sum(weight.dense.size for weight in maps):.1f}% of tiles dense"
