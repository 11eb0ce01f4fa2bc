"""Few tokens on any GPU since Ampere: a hybrid weight is streamed once through ``mma`` and ``mma.sp``.

Bound by the bytes of the weight, so all that matters is to keep many loads in flight. A thread block computes 16, 32 or
64 features; its warps share the records of a panel, each taking every n-th, and add up at the end in a fixed order, so
the result has the same bits on every run and needs neither atomics nor a workspace. Each warp loads its records straight
into the registers of the tensor core's A operand, as 16-byte vectors, in two alternating sets: while one is consumed the
other is on its way. Dense records' first set is asked for before the first 2:4 record is used.
"""

from dataclasses import dataclass

import triton
from torch import Tensor, int32
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from stoicc.format import HybridWeight
from stoicc.language import mma_24, mma_dense


@dataclass(frozen=True)
class StreamConfig:
    """How the few-token kernel is cut up.

    Attributes:
        rows: features of a thread block: 16, 32 or 64.
        tokens: tokens of a thread block: 8, 16 or 32.
        warps: warps of a thread block, which share the records of a panel.
        records: records in one of a warp's two sets.
    """

    rows: int
    tokens: int
    warps: int
    records: int


RECORD_24 = gl.constexpr(9 * 128)
RECORD_DENSE = gl.constexpr(16 * 128)
METADATA = gl.constexpr(8 * 128)


@gluon.constexpr_function
def _bits(size, rank, dim):
    """Basis vectors of a layout along ``dim``: 1, 2, 4, ... below ``size``."""
    return [[1 << i if d == dim else 0 for d in range(rank)] for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _fragments(warps, records, rows, tokens):
    """Layout of ``[warps, records, rows / 16, tokens / 8, 32 lanes, 4 registers]``, one warp along the first dimension."""
    registers = _bits(4, 6, 5) + _bits(tokens, 6, 3) + _bits(rows, 6, 2) + _bits(records, 6, 1)
    shape = [warps, records, rows, tokens, 32, 4]
    return gl.DistributedLinearLayout(registers, _bits(32, 6, 4), _bits(warps, 6, 0), [], shape)


@gluon.constexpr_function
def _along(layout, dim):
    """The layout of an index that runs along ``dim`` of a six-dimensional tensor in ``layout``."""
    for other in reversed(range(6)):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _index(size: gl.constexpr, layout: gl.constexpr, dim: gl.constexpr):
    index = gl.arange(0, size, _along(layout, dim))
    for other in gl.static_range(6):
        if other != dim:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit
def _load_x(x, column, inside, x_words, token_offsets, k_words, tokens_inside):
    """Both halves of a block's activations: words ``t * 4 + p`` of 32, t below four and from four on."""
    word = column * 32 + x_words
    return (
        gl.load(x + token_offsets + word, mask=inside & tokens_inside & (word < k_words), other=0),
        gl.load(x + token_offsets + word + 16, mask=inside & tokens_inside & (word + 16 < k_words), other=0),
    )


@gluon.jit
def _load_24(record, columns, step, count, x, x_words, token_offsets, k_words, tokens_inside, lane_words, lane_metadata):
    inside = step < count
    column = gl.load(columns + step, mask=inside, other=0)
    word = record + step * RECORD_24
    a0 = gl.load(word + lane_words, mask=inside, other=0)
    a1 = gl.load(word + 128 + lane_words, mask=inside, other=0)
    # Whatever is not a record must still be metadata that an instruction can take: 0x4 keeps positions 0 and 1.
    metadata = gl.load(word + METADATA + lane_metadata, mask=inside, other=0x44444444)
    x0, x1 = _load_x(x, column, inside, x_words, token_offsets, k_words, tokens_inside)
    return a0, a1, metadata, x0, x1


@gluon.jit
def _multiply_24(a0, a1, metadata, x0, x1, acc, dtype: gl.constexpr):
    return mma_24(a1, x1, metadata, mma_24(a0, x0, metadata, acc, 0, dtype), 1, dtype)


@gluon.jit
def _load_dense(record, columns, step, count, x, x_words, token_offsets, k_words, tokens_inside, lane_words):
    inside = step < count
    column = gl.load(columns + step, mask=inside, other=0)
    word = record + step * RECORD_DENSE + lane_words
    a0 = gl.load(word, mask=inside, other=0)
    a1 = gl.load(word + 128, mask=inside, other=0)
    a2 = gl.load(word + 256, mask=inside, other=0)
    a3 = gl.load(word + 384, mask=inside, other=0)
    x0, x1 = _load_x(x, column, inside, x_words, token_offsets, k_words, tokens_inside)
    return a0, a1, a2, a3, x0, x1


@gluon.jit
def _multiply_dense(a0, a1, a2, a3, x0, x1, acc, dtype: gl.constexpr):
    acc = mma_dense(a1, x0, mma_dense(a0, x0, acc, 0, dtype), 1, dtype)
    return mma_dense(a3, x1, mma_dense(a2, x1, acc, 0, dtype), 1, dtype)


@gluon.jit
def stream_linear(
    x, y, words, bias, starts, columns, sparse_blocks, order, steps, tokens, k_words, x_stride, out_features, y_stride,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr, RECORDS: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """``y = x @ W^T + bias`` for up to ``TOKENS`` tokens, one thread block per ``ROWS`` features.

    Args:
        x: int32, activations ``[tokens, K]`` as pairs, rows ``x_stride`` words apart.
        y: output ``[tokens, N]``, rows ``y_stride`` elements apart.
        words, starts, columns, sparse_blocks: the parts of the ``HybridWeight``; words as int32.
        bias: ``[N]``, or anything if not ``HAS_BIAS``.
        order: int32 ``[panels]``, most expensive first.
        k_words: ``K / 2``.
        ROWS: features of a thread block, 16, 32 or 64.
        TOKENS: a multiple of eight, a power of two.
        RECORDS: records in one of a warp's two sets.
    """
    dtype: gl.constexpr = y.dtype.element_ty
    R: gl.constexpr = ROWS // 16
    NT: gl.constexpr = TOKENS // 8
    layout: gl.constexpr = _fragments(WARPS, RECORDS, R, NT)
    warp = _index(WARPS, layout, 0)
    turn = _index(RECORDS, layout, 1)
    row = _index(R, layout, 2)
    eight = _index(NT, layout, 3)
    lane = _index(32, layout, 4)
    register = _index(4, layout, 5)

    panel = gl.load(order + gl.program_id(0) // (4 // R))
    part = gl.program_id(0) % (4 // R) * R
    sparse = gl.load(sparse_blocks + panel)
    dense = steps - sparse
    record = words + gl.load(starts + panel).to(gl.int64) * 128
    record_dense = record + sparse * RECORD_24
    columns += panel * steps
    columns_dense = columns + sparse

    lane_24 = (part + row) * 256 + lane * 4 + register
    lane_dense = (part + row) * 512 + lane * 4 + register
    lane_metadata = (part + row) * 32 + lane
    token = gl.program_id(1) * TOKENS + eight * 8 + lane // 4
    tokens_inside = token < tokens
    token_offsets = token.to(gl.int64) * x_stride
    x_words = register * 4 + lane % 4

    SET: gl.constexpr = WARPS * RECORDS
    step = turn * WARPS + warp
    acc = gl.zeros([WARPS, RECORDS, R, NT, 32, 4], gl.float32, layout)
    a0, a1, am, ax, ay = _load_24(record, columns, step, sparse, x, x_words, token_offsets, k_words, tokens_inside, lane_24, lane_metadata)
    b0, b1, bm, bx, by = _load_24(record, columns, step + SET, sparse, x, x_words, token_offsets, k_words, tokens_inside, lane_24, lane_metadata)
    c0, c1, c2, c3, cx, cy = _load_dense(record_dense, columns_dense, step, dense, x, x_words, token_offsets, k_words, tokens_inside, lane_dense)
    for done in range(0, sparse, 2 * SET):
        ahead = step + (done + 2 * SET)
        acc = _multiply_24(a0, a1, am, ax, ay, acc, dtype)
        a0, a1, am, ax, ay = _load_24(record, columns, ahead, sparse, x, x_words, token_offsets, k_words, tokens_inside, lane_24, lane_metadata)
        acc = _multiply_24(b0, b1, bm, bx, by, acc, dtype)
        b0, b1, bm, bx, by = _load_24(record, columns, ahead + SET, sparse, x, x_words, token_offsets, k_words, tokens_inside, lane_24, lane_metadata)
    d0, d1, d2, d3, dx, dy = _load_dense(record_dense, columns_dense, step + SET, dense, x, x_words, token_offsets, k_words, tokens_inside, lane_dense)
    for done in range(0, dense, 2 * SET):
        ahead = step + (done + 2 * SET)
        acc = _multiply_dense(c0, c1, c2, c3, cx, cy, acc, dtype)
        c0, c1, c2, c3, cx, cy = _load_dense(record_dense, columns_dense, ahead, dense, x, x_words, token_offsets, k_words, tokens_inside, lane_dense)
        acc = _multiply_dense(d0, d1, d2, d3, dx, dy, acc, dtype)
        d0, d1, d2, d3, dx, dy = _load_dense(record_dense, columns_dense, ahead + SET, dense, x, x_words, token_offsets, k_words, tokens_inside, lane_dense)

    total = gl.sum(gl.sum(acc, 1), 0)
    rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))
    _store(y, total, bias, panel * 64 + part * 16, tokens, out_features, y_stride, R, NT, rows, HAS_BIAS)


@gluon.jit
def _store(y, total, bias, first, tokens, out_features, y_stride, R: gl.constexpr, NT: gl.constexpr, layout: gl.constexpr, HAS_BIAS: gl.constexpr):
    row = gl.arange(0, R, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[:, None, None, None]
    eight = gl.arange(0, NT, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[None, :, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))[None, None, :, None]
    register = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))[None, None, None, :]
    feature = first + row * 16 + lane // 4 + register // 2 * 8
    token = gl.program_id(1) * NT * 8 + eight * 8 + lane % 4 * 2 + register % 2
    if HAS_BIAS:
        total += gl.load(bias + feature, mask=feature < out_features, other=0.0).to(gl.float32)
    inside = (feature < out_features) & (token < tokens)
    gl.store(y + token.to(gl.int64) * y_stride + feature, total.to(y.dtype.element_ty), mask=inside)


def launch(x: Tensor, hybrid: HybridWeight, order: Tensor, bias: Tensor | None, y: Tensor, config: StreamConfig) -> None:
    """Enqueue ``y = x @ W^T + bias`` on the current stream.

    Args:
        x: ``[tokens, K]`` of the weight's dtype, 4-byte aligned rows, at least one token.
        order: int32 ``[panels]``.
        y: ``[tokens, N]``.
    """
    tokens = x.shape[0]
    pairs = x.view(int32)
    grid = (hybrid.panels * (64 // config.rows), triton.cdiv(tokens, config.tokens))
    stream_linear[grid](
        pairs,
        y,
        hybrid.records,
        y if bias is None else bias,
        hybrid.starts,
        hybrid.columns,
        hybrid.sparse_blocks,
        order,
        hybrid.steps,
        tokens,
        pairs.shape[1],
        pairs.stride(0),
        hybrid.shape[0],
        y.stride(0),
        ROWS=config.rows,
        TOKENS=config.tokens,
        WARPS=config.warps,
        RECORDS=config.records,
        HAS_BIAS=bias is not None,
        num_warps=config.warps,
    )
