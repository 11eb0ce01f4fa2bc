"""Many tokens on Hopper: a persistent, warp-specialised product of a hybrid weight with ``wgmma`` and ``wgmma.sp``.

Two consumer warpgroups each own a band of one or two panels (64 or 128 output features) against one tile of tokens; a
producer warp keeps a ring of activation tiles filled by bulk tensor copies. Weights do not pass through shared memory:
each consumer loads its records from global memory straight into the registers of the tensor core's A operand, one turn of
the loop ahead. Why: a sparse ``wgmma`` reads 128 bytes of activations a cycle from shared memory at full rate, which is all
that a multiprocessor has, so any other traffic through it costs time.

A consumer drains its ``wgmma`` once per step, since ptxas serialises the pipeline when metadata registers change while it
is open; the other consumer's instructions fill the gap.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stoicc.format import HybridWeight
from stoicc.language import FRAGMENT, dot_24, dot_dense

GLUON_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class HopperConfig:
    """How the many-token kernel is cut up.

    Attributes:
        tokens: tokens of an output tile: 64, 128 or 256.
        panels: panels of a consumer: 1, or 2 for weights whose band is 2. An output tile has ``128 * panels`` features.
        stages: tiles of activations in the ring.
        together: token tiles that are walked together.
    """

    tokens: int
    panels: int
    stages: int
    together: int


RECORD_24 = gl.constexpr(9 * 128)
RECORD_DENSE = gl.constexpr(16 * 128)
METADATA = gl.constexpr(8 * 128)


@gluon.jit
def _output_tile(index, groups, token_tiles, order, TILES_TOGETHER: gl.constexpr):
    """Group of panels and tile of tokens of the ``index``-th output tile: some token tiles at a time, for the L2 cache."""
    width = TILES_TOGETHER * groups
    first = index // width * TILES_TOGETHER
    together = gl.minimum(token_tiles - first, TILES_TOGETHER)
    return gl.load(order + index % width // together), first + index % width % together


@gluon.jit
def _produce(x_desc, columns, order, x_ring, full, empty, steps, groups, token_tiles, PANELS: gl.constexpr, TILES_TOGETHER: gl.constexpr):
    STAGES: gl.constexpr = x_ring.shape[0]
    TOKENS: gl.constexpr = x_ring.shape[1]
    count = 0
    for index in range(gl.program_id(0), groups * token_tiles, gl.num_programs(0)):
        group, token_tile = _output_tile(index, groups, token_tiles, order, TILES_TOGETHER)
        walk = columns + group * 2 * PANELS * steps
        column = gl.load(walk)
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), TOKENS * 64 * 2)
            tma.async_copy_global_to_shared(x_desc, [token_tile * TOKENS, column * 64], full.index(stage), x_ring.index(stage))
            column = gl.load(walk + gl.minimum(step + 1, steps - 1))
            count += 1


@gluon.jit
def _wait_full(full, count, STAGES: gl.constexpr):
    mbarrier.wait(full.index(count % STAGES), count // STAGES & 1)


@gluon.jit
def _load_24(record, lane_words, lane_metadata):
    return gl.load(record + lane_words), gl.load(record + 128 + lane_words), gl.load(record + METADATA + lane_metadata)


@gluon.jit
def _dot_24(values0, values1, metadata, x, acc):
    return dot_24(values1, metadata, x, dot_24(values0, metadata, x, acc, 0, 0), 32, 1)


@gluon.jit
def _walk_24(acc0, acc1, record0, record1, length, count, x_ring, full, empty, lane_words, lane_metadata, PANELS: gl.constexpr):
    """``length`` steps of a band whose blocks there are all 2:4: an odd one first, then two at a time."""
    STAGES: gl.constexpr = x_ring.shape[0]
    if length % 2 == 1:
        a0, a1, am = _load_24(record0, lane_words, lane_metadata)
        record0 += RECORD_24
        if PANELS == 2:
            c0, c1, cm = _load_24(record1, lane_words, lane_metadata)
            record1 += RECORD_24
        _wait_full(full, count, STAGES)
        x = x_ring.index(count % STAGES)
        acc0 = _dot_24(a0, a1, am, x, acc0)
        if PANELS == 2:
            acc1 = _dot_24(c0, c1, cm, x, acc1)
            acc0, acc1 = warpgroup_mma_wait(0, [acc0, acc1])
        else:
            acc0 = warpgroup_mma_wait(0, [acc0])
        mbarrier.arrive(empty.index(count % STAGES))
        count += 1
    if length >= 2:
        a0, a1, am = _load_24(record0, lane_words, lane_metadata)
        b0, b1, bm = _load_24(record0 + RECORD_24, lane_words, lane_metadata)
        if PANELS == 2:
            c0, c1, cm = _load_24(record1, lane_words, lane_metadata)
            d0, d1, dm = _load_24(record1 + RECORD_24, lane_words, lane_metadata)
        for left in range(length // 2, 0, -1):
            # The last turn loads its own records again rather than read past the end.
            ahead = gl.where(left > 1, 2 * RECORD_24, 0)
            record0 += ahead
            e0, e1, em = _load_24(record0, lane_words, lane_metadata)
            f0, f1, fm = _load_24(record0 + RECORD_24, lane_words, lane_metadata)
            if PANELS == 2:
                record1 += ahead
                g0, g1, gm = _load_24(record1, lane_words, lane_metadata)
                h0, h1, hm = _load_24(record1 + RECORD_24, lane_words, lane_metadata)
            _wait_full(full, count, STAGES)
            x = x_ring.index(count % STAGES)
            acc0 = _dot_24(a0, a1, am, x, acc0)
            if PANELS == 2:
                acc1 = _dot_24(c0, c1, cm, x, acc1)
            _wait_full(full, count + 1, STAGES)
            x = x_ring.index((count + 1) % STAGES)
            acc0 = _dot_24(b0, b1, bm, x, acc0)
            if PANELS == 2:
                acc1 = _dot_24(d0, d1, dm, x, acc1)
                acc0, acc1 = warpgroup_mma_wait(0, [acc0, acc1])
                c0, c1, cm, d0, d1, dm = g0, g1, gm, h0, h1, hm
            else:
                acc0 = warpgroup_mma_wait(0, [acc0])
            mbarrier.arrive(empty.index(count % STAGES))
            mbarrier.arrive(empty.index((count + 1) % STAGES))
            a0, a1, am, b0, b1, bm = e0, e1, em, f0, f1, fm
            count += 2
    return acc0, acc1, count


@gluon.jit
def _load_dense(record, lane_words):
    record += lane_words
    return gl.load(record), gl.load(record + 128), gl.load(record + 256), gl.load(record + 384)


@gluon.jit
def _dot_dense(values0, values1, values2, values3, x, acc):
    acc = dot_dense(values1, x, dot_dense(values0, x, acc, 0), 16)
    return dot_dense(values3, x, dot_dense(values2, x, acc, 32), 48)


@gluon.jit
def _walk_dense(acc0, acc1, record0, record1, length, count, x_ring, full, empty, lane_words, PANELS: gl.constexpr):
    """``length`` steps of a band whose blocks there are all dense."""
    STAGES: gl.constexpr = x_ring.shape[0]
    a0, a1, a2, a3 = _load_dense(record0, lane_words)
    if PANELS == 2:
        c0, c1, c2, c3 = _load_dense(record1, lane_words)
    for left in range(length, 0, -1):
        ahead = gl.where(left > 1, RECORD_DENSE, 0)
        record0 += ahead
        e0, e1, e2, e3 = _load_dense(record0, lane_words)
        if PANELS == 2:
            record1 += ahead
            g0, g1, g2, g3 = _load_dense(record1, lane_words)
        _wait_full(full, count, STAGES)
        x = x_ring.index(count % STAGES)
        acc0 = _dot_dense(a0, a1, a2, a3, x, acc0)
        if PANELS == 2:
            acc1 = _dot_dense(c0, c1, c2, c3, x, acc1)
            acc0, acc1 = warpgroup_mma_wait(0, [acc0, acc1])
            c0, c1, c2, c3 = g0, g1, g2, g3
        else:
            acc0 = warpgroup_mma_wait(0, [acc0])
        mbarrier.arrive(empty.index(count % STAGES))
        a0, a1, a2, a3 = e0, e1, e2, e3
        count += 1
    return acc0, acc1, count


@gluon.jit
def _stage_output(y_stage, acc, bias, feature, out_features, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        rows = feature + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias + rows, mask=rows < out_features, other=0.0).to(gl.float32)[:, None]
    y_stage.permute((1, 0)).store(acc.to(y_stage.dtype))


@gluon.jit
def _consume(
    y_desc, words, bias, starts, sparse_blocks, leads, order, x_ring, y_stages, full, empty,
    steps, panels, groups, token_tiles, out_features,
    BAND: gl.constexpr, PANELS: gl.constexpr, TILES_TOGETHER: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = x_ring.shape[1]
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    warp = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, FRAGMENT)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, FRAGMENT)))[None, :, None]
    register = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, FRAGMENT)))[None, None, :]
    words_24 = warp * 256 + lane * 4 + register
    words_dense = warp * 512 + lane * 4 + register
    metadata = warp * 32 + lane
    count = 0
    for index in range(gl.program_id(0), groups * token_tiles, gl.num_programs(0)):
        group, token_tile = _output_tile(index, groups, token_tiles, order, TILES_TOGETHER)
        first_panel = (group * 2 + BAND) * PANELS
        # Beyond the last panel, compute it again: those output rows are outside and not stored.
        panel0 = gl.minimum(first_panel, panels - 1)
        sparse = gl.load(sparse_blocks + panel0)
        lead = gl.load(leads + panel0)
        record0 = words + gl.load(starts + panel0).to(gl.int64) * 128
        record1 = record0
        if PANELS == 2:
            record1 = words + gl.load(starts + gl.minimum(first_panel + 1, panels - 1)).to(gl.int64) * 128
        acc0 = gl.zeros([64, TOKENS], gl.float32, accumulator)
        acc1 = acc0
        if lead > 0:
            acc0, acc1, count = _walk_24(
                acc0, acc1, record0, record1, lead, count, x_ring, full, empty, words_24, metadata, PANELS
            )
        if steps > sparse:
            skip = sparse * RECORD_24
            acc0, acc1, count = _walk_dense(
                acc0, acc1, record0 + skip, record1 + skip, steps - sparse, count, x_ring, full, empty, words_dense, PANELS
            )
        if sparse > lead:
            skip = lead * RECORD_24
            acc0, acc1, count = _walk_24(
                acc0, acc1, record0 + skip, record1 + skip, sparse - lead, count, x_ring, full, empty, words_24, metadata, PANELS
            )
        feature = first_panel * 64
        token = token_tile * TOKENS
        tma.store_wait(0)
        gl.thread_barrier()
        _stage_output(y_stages.index(BAND * PANELS), acc0, bias, feature, out_features, HAS_BIAS)
        if PANELS == 2:
            _stage_output(y_stages.index(BAND * PANELS + 1), acc1, bias, feature + 64, out_features, HAS_BIAS)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(y_desc, [token, feature], y_stages.index(BAND * PANELS))
        if PANELS == 2:
            tma.async_copy_shared_to_global(y_desc, [token, feature + 64], y_stages.index(BAND * PANELS + 1))
    tma.store_wait(0)


@gluon.jit
def hopper_linear(
    x_desc, y_desc, words, bias, starts, columns, sparse_blocks, leads, order,
    steps, panels, groups, token_tiles, out_features,
    PANELS: gl.constexpr, STAGES: gl.constexpr, TILES_TOGETHER: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """``y = x @ W^T + bias`` over all output tiles of ``128 * PANELS`` features by as many tokens as ``x_desc``'s block.

    Args:
        x_desc: activations ``[tokens, K]`` in blocks of ``[TOKENS, 64]``.
        y_desc: output ``[tokens, N]`` in blocks of ``[TOKENS, 64]``.
        words, starts, columns, sparse_blocks: the parts of the ``HybridWeight``.
        bias: ``[N]``, or anything if not ``HAS_BIAS``.
        leads: the weight's where ``PANELS`` is its band; its ``sparse_blocks`` where ``PANELS`` is 1 and its band is 2, when
            the two panels of a group are one band and turn together.
        order: int32 ``[groups]``, the groups of ``2 * PANELS`` panels, most expensive first.
        PANELS: panels of a consumer, one or two.
        STAGES: tiles of activations in the ring, at least three.
        TILES_TOGETHER: token tiles that are walked together.
    """
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, 64], x_desc.layout)
    y_stages = gl.allocate_shared_memory(y_desc.dtype, [2 * PANELS, TOKENS, 64], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(empty.index(stage), 2)
    fence_async_shared()
    gl.thread_barrier()
    # Written out, since values of a tuple that has a name are no longer compile-time constants.
    gl.warp_specialize(
        [
            (_consume, (
                y_desc, words, bias, starts, sparse_blocks, leads, order, x_ring, y_stages, full, empty,
                steps, panels, groups, token_tiles, out_features, 0, PANELS, TILES_TOGETHER, HAS_BIAS,
            )),
            (_consume, (
                y_desc, words, bias, starts, sparse_blocks, leads, order, x_ring, y_stages, full, empty,
                steps, panels, groups, token_tiles, out_features, 1, PANELS, TILES_TOGETHER, HAS_BIAS,
            )),
            (_produce, (x_desc, columns, order, x_ring, full, empty, steps, groups, token_tiles, PANELS, TILES_TOGETHER)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def launch(x: Tensor, hybrid: HybridWeight, order: Tensor, bias: Tensor | None, y: Tensor, config: HopperConfig) -> None:
    """Enqueue ``y = x @ W^T + bias`` on the current stream.

    Args:
        x: ``[tokens, K]`` of the weight's dtype, 16-byte aligned rows, at least one token.
        order: int32 ``[groups]`` for ``config.panels``.
        y: ``[tokens, N]``, 16-byte aligned rows.
    """
    groups = len(order)
    token_tiles = triton.cdiv(x.shape[0], config.tokens)
    block = [config.tokens, 64]
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPE[hybrid.dtype])
    turns_together = config.panels < hybrid.band
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    hopper_linear[(min(processors, groups * token_tiles),)](
        TensorDescriptor.from_tensor(x, block, layout),
        TensorDescriptor.from_tensor(y, block, layout),
        hybrid.records,
        y if bias is None else bias,
        hybrid.starts,
        hybrid.columns,
        hybrid.sparse_blocks,
        hybrid.sparse_blocks if turns_together else hybrid.leads,
        order,
        hybrid.steps,
        hybrid.panels,
        groups,
        token_tiles,
        hybrid.shape[0],
        PANELS=config.panels,
        STAGES=config.stages,
        TILES_TOGETHER=config.together,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
