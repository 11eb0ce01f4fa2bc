"""Hybrid masks: which tiles of a weight are dense, which are 2:4, and which two of every four inputs survive.

A weight is ``[out_features N, in_features K]`` as in ``torch.nn.Linear``. A *group* is four consecutive inputs of one
row; its *pattern* is one of the six ways to keep two of four, numbered in lexicographic order of the kept pair. A
*tile* is a ``rows x cols`` block; the last row and column of tiles may be ragged. Since ``cols`` and ``K`` are
multiples of four, every tile holds whole groups and a 2:4 tile drops exactly half of its elements.

    >>> import torch
    >>> weight = torch.randn(128, 256)
    >>> mask = HybridMask(weight.shape, (64, 64), torch.zeros(2, 4, dtype=torch.bool), best_patterns(weight.abs()))
    >>> mask.sparsity
    0.5
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patch.errors import UserError
from patch.tiles import GROUP, TileShape, check_tile, tile_grid

KEPT_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def pattern_table(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool) -> Tensor:
    """The ``[6, 4]`` table whose row ``p`` is 1 where pattern ``p`` keeps an element."""
    # In one copy: SparseGPT asks for it at every group of columns.
    table = [[int(element in pair) for element in range(GROUP)] for pair in KEPT_PAIRS]
    return torch.tensor(table, dtype=dtype, device=device)


def tile_sizes(shape: Sequence[int], tile: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Elements in each tile, int64 ``[R, C]``; smaller at a ragged edge."""
    tile_rows, tile_cols = tile_grid(shape, tile)
    heights = torch.full((tile_rows,), tile[0], device=device)
    widths = torch.full((tile_cols,), tile[1], device=device)
    heights[-1] = shape[0] - tile[0] * (tile_rows - 1)
    widths[-1] = shape[1] - tile[1] * (tile_cols - 1)
    return heights[:, None] * widths[None, :]


def expand_tiles(per_tile: Tensor, shape: Sequence[int], tile: Sequence[int]) -> Tensor:
    """Each tile's value repeated over its elements: ``[R, C] -> [N, K]``, any dtype, differentiable."""
    rows = per_tile.repeat_interleave(tile[0], 0)[: shape[0]]
    return rows.repeat_interleave(tile[1], 1)[:, : shape[1]]


def tile_sums(values: Tensor, tile: Sequence[int]) -> Tensor:
    """Sum of ``values`` ``[N, K]`` over each tile, ``[R, C]``."""
    tile_rows, tile_cols = tile_grid(values.shape, tile)
    pad = (0, tile_cols * tile[1] - values.shape[1], 0, tile_rows * tile[0] - values.shape[0])
    padded = torch.nn.functional.pad(values, pad)
    return padded.reshape(tile_rows, tile[0], tile_cols, tile[1]).sum((1, 3))


def best_patterns(scores: Tensor) -> Tensor:
    """The pattern that keeps the two largest scores of each group, uint8 ``[N, K/4]``; ties keep the earlier input.

    Args:
        scores: ``[N, K]`` of any dtype that compares; what is not a number counts as larger than any.
    """
    if scores.is_floating_point():
        scores = scores.masked_fill(scores.isnan(), math.inf)
    # Comparisons, not a sort: on a GPU sorting many groups of four takes ten times as long.
    groups = scores.reshape(*scores.shape[:-1], -1, GROUP).unbind(-1)
    first, second, third = (
        torch.stack([other >= mine if j < i else other > mine for j, other in enumerate(groups) if j != i]).sum(0) < 2
        for i, mine in enumerate(groups[:3])
    )
    # Lexicographic rank of the pair: which is kept first, then how far away the second is.
    later = torch.where(second, 0, torch.where(third, 1, 2))
    of_second = torch.where(third, 3, 4)
    return torch.where(first, later, torch.where(second, of_second, 5)).to(torch.uint8)


def encode_patterns(keep: Tensor) -> Tensor:
    """Pattern of each group of a boolean ``[N, K]`` that keeps exactly two of four, uint8 ``[N, K/4]``.

    Raises:
        UserError: if some group does not keep exactly two; the first such row and column are named.
    """
    groups = keep.reshape(*keep.shape[:-1], -1, GROUP)
    wrong = groups.sum(-1) != 2
    if wrong.any():
        row, group = (int(i) for i in wrong.nonzero()[0])
        kept = int(groups[row, group].sum())
        raise UserError(f"not 2:4: row {row}, columns {GROUP * group}..{GROUP * group + 3} keep {kept} of {GROUP}")
    return best_patterns(keep.to(torch.uint8))


def decode_patterns(patterns: Tensor) -> Tensor:
    """Boolean keep mask ``[N, K]`` of patterns ``[N, K/4]``."""
    return pattern_table(patterns.device)[patterns.long()].flatten(-2)


@dataclass(frozen=True, eq=False)
class HybridMask:
    """The whole outcome of pruning for one weight.

    Attributes:
        shape: ``(N, K)`` of the weight.
        tile: ``(rows, cols)`` of a tile.
        dense: bool ``[R, C]``, the tile map: True where the tile stays dense.
        patterns: uint8 ``[N, K/4]``, values 0..5; in dense tiles what they would keep, which has no effect.

    Raises:
        UserError: if the parts do not fit each other, or a pattern is out of range.
    """

    shape: tuple[int, int]
    tile: TileShape
    dense: Tensor
    patterns: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        object.__setattr__(self, "tile", check_tile(self.tile))
        grid = tile_grid(self.shape, self.tile)
        if self.dense.dtype != torch.bool or tuple(self.dense.shape) != grid:
            raise UserError(f"tile map is {self.dense.dtype} {tuple(self.dense.shape)}, needs bool {grid}")
        groups = (self.shape[0], self.shape[1] // GROUP)
        if self.patterns.dtype != torch.uint8 or tuple(self.patterns.shape) != groups:
            raise UserError(f"patterns are {self.patterns.dtype} {tuple(self.patterns.shape)}, need uint8 {groups}")
        if int(self.patterns.max()) >= len(KEPT_PAIRS):
            raise UserError(f"pattern {int(self.patterns.max())} is out of range 0..{len(KEPT_PAIRS) - 1}")
        if self.dense.device != self.patterns.device:
            raise UserError(f"tile map is on {self.dense.device}, patterns on {self.patterns.device}")

    def keep(self) -> Tensor:
        """Boolean ``[N, K]``, True where an element survives."""
        return decode_patterns(self.patterns) | expand_tiles(self.dense, self.shape, self.tile)

    def apply(self, weight: Tensor) -> Tensor:
        """``weight`` ``[N, K]`` with dropped elements set to +0 (also where they were NaN or infinite).

        Raises:
            UserError: if the weight has another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise UserError(f"mask is for a weight of {self.shape}, got {tuple(weight.shape)}")
        return weight.masked_fill(~self.keep(), 0)

    @property
    def zeros(self) -> int:
        """Elements dropped."""
        return int(tile_sizes(self.shape, self.tile)[~self.dense.cpu()].sum()) // 2

    @property
    def sparsity(self) -> float:
        """Dropped elements over all elements, in [0, 0.5]."""
        return self.zeros / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> "HybridMask":
        """The same mask on a device."""
        return HybridMask(self.shape, self.tile, self.dense.to(device), self.patterns.to(device))

    def equal(self, other: "HybridMask") -> bool:
        """Whether both keep the same elements with the same tiles (patterns inside dense tiles do not matter)."""
        same_tiles = self.shape == other.shape and self.tile == other.tile and torch.equal(self.dense, other.dense)
        return same_tiles and torch.equal(self.keep(), other.keep())


# Share of a dense tile's elements that may be zero by chance.
STRAY_ZEROS = 0.01


@dataclass(frozen=True)
class Inferred:
    """A mask read out of a weight's zeros.

    Attributes:
        mask: tiles classified as 2:4 are 2:4, all others dense.
        violating: bool ``[R, C]``, True where a tile has many zeros and yet is not 2:4; in ``mask`` it is dense.
    """

    mask: HybridMask
    violating: Tensor

    @property
    def two_four(self) -> Tensor:
        """bool ``[R, C]``, True where the tile is 2:4."""
        return ~self.mask.dense


def infer(weight: Tensor, tile: Sequence[int]) -> Inferred:
    """Read the hybrid mask of a foreign checkpoint (published PATCH models are plain models with zeros).

    A tile is 2:4 if every group holds at least two zeros; dense if at most `STRAY_ZEROS` of its elements are zero
    (low-precision weights have some exact zeros); violating otherwise. A group with more than two zeros keeps its
    non-zero elements and as many of the earliest zeros as make two.

    Args:
        weight: ``[N, K]``, any floating dtype.
    """
    zero = weight == 0
    sizes = tile_sizes(weight.shape, tile).to(weight.device)
    crowded = (zero.reshape(weight.shape[0], -1, GROUP).sum(-1) < 2).repeat_interleave(GROUP, 1)
    two_four = tile_sums(crowded.int(), tile) == 0
    few_zeros = tile_sums(zero.int(), tile) <= STRAY_ZEROS * sizes
    mask = HybridMask((weight.shape[0], weight.shape[1]), check_tile(tile), ~two_four, best_patterns(~zero))
    return Inferred(mask, ~two_four & ~few_zeros)
