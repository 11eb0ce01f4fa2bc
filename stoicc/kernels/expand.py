"""The weight that 4 bits stand for, in 16: for more tokens than `stoicc.kernels.decode` serves, and on any GPU.

A product of many tokens is bound by the tensor cores, which take no 4 bits: it is then one of the expanded weight with
whatever torch multiplies by. That costs one pass over the weight and, for as long as the product takes, its memory in
16 bits. Plain Triton, the address of every element written out, so it runs wherever Triton does, interpreted too.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.format import LAYOUTS, HybridWeight

_DENSE = tl.constexpr(LAYOUTS[4].dense)
_SPARSE = tl.constexpr(LAYOUTS[4].sparse)
_UNIT = tl.constexpr(LAYOUTS[4].unit)
_METADATA = tl.constexpr(LAYOUTS[4].metadata)


@dataclass(frozen=True)
class ExpandConfig:
    """The product is torch's; there is nothing to choose."""


@triton.jit(do_not_specialize=["steps", "out_features"])
def expand_kernel(words, weight, starts, columns, sparse_blocks, steps, out_features, w_stride):
    """A thread block per block of the weight.

    Args:
        words, starts, columns, sparse_blocks: parts of the ``HybridWeight``; words are its records.
        weight: ``[out_features, ...]``, rows ``w_stride`` elements apart.
    """
    panel, step = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 64)[:, None]
    col = tl.arange(0, 128)[None, :]
    warp, half, q = row // 16, row % 16 // 8, row % 8

    sparse = tl.load(sparse_blocks + panel)
    two_four = step < sparse
    unit = tl.load(starts + panel) + tl.minimum(step, sparse) * _SPARSE + tl.maximum(step - sparse, 0) * _DENSE
    record = words + unit.to(tl.int64) * _UNIT

    # The element's group, and its place within it; where the group's nibble is.
    group, place = col // 4, col % 4
    metadata = _METADATA + group // 16 * 128 + warp * 32 + q * 4 + group % 16 // 4
    nibble = tl.load(record + metadata, mask=two_four, other=0) >> (16 * half + 4 * (group % 4))
    second = place == (nibble >> 2 & 3)
    kept = second | (place == (nibble & 3)) | (not two_four)
    # The stored column; 64 of them are a word a lane for each of four k-steps.
    column = tl.where(two_four, 2 * group + second.to(tl.int32), col)
    lane = q * 4 + column % 8 // 2
    per_warp = tl.where(two_four, 128, 256)
    word = warp * per_warp + column // 64 * 128 + lane * 4 + column % 64 // 16
    shift = 4 * (half + column % 16 // 8 * 2 + column % 2 * 4)
    value = (tl.load(record + word, mask=kept, other=0) >> shift & 15 ^ 8) - 8
    value = tl.where(kept, value, 0)

    last = tl.where(two_four, _SPARSE, _DENSE) - 1
    scale = (tl.load(record + last * _UNIT + warp * 8 + q) >> (16 * half)) << 16
    product = value.to(tl.float32) * scale.to(tl.float32, bitcast=True)
    at = tl.load(columns + panel * steps + step) * 128 + col
    feature = panel * 64 + row
    pointer = weight + feature.to(tl.int64) * w_stride + at
    tl.store(pointer, product.to(weight.dtype.element_ty), mask=feature < out_features)


def expand(hybrid: HybridWeight, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]`` of a packed one of 4 bits, each element its value times its scale, rounded to ``dtype``."""
    weight = torch.empty(hybrid.shape, dtype=dtype, device=hybrid.device)
    expand_kernel[(hybrid.panels, hybrid.steps)](
        hybrid.records,
        weight,
        hybrid.starts,
        hybrid.columns,
        hybrid.sparse_blocks,
        hybrid.steps,
        hybrid.shape[0],
        weight.stride(0),
    )
    return weight
