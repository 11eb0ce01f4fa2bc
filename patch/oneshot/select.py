"""From scores to what is kept: exact counts, ties decided by position, so that every process agrees.

Scores are ``[N, K]``, higher = rather keep. Among equal scores the earlier input is kept, in 2:4 groups as well.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from patch.errors import UserError
from patch.mask import HybridMask, best_patterns, decode_patterns, tile_sums
from patch.tiles import check_tile


def check_unstructured(sparsity: float) -> float:
    """Raises UserError unless ``sparsity`` is in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity {sparsity}: unstructured pruning takes 0 up to, not including, 1")
    return sparsity


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """Bool keep mask of ``scores`` ``[..., M]`` without the ``count`` lowest along the last dimension, exactly."""
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    above, tied = scores > threshold, scores == threshold
    kept_ties = scores.shape[-1] - count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= kept_ties))


def unstructured_per_row(scores: Tensor, sparsity: float) -> Tensor:
    """Bool ``[N, K]`` that drops the ``round(sparsity * K)`` lowest of every row of ``scores`` ``[N, K]``.

    Raises:
        UserError: if ``sparsity`` is not in [0, 1).
    """
    return drop_lowest(scores, round(check_unstructured(sparsity) * scores.shape[1]))


def unstructured_per_weight(scores: Tensor, sparsity: float) -> Tensor:
    """Bool ``[N, K]`` that drops the ``round(sparsity * N * K)`` lowest of all ``scores`` ``[N, K]``.

    Raises:
        UserError: if ``sparsity`` is not in [0, 1).
    """
    count = round(check_unstructured(sparsity) * scores.numel())
    return drop_lowest(scores.flatten(), count).reshape(scores.shape)


def hybrid_mask(scores: Tensor, tile: Sequence[int], dense: Tensor) -> HybridMask:
    """The two best of each group of ``scores`` ``[N, K]``, but for the tiles that ``dense``, bool ``[R, C]``, keeps."""
    return HybridMask((scores.shape[0], scores.shape[1]), check_tile(tile), dense, best_patterns(scores))


def tile_losses(scores: Tensor, tile: Sequence[int]) -> Tensor:
    """What making each tile 2:4 loses: the squared scores of what it would drop, summed, float32 ``[R, C]``."""
    dropped = scores.float().masked_fill(decode_patterns(best_patterns(scores)), 0)
    return tile_sums(dropped.square(), tile)
