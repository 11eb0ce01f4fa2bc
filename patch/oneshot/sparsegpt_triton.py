"""A block of columns of `patch.oneshot.sparsegpt`'s sweep in one kernel, where the eager one launches fifteen a column.

Columns follow one another but rows do not meet within a block, so a program takes a few rows through all of it: their
weights stay in registers, the factor's rows come from cache. What it computes is that of `sparsegpt.settle`, which the
tests hold it to.

Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported) runs the kernel on a CPU.
"""
# mypy: disable-error-code=no-untyped-def
# Kernels' arguments are of Triton's types, not of Python's.

import torch
import triton
import triton.language as tl
from torch import Tensor

from patch.tiles import GROUP

# Eight rows of a column are the least that memory delivers at once. The interpreter had rather have few programs.
_ROWS = 64 if triton.knobs.runtime.interpret else 8


def settle(block: Tensor, upper: Tensor, keep: Tensor, chosen: Tensor | None) -> Tensor:
    """See `patch.oneshot.sparsegpt.settle`."""
    rows, columns = block.shape
    # Factors come with their columns contiguous; the kernel reads row after row.
    upper = upper.contiguous()
    errors = torch.empty_like(block)
    out = keep if chosen is None else chosen
    _settle[(triton.cdiv(rows, _ROWS),)](
        *(block, *block.stride()),
        *(errors, *errors.stride()),
        *(keep, *keep.stride()),
        *(out, *out.stride()),
        *(upper, upper.stride(0)),
        rows,
        columns,
        CHOOSES=chosen is not None,
        ROWS=_ROWS,
        GROUPS=triton.next_power_of_2(triton.cdiv(columns, GROUP)),
        num_warps=1,
    )
    return errors


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
    rows,
    columns,
    CHOOSES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group, lane = tl.arange(0, GROUPS), tl.arange(0, 4)
    column = group[:, None] * 4 + lane[None, :]
    inside = (row < rows)[:, None, None] & (column < columns)[None]
    places = block + row[:, None, None] * block_row + column[None] * block_column
    weights = tl.load(places, inside, 0.0)
    for first in range(0, columns, 4):
        four = first + lane
        now = tl.sum(tl.where((group == first // 4)[None, :, None], weights, 0.0), 1)
        here = (row < rows)[:, None] & (four < columns)[None]
        kept = tl.load(keep + row[:, None] * keep_row + four[None] * keep_column, here, 1) != 0
        if CHOOSES:
            best = _best_two(tl.abs(now) / tl.load(upper + four * (upper_row + 1))[None], lane)
            tl.store(chosen + row[:, None] * chosen_row + four[None] * chosen_column, best, here)
            kept |= best
        error = tl.zeros_like(now)
        for i in tl.static_range(4):
            settled = first + i
            of_factor = upper + settled * upper_row
            step = tl.load(of_factor + settled, settled < columns, 1.0)
            # A column is picked by adding it to zeros: registers have no index.
            mine = (lane == i)[None]
            dropped = tl.sum(tl.where(mine & ~kept, now, 0.0), 1) / step
            error = tl.where(mine, dropped[:, None], error)
            now -= dropped[:, None] * tl.load(of_factor + four, (four > settled) & (four < columns), 0.0)[None]
            ahead = tl.load(of_factor + column, (column > settled) & (column < columns), 0.0)
            weights -= dropped[:, None, None] * ahead[None]
        tl.store(errors + row[:, None] * errors_row + four[None] * errors_column, error, here)
    tl.store(places, weights, inside)


@triton.jit
def _best_two(scores, lane):
    """`patch.mask.best_patterns` of one group a row ``[ROWS, 4]``, as a keep mask."""
    scores = tl.where(scores == scores, scores, float("inf"))
    mine, other = scores[:, :, None], scores[:, None, :]
    earlier = (lane[None, :] < lane[:, None])[None]
    itself = (lane[None, :] == lane[:, None])[None]
    better = tl.where(earlier, other >= mine, other > mine) & ~itself
    return tl.sum(better.to(tl.int32), 2) < 2
