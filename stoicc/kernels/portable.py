"""Any GPU that Triton serves, and its interpreter on a CPU: 2:4 blocks are expanded as they are loaded.

No sparse tensor cores and no more than ``tl.dot``, so it is here to be right and to run everywhere, and to be read: the
address of every element of a record is written out.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from stoicc.format import HybridWeight


@dataclass(frozen=True)
class PortableConfig:
    """Tokens of a thread block: 16 to 128, a power of two."""

    tokens: int


@triton.jit(do_not_specialize=["steps", "tokens", "out_features"])
def portable_linear(
    x, y, words, halves, bias, starts, columns, sparse_blocks, steps, tokens, in_features, out_features, x_stride,
    y_stride,
    TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``y = x @ W^T + bias``, a thread block per panel and ``TOKENS`` tokens.

    Args:
        words, halves: the records as int32 and as values of the weight's dtype.
        UPCAST: multiply in float32; the interpreter's product of bfloat16 is wrong.
    """
    panel = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.arange(0, 64)[:, None]
    col = tl.arange(0, 64)[None, :]
    warp, half, q = row // 16, row % 16 // 8, row % 8

    # The element's group, and its place within it.
    group, place = col // 4, col % 4
    nibble_word = 1024 + warp * 32 + q * 4 + group // 4
    nibble_shift = 16 * half + 4 * (group % 4)

    sparse = tl.load(sparse_blocks + panel)
    unit = tl.load(starts + panel).to(tl.int64)
    acc = tl.zeros([TOKENS, 64], tl.float32)
    for step in range(steps):
        two_four = step < sparse
        nibble = tl.load(words + unit * 128 + nibble_word, mask=two_four, other=0) >> nibble_shift
        second = place == (nibble >> 2 & 3)
        kept = second | (place == (nibble & 3)) | (not two_four)
        stored = tl.where(two_four, 2 * group + second.to(tl.int32), col)
        lane = q * 4 + stored % 8 // 2
        inside = stored // 16 * 256 + lane * 8 + stored % 16 // 8 * 4 + half * 2 + stored % 2
        per_warp = tl.where(two_four, 512, 1024)
        weight = tl.load(halves + unit * 256 + warp * per_warp + inside, mask=kept, other=0.0)

        column = tl.load(columns + panel * steps + step) * 64 + tl.arange(0, 64)
        mask = (token < tokens)[:, None] & (column < in_features)[None, :]
        values = tl.load(x + token.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        if UPCAST:
            acc += tl.dot(values.to(tl.float32), tl.trans(weight.to(tl.float32)), input_precision="ieee")
        else:
            acc += tl.dot(values, tl.trans(weight))
        unit += tl.where(two_four, 9, 16)
    feature = panel * 64 + tl.arange(0, 64)
    if HAS_BIAS:
        acc += tl.load(bias + feature, mask=feature < out_features, other=0.0).to(tl.float32)[None, :]
    mask = (token < tokens)[:, None] & (feature < out_features)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * y_stride + feature[None, :], acc.to(y.dtype.element_ty), mask=mask)


def launch(x: Tensor, hybrid: HybridWeight, bias: Tensor | None, y: Tensor, config: PortableConfig) -> None:
    """Run ``y = x @ W^T + bias``: ``x`` ``[tokens, K]``, ``y`` ``[tokens, N]``, both of the weight's dtype."""
    tokens = x.shape[0]
    portable_linear[(hybrid.panels, triton.cdiv(tokens, config.tokens))](
        x,
        y,
        hybrid.records,
        hybrid.records.view(hybrid.dtype),
        y if bias is None else bias,
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
        HAS_BIAS=bias is not None,
        UPCAST=knobs.runtime.interpret,
    )
