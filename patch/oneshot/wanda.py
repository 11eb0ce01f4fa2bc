"""Wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models").

The score of ``w_ij`` is ``|w_ij| * sqrt(mean over tokens of x_j^2)``. 2:4 keeps the two best of each group;
unstructured pruning keeps an exact count in every row, since scores are comparable within an output only. Kept weights
stay as they are.
"""

import torch
from torch import Tensor

from patch.mask import HybridMask
from patch.oneshot.method import Method
from patch.oneshot.select import hybrid_mask, unstructured_per_row
from patch.tiles import TileShape


class InputNorm:
    """Accumulates the root mean square over tokens of each input of a ``Linear``."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._squares = torch.zeros(features, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor, windows: int) -> None:
        """Take in ``inputs``, float32 ``[tokens, K]``; how many windows they come from does not matter."""
        self._squares += inputs.square().sum(0)
        self._tokens += len(inputs)

    def finite(self) -> bool:
        """Whether all inputs so far were finite."""
        return bool(self._squares.isfinite().all())

    def norm(self) -> Tensor:
        """``sqrt(mean over tokens of x_j^2)``, float32 ``[K]``."""
        return (self._squares / self._tokens).sqrt()


def scores(weight: Tensor, norm: Tensor) -> Tensor:
    """``|w| * norm``, float32 ``[N, K]``, of a weight ``[N, K]`` for the ``norm``, float32 ``[K]``, of its inputs."""
    return weight.float().abs() * norm


def prune_hybrid(weight: Tensor, norm: Tensor, tile: TileShape, dense: Tensor) -> tuple[Tensor, HybridMask]:
    """``weight`` ``[N, K]`` 2:4 outside the tiles in ``dense``, bool ``[R, C]``; float32, and its mask."""
    mask = hybrid_mask(scores(weight, norm), tile, dense)
    return mask.apply(weight.float()), mask


def prune_unstructured(weight: Tensor, norm: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """``weight`` ``[N, K]`` without the ``round(sparsity * K)`` lowest of each row; float32, and bool keep."""
    keep = unstructured_per_row(scores(weight, norm), sparsity)
    return weight.float().masked_fill(~keep, 0), keep


METHOD = Method(
    statistic=InputNorm,
    prepare=lambda name, statistic: statistic.norm(),
    scores=scores,
    hybrid=prune_hybrid,
    unstructured=prune_unstructured,
)
