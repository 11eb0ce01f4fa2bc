"""A block of columns of `patch.oneshot.sparsegpt`'s sweep in one kernel, where the eager one launches fifteen a column.

Columns follow one another but rows do not meet within a block, so a program takes a few rows through all of it: their
weights stay in registers, the factor's rows come from cache. What it computes is that of `sparsegpt.settle` and
`sparsegpt.settle_rounded`, which the tests hold it to.

Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported) runs the kernel on a CPU.
"""
# mypy: disable-error-code=no-untyped-def
# Kernels' arguments are of Triton's types, not of Python's.

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch.quantise.precisions import Precision
from patch.quantise.values import limits
from patch.tiles import GROUP

# Eight rows of a column are the least that memory delivers at once. The interpreter had rather have few programs.
_ROWS = 64 if triton.knobs.runtime.interpret else 8


def settle(block: Tensor, upper: Tensor, keep: Tensor, chosen: Tensor | None) -> Tensor:
    """See `patch.oneshot.sparsegpt.settle`."""
    errors = torch.empty_like(block)
    _launch(block, upper, keep, chosen, errors)
    return errors


def settle_rounded(
    block: Tensor, upper: Tensor, keep: Tensor, chosen: Tensor | None, scales: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """See `patch.oneshot.sparsegpt.settle_rounded`."""
    errors, values = torch.empty_like(block[:, : scales.shape[1]]), torch.empty_like(block[:, : scales.shape[1]])
    _launch(block, upper, keep, chosen, errors, values, scales, precision)
    return errors, values


def _launch(
    block: Tensor,
    upper: Tensor,
    keep: Tensor,
    chosen: Tensor | None,
    errors: Tensor,
    values: Tensor | None = None,
    scales: Tensor | None = None,
    precision: Precision | None = None,
) -> None:
    rows, columns = block.shape
    # Factors come with their columns contiguous; the kernel reads row after row.
    upper = upper.contiguous()
    out = keep if chosen is None else chosen
    values, scales = (errors if tensor is None else tensor for tensor in (values, scales))
    lowest, highest = limits(precision) if precision else (0.0, 0.0)
    _settle[(triton.cdiv(rows, _ROWS),)](
        *(block, *block.stride()),
        *(errors, *errors.stride()),
        *(keep, *keep.stride()),
        *(out, *out.stride()),
        *(upper, upper.stride(0)),
        *(values, *values.stride()),
        *(scales, *scales.stride()),
        rows,
        columns,
        errors.shape[1],
        CHOOSES=chosen is not None,
        ROUNDS=precision is not None,
        LOWEST=float(lowest),
        HIGHEST=float(highest),
        FLOATING=precision is not None and getattr(torch, precision.dtype).is_floating_point,
        ROWS=_ROWS,
        GROUPS=triton.next_power_of_2(triton.cdiv(columns, GROUP)),
        num_warps=1,
    )


@triton.jit
def _settle(
    block,
    block_row,
    block_column,
    errors,
    errors_row,
    errors_column,
    keep,
    keep_row,
    keep_column,
    chosen,
    chosen_row,
    chosen_column,
    upper,
    upper_row,
    values,
    values_row,
    values_column,
    scales,
    scales_row,
    scales_column,
    rows,
    columns,
    settled_columns,
    CHOOSES: tl.constexpr,
    ROUNDS: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    FLOATING: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group, lane = tl.arange(0, GROUPS), tl.arange(0, 4)
    column = group[:, None] * 4 + lane[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None]
    places = block + row[:, None, None] * block_row + column[None] * block_column
    weights = tl.load(places, inside, 0.0)
    for first in range(0, settled_columns, 4):
        four = first + lane
        now = tl.sum(tl.where((group == first // 4)[None, :, None], weights, 0.0), 1)
        here = (row < rows)[:, None] & (four < settled_columns)[None]
        kept = tl.load(keep + row[:, None] * keep_row + four[None] * keep_column, here, 1) != 0
        if CHOOSES:
            best = _best_two(tl.abs(now) / tl.load(upper + four * (upper_row + 1))[None], lane)
            tl.store(chosen + row[:, None] * chosen_row + four[None] * chosen_column, best, here)
            kept |= best
        if ROUNDS:
            scale = tl.load(scales + row[:, None] * scales_row + four[None] * scales_column, here, 1.0)
        error, value = tl.zeros_like(now), tl.zeros_like(now)
        for i in tl.static_range(4):
            settled = first + i
            of_factor = upper + settled * upper_row
            step = tl.load(of_factor + settled, settled < columns, 1.0)
            # A column is picked by adding it to zeros: registers have no index.
            mine = (lane == i)[None]
            lost = tl.where(kept, 0.0, now)
            if ROUNDS:
                near = tl.where(kept, _nearest(tl.div_rn(now, scale), LOWEST, HIGHEST, FLOATING), 0.0)
                value = tl.where(mine, near, value)
                lost = now - near * scale
            lost = tl.sum(tl.where(mine & here, lost, 0.0), 1) / step
            error = tl.where(mine, lost[:, None], error)
            now -= lost[:, None] * tl.load(of_factor + four, (four > settled) & (four < columns), 0.0)[None]
            ahead = tl.load(of_factor + column, (column > settled) & (column < columns), 0.0)
            weights -= lost[:, None, None] * ahead[None]
        tl.store(errors + row[:, None] * errors_row + four[None] * errors_column, error, here)
        if ROUNDS:
            tl.store(values + row[:, None] * values_row + four[None] * values_column, value, here)
    tl.store(places, weights, inside)


@triton.jit
def _nearest(scaled, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, FLOATING: tl.constexpr):
    """`patch.quantise.values.nearest`, by arithmetic: not all GPUs convert to 8 bits, and none to 4.

    A number that is added and taken away again, so large that float32 has just the bits for it that a value may have,
    rounds as the precision does: to nearest, to even at the half.
    """
    scaled = tl.where(scaled > HIGHEST, HIGHEST, tl.where(scaled < LOWEST, LOWEST, scaled))
    bits = scaled.to(tl.int32, bitcast=True)
    if FLOATING:
        # e4m3: three bits behind the first, of what is below 2^-6 as many less as it is smaller.
        large = tl.maximum(bits & 0x7F800000, (127 - 6) << 23).to(tl.float32, bitcast=True) * (1.5 * 2**20)
    else:
        large = tl.full(scaled.shape, 1.5 * 2**23, tl.float32)
    near = (scaled + large) - large
    # What is below zero becomes zero below it, as torch has it.
    return (near.to(tl.int32, bitcast=True) | ((bits >> 31) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _best_two(scores, lane):
    """`patch.mask.best_patterns` of one group a row ``[ROWS, 4]``, as a keep mask."""
    scores = tl.where(scores == scores, scores, float("inf"))
    mine, other = scores[:, :, None], scores[:, None, :]
    earlier = (lane[None, :] < lane[:, None])[None]
    itself = (lane[None, :] == lane[:, None])[None]
    better = tl.where(earlier, other >= mine, other > mine) & ~itself
    return tl.sum(better.to(tl.int32), 2) < 2
