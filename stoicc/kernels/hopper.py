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

Where output tiles are too few for all multiprocessors, ``splits`` blocks (or pairs) of a cluster share each tile: every
one takes a contiguous part of the walk over K, of about the same cost, and leaves its sums in a workspace; once all
have, each adds up a slice of the tokens in a fixed order, so the bits are the same on every run.

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
from stoicc.kernels.sums import add_up, leave
from stoicc.language import (
    FRAGMENT,
    GLUON_DTYPE,
    METADATA,
    RECORD_DENSE,
    accumulator,
    cluster_barrier,
    dot_24,
    dot_dense,
    let_others_see,
    multicast_next,
    quiet,
    record_24,
    remote_next,
    see_what_others_wrote,
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
        splits: parts that K is cut into, each of ``cluster`` thread blocks: 1, 2 or 4.
    """

    tokens: int
    stages: int
    together: int
    cluster: int
    splits: int = 1


@gluon.jit
def _output_tile(index, groups, token_tiles, order, TILES_TOGETHER: gl.constexpr):
    """Group of panels and token tile of the ``index``-th output tile: some token tiles at a time, for the L2 cache."""
    width = TILES_TOGETHER * groups
    first = index // width * TILES_TOGETHER
    together = gl.minimum(token_tiles - first, TILES_TOGETHER)
    return gl.load(order + index % width // together * 4), first + index % width % together


@gluon.jit
def _within(number, last):
    return gl.minimum(gl.maximum(number, 0), last)


@gluon.jit
def _part(split, group, steps, panels, sparse_blocks, leads, CLUSTER: gl.constexpr, SPLITS: gl.constexpr):
    """First step of part ``split`` of a group's walk and the first after it, so that all parts cost about the same.

    A dense step is reckoned as one and a half of 2:4: tensor cores take twice as long, shared memory as long.
    """
    if SPLITS == 1:
        return 0, steps
    else:
        # Both blocks of a pair have panels of the same two bands.
        a = gl.minimum(group * 2 * CLUSTER, panels - 1)
        b = gl.minimum((group * 2 + 1) * CLUSTER, panels - 1)
        lead_a, dense_a = gl.load(leads + a), steps - gl.load(sparse_blocks + a)
        lead_b, dense_b = gl.load(leads + b), steps - gl.load(sparse_blocks + b)
        whole = 4 * steps + dense_a + dense_b
        first, last = steps * 0, steps * 0
        bit = 1 << 14
        # The most steps that cost no more than the parts before, bit by bit.
        for _ in range(15):
            more = gl.minimum(first + bit, steps)
            cost = 4 * more + _within(more - lead_a, dense_a) + _within(more - lead_b, dense_b)
            first = gl.where(cost * SPLITS <= whole * split, more, first)
            more = gl.minimum(last + bit, steps)
            cost = 4 * more + _within(more - lead_a, dense_a) + _within(more - lead_b, dense_b)
            last = gl.where(cost * SPLITS <= whole * (split + 1), more, last)
            bit = bit >> 1
        return first, last


@gluon.jit
def _produce(
    x_desc, columns, sparse_blocks, leads, order, x_ring, full, empty, steps, panels, groups, token_tiles,
    TOKENS: gl.constexpr, CLUSTER: gl.constexpr, SPLITS: gl.constexpr, TILES_TOGETHER: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = full.shape[0]
    TEAM: gl.constexpr = CLUSTER * SPLITS
    rank = gl.program_id(0) % CLUSTER
    split = gl.program_id(0) % TEAM // CLUSTER
    count = 0
    for index in range(gl.program_id(0) // TEAM, groups * token_tiles, gl.num_programs(0) // TEAM):
        group, token_tile = _output_tile(index, groups, token_tiles, order, TILES_TOGETHER)
        walk = columns + group * 2 * CLUSTER * steps
        first, last = _part(split, group, steps, panels, sparse_blocks, leads, CLUSTER, SPLITS)
        column = gl.load(walk + gl.minimum(first, steps - 1))
        token = token_tile * TOKENS + rank * (TOKENS // CLUSTER)
        for step in range(first, last):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), TOKENS * _ROW_BYTES)
            at = [token, column * x_desc.block_shape[1]]
            if CLUSTER == 1:
                load_tile(x_desc, at, full.index(stage), x_ring.index(stage))
            else:
                # The blocks that it lands in are part of the instruction.
                for pair in gl.static_range(SPLITS):
                    if split == pair:
                        multicast_next(3 << 2 * pair)
                        load_tile(x_desc, at, full.index(stage), x_ring.index(stage * CLUSTER + rank))
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
def _consume(
    y_desc, y, words, bias, scales, token_scales, workspace, starts, sparse_blocks, leads, order, x_ring, y_stages,
    factors, full, empty, left, steps, panels, groups, token_tiles, out_features, tokens, y_stride,
    CONSUMER: gl.constexpr, CLUSTER: gl.constexpr, SPLITS: gl.constexpr, TILES_TOGETHER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
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
    TEAM: gl.constexpr = CLUSTER * SPLITS
    y_stage = y_stages.index(CONSUMER)
    rank = gl.program_id(0) % CLUSTER
    split = gl.program_id(0) % TEAM // CLUSTER
    peer = gl.program_id(0) % TEAM ^ 1
    count = 0
    turn = 0
    for index in range(gl.program_id(0) // TEAM, groups * token_tiles, gl.num_programs(0) // TEAM):
        group, token_tile = _output_tile(index, groups, token_tiles, order, TILES_TOGETHER)
        # The first consumers of a cluster have one band, the second the other: so all blocks have the same work.
        own_panel = (group * 2 + CONSUMER) * CLUSTER + rank
        # Beyond the last panel, compute it again: those output rows are outside and not stored.
        panel = gl.minimum(own_panel, panels - 1)
        sparse = gl.load(sparse_blocks + panel)
        lead = gl.load(leads + panel)
        record = words + gl.load(starts + panel).to(gl.int64) * 128
        feature = own_panel * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        first, last = _part(split, group, steps, panels, sparse_blocks, leads, CLUSTER, SPLITS)
        if HAS_BIAS and SPLITS == 1:
            offset = gl.load(bias + feature, mask=feature < out_features, other=0.0).to(gl.float32)
        if BITS == 8 and SPLITS == 1:
            # Asked for now, needed after the walk; from shared memory each thread then takes those of its tokens.
            factor = gl.load(scales + feature, mask=feature < out_features, other=0.0)
            token = token_tile * TOKENS + gl.arange(0, TOKENS, spread)
            factors.index(CONSUMER).store(gl.load(token_scales + token, mask=token < tokens, other=0.0))
        acc = gl.zeros([64, TOKENS], accumulator(x_ring.dtype), layout)
        # Of this part: 2:4 steps up to the panel's first dense one, dense ones, and 2:4 ones after the last of them.
        dense = steps - sparse
        skipped = gl.minimum(first, lead)
        length = gl.minimum(last, lead) - skipped
        if length > 0:
            at = record + skipped * record_24(x_ring.dtype)
            acc, count = _walk_24(acc, at, length, count, x_ring, full, empty, peer, words_24, metadata, CLUSTER)
        skipped = _within(first - lead, dense)
        length = _within(last - lead, dense) - skipped
        if length > 0:
            at = record + sparse * record_24(x_ring.dtype) + skipped * RECORD_DENSE
            acc, count = _walk_dense(acc, at, length, count, x_ring, full, empty, peer, words_dense, CLUSTER)
        skipped = gl.maximum(first - dense, lead)
        length = gl.maximum(last - dense, lead) - skipped
        if length > 0:
            at = record + skipped * record_24(x_ring.dtype)
            acc, count = _walk_24(acc, at, length, count, x_ring, full, empty, peer, words_24, metadata, CLUSTER)
        if SPLITS == 1:
            # The previous tile's store has had this tile's whole walk to read the stage.
            tma.store_wait(0)
            barrier()
            out = acc.to(gl.float32)
            if BITS == 8:
                out *= factors.index(CONSUMER).load(gl.SliceLayout(0, layout))[None, :] * factor[:, None]
            if HAS_BIAS:
                out += offset[:, None]
            y_stage.permute((1, 0)).store(out.to(y_stage.dtype))
            fence_async_shared()
            barrier()
            store_tile(y_desc, [token_tile * TOKENS, own_panel * 64], y_stage)
        else:
            # Two of them, in turns: who writes to one again knows that all have read what was there.
            team = gl.program_id(0) // TEAM * 2 + turn % 2
            sums = workspace + ((team * CLUSTER + rank) * 2 + CONSUMER) * (SPLITS * 64 * TOKENS)
            leave(sums + split * (64 * TOKENS), acc)
            let_others_see()
            for other in gl.static_range(SPLITS):
                remote_next(rank + other * CLUSTER)
                mbarrier.arrive(left.index(CONSUMER))
            mbarrier.wait(left.index(CONSUMER), turn & 1)
            see_what_others_wrote()
            add_up(
                y, bias, scales, token_scales, sums, split, token_tile * TOKENS, own_panel * 64, tokens, out_features,
                y_stride, 64, TOKENS, SPLITS, 4, BITS, HAS_BIAS,
            )  # fmt: skip
            turn += 1
    if SPLITS == 1:
        tma.store_wait(0)


# Sizes are not specialised on: a binary for each of their divisibilities would gain nothing.
@gluon.jit(do_not_specialize=["steps", "panels", "groups", "token_tiles", "out_features", "tokens", "y_stride"])
def hopper_linear(
    x_desc, y_desc, y, words, bias, scales, token_scales, workspace, starts, columns, sparse_blocks, leads, order,
    steps, panels, groups, token_tiles, out_features, tokens, y_stride,
    STAGES: gl.constexpr, CLUSTER: gl.constexpr, SPLITS: gl.constexpr, TILES_TOGETHER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """``y = x @ W^T + bias`` over output tiles of 128 features a thread block by as many tokens as ``y_desc``'s block.

    Args:
        x_desc: activations ``[tokens, K]`` in blocks of ``[TOKENS / CLUSTER, 64]``, of 8 bits 128 columns.
        y_desc: output ``[tokens, N]`` in blocks of ``[TOKENS, 64]``, if ``SPLITS`` is one; else of any.
        y: the same, rows ``y_stride`` elements apart.
        words, starts, columns, sparse_blocks: the parts of the ``HybridWeight``.
        bias: ``[N]``, or anything if not ``HAS_BIAS``.
        scales, token_scales: float32 ``[N]`` and ``[tokens]``, factors of products of 8 bits; else anything.
        workspace: float32, if ``SPLITS`` is more than one, for each thread block two times ``[2, TOKENS, 64]``.
        leads: the weight's where a group is its group (``CLUSTER`` equals its band); its ``sparse_blocks`` where a
            group is only one of its bands, whose panels turn together.
        order: int32 ``[groups, 4]``, the groups of ``2 * CLUSTER`` panels, most expensive first.
        STAGES: tiles of activations in the ring, at least three.
        CLUSTER: thread blocks that share activations, one or two.
        SPLITS: parts that the walk over K is cut into.
        TILES_TOGETHER: token tiles that are walked together.
    """
    TOKENS: gl.constexpr = x_desc.block_shape[0] * CLUSTER
    WIDTH: gl.constexpr = x_desc.block_shape[1]
    x_halves = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CLUSTER, TOKENS // CLUSTER, WIDTH], x_desc.layout)
    x_ring = reinterpret(x_halves, x_desc.dtype, [STAGES, TOKENS, WIDTH], x_desc.layout)
    y_stages = gl.allocate_shared_memory(y_desc.dtype, [2, y_desc.block_shape[0], 64], y_desc.layout)
    factors = gl.allocate_shared_memory(
        gl.float32, [2, TOKENS if WIDTH == 128 else 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    left = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        # Every warp of every consumer arrives for itself.
        mbarrier.init(empty.index(stage), 2 * CLUSTER * 4)
    for consumer in gl.static_range(2):
        mbarrier.init(left.index(consumer), SPLITS * 4)
    fence_async_shared()
    barrier()
    quiet(128)
    if CLUSTER * SPLITS > 1:
        cluster_barrier(CLUSTER * SPLITS, 128)
    # Written out, since values of a tuple that has a name are no longer compile-time constants.
    gl.warp_specialize(
        [
            (_consume, (
                y_desc, y, words, bias, scales, token_scales, workspace, starts, sparse_blocks, leads, order, x_ring,
                y_stages, factors, full, empty, left, steps, panels, groups, token_tiles, out_features, tokens,
                y_stride, 0, CLUSTER, SPLITS, TILES_TOGETHER, HAS_BIAS,
            )),
            (_consume, (
                y_desc, y, words, bias, scales, token_scales, workspace, starts, sparse_blocks, leads, order, x_ring,
                y_stages, factors, full, empty, left, steps, panels, groups, token_tiles, out_features, tokens,
                y_stride, 1, CLUSTER, SPLITS, TILES_TOGETHER, HAS_BIAS,
            )),
            (_produce, (
                x_desc, columns, sparse_blocks, leads, order, x_halves, full, empty, steps, panels, groups, token_tiles,
                TOKENS, CLUSTER, SPLITS, TILES_TOGETHER,
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
    x_block = [config.tokens // config.cluster, block_columns(x.dtype)]
    # Parts store what they add up without a stage.
    y_block = [config.tokens if config.splits == 1 else 8, 64]
    team = config.cluster * config.splits
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    # Hopper's come in clusters of 16 or 18, within which a team must find its place, all teams at once.
    teams = min(processors // team if team < 4 else processors // 16 * 16 // team, groups * token_tiles)
    workspace = y
    if config.splits > 1:
        # A new one for every call: the allocator keeps streams and captured graphs apart.
        workspace = torch.empty(teams * team * 2 * 2 * 64 * config.tokens, dtype=torch.float32, device=x.device)
    hopper_linear[(teams * team,)](
        TensorDescriptor.from_tensor(x, x_block, gl.NVMMASharedLayout.get_default_for(x_block, GLUON_DTYPE[x.dtype])),
        TensorDescriptor.from_tensor(y, y_block, gl.NVMMASharedLayout.get_default_for(y_block, GLUON_DTYPE[y.dtype])),
        y,
        hybrid.records,
        y if bias is None else bias,
        y if hybrid.scales is None else hybrid.scales,
        y if token_scales is None else token_scales,
        workspace,
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
        y.stride(0),
        STAGES=config.stages,
        CLUSTER=config.cluster,
        SPLITS=config.splits,
        TILES_TOGETHER=config.together,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
