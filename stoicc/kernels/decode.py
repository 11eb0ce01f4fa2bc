"""Any GPU since Ampere, and few tokens on all of them: ``mma`` and ``mma.sp`` on records streamed into registers.

A thread block computes 16, 32 or 64 features of one panel, or 128 of two that have one block map (weights whose band
is 2). Its warps are split along K (each takes every n-th record; they add up at the end in a fixed order, without
atomics, so the bits are the same on every run), along features, and along tokens. With few tokens all
that matters is to keep many loads in flight: records go straight from global memory into the registers of the tensor
core's A operand, as 16-byte vectors, in two alternating sets of which one is consumed while the other is on its way,
and the first dense records are asked for before the first 2:4 record is used.

Where the features alone do not fill the GPU, thread blocks split K once more: on Hopper a cluster of ``blocks``
shares a panel's records, each leaves its sums in a workspace, and after the cluster's barrier the first adds them in
a fixed order.

Values of 4 bits are widened in registers to those of the activations, bfloat16 or float16. A block of them is a group
of inputs with a scale for each row, which its sums are multiplied by as they are added to the others, in float32: so
nothing is rounded before the result.

Activations of up to eight tokens go the same way (``stages`` 0). More of them are copied asynchronously to a ring in
shared memory, from which each warp takes its fragments: as registers they would need many narrow loads.

A product of few tokens takes microseconds, of which the way to the first record is a good part. So one load tells where
the records are, and on Hopper the kernel begins before the one before it on the stream is done (programmatic dependent
launch): within a captured graph, where weights do not change, it asks for its first records and only then waits. In
turn it lets the next kernel begin: with activations in registers as soon as it has waited itself, else when its last
records are used, since blocks of the next kernel would take shared memory that its own are still to come for.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from stoicc.compat import barrier, copy_to_shared
from stoicc.format import HybridWeight, bits_of
from stoicc.language import (
    GLUON_DTYPE,
    accumulator,
    cluster_barrier,
    let_next_begin,
    mma_24,
    mma_dense,
    scaled_by,
    unit_words,
    wait_for_previous,
    widen,
    words_24,
    words_dense,
    words_values,
)


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is cut up.

    Attributes:
        rows: features of a thread block: 16, 32 or 64; 128 for weights whose band is 2.
        tokens: tokens of a thread block: 8 to 128, a power of two.
        warps: warps along K, features and tokens.
        records: records in one of a warp's two sets, a power of two.
        stages: tiles of activations in the ring; 0 loads them as registers.
        blocks: thread blocks of a cluster that split K; more than one needs Hopper.
    """

    rows: int
    tokens: int
    warps: tuple[int, int, int]
    records: int
    stages: int
    blocks: int = 1


@gluon.constexpr_function
def _bits(size, rank, dim, first=1):
    """Basis vectors of a layout along ``dim``: ``size`` positions that are ``first`` apart."""
    return [[first << i if d == dim else 0 for d in range(rank)] for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _fragments(records, rows, tokens, k_warps, row_warps, token_warps):
    """Layout of ``[warps along K, records, rows / 16, tokens / 8, 32 lanes, 4 registers]``."""
    own_rows, own_tokens = rows // 16 // row_warps, tokens // 8 // token_warps
    return gl.DistributedLinearLayout(
        reg_bases=_bits(4, 6, 5) + _bits(own_tokens, 6, 3) + _bits(own_rows, 6, 2) + _bits(records, 6, 1),
        lane_bases=_bits(32, 6, 4),
        warp_bases=_bits(k_warps, 6, 0) + _bits(row_warps, 6, 2, own_rows) + _bits(token_warps, 6, 3, own_tokens),
        block_bases=[],
        shape=[k_warps, records, rows // 16, tokens // 8, 32, 4],
    )


@gluon.constexpr_function
def _staged(records, tokens, words, k_warps, row_warps, token_warps):
    """Layout of ``[records of all warps, tokens, words]`` that gives each lane the words of its fragment."""
    own_tokens = tokens // 8 // token_warps
    return gl.DistributedLinearLayout(
        reg_bases=_bits(words // 4, 3, 2, 4) + _bits(own_tokens, 3, 1, 8) + _bits(records, 3, 0, k_warps),
        lane_bases=_bits(4, 3, 2) + _bits(8, 3, 1),
        warp_bases=_bits(k_warps, 3, 0)
        + [[0, 0, 0]] * (row_warps.bit_length() - 1)
        + _bits(token_warps, 3, 1, own_tokens * 8),
        block_bases=[],
        shape=[k_warps * records, tokens, words],
    )


@gluon.constexpr_function
def _x_words(bits):
    """Words of a token's activations for one block: 128 bytes, for values of 4 bits twice that."""
    return 64 if bits == 4 else 32


@gluon.constexpr_function
def _copied(words, warps):
    """Layout in which ``[records, tokens, words]`` of activations are copied, 16 bytes a thread."""
    return gl.BlockedLayout([1, 1, 4], [1, 128 // words, words // 4], [1, warps, 1], [2, 1, 0])


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
def _load_x(x, column, x_words, token_offsets, k_words, inside, BITS: gl.constexpr):
    """A block's activations as registers, 16 words a piece: of its words ``4t + p`` four ``t`` each."""
    word = column * _x_words(BITS) + x_words
    if BITS == 4:  # K is a whole number of blocks
        x += token_offsets + word
        return (
            gl.load(x, mask=inside, other=0),
            gl.load(x + 16, mask=inside, other=0),
            gl.load(x + 32, mask=inside, other=0),
            gl.load(x + 48, mask=inside, other=0),
        )
    else:
        return (
            gl.load(x + token_offsets + word, mask=inside & (word < k_words), other=0),
            gl.load(x + token_offsets + word + 16, mask=inside & (word + 16 < k_words), other=0),
        )


@gluon.jit
def _next_x(x, columns, step, count, x_words, token_offsets, k_words, tokens_inside, BITS: gl.constexpr):
    inside = step < count
    column = gl.load(columns + step, mask=inside, other=0)
    return _load_x(x, column, x_words, token_offsets, k_words, inside & tokens_inside, BITS)


@gluon.jit
def _column(
    columns, turn, turns_24, sparse, steps, block,
    RECORDS: gl.constexpr, BLOCKS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """The block columns of all records of one turn, ``-1`` where there is none."""
    LAYOUT: gl.constexpr = _copied(WORDS, gl.num_warps())
    record = gl.arange(0, RECORDS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    first = turn * BLOCKS * RECORDS + gl.where(turn < turns_24, 0, sparse - turns_24 * BLOCKS * RECORDS)
    step = first + block * RECORDS + record
    return gl.load(columns + step, mask=step < gl.where(turn < turns_24, sparse, steps), other=-1)


@gluon.jit
def _copy_x(x, column, ring, turn, tokens, k_words, x_stride):
    """Start to copy the activations of all records of one turn into its stage."""
    STAGES: gl.constexpr = ring.shape[0]
    TOKENS: gl.constexpr = ring.shape[2]
    WORDS: gl.constexpr = ring.shape[3]
    LAYOUT: gl.constexpr = _copied(WORDS, gl.num_warps())
    token = (
        gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None] + gl.program_id(1) * TOKENS
    )
    word = column * WORDS + gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    pointer = x + token.to(gl.int64) * x_stride + word
    mask = (column >= 0) & (token < tokens) & (word < k_words)
    copy_to_shared(ring.index(turn % STAGES), pointer, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _staged_x(ring, turn, staged: gl.constexpr, layout: gl.constexpr, K_WARPS: gl.constexpr, RECORDS: gl.constexpr):
    """A turn's activations out of the ring, as ``_load_x`` gives them."""
    STAGES: gl.constexpr = ring.shape[0]
    EIGHTS: gl.constexpr = ring.shape[2] // 8
    shape: gl.constexpr = [K_WARPS, RECORDS, 1, EIGHTS, 32, 4]
    if ring.shape[3] == 64:
        quarters = ring.index(turn % STAGES).load(staged).reshape([RECORDS, K_WARPS, EIGHTS, 8, 2, 2, 4, 4])
        first, second = gl.split(quarters.permute((1, 0, 2, 3, 7, 6, 5, 4)))
        a, b = gl.split(first)
        c, d = gl.split(second)
        return (
            gl.convert_layout(a.reshape(shape), layout, assert_trivial=True),
            gl.convert_layout(b.reshape(shape), layout, assert_trivial=True),
            gl.convert_layout(c.reshape(shape), layout, assert_trivial=True),
            gl.convert_layout(d.reshape(shape), layout, assert_trivial=True),
        )
    else:
        words = ring.index(turn % STAGES).load(staged).reshape([RECORDS, K_WARPS, EIGHTS, 8, 2, 4, 4])
        lower, upper = gl.split(words.permute((1, 0, 2, 3, 6, 5, 4)))
        return (
            gl.convert_layout(lower.reshape(shape), layout, assert_trivial=True),
            gl.convert_layout(upper.reshape(shape), layout, assert_trivial=True),
        )


@gluon.jit
def _load_24(record, step, count, lane_words, lane_metadata, lane_scales, BITS: gl.constexpr):
    """Of one record both k-steps' values, and the metadata word of each, which of 16 bits is the same one.

    Of 4 bits the values of all four k-steps, the metadata words of two each, and the scales.
    """
    inside = step < count
    record += step * words_24(BITS)
    # Where there is no record there must still be metadata that the instruction takes: 0x4 keeps positions 0 and 1.
    metadata = record + words_values(BITS, True) + lane_metadata
    first = gl.load(metadata, mask=inside, eviction_policy="evict_first", other=0x44444444)
    second = first
    if BITS < 16:
        second = gl.load(metadata + 128, mask=inside, eviction_policy="evict_first", other=0x44444444)
    if BITS == 4:
        return (
            gl.load(record + lane_words, mask=inside, eviction_policy="evict_first", other=0),
            gl.load(record + words_values(BITS, True) + 256 + lane_scales, mask=inside, other=0),
            first,
            second,
        )
    else:
        return (
            gl.load(record + lane_words, mask=inside, eviction_policy="evict_first", other=0),
            gl.load(record + 128 + lane_words, mask=inside, eviction_policy="evict_first", other=0),
            first,
            second,
        )


@gluon.jit
def _load_dense(record, step, count, lane_words, lane_scales, BITS: gl.constexpr):
    inside = step < count
    if BITS == 4:
        record += step * words_dense(BITS)
        return (
            gl.load(record + lane_words, mask=inside, eviction_policy="evict_first", other=0),
            gl.load(record + 128 + lane_words, mask=inside, eviction_policy="evict_first", other=0),
            gl.load(record + words_values(BITS, False) + lane_scales, mask=inside, other=0),
        )
    else:
        record += step * words_dense(BITS) + lane_words
        return (
            gl.load(record, mask=inside, eviction_policy="evict_first", other=0),
            gl.load(record + 128, mask=inside, eviction_policy="evict_first", other=0),
            gl.load(record + 256, mask=inside, eviction_policy="evict_first", other=0),
            gl.load(record + 384, mask=inside, eviction_policy="evict_first", other=0),
        )


@gluon.jit
def _multiply_24(a, x, acc, register, dtype: gl.constexpr, BITS: gl.constexpr):
    if BITS == 4:
        wide = widen(a[0], dtype)
        part = gl.zeros_like(acc)
        for step in gl.static_range(4):
            part = mma_24(wide[step], x[step], a[2 + step // 2], part, step % 2, dtype)
        return acc + scaled_by(part, a[1], register)
    else:
        acc = mma_24(a[0], x[0], a[2], acc, 0, dtype)
        return mma_24(a[1], x[1], a[3], acc, 1 if BITS == 16 else 0, dtype)


@gluon.jit
def _multiply_dense(a, x, acc, register, dtype: gl.constexpr, BITS: gl.constexpr):
    if BITS == 4:
        part = gl.zeros_like(acc)
        for half in gl.static_range(2):
            wide = widen(a[half], dtype)
            for step in gl.static_range(4):
                part = mma_dense(wide[step], x[2 * half + step // 2], part, step % 2, dtype)
        return acc + scaled_by(part, a[2], register)
    else:
        acc = mma_dense(a[1], x[0], mma_dense(a[0], x[0], acc, 0, dtype), 1, dtype)
        return mma_dense(a[3], x[1], mma_dense(a[2], x[1], acc, 0, dtype), 1, dtype)


@gluon.jit
def _fragment_indices(ROWS: gl.constexpr, EIGHTS: gl.constexpr, layout: gl.constexpr):
    return (
        gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[:, None, None, None],
        gl.arange(0, EIGHTS, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))[None, :, None, None],
        gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))[None, None, :, None],
        gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))[None, None, None, :],
    )


@gluon.jit
def _add_blocks(total, workspace, tile, block, layout: gl.constexpr, BLOCKS: gl.constexpr, THREADS: gl.constexpr):
    """The sum of the cluster's blocks, in their order; of use to the first only."""
    ROWS: gl.constexpr = total.shape[0]
    EIGHTS: gl.constexpr = total.shape[1]
    row, eight, lane, register = _fragment_indices(ROWS, EIGHTS, layout)
    SIZE: gl.constexpr = ROWS * EIGHTS * 128
    own = workspace + tile.to(gl.int64) * SIZE + ((row * EIGHTS + eight) * 32 + lane) * 4 + register
    gl.store(own + block * SIZE, total)
    cluster_barrier(BLOCKS, THREADS)
    if block == 0:
        for other in gl.static_range(1, BLOCKS):
            total += gl.load(own + other * SIZE, volatile=True)
    return total


@gluon.jit
def _store(
    y, total, bias, scales, token_scales, first, tokens, out_features, y_stride,
    layout: gl.constexpr, HAS_BIAS: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = total.shape[0]
    EIGHTS: gl.constexpr = total.shape[1]
    row, eight, lane, register = _fragment_indices(ROWS, EIGHTS, layout)
    feature = first + row * 16 + lane // 4 + register // 2 * 8
    token = (gl.program_id(1) * EIGHTS + eight) * 8 + lane % 4 * 2 + register % 2
    if SCALED:
        total *= gl.load(scales + feature, mask=feature < out_features, other=0.0)
        total *= gl.load(token_scales + token, mask=token < tokens, other=0.0)
    if HAS_BIAS:
        total += gl.load(bias + feature, mask=feature < out_features, other=0.0).to(gl.float32)
    inside = (feature < out_features) & (token < tokens)
    gl.store(y + token.to(gl.int64) * y_stride + feature, total.to(y.dtype.element_ty), mask=inside)


# Sizes are not specialised on, but for those that the width of the copies of activations depends on.
@gluon.jit(do_not_specialize=["steps", "tokens", "out_features", "early"])
def decode_linear(
    x, y, words, bias, scales, token_scales, workspace, columns, order,
    steps, tokens, k_words, x_stride, out_features, y_stride, early,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, K_WARPS: gl.constexpr, ROW_WARPS: gl.constexpr, TOKEN_WARPS: gl.constexpr,
    RECORDS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
    VALUES: gl.constexpr, BITS: gl.constexpr,
):  # fmt: skip
    """``y = x @ W^T + bias``, a thread block per ``ROWS`` features and ``TOKENS`` tokens.

    Args:
        x: int32, activations ``[tokens, K]`` as words, rows ``x_stride`` of them apart.
        y: output ``[tokens, N]``, rows ``y_stride`` elements apart.
        words, columns: parts of the ``HybridWeight``; words are its records.
        bias: ``[N]``, or anything if not ``HAS_BIAS``.
        scales, token_scales: float32 ``[N]`` and ``[tokens]``, factors of products of 8 bits; else anything.
        workspace: float32, ``ROWS * TOKENS`` for each thread block, if ``BLOCKS`` is more than one.
        order: int32 ``[panels, 4]`` (with 128 ``ROWS``, of pairs of panels), most expensive first.
        k_words: words of a row of ``x``.
        early: whether the first records may be read before the kernel before on the stream is done.
        ROWS to BLOCKS: as in ``DecodeConfig``.
        PDL: whether it is launched with ``launch_pdl``.
        VALUES: what the words of ``x`` hold, and those of the records.
        BITS: of the records' values, if they are widened to ``VALUES``; else theirs.
    """
    dtype: gl.constexpr = VALUES
    PARTS: gl.constexpr = 1 if ROWS > 64 else 64 // ROWS
    PANELS: gl.constexpr = 2 if ROWS > 64 else 1
    R: gl.constexpr = ROWS // 16
    layout: gl.constexpr = _fragments(RECORDS, ROWS, TOKENS, K_WARPS, ROW_WARPS, TOKEN_WARPS)
    X_WORDS: gl.constexpr = _x_words(BITS)
    staged: gl.constexpr = _staged(RECORDS, TOKENS, X_WORDS, K_WARPS, ROW_WARPS, TOKEN_WARPS)
    lane = _index(32, layout, 4)
    register = _index(4, layout, 5)

    if PDL:  # noqa: SIM102 a condition at compile time, then one at run time
        if early == 0:
            wait_for_previous()
    block = gl.program_id(0) % BLOCKS
    part = gl.program_id(0) // BLOCKS
    order += part // PARTS * 4
    panel = gl.load(order) * PANELS
    start = gl.load(order + 1)
    sparse = gl.load(order + 3)
    dense = steps - sparse
    first_row = part % PARTS * R
    UNIT: gl.constexpr = unit_words(BITS)
    row = first_row + _index(R, layout, 2)
    if PANELS == 1:
        record = words + start.to(gl.int64) * UNIT
    else:
        # Where there is no second panel, the first is computed again: those output rows are outside and not stored.
        record = words + gl.where(row < 4, start, gl.load(order + 2)).to(gl.int64) * UNIT
        row = row % 4
    record_dense = record + sparse * words_24(BITS)
    columns += panel * steps
    columns_dense = columns + sparse
    lane_24 = row * (words_values(BITS, True) // 4) + lane * 4 + register
    lane_dense = row * (words_values(BITS, False) // 4) + lane * 4 + register
    lane_metadata = row * 32 + lane
    lane_scales = row * 8 + lane // 4

    # A turn is one set of records of every warp; both loops take two turns at a time, one of each set.
    OWN: gl.constexpr = K_WARPS * RECORDS
    SET: gl.constexpr = BLOCKS * OWN
    step = block * OWN + _index(RECORDS, layout, 1) * K_WARPS + _index(K_WARPS, layout, 0)
    turns_24 = (sparse + 2 * SET - 1) // (2 * SET) * 2
    acc = gl.zeros([K_WARPS, RECORDS, R, TOKENS // 8, 32, 4], accumulator(dtype), layout)
    a = _load_24(record, step, sparse, lane_24, lane_metadata, lane_scales, BITS)
    b = _load_24(record, step + SET, sparse, lane_24, lane_metadata, lane_scales, BITS)
    c = _load_dense(record_dense, step, dense, lane_dense, lane_scales, BITS)
    if STAGES == 0:
        a_column = gl.load(columns + step, mask=step < sparse, other=0)
        b_column = gl.load(columns + step + SET, mask=step + SET < sparse, other=0)
        c_column = gl.load(columns_dense + step, mask=step < dense, other=0)
    if PDL:
        # Weights do not depend on what runs before; activations do, and so does the memory that is written.
        wait_for_previous()
        # Not before the wait: the next kernel may read at once what an earlier one wrote and this one does not.
        if STAGES == 0:
            let_next_begin()
    if STAGES == 0:
        token = gl.program_id(1) * TOKENS + _index(TOKENS // 8, layout, 3) * 8 + lane // 4
        inside = token < tokens
        offsets = token.to(gl.int64) * x_stride
        x_words = register * 4 + lane % 4
        ax = _load_x(x, a_column, x_words, offsets, k_words, inside & (step < sparse), BITS)
        bx = _load_x(x, b_column, x_words, offsets, k_words, inside & (step + SET < sparse), BITS)
        cx = _load_x(x, c_column, x_words, offsets, k_words, inside & (step < dense), BITS)
    else:
        swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0])
        ring = gl.allocate_shared_memory(gl.int32, [STAGES, OWN, TOKENS, X_WORDS], swizzled)
        for turn in gl.static_range(STAGES - 1):
            column = _column(columns, turn, turns_24, sparse, steps, block, OWN, BLOCKS, X_WORDS)
            _copy_x(x, column, ring, turn, tokens, k_words, x_stride)
        # The columns of a turn are asked for a turn before its copies.
        column = _column(columns, STAGES - 1, turns_24, sparse, steps, block, OWN, BLOCKS, X_WORDS)
    for turn in range(0, turns_24, 2):
        ahead = step + (turn + 2) * SET
        if STAGES > 0:
            async_copy.wait_group(STAGES - 2)
            barrier()
            ax = _staged_x(ring, turn, staged, layout, K_WARPS, RECORDS)
            _copy_x(x, column, ring, turn + STAGES - 1, tokens, k_words, x_stride)
            column = _column(columns, turn + STAGES, turns_24, sparse, steps, block, OWN, BLOCKS, X_WORDS)
        acc = _multiply_24(a, ax, acc, register, dtype, BITS)
        a = _load_24(record, ahead, sparse, lane_24, lane_metadata, lane_scales, BITS)
        if STAGES > 0:
            async_copy.wait_group(STAGES - 2)
            barrier()
            bx = _staged_x(ring, turn + 1, staged, layout, K_WARPS, RECORDS)
            _copy_x(x, column, ring, turn + STAGES, tokens, k_words, x_stride)
            column = _column(columns, turn + STAGES + 1, turns_24, sparse, steps, block, OWN, BLOCKS, X_WORDS)
        else:
            ax = _next_x(x, columns, ahead, sparse, x_words, offsets, k_words, inside, BITS)
        acc = _multiply_24(b, bx, acc, register, dtype, BITS)
        b = _load_24(record, ahead + SET, sparse, lane_24, lane_metadata, lane_scales, BITS)
        if STAGES == 0:
            bx = _next_x(x, columns, ahead + SET, sparse, x_words, offsets, k_words, inside, BITS)
    d = _load_dense(record_dense, step + SET, dense, lane_dense, lane_scales, BITS)
    if STAGES == 0:
        dx = _next_x(x, columns_dense, step + SET, dense, x_words, offsets, k_words, inside, BITS)
    for done in range(0, dense, 2 * SET):
        ahead = step + (done + 2 * SET)
        turn = turns_24 + done // SET
        if STAGES > 0:
            async_copy.wait_group(STAGES - 2)
            barrier()
            cx = _staged_x(ring, turn, staged, layout, K_WARPS, RECORDS)
            _copy_x(x, column, ring, turn + STAGES - 1, tokens, k_words, x_stride)
            column = _column(columns, turn + STAGES, turns_24, sparse, steps, block, OWN, BLOCKS, X_WORDS)
        acc = _multiply_dense(c, cx, acc, register, dtype, BITS)
        c = _load_dense(record_dense, ahead, dense, lane_dense, lane_scales, BITS)
        if STAGES > 0:
            async_copy.wait_group(STAGES - 2)
            barrier()
            dx = _staged_x(ring, turn + 1, staged, layout, K_WARPS, RECORDS)
            _copy_x(x, column, ring, turn + STAGES, tokens, k_words, x_stride)
            column = _column(columns, turn + STAGES + 1, turns_24, sparse, steps, block, OWN, BLOCKS, X_WORDS)
        else:
            cx = _next_x(x, columns_dense, ahead, dense, x_words, offsets, k_words, inside, BITS)
        acc = _multiply_dense(d, dx, acc, register, dtype, BITS)
        d = _load_dense(record_dense, ahead + SET, dense, lane_dense, lane_scales, BITS)
        if STAGES == 0:
            dx = _next_x(x, columns_dense, ahead + SET, dense, x_words, offsets, k_words, inside, BITS)

    if PDL and STAGES > 0:
        let_next_begin()
    total = gl.sum(gl.sum(acc, 1), 0).to(gl.float32)
    rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))
    if BLOCKS > 1:
        tile = (gl.program_id(1) * (gl.num_programs(0) // BLOCKS) + part) * BLOCKS
        total = _add_blocks(total, workspace, tile, block, rows, BLOCKS, gl.num_warps() * 32)
    if block == 0:
        _store(
            y, total, bias, scales, token_scales, panel * 64 + first_row * 16, tokens, out_features, y_stride,
            rows, HAS_BIAS, BITS == 8,
        )  # fmt: skip


def launch(
    x: Tensor,
    hybrid: HybridWeight,
    order: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: DecodeConfig,
    token_scales: Tensor | None = None,
) -> None:
    """Enqueue ``y = x @ W^T + bias`` on the current stream.

    Args:
        x: ``[tokens, K]`` of the weight's dtype, of 16 bits if that has 4; 16-byte aligned rows, at least one token.
        order: int32 ``[panels, 4]``, or with 128 ``rows`` of pairs of panels.
        y: ``[tokens, N]``.
        token_scales: float32 ``[tokens]``, of weights of 8 bits.
    """
    tokens = x.shape[0]
    words = x.view(torch.int32)
    k_warps, row_warps, token_warps = config.warps
    grid = (triton.cdiv(hybrid.panels * 64, config.rows) * config.blocks, triton.cdiv(tokens, config.tokens))
    # Early clusters of eight crowd onto the multiprocessors that are free first: half as slow again on an H200.
    pdl = config.blocks < 8 and torch.cuda.get_device_capability(x.device) >= (9, 0)
    workspace = y
    if config.blocks > 1:
        # A new one for every call: the allocator keeps streams and captured graphs apart.
        workspace = torch.empty(grid[0] * grid[1] * config.rows * config.tokens, dtype=torch.float32, device=x.device)
    decode_linear[grid](
        words,
        y,
        hybrid.records,
        y if bias is None else bias,
        y if hybrid.scales is None else hybrid.scales,
        y if token_scales is None else token_scales,
        workspace,
        hybrid.columns,
        order,
        hybrid.steps,
        tokens,
        words.shape[1],
        words.stride(0),
        hybrid.shape[0],
        y.stride(0),
        # In a captured graph weights are constants; elsewhere the kernel before may have written them.
        int(torch.cuda.is_current_stream_capturing()),
        ROWS=config.rows,
        TOKENS=config.tokens,
        K_WARPS=k_warps,
        ROW_WARPS=row_warps,
        TOKEN_WARPS=token_warps,
        RECORDS=config.records,
        STAGES=config.stages,
        BLOCKS=config.blocks,
        HAS_BIAS=bias is not None,
        PDL=pdl,
        VALUES=GLUON_DTYPE[x.dtype],
        BITS=bits_of(hybrid.dtype),
        num_warps=k_warps * row_warps * token_warps,
        launch_pdl=pdl,
    )
