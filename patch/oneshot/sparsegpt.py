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

A sweep can also round what it keeps as it settles it, to INT4 (`quantise_hybrid`, `quantise_masked`) or, with scales
that are chosen before and in any order of columns, to every precision (`quantise_in_order`): the error of a
column, rounded or dropped, goes the same way. With everything kept that is GPTQ (Frantar et al., arXiv:2210.17323). The
error that a column adds to the outputs, once all to its right make up for it, is its square over ``d_j^2``: by that a
group's scale is chosen.

`FROZEN` is the sweep with its corrections left out, which MaskLLM starts from: every choice is by the weights as they
were, and what is kept stays as it was.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from patch.contexts import full_float32
from patch.errors import UserError
from patch.mask import HybridMask, best_patterns, decode_patterns, encode_patterns, expand_tiles
from patch.oneshot.method import Method
from patch.oneshot.select import check_unstructured, drop_lowest, hybrid_mask
from patch.quantise.precisions import Precision
from patch.quantise.values import GroupRounding, Quantised, ScaledRounding, nearest, weight_scales
from patch.tiles import GROUP, TileShape, tile_grid

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


class SinkHessian:
    """`InputHessian` in which the first tokens of windows count as much as all others together.

    What finds nothing to attend to attends to the first token (Xiao et al., arXiv:2309.17453), which so has a share in
    every output, while it is one token of a window: its values, which are small where its inputs are large, would be
    rounded away. Tokens are weighted by the attention that they get by Sung et al. (arXiv:2503.01820) too.

    As much means as often or, where their inputs are so large that they would hide all others', with as large a sum of
    squares. Where a matrix sees only some of the tokens (experts), none is told apart.

    Args:
        length: tokens of a window.
    """

    def __init__(self, features: int, device: torch.device | str, length: int) -> None:
        self._all = InputHessian(features, device)
        self._first = InputHessian(features, device)
        self._length = length

    def add(self, inputs: Tensor, windows: int) -> None:
        """Take in ``inputs``, float32 ``[tokens, K]``, of ``windows`` windows."""
        self._all.add(inputs, windows)
        known = len(inputs) == windows * self._length
        self._first.add(inputs[:: self._length] if known else inputs[:0], windows)

    def finite(self) -> bool:
        """Whether all inputs so far were finite."""
        return self._all.finite()

    def hessian(self) -> Tensor:
        """``H``, float32 ``[K, K]``."""
        whole, first = self._all.hessian(), self._first.hessian()
        size = first.trace()
        often = torch.minimum(size.new_tensor(self._length - 1.0), (whole.trace() - size) / size.clamp(min=1e-30))
        # They are in the whole once.
        return whole + (often - 1).clamp(min=0) * first


@dataclass(frozen=True)
class InverseFactor:
    """What SparseGPT needs to know of the inputs.

    Attributes:
        upper: ``U`` with ``U^T U = (H + damping)^-1``, upper triangular, float32 ``[K, K]``.
        dead: bool ``[K]``, True where an input was always zero.
    """

    upper: Tensor
    dead: Tensor


def inverse_factor(hessian: Tensor, name: str = "weight") -> InverseFactor:
    """Factor of the damped inverse of ``hessian`` ``[K, K]``, which is left as it is.

    Args:
        name: of the weight, for the error.

    Raises:
        UserError: if the damped matrix is not positive definite in float32.
    """
    # The Cholesky factor of the reversed matrix, reversed back, is an upper R with H = R R^T, so U = R^-1: one
    # factorisation instead of two with an inverse between them, and less rounding.
    backwards = hessian.flip(0, 1)
    diagonal = backwards.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += DAMPING * diagonal.mean()
    with full_float32():
        backwards, failed = torch.linalg.cholesky_ex(backwards)
        if failed:
            raise UserError(
                f"{name}: the Hessian of its inputs is not positive definite with {DAMPING:.0%} damping: "
                "calibrate on more windows"
            )
        identity = torch.eye(len(backwards), dtype=backwards.dtype, device=backwards.device)
        backwards = torch.linalg.solve_triangular(backwards, identity, upper=False)
    return InverseFactor(backwards.flip(0, 1), dead.flip(0))


@dataclass(frozen=True)
class OrderedFactor:
    """What a sweep in another order of inputs needs to know.

    Attributes:
        factor: of the inputs in that order.
        order: int64 ``[K]``: which input comes first, second, ...
    """

    factor: InverseFactor
    order: Tensor


def largest_first(hessian: Tensor, name: str = "weight") -> OrderedFactor:
    """As `inverse_factor`, with the inputs in order of their mean squares, the largest first (GPTQ's ``act-order``).

    What is settled early can be made up for by all that comes after, what is settled last by nothing.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return OrderedFactor(inverse_factor(hessian[order][:, order], name), order)


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
    keep = expand_tiles(dense.T, weight.T.shape, tile[::-1]).T
    chosen = torch.empty_like(keep)
    updated = _sweep(weight, factor, keep, chosen)
    mask = HybridMask((weight.shape[0], weight.shape[1]), tile, dense, encode_patterns(chosen))
    return updated.masked_fill_(~(keep | chosen), 0), mask


def quantise_hybrid(
    weight: Tensor, factor: InverseFactor, tile: TileShape, dense: Tensor, group: int
) -> tuple[Quantised, HybridMask]:
    """`prune_hybrid` that rounds what it keeps to INT4 as it goes, ``group`` inputs to a scale."""
    tile_grid(weight.shape, tile)
    keep = expand_tiles(dense.T, weight.T.shape, tile[::-1]).T
    chosen = torch.empty_like(keep)
    rounding = GroupRounding((weight.shape[0], weight.shape[1]), group, weight.device)
    _sweep(weight, factor, keep, chosen, rounding=rounding)
    mask = HybridMask((weight.shape[0], weight.shape[1]), tile, dense, encode_patterns(chosen))
    return rounding.quantised, mask


def quantise_masked(weight: Tensor, factor: InverseFactor, keep: Tensor, group: int) -> Quantised:
    """A weight ``[N, K]`` that is zero outside ``keep`` in INT4, zero there too, ``group`` inputs to a scale.

    The outputs of the weight as given are what is kept to. Inputs that calibration never saw are rounded to nearest.
    """
    rounding = GroupRounding((weight.shape[0], weight.shape[1]), group, weight.device)
    # Nothing is known of what dead inputs do in other text: their weights stay.
    alive = replace(factor, dead=torch.zeros_like(factor.dead))
    _sweep(weight.masked_fill(~keep, 0), alive, keep, rounding=rounding)
    return rounding.quantised


def quantise_in_order(
    weight: Tensor, ordered: OrderedFactor, keep: Tensor, precision: Precision, group: int
) -> Quantised:
    """A weight ``[N, K]`` in few bits, zero outside ``keep``, settled in another order of inputs than they lie in.

    Scales are chosen before, from the weight as given, so which inputs share one does not depend on the order. Those of
    4 bits lose least if all other weights make up for an error: its square over the diagonal of the inverse Hessian.

    Args:
        group: inputs that share a scale; of 8 bits all do.
    """
    factor, order = ordered.factor, ordered.order
    kept = weight.float().masked_fill(~keep, 0)
    importance = torch.empty_like(kept[0])
    importance[order] = factor.upper.square().sum(0).reciprocal()
    rounding = ScaledRounding(precision, weight_scales(kept, precision, group, importance), order)
    alive = replace(factor, dead=torch.zeros_like(factor.dead))
    _sweep(kept[:, order], alive, keep[:, order], rounding=rounding)
    return rounding.quantised


def prune_unstructured(weight: Tensor, factor: InverseFactor, sparsity: float) -> tuple[Tensor, Tensor]:
    """``weight`` ``[N, K]`` without ``round(sparsity * N * K)`` elements, and updated; float32, and bool keep.

    Every block of 128 columns has the target sparsity; what rounding leaves over goes to the next block.
    """
    check_unstructured(sparsity)
    rows, columns = weight.shape
    keep = torch.empty((columns, rows), dtype=torch.bool, device=weight.device).T

    def choose(scores: Tensor, start: int) -> None:
        keep[:, start : start + scores.shape[1]] = _kept_of_block(scores, start, sparsity)

    updated = _sweep(weight, factor, keep, choose=choose)
    return updated.masked_fill_(~keep, 0), keep.contiguous()


def _kept_of_block(scores: Tensor, start: int, sparsity: float) -> Tensor:
    """What unstructured pruning keeps of a block of columns, whose first is ``start``; bool like ``scores``."""
    rows, stop = scores.shape[0], start + scores.shape[1]
    before, after = (round(sparsity * rows * column) for column in (start, stop))
    return drop_lowest(scores.flatten(), after - before).reshape(scores.shape)


def _costs(weight: Tensor, factor: InverseFactor) -> Tensor:
    """By what a sweep that corrects nothing chooses: ``|w_j| / d_j`` of the weight as it is, float32 ``[N, K]``."""
    return weight.float().masked_fill(factor.dead, 0).abs() / factor.upper.diagonal()


def select_hybrid(weight: Tensor, factor: InverseFactor, tile: TileShape, dense: Tensor) -> tuple[Tensor, HybridMask]:
    """`prune_hybrid` without corrections."""
    mask = hybrid_mask(_costs(weight, factor), tile, dense)
    return mask.apply(weight.float()), mask


def select_unstructured(weight: Tensor, factor: InverseFactor, sparsity: float) -> tuple[Tensor, Tensor]:
    """`prune_unstructured` without corrections."""
    check_unstructured(sparsity)
    costs = _costs(weight, factor)
    starts = range(0, weight.shape[1], COLUMNS)
    kept = [_kept_of_block(costs[:, start : start + COLUMNS], start, sparsity) for start in starts]
    keep = torch.cat(kept, 1)
    return weight.float().masked_fill(~keep, 0), keep


def _sweep(
    weight: Tensor,
    factor: InverseFactor,
    keep: Tensor,
    chosen: Tensor | None = None,
    choose: Callable[[Tensor, int], None] | None = None,
    rounding: GroupRounding | ScaledRounding | None = None,
) -> Tensor:
    """Settle all columns from left to right: the updated weight, float32 ``[N, K]``, dropped elements as they come.

    Args:
        keep, chosen: of the whole weight, see `settle`.
        choose: called before each block with the scores ``[N, columns]`` of updated weights and their first column.
        rounding: of the whole weight, to be filled with what is kept.
    """
    settled = _fastest(weight.device).settle
    # Columns are contiguous.
    left = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format).T
    left.masked_fill_(factor.dead, 0)
    inputs = left.shape[1]
    with full_float32():
        for start in range(0, inputs, COLUMNS):
            stop = min(start + COLUMNS, inputs)
            here = slice(start, stop)
            block, upper = left[:, here], factor.upper[here, here]
            if choose:
                choose(block.abs() / upper.diagonal(), start)
            chosen_here = None if chosen is None else chosen[:, here]
            if rounding is None:
                errors = settled(block, upper, keep[:, here], chosen_here)
            else:
                errors = _settle_groups(block, upper, keep[:, here], chosen_here, rounding, start)
            left[:, stop:].addmm_(errors, factor.upper[here, stop:], alpha=-1)
    return left.contiguous()


def settle(block: Tensor, upper: Tensor, keep: Tensor, chosen: Tensor | None) -> Tensor:
    """Settle a block's columns from left to right, in place; dropped elements are left as they come.

    Args:
        block: updated weights, float32 ``[N, columns]``.
        upper: float32 ``[columns, columns]``, the block's part of `InverseFactor.upper`.
        keep: bool ``[N, columns]``, what is kept.
        chosen: bool ``[N, columns]`` to be filled with the best two of each four, chosen when the first is reached,
            which are kept too; None if ``keep`` says it all.

    Returns:
        What columns to the right have to make up for, in units of their rows of the factor, float32 ``[N, columns]``.
    """
    steps = upper.diagonal()
    errors = torch.empty_like(block)
    for column in range(block.shape[1]):
        if chosen is not None and column % GROUP == 0:
            group = slice(column, column + GROUP)
            chosen[:, group] = decode_patterns(best_patterns(block[:, group].abs() / steps[group]))
        kept = keep[:, column] if chosen is None else keep[:, column] | chosen[:, column]
        errors[:, column] = (block[:, column] / steps[column]).masked_fill_(kept, 0)
        block[:, column + 1 :].addr_(errors[:, column], upper[column, column + 1 :], alpha=-1)
    return errors


def settle_rounded(
    block: Tensor, upper: Tensor, keep: Tensor, chosen: Tensor | None, scales: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """`settle` a block's first columns, as many as have scales, rounding what is kept: what that loses is an error too.

    Args:
        scales: of each element, float32 ``[N, settled]``.

    Returns:
        What columns to the right have to make up for, which those of the block did, and the values that elements are
        rounded to, whose scales are to be multiplied by; float32 ``[N, settled]``.
    """
    steps = upper.diagonal()
    errors, values = torch.empty_like(block[:, : scales.shape[1]]), torch.empty_like(block[:, : scales.shape[1]])
    for column in range(scales.shape[1]):
        if chosen is not None and column % GROUP == 0:
            group = slice(column, column + GROUP)
            chosen[:, group] = decode_patterns(best_patterns(block[:, group].abs() / steps[group]))
        kept = keep[:, column] if chosen is None else keep[:, column] | chosen[:, column]
        scale = scales[:, column]
        values[:, column] = nearest(block[:, column].masked_fill(~kept, 0) / scale, precision)
        errors[:, column] = (block[:, column] - values[:, column] * scale) / steps[column]
        block[:, column + 1 :].addr_(errors[:, column], upper[column, column + 1 :], alpha=-1)
    return errors, values


def _settle_groups(
    block: Tensor,
    upper: Tensor,
    keep: Tensor,
    chosen: Tensor | None,
    rounding: GroupRounding | ScaledRounding,
    start: int,
) -> Tensor:
    """`settle_rounded` all of a block, scales being chosen on the way where they are not yet; the errors.

    Args:
        start: the block's first column in the weight, of whole groups where scales are chosen on the way.
    """
    settled = _fastest(block.device).settle_rounded
    columns, errors = block.shape[1], torch.empty_like(block)
    for first in range(0, columns, rounding.group or columns):
        here, still = slice(first, first + (rounding.group or columns)), slice(first, columns)
        if rounding.group is not None:
            steps, likely = upper.diagonal()[here], keep[:, here]
            if chosen is not None:
                # Which two of each four stay is settled later; those that are largest now mostly do.
                likely = likely | decode_patterns(best_patterns(block[:, here].abs() / steps))
            rounding.open(start + first, block[:, here].masked_fill(~likely, 0), steps.square().reciprocal())
        errors[:, here], values = settled(
            block[:, still],
            upper[still, still],
            keep[:, still],
            None if chosen is None else chosen[:, still],
            rounding.scales_of(start + first, start + min(here.stop, columns)),
            rounding.precision,
        )
        rounding.take(start + first, values)
    return errors


def _fastest(device: torch.device) -> ModuleType:
    """The module whose `settle` and `settle_rounded` are the fastest on a device."""
    if device.type != "cuda":
        return sys.modules[__name__]
    # Triton is there on Linux alone.
    from patch.oneshot import sparsegpt_triton

    return sparsegpt_triton


_METHOD = Method(
    statistic=InputHessian,
    prepare=lambda name, statistic: inverse_factor(statistic.hessian(), name),
    scores=scores,
    hybrid=prune_hybrid,
    unstructured=prune_unstructured,
    quantised=quantise_hybrid,
)
FROZEN = replace(_METHOD, hybrid=select_hybrid, unstructured=select_unstructured, quantised=None)
METHOD = replace(_METHOD, frozen=FROZEN)
