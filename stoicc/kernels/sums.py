"""Sums of thread blocks that share one output tile: each leaves its own in a workspace, then adds up a slice of all.

    leave(sums + part * (ROWS * TOKENS), acc)
    # now each waits until all have
    add_up(y, bias, scales, token_scales, sums, ...)

Every block adds up an equal slice of the tokens, in the order of the parts, so the bits are the same on every run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def leave(sums, acc):
    """Write one part's sums ``[rows, tokens]`` where the others find them, token by token."""
    row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    token = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    gl.store(sums + token[None, :] * acc.shape[0] + row[:, None], acc.to(gl.float32))


@gluon.jit
def add_up(
    y, bias, scales, token_scales, sums, part, token, feature, tokens, out_features, y_stride,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, BITS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Store this part's slice of an output tile: what all parts left of it, scaled, and the bias.

    Args:
        sums: what `leave` wrote, of the first part.
        part: this one's number; at most as many as there are tokens.
        token, feature: the tile's first, of ``y``.
        ROWS, TOKENS: of the tile.
        BITS: of the values that were multiplied: sums of 8 are scaled.
    """
    SLICE: gl.constexpr = TOKENS // PARTS
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    at = part * SLICE + gl.arange(0, SLICE, gl.SliceLayout(1, layout))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    sums += at[:, None] * ROWS + row[None, :]
    # Volatile: not from a cache that does not know what other multiprocessors wrote.
    total = gl.load(sums, volatile=True)
    for other in gl.static_range(1, PARTS):
        total += gl.load(sums + other * (ROWS * TOKENS), volatile=True)
    at += token
    row += feature
    if BITS == 8:
        total *= gl.load(scales + row, mask=row < out_features, other=0.0)[None, :]
        total *= gl.load(token_scales + at, mask=at < tokens, other=0.0)[:, None]
    if HAS_BIAS:
        total += gl.load(bias + row, mask=row < out_features, other=0.0).to(gl.float32)[None, :]
    inside = (at < tokens)[:, None] & (row < out_features)[None, :]
    gl.store(y + at.to(gl.int64)[:, None] * y_stride + row[None, :], total.to(y.dtype.element_ty), mask=inside)
