"""Few tokens on Hopper: ``wgmma`` and ``wgmma.sp`` of eight tokens and more on records streamed into registers.

As `stoicc.kernels.decode` streams records, but each warpgroup multiplies a whole panel at a time. So values of 8 bits
are used as they lie in memory, for Hopper has no other instruction that takes ``float8_e4m3fn``: its ``mma`` is made of
half-precision ones, whose operands must be widened first.

A thread block has 64 features, or 128 of two panels that have one block map (weights whose band is 2), and all records
of them or, in a cluster of ``blocks``, a contiguous share of the 2:4 ones and of the dense ones. A *turn* is
``together`` records: while those of one turn are multiplied, those of the next are on their way to registers, several
kilobytes a warp. Activations come to a ring in shared memory by bulk copies, a few turns ahead; where a share ends
within a turn, what is missing is zero on both sides.

Sums of a cluster's blocks meet in a workspace. Every block adds up an equal slice of the tokens, in the order of the
blocks, so the bits are the same on every run.
As in `stoicc.kernels.decode` the kernel begins before the one before it is done, and asks for records first.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stoicc.compat import barrier, load_tile, reinterpret
from stoicc.format import ROW_BYTES, HybridWeight, block_columns
from stoicc.language import (
    GLUON_DTYPE,
    METADATA,
    RECORD_DENSE,
    accumulator,
    cluster_barrier,
    dot_24,
    dot_dense,
    let_next_begin,
    record_24,
    wait_for_previous,
)

_ROW_BYTES = gl.constexpr(ROW_BYTES)


@dataclass(frozen=True)
class HopperDecodeConfig:
    """How the kernel is cut up.

    Attributes:
        rows: features of a thread block: 64, or 128 for weights whose band is 2.
        tokens: tokens of a thread block: 8 to 128, a power of two.
        together: records of a turn: 2 or 4.
        stages: turns whose activations the ring holds, at least 2; with 8 tokens ``stages * together`` is at least 16
            for 128 rows and 8 for 64, with 16 tokens half of that.
        blocks: thread blocks of a cluster that split K: 1, 2, 4 or 8.
        promote: add each record's sums, of 128 columns, to others in float32, for ``float8_e4m3fn``: within a sum of
            its products the tensor cores keep fewer bits.
    """

    rows: int
    tokens: int
    together: int
    stages: int
    blocks: int
    promote: bool = False


@gluon.jit
def _load_24(record, at, last, lane_words, lane_metadata, dtype: gl.constexpr):
    inside = at < last
    record += at * record_24(dtype)
    # Where there is no record there must still be metadata that the instruction takes: 0x4 keeps positions 0 and 1.
    metadata = record + METADATA + lane_metadata
    first = gl.load(metadata, mask=inside, eviction_policy="evict_first", other=0x44444444)
    second = first
    if dtype.primitive_bitwidth == 8:
        second = gl.load(metadata + 128, mask=inside, eviction_policy="evict_first", other=0x44444444)
    return (
        gl.load(record + lane_words, mask=inside, eviction_policy="evict_first", other=0),
        gl.load(record + 128 + lane_words, mask=inside, eviction_policy="evict_first", other=0),
        first,
        second,
    )


@gluon.jit
def _load_dense(record, at, last, lane_words):
    inside = at < last
    record += at * RECORD_DENSE + lane_words
    return (
        gl.load(record, mask=inside, eviction_policy="evict_first", other=0),
        gl.load(record + 128, mask=inside, eviction_policy="evict_first", other=0),
        gl.load(record + 256, mask=inside, eviction_policy="evict_first", other=0),
        gl.load(record + 384, mask=inside, eviction_policy="evict_first", other=0),
    )


@gluon.jit
def _turn_24(record, at, last, lane_words, lane_metadata, dtype: gl.constexpr, TOGETHER: gl.constexpr):
    """The records of one turn, two or four."""
    a = _load_24(record, at, last, lane_words, lane_metadata, dtype)
    b = _load_24(record, at + 1, last, lane_words, lane_metadata, dtype)
    c = b
    d = b
    if TOGETHER == 4:
        c = _load_24(record, at + 2, last, lane_words, lane_metadata, dtype)
        d = _load_24(record, at + 3, last, lane_words, lane_metadata, dtype)
    return a, b, c, d


@gluon.jit
def _turn_dense(record, at, last, lane_words, TOGETHER: gl.constexpr):
    a = _load_dense(record, at, last, lane_words)
    b = _load_dense(record, at + 1, last, lane_words)
    c = b
    d = b
    if TOGETHER == 4:
        c = _load_dense(record, at + 2, last, lane_words)
        d = _load_dense(record, at + 3, last, lane_words)
    return a, b, c, d


@gluon.jit
def _multiply_24(acc, a, x, stand_in):
    HALF: gl.constexpr = x.shape[1] // 2
    acc = dot_24(a[0], a[2], x, acc, 0, 0, stand_in)
    return dot_24(a[1], a[3], x, acc, HALF, 1 if HALF == 32 else 0, stand_in)


@gluon.jit
def _multiply_dense(acc, a, x, stand_in):
    QUARTER: gl.constexpr = x.shape[1] // 4
    acc = dot_dense(a[1], x, dot_dense(a[0], x, acc, 0, stand_in), QUARTER, stand_in)
    return dot_dense(a[3], x, dot_dense(a[2], x, acc, 2 * QUARTER, stand_in), 3 * QUARTER, stand_in)


@gluon.jit
def _columns(columns, turn, turns_24, first_24, last_24, first_dense, last_dense, steps, TOGETHER: gl.constexpr):
    """The block columns of a turn's records; beyond the last, where a copy reads zeros, for those that are none."""
    two_four = turn < turns_24
    at = gl.where(two_four, first_24 + turn * TOGETHER, first_dense + (turn - turns_24) * TOGETHER)
    last = gl.where(two_four, last_24, last_dense)
    found = columns + gl.minimum(at, steps - 1)
    a = gl.where(at < last, gl.load(found), steps)
    b = gl.where(at + 1 < last, gl.load(columns + gl.minimum(at + 1, steps - 1)), steps)
    c = b
    d = b
    if TOGETHER == 4:
        c = gl.where(at + 2 < last, gl.load(columns + gl.minimum(at + 2, steps - 1)), steps)
        d = gl.where(at + 3 < last, gl.load(columns + gl.minimum(at + 3, steps - 1)), steps)
    return a, b, c, d


@gluon.jit
def _fill(x_desc, found, token, ring, full, turn, TOGETHER: gl.constexpr):
    """Start to copy the activations of all records of one turn into its stage."""
    STAGES: gl.constexpr = full.shape[0]
    TOKENS: gl.constexpr = ring.shape[1]
    WIDTH: gl.constexpr = ring.shape[2]
    stage = turn % STAGES
    mbarrier.expect(full.index(stage), TOGETHER * TOKENS * _ROW_BYTES)
    for number in gl.static_range(TOGETHER):
        load_tile(x_desc, [token, found[number] * WIDTH], full.index(stage), ring.index(stage * TOGETHER + number))


@gluon.jit
def _leave(sums, acc):
    """Write one part's sums ``[rows, tokens]`` where the others find them, token by token."""
    row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    token = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    gl.store(sums + token[None, :] * acc.shape[0] + row[:, None], acc.to(gl.float32))


@gluon.jit
def _add_up(
    y, bias, scales, token_scales, sums, part, token, feature, tokens, out_features, y_stride,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, BITS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Store this part's slice of an output tile: what all parts left of it, scaled, and the bias.

    Args:
        sums: what `_leave` wrote, of the first part.
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


# Sizes are not specialised on: a binary for each of their divisibilities would gain nothing.
@gluon.jit(do_not_specialize=["steps", "tokens", "out_features", "y_stride", "early"])
def hopper_decode_linear(
    x_desc, y, words, bias, scales, token_scales, workspace, columns, order,
    steps, tokens, out_features, y_stride, early,
    ROWS: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr,
    PROMOTE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """``y = x @ W^T + bias``, a cluster of thread blocks per ``ROWS`` features and the tokens of ``x_desc``'s block.

    Args:
        x_desc: activations ``[tokens, K]`` in blocks of ``[TOKENS, 64]``, of 8 bits 128 columns.
        y: output ``[tokens, N]``, rows ``y_stride`` elements apart.
        words, columns: parts of the ``HybridWeight``; words are its records.
        bias: ``[N]``, or anything if not ``HAS_BIAS``.
        scales, token_scales: float32 ``[N]`` and ``[tokens]``, factors of products of 8 bits; else anything.
        workspace: float32, ``ROWS * TOKENS`` for each thread block, if ``BLOCKS`` is more than one.
        order: int32 ``[panels, 4]`` (with 128 ``ROWS``, of pairs of panels), most expensive first.
        early: whether the first records may be read before the kernel before on the stream is done.
        ROWS to BLOCKS, PROMOTE: as in ``HopperDecodeConfig``.
        PDL: whether it is launched with ``launch_pdl``.
    """
    dtype: gl.constexpr = x_desc.dtype
    TOKENS: gl.constexpr = x_desc.block_shape[0]
    WIDTH: gl.constexpr = x_desc.block_shape[1]
    WARPS: gl.constexpr = ROWS // 16
    PANELS: gl.constexpr = ROWS // 64
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, WIDTH // 4])
    fragment: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])

    ring = gl.allocate_shared_memory(dtype, [STAGES * TOGETHER, TOKENS, WIDTH], x_desc.layout)
    # Any operand of as many rows, which the lowering replaces by registers.
    stand_in = reinterpret(ring, dtype, [STAGES * TOGETHER * TOKENS // ROWS, ROWS, WIDTH], x_desc.layout).index(0)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
    fence_async_shared()
    barrier()

    if PDL:  # noqa: SIM102 a condition at compile time, then one at run time
        if early == 0:
            wait_for_previous()
    block = gl.program_id(0) % BLOCKS
    part = gl.program_id(0) // BLOCKS
    order += part * 4
    panel = gl.load(order) * PANELS
    start = gl.load(order + 1)
    sparse = gl.load(order + 3)
    dense = steps - sparse
    columns += panel * steps
    first_24, last_24 = sparse * block // BLOCKS, sparse * (block + 1) // BLOCKS
    first_dense, last_dense = sparse + dense * block // BLOCKS, sparse + dense * (block + 1) // BLOCKS
    turns_24 = (last_24 - first_24 + TOGETHER - 1) // TOGETHER
    turns = turns_24 + (last_dense - first_dense + TOGETHER - 1) // TOGETHER

    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, fragment)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, fragment)))[None, :, None]
    register = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, fragment)))[None, None, :]
    if PANELS == 1:
        record = words + start.to(gl.int64) * 128
    else:
        # Where there is no second panel, the first is computed again: those output rows are outside and not stored.
        record = words + gl.where(warp < 4, start, gl.load(order + 2)).to(gl.int64) * 128
    row = warp % 4
    words_24 = row * 256 + lane * 4 + register
    words_dense = row * 512 + lane * 4 + register
    metadata = row * 32 + lane
    # Counted from the panel's first record, of which those before are 2:4.
    record_dense = record + sparse * record_24(dtype) - sparse * RECORD_DENSE

    a = _turn_24(record, first_24, last_24, words_24, metadata, dtype, TOGETHER)
    b = _turn_dense(record_dense, first_dense, last_dense, words_dense, TOGETHER)
    if PDL:
        # Weights do not depend on what runs before; activations do, and so does the memory that is written.
        wait_for_previous()
    token = gl.program_id(1) * TOKENS
    for turn in gl.static_range(STAGES):
        if turn < turns:
            found = _columns(columns, turn, turns_24, first_24, last_24, first_dense, last_dense, steps, TOGETHER)
            _fill(x_desc, found, token, ring, full, turn, TOGETHER)
    # The columns of a turn are asked for a turn before its copies.
    found = _columns(columns, STAGES, turns_24, first_24, last_24, first_dense, last_dense, steps, TOGETHER)

    acc = gl.zeros([ROWS, TOKENS], accumulator(dtype), layout)
    total = acc
    for turn in range(turns_24):
        ahead = first_24 + (turn + 1) * TOGETHER
        c = _turn_24(record, ahead, last_24, words_24, metadata, dtype, TOGETHER)
        mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
        for number in gl.static_range(TOGETHER):
            acc = _multiply_24(acc, a[number], ring.index(turn % STAGES * TOGETHER + number), stand_in)
            if PROMOTE:
                total += warpgroup_mma_wait(0, [acc])
                acc = gl.zeros([ROWS, TOKENS], accumulator(dtype), layout)
        acc = warpgroup_mma_wait(0, [acc])
        barrier()
        if turn + STAGES < turns:
            _fill(x_desc, found, token, ring, full, turn + STAGES, TOGETHER)
        more = turn + STAGES + 1
        found = _columns(columns, more, turns_24, first_24, last_24, first_dense, last_dense, steps, TOGETHER)
        a = c
    for turn in range(turns_24, turns):
        ahead = first_dense + (turn - turns_24 + 1) * TOGETHER
        d = _turn_dense(record_dense, ahead, last_dense, words_dense, TOGETHER)
        mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
        for number in gl.static_range(TOGETHER):
            acc = _multiply_dense(acc, b[number], ring.index(turn % STAGES * TOGETHER + number), stand_in)
            if PROMOTE:
                total += warpgroup_mma_wait(0, [acc])
                acc = gl.zeros([ROWS, TOKENS], accumulator(dtype), layout)
        acc = warpgroup_mma_wait(0, [acc])
        barrier()
        if turn + STAGES < turns:
            _fill(x_desc, found, token, ring, full, turn + STAGES, TOGETHER)
        more = turn + STAGES + 1
        found = _columns(columns, more, turns_24, first_24, last_24, first_dense, last_dense, steps, TOGETHER)
        b = d
    if PDL:
        let_next_begin()

    if not PROMOTE:
        total = acc
    if BLOCKS > 1:
        SIZE: gl.constexpr = ROWS * TOKENS
        tile = (gl.program_id(1) * (gl.num_programs(0) // BLOCKS) + part) * BLOCKS
        sums = workspace + tile.to(gl.int64) * SIZE
        _leave(sums + block * SIZE, total)
        cluster_barrier(BLOCKS, WARPS * 32)
        _add_up(
            y, bias, scales, token_scales, sums, block, token, panel * 64, tokens, out_features, y_stride,
            ROWS, TOKENS, BLOCKS, WARPS, dtype.primitive_bitwidth, HAS_BIAS,
        )  # fmt: skip
    else:
        total = total.to(gl.float32)
        feature = panel * 64 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        at = token + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
        if dtype.primitive_bitwidth == 8:
            total *= gl.load(scales + feature, mask=feature < out_features, other=0.0)[:, None]
            total *= gl.load(token_scales + at, mask=at < tokens, other=0.0)[None, :]
        if HAS_BIAS:
            total += gl.load(bias + feature, mask=feature < out_features, other=0.0).to(gl.float32)[:, None]
        inside = (feature < out_features)[:, None] & (at < tokens)[None, :]
        pointer = y + at.to(gl.int64)[None, :] * y_stride + feature[:, None]
        gl.store(pointer, total.to(y.dtype.element_ty), mask=inside)


def launch(
    x: Tensor,
    hybrid: HybridWeight,
    order: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: HopperDecodeConfig,
    token_scales: Tensor | None = None,
) -> None:
    """Enqueue ``y = x @ W^T + bias`` on the current stream.

    Args:
        x: ``[tokens, K]`` of the weight's dtype, 16-byte aligned rows, at least one token.
        order: int32 ``[panels, 4]``, or with 128 ``rows`` of pairs of panels.
        y: ``[tokens, N]``.
        token_scales: float32 ``[tokens]``, of weights of 8 bits.
    """
    tokens = x.shape[0]
    x_block = [config.tokens, block_columns(x.dtype)]
    grid = (len(order) * config.blocks, triton.cdiv(tokens, config.tokens))
    # Early clusters of eight crowd onto the multiprocessors that are free first.
    pdl = config.blocks < 8
    workspace = y
    if config.blocks > 1:
        # A new one for every call: the allocator keeps streams and captured graphs apart.
        workspace = torch.empty(grid[0] * grid[1] * config.rows * config.tokens, dtype=torch.float32, device=x.device)
    hopper_decode_linear[grid](
        TensorDescriptor.from_tensor(x, x_block, gl.NVMMASharedLayout.get_default_for(x_block, GLUON_DTYPE[x.dtype])),
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
        hybrid.shape[0],
        y.stride(0),
        # In a captured graph weights are constants; elsewhere the kernel before may have written them.
        int(torch.cuda.is_current_stream_capturing()),
        ROWS=config.rows,
        TOGETHER=config.together,
        STAGES=config.stages,
        BLOCKS=config.blocks,
        HAS_BIAS=bias is not None,
        PROMOTE=config.promote,
        PDL=pdl,
        num_warps=config.rows // 16,
        launch_pdl=pdl,
    )
