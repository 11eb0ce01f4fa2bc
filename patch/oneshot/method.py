"""What a one-shot method offers: five functions on one weight, gathered in a `Method` at the end of its module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patch.mask import HybridMask
from patch.oneshot.calibration import Statistic
from patch.quantise.values import Quantised
from patch.tiles import TileShape


@dataclass(frozen=True)
class Method:
    """One one-shot method. ``prepared`` is whatever ``prepare`` returns, None for a method that needs no calibration.

    Attributes:
        statistic: makes an empty statistic of the inputs from ``in_features`` and a device; None if none is needed.
        prepare: ``(weight name, statistic) -> prepared``; called once for all weights that read the same tensor.
        scores: ``(weight, prepared)`` -> float32 ``[N, K]``, not negative, higher = rather keep. Its square is the loss
            from dropping that element alone, in the unit in which the method's tiles are compared.
        hybrid: ``(weight, prepared, tile, dense) -> (float32 weight, mask)`` for a bool tile map ``dense``.
        unstructured: ``(weight, prepared, sparsity) -> (float32 weight, bool keep)``.
        quantised: of a method that can round what it keeps to INT4 as it prunes: ``(weight, prepared, tile, dense,
            inputs that share a scale) -> (quantised, mask)``.
        frozen: of a method that changes weights, the same with all that is kept as it was.

    Weights are ``[N, K]`` of any floating dtype.
    """

    statistic: Callable[[int, torch.device], Statistic] | None
    prepare: Callable[[str, Any], Any]
    scores: Callable[[Tensor, Any], Tensor]
    hybrid: Callable[[Tensor, Any, TileShape, Tensor], tuple[Tensor, HybridMask]]
    unstructured: Callable[[Tensor, Any, float], tuple[Tensor, Tensor]]
    quantised: Callable[[Tensor, Any, TileShape, Tensor, int], tuple[Quantised, HybridMask]] | None = None
    frozen: "Method | None" = None
