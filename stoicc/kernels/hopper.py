"""Many tokens on Hopper: a persistent, warp-specialised product of a hybrid weight with ``wgmma`` and ``wgmma.sp``.

Two consumer warpgroups each own a panel, 64 output features, against one tile of tokens; a producer warp keeps a ring
of activation tiles filled by bulk tensor copies. Weights do not pass through shared memory: each consumer loads its
records from global memory straight into the registers of the tensor core's A operand, one turn of the loop ahead.
Why: a sparse ``wgmma`` reads 128 bytes of activations a cycle from shared memory at full rate, which is all that a
multiprocessor has, so any other traffic through it costs time.

Where bands have two panels (tiles of at least 128 rows), two thread blocks form a cluster: each copies half of an
activation tile and the copy lands in both, which halves what is read from the L2 cache. Each block has one panel of
either band, so that a column that is dense in one band and 2:4 in the other costs both blocks the same.

The warps of a consumer do not meet to wait for a stage or to give one back: each does so for itself.

A consumer drains its ``wgmma`` once per turn of the loop, since ptxas serialises the pipeline when metadata registers
change while it is open; within a turn one step is in flight while the next is issued.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stoicc.compat import barrier, load_tile, reinterpret, store_tile
from stoicc.format import ROW_BYTES, HybridWeight, block_columns
from stoicc.language import (
    FRAGMENT,
    GLUON_DTYPE,
    METADATA,
    RECORD_DENSE,
    accumulator,
    cluster_barrier,
    dot_24,
    dot_dense,
    multicast_next,
    quiet,
    record_24,
    remote_next,
)

_ROW_BYTES = gl.constexpr(ROW_BYTES)


@dataclass(frozen=True)
class HopperConfig:
    """How the many-token kernel is cut up.

    Attributes:
        tokens: tokens of an output tile: 64, 128 or 256.
        stages: tiles of activations in the ring.
        together: token tiles that are walked together.
        cluster: thread blocks that share activations: 1, or 2 for weights whose band is 2.
        promote: add the sums of every step, 128 columns, to others in float32, for ``float8_e4m3fn``: within a sum of
            its products the tensor cores keep fewer bits. Not with 256 tokens, for want of registers.
    """

    tokens: int
    stages: int
    together: int
    cluster: int
    promote: bool = False


@gluon.jit
def _output_tile(index, groups, token_tiles, order, TILES_TOGETHER: gl.constexpr):
    """Group of panels and token tile of the ``index``-th output tile: some token tiles at a time, for the L2 cache."""
    width = TILES_TOGETHER * groups
    first = index // width * TILES_TOGETHER
    together = gl.minimum(token_tiles - first, TILES_TOGETHER)
    return gl.load(order + index % width // together * 4), first + index % width % together


@gluon.jit
def _produce(
    x_desc, columns, order, x_ring, full, empty, steps, groups, token_tiles,
    TOKENS: gl.constexpr, CLUSTER: gl.constexpr, TILES_TOGETHER: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = full.shape[0]
    rank = gl.program_id(0) % CLUSTER
    count = 0
    for index in range(gl.program_id(0) // CLUSTER, groups * token_tiles, gl.num_programs(0) // CLUSTER):
        group, token_tile = _output_tile(index, groups, token_tiles, order, TILES_TOGETHER)
        walk = columns + group * 2 * CLUSTER * steps
        column = gl.load(walk)
        token = token_tile * TOKENS + rank * (TOKENS // CLUSTER)
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), TOKENS * _ROW_BYTES)
            if CLUSTER == 2:
                multicast_next(3)
            load_tile(
                x_desc, [token, column * x_desc.block_shape[1]], full.index(stage), x_ring.index(stage * CLUSTER + rank)
            )
            column = gl.load(walk + gl.minimum(step + 1, steps - 1))
            count += 1
    if CLUSTER == 2:
        # The other block still arrives at this one's barriers: do not leave before it has.
        for _ in range(STAGES):
            mbarrier.wait(empty.index(count % STAGES), (count // STAGES & 1) ^ 1)
            count += 1


@gluon.jit
def _wait_full(full, count):
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(count % STAGES), count // STAGES & 1)


@gluon.jit
def _release(empty, count, peer, CLUSTER: gl.constexpr):
    STAGES: gl.constexpr = empty.shape[0]
    barrier = empty.index(count % STAGES)
    mbarrier.arrive(barrier)
    if CLUSTER == 2:
        remote_next(peer)
        mbarrier.arrive(barrier)


@gluon.jit
def _load_24(record, lane_words, lane_metadata, BITS: gl.constexpr):
    """Of one record both k-steps' values, and the metadata word of each, which of 16 bits is the same one."""
    first = gl.load(record + METADATA + lane_metadata)
    second = first
    if BITS == 8:
        second = gl.load(record + METADATA + 128 + lane_metadata)
    return gl.load(record + lane_words), gl.load(record + 128 + lane_words), first, second


@gluon.jit
def _step_24(acc, a, count, x_ring, full):
    _wait_full(full, count)
    x = x_ring.index(count % x_ring.shape[0])
    HALF: gl.constexpr = x.shape[1] // 2
    return dot_24(a[1], a[3], x, dot_24(a[0], a[2], x, acc, 0, 0), HALF, 1 if HALF == 32 else 0)


@gluon.jit
def _walk_24(acc, record, length, count, x_ring, full, empty, peer, lane_words, lane_metadata, CLUSTER: gl.constexpr):
    """``length`` steps over 2:4 blocks: those that four do not divide first, then four at a time."""
    BITS: gl.constexpr = x_ring.dtype.primitive_bitwidth
    RECORD: gl.constexpr = record_24(x_ring.dtype)
    for _ in range(length % 4):
        a = _load_24(record, lane_words, lane_metadata, BITS)
        record += RECORD
        acc = warpgroup_mma_wait(0, [_step_24(acc, a, count, x_ring, full)])
        _release(empty, count, peer, CLUSTER)
        count += 1
    if length >= 4:
        a = _load_24(record, lane_words, lane_metadata, BITS)
        b = _load_24(record + RECORD, lane_words, lane_metadata, BITS)
        c = _load_24(record + 2 * RECORD, lane_words, lane_metadata, BITS)
        d = _load_24(record + 3 * RECORD, lane_words, lane_metadata, BITS)
        for left in range(length // 4, 0, -1):
            # The last turn loads its own records again rather than read past the end.
            record += gl.where(left > 1, 4 * RECORD, 0)
            e = _load_24(record, lane_words, lane_metadata, BITS)
            f = _load_24(record + RECORD, lane_words, lane_metadata, BITS)
            g = _load_24(record + 2 * RECORD, lane_words, lane_metadata, BITS)
            h = _load_24(record + 3 * RECORD, lane_words, lane_metadata, BITS)
            # While one step is in flight the next is issued, and the stage of the one before is given back.
            acc = _step_24(acc, a, count, x_ring, full)
            acc = warpgroup_mma_wait(1, [_step_24(acc, b, count + 1, x_ring, full)])
            _release(empty, count, peer, CLUSTER)
            acc = warpgroup_mma_wait(1, [_step_24(acc, c, count + 2, x_ring, full)])
            _release(empty, count + 1, peer, CLUSTER)
            acc = warpgroup_mma_wait(1, [_step_24(acc, d, count + 3, x_ring, full)])
            _release(empty, count + 2, peer, CLUSTER)
            acc = warpgroup_mma_wait(0, [acc])
            _release(empty, count + 3, peer, CLUSTER)
            a, b, c, d = e, f, g, h
            count += 4
    return acc, count


@gluon.jit
def _load_dense(record, lane_words):
    record += lane_words
    return gl.load(record), gl.load(record + 128), gl.load(record + 256), gl.load(record + 384)


@gluon.jit
def _step_dense(acc, a, count, x_ring, full):
    _wait_full(full, count)
    x = x_ring.index(count % x_ring.shape[0])
    QUARTER: gl.constexpr = x.shape[1] // 4
    acc = dot_dense(a[1], x, dot_dense(a[0], x, acc, 0), QUARTER)
    return dot_dense(a[3], x, dot_dense(a[2], x, acc, 2 * QUARTER), 3 * QUARTER)


@gluon.jit
def _walk_dense(acc, record, length, count, x_ring, full, empty, peer, lane_words, CLUSTER: gl.constexpr):
    """``length`` steps over dense blocks: an odd one first, then two at a time."""
    if length % 2 == 1:
        a = _load_dense(record, lane_words)
        record += RECORD_DENSE
        acc = warpgroup_mma_wait(0, [_step_dense(acc, a, count, x_ring, full)])
        _release(empty, count, peer, CLUSTER)
        count += 1
    if length >= 2:
        a = _load_dense(record, lane_words)
        b = _load_dense(record + RECORD_DENSE, lane_words)
        for left in range(length // 2, 0, -1):
            record += gl.where(left > 1, 2 * RECORD_DENSE, 0)
            e = _load_dense(record, lane_words)
            f = _load_dense(record + RECORD_DENSE, lane_words)
            acc = _step_dense(acc, a, count, x_ring, full)
            acc = _step_dense(acc, b, count + 1, x_ring, full)
            acc = warpgroup_mma_wait(1, [acc])
            _release(empty, count, peer, CLUSTER)
            acc = warpgroup_mma_wait(0, [acc])
            _release(empty, count + 1, peer, CLUSTER)
            a, b = e, f
            count += 2
    return acc, count


@gluon.jit
def _walk(
    total, record, length, count, x_ring, full, empty, peer, lane_words, lane_metadata,
    DENSE: gl.constexpr, CLUSTER: gl.constexpr, PROMOTE: gl.constexpr,
):  # fmt: skip
    """At least one step over blocks of one kind, added to ``total``; if ``PROMOTE`` each is a sum of its own first."""
    BITS: gl.constexpr = x_ring.dtype.primitive_bitwidth
    if PROMOTE:
        RECORD: gl.constexpr = RECORD_DENSE if DENSE else record_24(x_ring.dtype)
        layout: gl.constexpr = total.type.layout
        # Records are on their way for two steps.
        b = _load_dense(record, lane_words) if DENSE else _load_24(record, lane_words, lane_metadata, BITS)
        record += gl.where(length > 1, RECORD, 0)
        c = _load_dense(record, lane_words) if DENSE else _load_24(record, lane_words, lane_metadata, BITS)
        for left in range(length, 0, -1):
            a, b = b, c
            record += gl.where(left > 2, RECORD, 0)
            c = _load_dense(record, lane_words) if DENSE else _load_24(record, lane_words, lane_metadata, BITS)
            acc = gl.zeros(total.shape, total.dtype, layout)
            acc = _step_dense(acc, a, count, x_ring, full) if DENSE else _step_24(acc, a, count, x_ring, full)
            total += warpgroup_mma_wait(0, [acc])
            _release(empty, count, peer, CLUSTER)
            count += 1
    elif DENSE:
        total, count = _walk_dense(total, record, length, count, x_ring, full, empty, peer, lane_words, CLUSTER)
    else:
        total, count = _walk_24(
            total, record, length, count, x_ring, full, empty, peer, lane_words, lane_metadata, CLUSTER
        )
    return total, count


@gluon.jit
def _consume(
    y_desc, words, bias, scales, token_scales, starts, sparse_blocks, leads, order, x_ring, y_stages, factors,
    full, empty, steps, panels, groups, token_tiles, out_features, tokens,
    CONSUMER: gl.constexpr, CLUSTER: gl.constexpr, TILES_TOGETHER: gl.constexpr, HAS_BIAS: gl.constexpr,
    PROMOTE: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = x_ring.shape[1]
    BITS: gl.constexpr = x_ring.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 256 // BITS])
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    warp = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, FRAGMENT)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, FRAGMENT)))[None, :, None]
    register = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, FRAGMENT)))[None, None, :]
    words_24 = warp * 256 + lane * 4 + register
    words_dense = warp * 512 + lane * 4 + register
    metadata = warp * 32 + lane
    y_stage = y_stages.index(CONSUMER)
    rank = gl.program_id(0) % CLUSTER
    peer = rank ^ 1
    count = 0
    for index in range(gl.program_id(0) // CLUSTER, groups * token_tiles, gl.num_programs(0) // CLUSTER):
        group, token_tile = _output_tile(index, groups, token_tiles, order, TILES_TOGETHER)
        # The first consumers of a cluster have one band, the second the other: so all blocks have the same work.
        own_panel = (group * 2 + CONSUMER) * CLUSTER + rank
        # Beyond the last panel, compute it again: those output rows are outside and not stored.
        panel = gl.minimum(own_panel, panels - 1)
        sparse = gl.load(sparse_blocks + panel)
        lead = gl.load(leads + panel)
        record = words + gl.load(starts + panel).to(gl.int64) * 128
        feature = own_panel * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        if HAS_BIAS:
            offset = gl.load(bias + feature, mask=feature < out_features, other=0.0).to(gl.float32)
        if BITS == 8:
            # Asked for now, needed after the walk; from shared memory each thread then takes those of its tokens.
            factor = gl.load(scales + feature, mask=feature < out_features, other=0.0)
            token = token_tile * TOKENS + gl.arange(0, TOKENS, spread)
            factors.index(CONSUMER).store(gl.load(token_scales + token, mask=token < tokens, other=0.0))
        total = gl.zeros([64, TOKENS], accumulator(x_ring.dtype), layout)
        if lead > 0:
            total, count = _walk(
                total, record, lead, count, x_ring, full, empty, peer, words_24, metadata, False, CLUSTER, PROMOTE
            )
        if steps > sparse:
            dense = record + sparse * record_24(x_ring.dtype)
            total, count = _walk(
                total, dense, steps - sparse, count, x_ring, full, empty, peer, words_dense, metadata, True, CLUSTER,
                PROMOTE,
            )  # fmt: skip
        if sparse > lead:
            record += lead * record_24(x_ring.dtype)
            total, count = _walk(
                total, record, sparse - lead, count, x_ring, full, empty, peer, words_24, metadata, False, CLUSTER,
                PROMOTE,
            )  # fmt: skip
        # The previous tile's store has had this tile's whole walk to read the stage.
        tma.store_wait(0)
        barrier()
        out = total.to(gl.float32)
        if BITS == 8:
            out *= factors.index(CONSUMER).load(gl.SliceLayout(0, layout))[None, :] * factor[:, None]
        if HAS_BIAS:
            out += offset[:, None]
        y_stage.permute((1, 0)).store(out.to(y_stage.dtype))
        fence_async_shared()
        barrier()
        store_tile(y_desc, [token_tile * TOKENS, own_panel * 64], y_stage)
    tma.store_wait(0)


# Sizes are not specialised on: a binary for each of their divisibilities would gain nothing.
@gluon.jit(do_not_specialize=["steps", "panels", "groups", "token_tiles", "out_features", "tokens"])
def hopper_linear(
    x_desc, y_desc, words, bias, scales, token_scales, starts, columns, sparse_blocks, leads, order,
    steps, panels, groups, token_tiles, out_features, tokens,
    STAGES: gl.constexpr, CLUSTER: gl.constexpr, TILES_TOGETHER: gl.constexpr, HAS_BIAS: gl.constexpr,
    PROMOTE: gl.constexpr,
):  # fmt: skip
    """``y = x @ W^T + bias`` over output tiles of 128 features a thread block by as many tokens as ``y_desc``'s block.

    Args:
        x_desc: activations ``[tokens, K]`` in blocks of ``[TOKENS / CLUSTER, 64]``, of 8 bits 128 columns.
        y_desc: output ``[tokens, N]`` in blocks of ``[TOKENS, 64]``.
        words, starts, columns, sparse_blocks: the parts of the ``HybridWeight``.
        bias: ``[N]``, or anything if not ``HAS_BIAS``.
        scales, token_scales: float32 ``[N]`` and ``[tokens]``, factors of products of 8 bits; else anything.
        leads: the weight's where a group is its group (``CLUSTER`` equals its band); its ``sparse_blocks`` where a
            group is only one of its bands, whose panels turn together.
        order: int32 ``[groups, 4]``, the groups of ``2 * CLUSTER`` panels, most expensive first.
        STAGES: tiles of activations in the ring, at least three.
        CLUSTER: thread blocks that share activations, one or two.
        TILES_TOGETHER: token tiles that are walked together.
        PROMOTE: as in ``HopperConfig``.
    """
    TOKENS: gl.constexpr = y_desc.block_shape[0]
    WIDTH: gl.constexpr = x_desc.block_shape[1]
    x_halves = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CLUSTER, TOKENS // CLUSTER, WIDTH], x_desc.layout)
    x_ring = reinterpret(x_halves, x_desc.dtype, [STAGES, TOKENS, WIDTH], x_desc.layout)
    y_stages = gl.allocate_shared_memory(y_desc.dtype, [2, TOKENS, 64], y_desc.layout)
    factors = gl.allocate_shared_memory(
        gl.float32, [2, TOKENS if WIDTH == 128 else 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        # Every warp of every consumer arrives for itself.
        mbarrier.init(empty.index(stage), 2 * CLUSTER * 4)
    fence_async_shared()
    barrier()
    quiet(128)
    if CLUSTER == 2:
        cluster_barrier(2, 128)
    # Written out, since values of a tuple that has a name are no longer compile-time constants.
    gl.warp_specialize(
        [
            (_consume, (
                y_desc, words, bias, scales, token_scales, starts, sparse_blocks, leads, order, x_ring, y_stages,
                factors, full, empty, steps, panels, groups, token_tiles, out_features, tokens,
                0, CLUSTER, TILES_TOGETHER, HAS_BIAS, PROMOTE,
            )),
            (_consume, (
                y_desc, words, bias, scales, token_scales, starts, sparse_blocks, leads, order, x_ring, y_stages,
                factors, full, empty, steps, panels, groups, token_tiles, out_features, tokens,
                1, CLUSTER, TILES_TOGETHER, HAS_BIAS, PROMOTE,
            )),
            (_produce, (
                x_desc, columns, order, x_halves, full, empty, steps, groups, token_tiles,
                TOKENS, CLUSTER, TILES_TOGETHER,
            )),
        ],
        [4, 1],
        # All that there are: with 232 Triton 3.9 spills.
        [240, 24],
    )  # fmt: skip


def launch(
    x: Tensor,
    hybrid: HybridWeight,
    order: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: HopperConfig,
    token_scales: Tensor | None = None,
) -> None:
    """Enqueue ``y = x @ W^T + bias`` on the current stream.

    Args:
        x: ``[tokens, K]`` of the weight's dtype, 16-byte aligned rows, at least one token.
        order: int32 ``[groups, 4]`` for ``2 * config.cluster`` panels.
        y: ``[tokens, N]``, 16-byte aligned rows.
        token_scales: float32 ``[tokens]``, of weights of 8 bits.
    """
    tokens = x.shape[0]
    groups = len(order)
    token_tiles = triton.cdiv(tokens, config.tokens)
    x_block, y_block = [config.tokens // config.cluster, block_columns(x.dtype)], [config.tokens, 64]
    clusters = torch.cuda.get_device_properties(x.device).multi_processor_count // config.cluster
    hopper_linear[(min(clusters, groups * token_tiles) * config.cluster,)](
        TensorDescriptor.from_tensor(x, x_block, gl.NVMMASharedLayout.get_default_for(x_block, GLUON_DTYPE[x.dtype])),
        TensorDescriptor.from_tensor(y, y_block, gl.NVMMASharedLayout.get_default_for(y_block, GLUON_DTYPE[y.dtype])),
        hybrid.records,
        y if bias is None else bias,
        y if hybrid.scales is None else hybrid.scales,
        y if token_scales is None else token_scales,
        hybrid.starts,
        hybrid.columns,
        hybrid.sparse_blocks,
        hybrid.leads if config.cluster == hybrid.band else hybrid.sparse_blocks,
        order,
        hybrid.steps,
        hybrid.panels,
        groups,
        token_tiles,
        hybrid.shape[0],
        tokens,
        STAGES=config.stages,
        CLUSTER=config.cluster,
        TILES_TOGETHER=config.together,
        HAS_BIAS=bias is not None,
        PROMOTE=config.promote,
        num_warps=4,
    )
