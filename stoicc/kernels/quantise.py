"""Activations to 8 bits, a scale for each token, in one pass; with RMSNorm in front of it where that is wanted.

A thread block per token holds the whole row in registers, so that it is read once and the largest magnitude is known
before anything is written. Plain Triton, so it runs wherever the products do.

It takes a microsecond or two, most of it the way to start and end. So on Hopper it begins before the kernel before it
is done, and where a product of ours is known to follow it lets that begin at once (``EARLY``): the product asks for its
weights, and then waits for this kernel. Any other kernel might not wait for what ran before this one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from patch.quantise.values import LARGEST

# Added and taken away again it rounds to the nearest integer, to even at the half, for magnitudes below 2**22.
_ROUND = tl.constexpr(12582912.0)
# The bits of 1e-30 in float32, below which no magnitude counts.
_LEAST = tl.constexpr(int(torch.tensor(1e-30).view(torch.int32)))


# Columns of which Triton does not know that they are a multiple of 16 are loaded and stored one by one.
@triton.jit
def quantise_kernel(
    x, norm, values, scales, columns, padded, x_stride, eps, largest,
    BLOCK: tl.constexpr, NORM: tl.constexpr, INTEGERS: tl.constexpr, PDL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """``values * scales = x``, a thread block per token.

    Args:
        x: ``[tokens, columns]`` with unit column stride, rows ``x_stride`` elements apart.
        norm: ``[columns]``, the weight of the RMSNorm if ``NORM``.
        values: ``[tokens, padded]``, zero from ``columns`` on.
        scales: float32 ``[tokens]``.
        largest: the magnitude that the token's largest becomes.
        PDL: whether it is launched with ``launch_pdl``.
        EARLY: whether the next kernel may begin before this one has waited.
    """
    if PDL:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    row = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
    wide = row.to(tl.float32)
    if NORM:
        wide *= tl.math.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
        # Rounded as often as transformers does it: before the weight and after.
        weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        wide = (wide.to(row.dtype).to(tl.float32) * weight).to(row.dtype).to(tl.float32)
    # Of magnitudes as integers, whose order is the same: a maximum of floats passes NaNs over, and they must reach the
    # scale, for values of 8 bits cannot all hold them.
    magnitude = tl.max(tl.abs(wide).to(tl.int32, bitcast=True), 0)
    magnitude = tl.maximum(magnitude, _LEAST).to(tl.float32, bitcast=True)
    # As rounded as torch's divisions: Triton's own are not, and some values would come to lie on another side.
    scale = tl.math.div_rn(magnitude, largest)
    wide = wide * tl.math.div_rn(1.0, scale)
    if INTEGERS:
        wide = (wide + _ROUND) - _ROUND
    tl.store(values + token * padded + column, wide.to(values.dtype.element_ty), mask=column < padded)
    tl.store(scales + token, scale)


def launch(
    x: Tensor,
    dtype: torch.dtype,
    norm: Tensor | None,
    eps: float,
    values: Tensor,
    scales: Tensor,
    pdl: bool = False,
    early: bool = False,
) -> None:
    """Enqueue the quantisation of ``x`` ``[tokens, K]``, unit column stride, into ``values`` and ``scales``.

    Args:
        pdl: begin before the kernel before it on the stream is done; Hopper and newer.
        early: let the next kernel begin at once, which must be a product of this package.
    """
    tokens, columns = x.shape
    block = triton.next_power_of_2(values.shape[1])
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    quantise_kernel[(tokens,)](
        x,
        x if norm is None else norm,
        values,
        scales,
        columns,
        values.shape[1],
        x.stride(0),
        eps,
        LARGEST[dtype],
        BLOCK=block,
        NORM=norm is not None,
        INTEGERS=dtype == torch.int8,
        PDL=pdl,
        EARLY=early,
        num_warps=min(16, max(1, block // 512)),
        # A product that is fused with the rounding is rounded once where the reference does it twice.
        enable_fp_fusion=False,
        **options,
    )
