"""SparseGPT: drop by optimal brain surgeon, and let the remaining weights make up for it.

Frantar and Alistarh, arXiv:2301.00774.

For one weight ``W`` ``[N, K]`` with inputs ``X`` ``[K, tokens]`` of ``n`` calibration windows, the squared
error of the outputs has the Hessian ``H = 2/n X X^T``, the same for every row. Columns are settled from left to right.
With ``U`` the upper Cholesky factor of ``H^-1`` and ``d`` its diagonal, dropping ``w_j`` costs ``w_j^2 / d_j^2``, and
subtracting ``w_j / d_j * U[j, j:]`` from the row is the best correction that the columns still to come can make.
Corrections reach the rest of a block of 128 columns at once, and the columns after it when the block is done.

2:4 groups are chosen when their first column is reached, from weights updated so far. Unstructured pruning chooses a
block of 128 columns at a time, over all rows, at the target sparsity. In a hybrid mask, dense tiles keep everything
and so correct nothing, but still take the corrections of dropped weights to their left.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patch.errors import UserError
from patch.mask import GROUP, HybridMask, TileShape, best_patterns, decode_patterns, tile_grid
from patch.modes import full_float32
from patch.oneshot.method import Method
from patch.oneshot.select import check_unstructured, drop_lowest

COLUMNS = 128
DAMPING = 0.01


class InputHessian:
    """Accumulates ``H = 2/n X X^T`` of the inputs of a ``Linear``, float32.

    ``n`` counts windows, as the reference implementation does. It cancels everywhere but in how much a dead
    input, whose diagonal is set to 1, adds to the damping.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._products = torch.zeros(features, features, device=device)
        self._windows = 0

    def add(self, inputs: Tensor, windows: int) -> None:
        """Take in ``inputs``, float32 ``[tokens, K]``, of ``windows`` windows."""
        # TF32 would lose the small eigenvalues of H.
        with full_float32():
            self._products.addmm_(inputs.T, inputs)
        self._windows += windows

    def finite(self) -> bool:
        """Whether all inputs so far were finite."""
        return bool(self._products.diagonal().isfinite().all())

    def hessian(self) -> Tensor:
        """``H``, float32 ``[K, K]``."""
        return self._products * (2 / self._windows)


@dataclass(frozen=True)
class InverseFactor:
    """What SparseGPT needs to know of the inputs.

    Attributes:
        upper: ``U`` with ``U^T U = (H + damping)^-1``, upper triangular, float32 ``[K, K]``.
        dead: bool ``[K]``, True where an input was always zero.
    """

    upper: Tensor
    dead: Tensor


def inverse_factor(hessian: Tensor, name: str = "weight", damping: float = DAMPING) -> InverseFactor:
    """Factor of the damped inverse of ``hessian`` ``[K, K]``, which is left as it is.

    Args:
        name: of the weight, for the error.
        damping: what is added to the diagonal, as a share of its mean.

    Raises:
        UserError: if the damped matrix is not positive definite in float32.
    """
    # The Cholesky factor of the reversed matrix, reversed back, is an upper R with H = R R^T, so U = R^-1: one
    # factorisation instead of two with an inverse between them, and less rounding.
    backwards = hessian.flip(0, 1)
    diagonal = backwards.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    with full_float32():
        backwards, failed = torch.linalg.cholesky_ex(backwards)
        if failed:
            raise UserError(
                f"{name}: the Hessian of its inputs is not positive definite with {damping:.0%} damping: "
                "calibrate on more windows, or damp more"
            )
        identity = torch.eye(len(backwards), dtype=backwards.dtype, device=backwards.device)
        backwards = torch.linalg.solve_triangular(backwards, identity, upper=False)
    return InverseFactor(backwards.flip(0, 1), dead.flip(0))


def scores(weight: Tensor, factor: InverseFactor) -> Tensor:
    """What dropping each element of a weight not yet updated costs, as a square root: ``|w_j| / sqrt((H^-1)_jj)``.

    The cost of optimal brain surgeon when all other weights of the row make up for it, float32 ``[N, K]``. The sweep's
    own ``d_j`` would not do to compare tiles: it counts only the columns that are still to come, so the last columns of
    any weight look dear, and the tiles there would stay dense whatever they hold.
    """
    inverse_diagonal = factor.upper.square().sum(0)
    return weight.float().masked_fill(factor.dead, 0).abs() / inverse_diagonal.sqrt()


def prune_hybrid(weight: Tensor, factor: InverseFactor, tile: TileShape, dense: Tensor) -> tuple[Tensor, HybridMask]:
    """``weight`` ``[N, K]`` 2:4 outside the tiles in ``dense``, bool ``[R, C]``, and updated; float32, and its mask."""
    tile_grid(weight.shape, tile)
    dense_rows = dense.repeat_interleave(tile[0], 0)[: weight.shape[0]]
    patterns: list[Tensor] = []

    def choose(group: Tensor, column: int) -> Tensor:
        patterns.append(best_patterns(group))
        return decode_patterns(patterns[-1]) | dense_rows[:, column // tile[1], None]

    updated, _ = _sweep(weight, factor, GROUP, choose)
    mask = HybridMask((weight.shape[0], weight.shape[1]), tile, dense, torch.cat(patterns, 1))
    return updated, mask


def prune_unstructured(weight: Tensor, factor: InverseFactor, sparsity: float) -> tuple[Tensor, Tensor]:
    """``weight`` ``[N, K]`` without ``round(sparsity * N * K)`` elements, and updated; float32, and bool keep.

    Every block of 128 columns has the target sparsity; what rounding leaves over goes to the next block.
    """
    check_unstructured(sparsity)
    rows = weight.shape[0]

    def choose(block: Tensor, column: int) -> Tensor:
        before, after = (round(sparsity * rows * columns) for columns in (column, column + block.shape[1]))
        return drop_lowest(block.flatten(), after - before).reshape(block.shape)

    return _sweep(weight, factor, COLUMNS, choose)


def _sweep(
    weight: Tensor, factor: InverseFactor, width: int, choose: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Settle all columns from left to right: the updated weight, float32 with dropped elements 0, and what was kept.

    Args:
        width: how many columns are chosen at a time; divides 128.
        choose: from the scores ``[N, width]`` of updated weights and their first column to what is kept, bool.
    """
    # Transposed, so that a column is contiguous.
    left = weight.float().T.contiguous().masked_fill_(factor.dead[:, None], 0)
    keep = torch.empty_like(left, dtype=torch.bool)
    inputs = len(left)
    with full_float32():
        for start in range(0, inputs, COLUMNS):
            stop = min(start + COLUMNS, inputs)
            block, kept = left[start:stop], keep[start:stop]
            upper = factor.upper[start:stop, start:stop]
            steps = upper.diagonal()[:, None]
            errors = torch.empty_like(block)
            for column in range(stop - start):
                if column % width == 0:
                    ahead = slice(column, column + width)
                    kept[ahead] = choose((block[ahead].abs() / steps[ahead]).T, start + column).T
                errors[column] = (block[column] / steps[column]).masked_fill_(kept[column], 0)
                block[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
            left[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)
    return left.masked_fill_(~keep, 0).T.contiguous(), keep.T.contiguous()


METHOD = Method(
    statistic=InputHessian,
    prepare=lambda name, statistic: inverse_factor(statistic.hessian(), name),
    scores=scores,
    hybrid=prune_hybrid,
    unstructured=prune_unstructured,
    changes_weights=True,
)
