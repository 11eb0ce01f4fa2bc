"""Any GPU that Triton serves, and its interpreter on a CPU: 2:4 blocks are expanded as they are loaded.

No sparse tensor cores and no more than ``tl.dot``, so it is here to be right and to run everywhere, and to be read: the
address of every element of a record is written out.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from stoicc.format import HybridWeight


@dataclass(frozen=True)
class PortableConfig:
    """Tokens of a thread block: 16 to 128, a power of two."""

    tokens: int


@triton.jit
def _widened(values, INTEGERS: tl.constexpr):
    """The bytes of ``float8_e4m3fn`` or ``int8`` values as float32, exactly, on GPUs that do not know the type too."""
    if INTEGERS:
        return values.to(tl.float32)
    word = values.to(tl.int32)
    magnitude = word & 0x7F
    # Exponent and mantissa at the places of float32; the exponents' biases differ by 120.
    exact = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    exact = tl.where(magnitude == 0x7F, float("nan"), exact)
    return tl.where(word < 0, -exact, exact)


@triton.jit(do_not_specialize=["steps", "tokens", "out_features"])
def portable_linear(
    x, y, words, stored, bias, scales, token_scales, starts, columns, sparse_blocks,
    steps, tokens, in_features, out_features, x_stride, y_stride,
    TOKENS: tl.constexpr, BYTES: tl.constexpr, INTEGERS: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``y = x @ W^T + bias``, a thread block per panel and ``TOKENS`` tokens.

    Args:
        x: ``[tokens, in_features]`` and more columns that are not read; of 8 bits as int8.
        words, stored: the records as int32 and as values of the weight's dtype, of 8 bits as int8.
        scales, token_scales: float32, what products of 8 bits are multiplied by; else anything.
        BYTES: of a value.
        INTEGERS: whether values of one byte are integers.
        UPCAST: multiply in float32; the interpreter's product of bfloat16 is wrong.
    """
    WIDTH: tl.constexpr = 128 // BYTES
    panel = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.arange(0, 64)[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    warp, half, q = row // 16, row % 16 // 8, row % 8

    # The element's group, and its place within it; where the group's nibble is.
    group, place = col // 4, col % 4
    if BYTES == 2:
        nibble_word = 1024 + warp * 32 + q * 4 + group // 4
        nibble_shift = 16 * half + 4 * (group % 4)
    else:
        nibble_word = 1024 + group // 16 * 128 + warp * 32 + q * 4 + group % 16 // 8 * 2 + half
        nibble_shift = 4 * (group % 8)

    sparse = tl.load(sparse_blocks + panel)
    unit = tl.load(starts + panel).to(tl.int64)
    acc = tl.zeros([TOKENS, 64], tl.float32)
    for step in range(steps):
        two_four = step < sparse
        nibble = tl.load(words + unit * 128 + nibble_word, mask=two_four, other=0) >> nibble_shift
        second = place == (nibble >> 2 & 3)
        kept = second | (place == (nibble & 3)) | (not two_four)
        # Values of one byte lie in pairs as those of two bytes lie alone.
        column = tl.where(two_four, 2 * group + second.to(tl.int32), col)
        pair = column * BYTES // 2
        lane = q * 4 + pair % 8 // 2
        inside = pair // 16 * 256 + lane * 8 + pair % 16 // 8 * 4 + half * 2 + pair % 2
        per_warp = tl.where(two_four, 512, 1024)
        offset = unit * 256 + warp * per_warp + inside
        if BYTES == 1:
            offset = 2 * offset + column % 2
        weight = tl.load(stored + offset, mask=kept, other=0)

        at = tl.load(columns + panel * steps + step) * WIDTH + tl.arange(0, WIDTH)
        mask = (token < tokens)[:, None] & (at < in_features)[None, :]
        values = tl.load(x + token.to(tl.int64)[:, None] * x_stride + at[None, :], mask=mask, other=0)
        if BYTES == 1:
            # Both kinds of 8 bits are exact in bfloat16.
            weight = _widened(weight, INTEGERS).to(tl.bfloat16)
            values = _widened(values, INTEGERS).to(tl.bfloat16)
        if UPCAST:
            acc += tl.dot(values.to(tl.float32), tl.trans(weight.to(tl.float32)), input_precision="ieee")
        else:
            acc += tl.dot(values, tl.trans(weight))
        unit += tl.where(two_four, 8 + 2 // BYTES, 16)
    feature = panel * 64 + tl.arange(0, 64)
    if BYTES == 1:
        acc *= tl.load(scales + feature, mask=feature < out_features, other=0.0)[None, :]
        acc *= tl.load(token_scales + token, mask=token < tokens, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + feature, mask=feature < out_features, other=0.0).to(tl.float32)[None, :]
    mask = (token < tokens)[:, None] & (feature < out_features)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * y_stride + feature[None, :], acc.to(y.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    hybrid: HybridWeight,
    bias: Tensor | None,
    y: Tensor,
    config: PortableConfig,
    token_scales: Tensor | None = None,
) -> None:
    """Run ``y = x @ W^T + bias``: ``x`` ``[tokens, K]`` of the weight's dtype, ``y`` ``[tokens, N]``.

    Args:
        token_scales: float32 ``[tokens]``, of weights of 8 bits.
    """
    tokens = x.shape[0]
    kind = torch.int8 if hybrid.dtype.itemsize == 1 else hybrid.dtype
    portable_linear[(hybrid.panels, triton.cdiv(tokens, config.tokens))](
        x.view(kind),
        y,
        hybrid.records,
        hybrid.records.view(kind),
        y if bias is None else bias,
        y if hybrid.scales is None else hybrid.scales,
        y if token_scales is None else token_scales,
        hybrid.starts,
        hybrid.columns,
        hybrid.sparse_blocks,
        hybrid.steps,
        tokens,
        hybrid.shape[1],
        hybrid.shape[0],
        x.stride(0),
        y.stride(0),
        TOKENS=config.tokens,
        BYTES=hybrid.dtype.itemsize,
        INTEGERS=hybrid.dtype == torch.int8,
        HAS_BIAS=bias is not None,
        UPCAST=knobs.runtime.interpret,
    )
