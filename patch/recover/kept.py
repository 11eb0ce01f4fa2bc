"""What a mask keeps of a weight, as the vector that is trained: gradients and moments of the rest do not exist."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patch.learn.distributed import Ranks
from patch.quantise.values import Grid
from patch.tiles import TileShape


class _Placed(torch.autograd.Function):
    """Values at their places in a weight of zeros; the gradient of a value is that of its place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(places)
        weight = values.new_zeros(shape, dtype=dtype)
        weight.view(-1).index_copy_(0, places.long(), values.to(dtype))
        return weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grads[0].reshape(-1).index_select(0, places).float(), None, None, None


class _Rounded(torch.autograd.Function):
    """A weight rounded to a grid; the gradient of what is under the rounding is that of what it becomes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return grid.rounded(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


@dataclass(frozen=True, eq=False)
class Kept:
    """Which elements of a weight are kept, and which of them this rank trains: those of whole rows of tiles.

    Attributes:
        keep: bool ``[N, K]`` on the CPU.
        tile: rows of a tile, and columns.
        ranks: the processes that train together.
        grid: to which what is kept is rounded wherever it is used, of the whole weight on the CPU; None as it is.
    """

    keep: Tensor
    tile: TileShape
    ranks: Ranks
    grid: Grid | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.keep.shape[0], self.keep.shape[1]

    @property
    def here(self) -> slice:
        """This rank's rows."""
        return self.ranks.rows(self.keep.shape[0], self.tile[0])

    def values_of(self, weight: Tensor) -> Tensor:
        """What is kept of this rank's rows of a weight ``[N, K]``, float32 on the CPU, row by row."""
        return weight[self.here].cpu()[self.keep[self.here]].float()

    def whole(self, values: Tensor, device: torch.device) -> Tensor:
        """Those of all ranks, of this rank's ``values``, on the CPU; they cross between processes on ``device``."""
        if self.ranks.size == 1:
            return values.detach().cpu()
        rows = torch.zeros((self.here.stop - self.here.start, self.shape[1]), device=device)
        rows[self.keep[self.here].to(device)] = values.detach().to(device)
        return self.ranks.collect(rows, self.shape[0], self.tile[0]).cpu()[self.keep]

    def part(self, whole: Tensor) -> Tensor:
        """The inverse of `whole`."""
        first = int(self.keep[: self.here.start].sum())
        return whole[first : first + int(self.keep[self.here].sum())]

    def weight(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight ``[N, K]`` that keeps ``whole``, on the CPU."""
        weight = torch.zeros(self.shape, dtype=dtype)
        weight[self.keep] = whole.to(dtype)
        return self.grid.rounded(weight) if self.grid else weight


class KeptWeight:
    """A ``Linear`` under training: what this rank holds of it, on its device (`patch.learn.masked_model.Drawn`).

    Attributes:
        values: float32, the kept elements of this rank's rows, row by row; with a gradient.
    """

    def __init__(self, linear: nn.Linear, kept: Kept, values: Tensor) -> None:
        device = linear.weight.device
        self.linear = linear
        self.kept = kept
        self.shape, self.tile, self.ranks = kept.shape, kept.tile, kept.ranks
        self.values = values.to(device, torch.float32, copy=True).requires_grad_()
        keep = kept.keep[kept.here]
        self._here = (keep.shape[0], keep.shape[1])
        # Half the bytes of the indices that torch computes with, which are made one weight at a time.
        self._places = keep.flatten().nonzero().squeeze(1).int().to(device)
        self._grid = kept.grid.rows(kept.here, device) if kept.grid else None

    def draw(self) -> Tensor:
        """This rank's rows ``[rows here, K]`` in the dtype of the model's weight, zero where nothing is kept."""
        drawn: Tensor = _Placed.apply(self.values, self._places, self._here, self.linear.weight.dtype)
        if self._grid:
            drawn = _Rounded.apply(drawn, self._grid)
        return drawn
