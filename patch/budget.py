"""Exact sparsity budgets: which tiles become 2:4 so that the model's sparsity meets the target within one tile.

Two ways to spend a budget. `cut_globally` ranks the tiles of all weights together, as hardening a learned mask does:
tiles compete across layers. `UniformBudget` gives every weight its own share, as one-shot methods need, whose scores
do not compare across layers and whose weights come one after the other; it carries the rounding of one weight into
the next, so that the total is as exact as the global cut.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from patch.errors import UserError
from patch.tiles import check_sparsity


def _densest_cut(scores: Tensor, sizes: Tensor, sparse_elements: float) -> Tensor:
    """True for the tiles that stay dense: the lowest scores become 2:4 until their elements come nearest the budget.

    Args:
        scores: ``[T]``; ties are cut in order of position, so that every process agrees.
        sizes: int64 ``[T]``, elements of each tile.
        sparse_elements: how many elements should lie in 2:4 tiles.
    """
    if not torch.isfinite(scores).all():
        raise UserError("a tile score is not finite: the tile map cannot be ranked")
    order = scores.argsort(stable=True)
    spent = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[order].cumsum(0)])
    count = int((spent.double() - sparse_elements).abs().argmin())
    dense = torch.ones(len(scores), dtype=torch.bool)
    dense[order[:count]] = False
    return dense


def cut_globally(scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Tile maps whose sparsity over all weights is the nearest to ``sparsity`` that whole tiles allow.

    Args:
        scores: per weight ``[R, C]``, higher = rather dense; compared across weights.
        sizes: per weight int64 ``[R, C]`` from `patch.mask.tile_sizes`.
        sparsity: zeros over elements of all the weights, in [0, 0.5].

    Returns:
        Per weight a bool tile map ``[R, C]`` on the CPU; off the target by at most half of the last tile's zeros.

    Raises:
        UserError: if ``sparsity`` is out of range or a score is not finite.
    """
    check_sparsity(sparsity)
    flat_scores = torch.cat([scores[name].detach().double().cpu().flatten() for name in scores])
    flat_sizes = torch.cat([sizes[name].flatten() for name in scores])
    dense = _densest_cut(flat_scores, flat_sizes, 2 * sparsity * int(flat_sizes.sum()))
    parts = dense.split([scores[name].numel() for name in scores])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


class UniformBudget:
    """The same sparsity for every weight, with the rounding to whole tiles carried from one weight to the next."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = check_sparsity(sparsity)
        self._owed = 0.0

    def cut(self, scores: Tensor, sizes: Tensor) -> Tensor:
        """The next weight's tile map, bool ``[R, C]`` on the CPU.

        Args:
            scores: ``[R, C]``, higher = rather dense.
            sizes: int64 ``[R, C]`` from `patch.mask.tile_sizes`.

        Raises:
            UserError: if a score is not finite.
        """
        wanted = 2 * self.sparsity * int(sizes.sum()) + self._owed
        dense = _densest_cut(scores.detach().double().cpu().flatten(), sizes.flatten(), wanted).reshape(sizes.shape)
        self._owed = wanted - int(sizes[~dense].sum())
        return dense
