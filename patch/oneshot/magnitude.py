"""Magnitude pruning: keep the largest ``|w|``. Needs no calibration.

2:4 keeps the two largest of each group. Unstructured pruning keeps an exact count per weight, the layerwise
convention (Han et al. 2015, and the baselines of Wanda and SparseGPT): every weight gets the same sparsity, and
magnitudes are never compared across weights.
"""

from torch import Tensor

from patch.mask import HybridMask
from patch.oneshot.method import Method
from patch.oneshot.select import hybrid_mask, unstructured_per_weight
from patch.tiles import TileShape


def scores(weight: Tensor) -> Tensor:
    """``|w|``, float32 ``[N, K]``."""
    return weight.float().abs()


def prune_hybrid(weight: Tensor, tile: TileShape, dense: Tensor) -> tuple[Tensor, HybridMask]:
    """``weight`` ``[N, K]`` 2:4 outside the tiles in ``dense``, bool ``[R, C]``; float32, and its mask."""
    mask = hybrid_mask(scores(weight), tile, dense)
    return mask.apply(weight.float()), mask


def prune_unstructured(weight: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """``weight`` ``[N, K]`` without its ``round(sparsity * N * K)`` smallest elements; float32, and bool keep."""
    keep = unstructured_per_weight(scores(weight), sparsity)
    return weight.float().masked_fill(~keep, 0), keep


METHOD = Method(
    statistic=None,
    prepare=lambda name, statistic: None,
    scores=lambda weight, prepared: scores(weight),
    hybrid=lambda weight, prepared, tile, dense: prune_hybrid(weight, tile, dense),
    unstructured=lambda weight, prepared, sparsity: prune_unstructured(weight, sparsity),
)
