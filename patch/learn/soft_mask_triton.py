"""`patch.learn.soft_mask.sampled_weight` in one pass over memory: a forward and a backward kernel in Triton.

``W * M`` with ``M = t + (1 - t) * m24`` costs, eagerly, some thirty passes over tensors of the weight's size or more.
Here each weight, logit and gradient is read and written once. For a group (four weights of two bytes, six float32
logits) the forward pass moves 24 + 8 bytes in and 8 out, the backward pass 24 + 8 + 8 in and 24 out: 6.3 ms for both
passes over all linears of LLaMA-3.2-1B at 4 TB/s.

Nothing is saved but the inputs. The noise is a function of a key and of where in the weight it falls
(`patch.learn.philox` defines it), so the backward pass draws it again, and whoever recomputes the pass, resumes it, or
runs it on another rank sees the same mask. There are no atomic operations and every sum has a fixed order: results
repeat bit by bit.

A program handles some rows of one tile, so that ``t`` is one number to it. What it adds up, the penalties' two sums and
the gradient of its tile, goes to a slot of its own, and ``torch.sum`` adds the slots.

Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported) runs the kernels on a CPU.
"""
# mypy: disable-error-code=no-untyped-def
# Kernels' arguments are of Triton's types, not of Python's.

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from patch.errors import UserError
from patch.learn.recipe import Temperatures
from patch.learn.soft_mask import Masked, stream_seed
from patch.tiles import GROUP, TileShape, tile_grid

# Groups a program holds at a time: four to each of 128 threads make 16-byte accesses of float32 logits.
_BLOCK = 512
_BLOCK_GROUPS = 128
_THREADS_OF_WARP = 32
# More programs than this keep no more of a GPU busy, and each costs a slot and a drawing of its tile's noise.
_PROGRAMS = 4096
# Tiles of patterns alone: any that fill a block and make long rows.
_PSEUDO_TILE = (32, 512)
# Words of a draw: two of its key, and four numbers.
PACKED = 6
# The interpreter knows no assembly.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _log2_magnitude(x):
    """The base-two logarithm of the magnitude of a normal number; on a GPU one instruction, off by 2**-22 around one.

    Instructions take the magnitude of an operand for free; a negation outside would be one more.
    """
    if _INTERPRETED:
        return tl.log2(tl.abs(x))
    else:
        assembly: tl.constexpr = "{ .reg .f32 x; abs.f32 x, $1; lg2.approx.ftz.f32 $0, x; }"
        return tl.inline_asm_elementwise(assembly, "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _philox(key, counter, STREAM: tl.constexpr):
    """`patch.learn.philox.words` of the counter ``(counter, STREAM, 0, 0)``.

    Triton's own asks for the high and the low half of each product apart, which costs twice the multiplications.
    """
    c0 = counter.to(tl.uint32)
    c1, c2, c3 = tl.full((), STREAM, tl.uint32), tl.full((), 0, tl.uint32), tl.full((), 0, tl.uint32)
    k0, k1 = key.to(tl.uint32), (key.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        left, right = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (right >> 32).to(tl.uint32) ^ c1 ^ k0, right.to(tl.uint32)
        c2, c3 = (left >> 32).to(tl.uint32) ^ c3 ^ k1, left.to(tl.uint32)
        k0, k1 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False), tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _uniform(bits):
    """Bits 2 to 22 as a float32 in (0, 1), an odd multiple of 2**-22, and one less it; both exact."""
    lifted = ((bits & 0x7FFFFC) | 0x3F800002).to(tl.float32, bitcast=True)
    return lifted - 1.0, 2.0 - lifted


@triton.jit
def _exponential(bits):
    """The base-two logarithm of a standard exponential variable, -log(1 - u), short of a constant.

    Gumbel noise is its negative; softmax ignores the constant.
    """
    u, rest = _uniform(bits)
    # The instruction is exact to 2**-22, not to a share of its result, which is small where u is: a series there.
    series = u * (1.44269504 + u * (0.72134752 + u * 0.48089835))
    return _log2_magnitude(tl.where(u < 0.015625, series, _log2_magnitude(rest)))


@triton.jit
def _packed(draw):
    """What `pack` wrote: the key; factors of logits and 1 / tau, of patterns (the factor over log(2)) and of tiles."""
    low, high = tl.load(draw).to(tl.uint32, bitcast=True), tl.load(draw + 1).to(tl.uint32, bitcast=True)
    key = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    pattern_scale = tl.load(draw + 2).to(tl.float32, bitcast=True)
    return (
        key,
        pattern_scale,
        tl.load(draw + 3).to(tl.float32, bitcast=True),
        tl.load(draw + 4).to(tl.float32, bitcast=True),
        tl.load(draw + 5).to(tl.float32, bitcast=True),
    )


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _logits(patterns, plane, index, inside):
    """One logit of each plane; loaded ahead of everything that waits, so that one wait serves for all."""
    patterns += index
    return (
        tl.load(patterns, inside, 0.0),
        tl.load(patterns + plane, inside, 0.0),
        tl.load(patterns + 2 * plane, inside, 0.0),
        tl.load(patterns + 3 * plane, inside, 0.0),
        tl.load(patterns + 4 * plane, inside, 0.0),
        tl.load(patterns + 5 * plane, inside, 0.0),
    )


@triton.jit
def _beside(index, logit):
    """``index``, held by the threads that hold ``logit``: or else the noise moves between threads, not the index."""
    if _INTERPRETED:
        return index
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,f", [index, logit], tl.int32, True, 1)


@triton.jit
def _powers(logits, place, key, scale, inverse_tau):
    """The six patterns' shares of each group, not normalised: two to the exponent less the largest exponent.

    Args:
        place: of the group in the whole weight, which names its noise.
    """
    l0, l1, l2, l3, l4, l5 = logits
    r0, r1, r2, r3 = _philox(key, _beside(place, l0.to(tl.float32)), 0)
    x0 = scale * l0.to(tl.float32) - _exponential(r0 >> 9)
    x1 = scale * l1.to(tl.float32) - _exponential(r1 >> 9)
    x2 = scale * l2.to(tl.float32) - _exponential(r2 >> 9)
    x3 = scale * l3.to(tl.float32) - _exponential(r3 >> 9)
    # The planes above have left the low eleven bits of each word.
    x4 = scale * l4.to(tl.float32) - _exponential(((r0 << 10) ^ r1) << 2)
    x5 = scale * l5.to(tl.float32) - _exponential(((r2 << 10) ^ r3) << 2)
    largest = inverse_tau * _larger(_larger(_larger(x0, x1), _larger(x2, x3)), _larger(x4, x5))
    s0, s1, s2 = _power(x0, largest, inverse_tau), _power(x1, largest, inverse_tau), _power(x2, largest, inverse_tau)
    s3, s4, s5 = _power(x3, largest, inverse_tau), _power(x4, largest, inverse_tau), _power(x5, largest, inverse_tau)
    return s0, s1, s2, s3, s4, s5


@triton.jit
def _power(x, largest, inverse_tau):
    return tl.exp2(inverse_tau * x - largest)


@triton.jit
def _fixed(patterns):
    """What fixed patterns keep of each element, 0.0 or 1.0: bit ``4 * pattern + element`` of the constant."""
    kept = 0xCA6953 >> (4 * patterns.to(tl.int32))
    return (
        (kept & 1).to(tl.float32),
        ((kept >> 1) & 1).to(tl.float32),
        ((kept >> 2) & 1).to(tl.float32),
        ((kept >> 3) & 1).to(tl.float32),
    )


@triton.jit
def _soft_tile(tiles, tile, place, key, scale, inverse_tau):
    """``t`` and ``1 - t`` of one tile, both to full precision however near to zero; ``place``: in the whole weight."""
    bits, _, _, _ = _philox(key, place, 1)
    u, rest = _uniform(bits >> 9)
    noise = 0.69314718 * (_log2_magnitude(u) - _log2_magnitude(rest))
    logit = tl.load(tiles + tile).to(tl.float32)
    exponent = 1.44269504 * inverse_tau * (scale * logit + noise)
    power = tl.exp2(-tl.abs(exponent))
    large, small = 1.0 / (1.0 + power), power / (1.0 + power)
    return tl.where(exponent > 0, large, small), tl.where(exponent > 0, small, large)


@triton.jit
def _tile_size(rows, groups, first_row, first_group, TILE_ROWS: tl.constexpr, TILE_GROUPS: tl.constexpr):
    """Elements of a tile; fewer at a ragged edge."""
    height, width = tl.minimum(rows - first_row, TILE_ROWS), tl.minimum(groups - first_group, TILE_GROUPS)
    return (4 * height * width).to(tl.float32)


@triton.jit
def _place(
    rows, groups, first_row, first_group, block,
    TILE_ROWS: tl.constexpr, TILE_GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Where the groups and where the elements of a tile's block lie, and which of them are in the tile."""
    ACROSS: tl.constexpr = (TILE_GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS
    row = block // ACROSS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = block % ACROSS * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    column = block % ACROSS * (4 * BLOCK_GROUPS) + tl.arange(0, 4 * BLOCK_GROUPS)
    # Two comparisons each, not one with the smaller bound, whose divisibility the compiler could not see.
    row_inside = ((row < TILE_ROWS) & (first_row + row < rows))[:, None]
    inside = row_inside & ((group < TILE_GROUPS) & (first_group + group < groups))[None, :]
    element_inside = row_inside & ((column < 4 * TILE_GROUPS) & (4 * first_group + column < 4 * groups))[None, :]
    start = ((first_row + row) * groups + first_group)[:, None]
    return start + group[None, :], inside, 4 * start + column[None, :], element_inside


@triton.jit
def _load_groups(weight, index, inside, element, element_inside, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The first, second, third and fourth element of each group, in float32."""
    dtype: tl.constexpr = weight.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        # A group is one word: what a thread loads of it is what it needs, and no thread has to pass elements on.
        word = tl.load(weight.to(tl.pointer_type(tl.int64)) + index, inside, 0)
        return (
            word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32),
            (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),
            (word >> 32).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),
            (word >> 48).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),
        )
    else:
        values = tl.load(weight + element, element_inside, 0.0)
        even, odd = tl.split(values.reshape(ROWS, GROUPS, 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first.to(tl.float32), second.to(tl.float32), third.to(tl.float32), fourth.to(tl.float32)


@triton.jit
def _word(value, dtype: tl.constexpr):
    return value.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint64)


@triton.jit
def _store_groups(masked, first, second, third, fourth, index, inside, element, element_inside):
    """The inverse of `_load_groups`."""
    dtype: tl.constexpr = masked.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        word = _word(first, dtype) | (_word(second, dtype) << 16) | (_word(third, dtype) << 32)
        word |= _word(fourth, dtype) << 48
        tl.store(masked.to(tl.pointer_type(tl.uint64)) + index, word, inside)
    else:
        even, odd = tl.join(first.to(dtype), third.to(dtype)), tl.join(second.to(dtype), fourth.to(dtype))
        tl.store(masked + element, tl.join(even, odd).reshape(element.shape), element_inside)


# The draw of each weight has an address of its own; a kernel for each alignment would be compiled.
@triton.jit(do_not_specialize=["draw"])
def _forward(
    weight, patterns, tiles, masked, sums,
    rows, groups, first_group_of_all, first_tile_of_all, draw,
    FIXED: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """``weight * mask``, and in ``sums[:, program]`` the kept elements (a tile's are its first program's) and squares.

    Args:
        weight, masked: ``[rows, 4 * groups]``.
        patterns: logits ``[6, rows, groups]``, or uint8 ``[rows, groups]`` if FIXED.
        tiles: logits, or None.
        sums: float32 ``[2, tiles * CHUNKS]``.
        first_group_of_all, first_tile_of_all: where in the whole weight these rows begin.
        draw: a row of `pack`.
        STEPS: blocks of a program.
        CHUNKS: programs of a tile.
    """
    program = tl.program_id(0)
    tile, chunk = program // CHUNKS, program % CHUNKS
    tiles_across = tl.cdiv(groups, TILE_GROUPS)
    first_row, first_group = tile // tiles_across * TILE_ROWS, tile % tiles_across * TILE_GROUPS
    plane = tl.cast(rows * groups, tl.int64)
    key, pattern_scale, inverse_tau, tile_scale, inverse_tile_tau = _packed(draw)
    t, rest = 0.0, 1.0
    if tiles is not None:
        t, rest = _soft_tile(tiles, tile, first_tile_of_all + tile, key, tile_scale, inverse_tile_tau)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_GROUPS), tl.float32)
    for step in range(STEPS):
        index, inside, element, element_inside = _place(
            rows, groups, first_row, first_group, chunk * STEPS + step, TILE_ROWS, TILE_GROUPS, BLOCK_ROWS, BLOCK_GROUPS
        )  # fmt: skip
        if FIXED:
            fixed = tl.load(patterns + index, inside, 0)
        else:
            logits = _logits(patterns, plane, index, inside)
        w0, w1, w2, w3 = _load_groups(weight, index, inside, element, element_inside, BLOCK_ROWS, BLOCK_GROUPS)
        if FIXED:
            m0, m1, m2, m3 = _fixed(fixed)
            share = rest
        else:
            s0, s1, s2, s3, s4, s5 = _powers(logits, first_group_of_all + index, key, pattern_scale, inverse_tau)
            m0, m1, m2, m3 = s0 + s1 + s2, s0 + s3 + s4, s1 + s3 + s5, s2 + s4 + s5
            # A group's mask sums to two.
            share = rest * 2.0 / ((m0 + m1) + (m2 + m3))
        p0, p1, p2, p3 = w0 * (t + share * m0), w1 * (t + share * m1), w2 * (t + share * m2), w3 * (t + share * m3)
        squares += (p0 * p0 + p1 * p1) + (p2 * p2 + p3 * p3)
        _store_groups(masked, p0, p1, p2, p3, index, inside, element, element_inside)
    size = _tile_size(rows, groups, first_row, first_group, TILE_ROWS, TILE_GROUPS)
    tl.store(sums + program, tl.where(chunk == 0, size * (0.5 + 0.5 * t), 0.0))
    tl.store(sums + tl.num_programs(0) + program, tl.sum(squares))


# Autograd hands over the two scalars at any address; a kernel for each alignment would be compiled.
@triton.jit(do_not_specialize=["draw", "grad_kept", "grad_squares"])
def _backward(
    weight, patterns, tiles, grad_masked, grad_kept, grad_squares, grad_patterns, grad_tiles,
    rows, groups, first_group_of_all, first_tile_of_all, draw,
    FIXED: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The gradients of `_forward`.

    Args:
        grad_masked: like ``weight``.
        grad_kept, grad_squares: float32 scalars.
        grad_patterns: like the logits; None if FIXED.
        grad_tiles: each program's share of its tile's, float32 ``[tiles * CHUNKS]``; None without tiles.
        others: as in `_forward`.
    """
    program = tl.program_id(0)
    tile, chunk = program // CHUNKS, program % CHUNKS
    tiles_across = tl.cdiv(groups, TILE_GROUPS)
    first_row, first_group = tile // tiles_across * TILE_ROWS, tile % tiles_across * TILE_GROUPS
    plane = tl.cast(rows * groups, tl.int64)
    key, pattern_scale, inverse_tau, tile_scale, inverse_tile_tau = _packed(draw)
    t, rest = 0.0, 1.0
    if tiles is not None:
        t, rest = _soft_tile(tiles, tile, first_tile_of_all + tile, key, tile_scale, inverse_tile_tau)
    twice = 2 * tl.load(grad_squares)
    grad_t = tl.zeros((BLOCK_ROWS, BLOCK_GROUPS), tl.float32)
    for step in range(STEPS):
        index, inside, element, element_inside = _place(
            rows, groups, first_row, first_group, chunk * STEPS + step, TILE_ROWS, TILE_GROUPS, BLOCK_ROWS, BLOCK_GROUPS
        )  # fmt: skip
        if FIXED:
            fixed = tl.load(patterns + index, inside, 0)
        else:
            logits = _logits(patterns, plane, index, inside)
        w0, w1, w2, w3 = _load_groups(weight, index, inside, element, element_inside, BLOCK_ROWS, BLOCK_GROUPS)
        g0, g1, g2, g3 = _load_groups(grad_masked, index, inside, element, element_inside, BLOCK_ROWS, BLOCK_GROUPS)
        if FIXED:
            m0, m1, m2, m3 = _fixed(fixed)
        else:
            s0, s1, s2, s3, s4, s5 = _powers(logits, first_group_of_all + index, key, pattern_scale, inverse_tau)
            m0, m1, m2, m3 = s0 + s1 + s2, s0 + s3 + s4, s1 + s3 + s5, s2 + s4 + s5
            norm = 2.0 / ((m0 + m1) + (m2 + m3))
            m0, m1, m2, m3 = m0 * norm, m1 * norm, m2 * norm, m3 * norm
        # From here on the gradients of the mask: through the product, and through its square.
        g0, g1 = w0 * (g0 + twice * w0 * (t + rest * m0)), w1 * (g1 + twice * w1 * (t + rest * m1))
        g2, g3 = w2 * (g2 + twice * w2 * (t + rest * m2)), w3 * (g3 + twice * w3 * (t + rest * m3))
        mean = (g0 * m0 + g1 * m1) + (g2 * m2 + g3 * m3)
        grad_t += (g0 + g1) + (g2 + g3) - mean
        if not FIXED:
            # The softmax's gradient is s * (h - sum of s * h), h being the sum over a pattern's two elements.
            factor = 0.69314718 * pattern_scale * inverse_tau * rest * norm
            grad_patterns_here = grad_patterns + index
            _store(grad_patterns_here, inside, s0, factor * (g0 + g1 - mean))
            _store(grad_patterns_here + plane, inside, s1, factor * (g0 + g2 - mean))
            _store(grad_patterns_here + 2 * plane, inside, s2, factor * (g0 + g3 - mean))
            _store(grad_patterns_here + 3 * plane, inside, s3, factor * (g1 + g2 - mean))
            _store(grad_patterns_here + 4 * plane, inside, s4, factor * (g1 + g3 - mean))
            _store(grad_patterns_here + 5 * plane, inside, s5, factor * (g2 + g3 - mean))
    if tiles is not None:
        size = _tile_size(rows, groups, first_row, first_group, TILE_ROWS, TILE_GROUPS)
        through_kept = tl.where(chunk == 0, 0.5 * size * tl.load(grad_kept), 0.0)
        through_logit = tile_scale * inverse_tile_tau * t * rest
        tl.store(grad_tiles + program, through_logit * (tl.sum(grad_t) + through_kept))


@triton.jit
def _store(pointers, inside, power, slope):
    """Store a logit's gradient: none where `soft_mask.soft_patterns` holds the share at its floor of 2**-29.

    Adam would make much of what little there is. The share itself is left alone: it changes nothing on a GPU.
    """
    gradient = tl.where(power > 1.8626452e-09, power, 0.0) * slope
    tl.store(pointers, gradient.to(pointers.dtype.element_ty), inside)


@dataclass(frozen=True)
class _Blocks:
    """How programs divide a weight.

    Attributes:
        tile: rows and groups of a tile.
        block: rows and groups that a program holds at a time; powers of two.
        steps: blocks of a program.
        chunks: programs of a tile.
        programs: of the weight.
    """

    tile: tuple[int, int]
    block: tuple[int, int]
    steps: int
    chunks: int
    programs: int

    def constants(self) -> dict[str, int]:
        """The kernels' compile-time arguments."""
        return {
            "TILE_ROWS": self.tile[0],
            "TILE_GROUPS": self.tile[1],
            "BLOCK_ROWS": self.block[0],
            "BLOCK_GROUPS": self.block[1],
            "STEPS": self.steps,
            "CHUNKS": self.chunks,
            "num_warps": max(1, self.block[0] * self.block[1] // 4 // _THREADS_OF_WARP),
        }


@functools.cache
def _blocks(shape: tuple[int, int], tile: TileShape) -> _Blocks:
    """Depends on the shapes alone, so that sums are the same on every GPU."""
    tile_rows, tile_groups = tile[0], tile[1] // GROUP
    block_groups = min(triton.next_power_of_2(tile_groups), _BLOCK_GROUPS)
    block_rows = min(triton.next_power_of_2(tile_rows), _BLOCK // block_groups)
    blocks = -(-tile_rows // block_rows) * -(-tile_groups // block_groups)
    tiles = math.prod(tile_grid(shape, tile))
    steps = max(1, min(blocks, tiles * blocks // _PROGRAMS))
    chunks = -(-blocks // steps)
    return _Blocks((tile_rows, tile_groups), (block_rows, block_groups), steps, chunks, tiles * chunks)


@dataclass(frozen=True)
class _Draw:
    """What the kernels take besides tensors."""

    blocks: _Blocks
    packed: Tensor
    first_group: int
    first_tile: int

    def arguments(self, weight: Tensor) -> tuple[int, int, int, int, Tensor]:
        return weight.shape[0], weight.shape[1] // GROUP, self.first_group, self.first_tile, self.packed


def pack(temperatures: Temperatures, streams: Sequence[Sequence[int]]) -> Tensor:
    """Draws as the kernels read them from memory, int32 ``[draws, PACKED]`` on the CPU.

    In memory, and not among a kernel's arguments, they can change from one replay of a CUDA graph to the next.
    """
    scales = [temperatures.pattern_scale / math.log(2), 1 / temperatures.tau]
    scales += [temperatures.tile_scale, 1 / temperatures.of_tiles]
    packed = torch.empty((len(streams), PACKED), dtype=torch.int32)
    keys = torch.tensor([stream_seed("masks", *stream) for stream in streams], dtype=torch.int64)
    packed[:, :2] = keys.view(torch.int32).view(-1, 2)
    packed[:, 2:] = torch.tensor(scales, dtype=torch.float32).view(torch.int32)
    return packed


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, patterns: Tensor, tiles: Tensor | None, draw: _Draw
    ) -> tuple[Tensor, Tensor, Tensor]:
        masked = torch.empty_like(weight)
        sums = torch.empty((2, draw.blocks.programs), device=weight.device)
        fixed = not patterns.is_floating_point()
        # Triton launches on the current device.
        with torch.cuda.device_of(weight):
            _forward[(draw.blocks.programs,)](
                weight,
                patterns,
                tiles,
                masked,
                sums,
                *draw.arguments(weight),
                FIXED=fixed,
                **draw.blocks.constants(),
            )
        ctx.save_for_backward(weight, patterns, tiles)
        ctx.draw = draw
        totals = sums.sum(1)
        return masked, totals[0], totals[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_masked: Tensor, grad_kept: Tensor, grad_squares: Tensor) -> tuple[Tensor | None, ...]:
        weight, patterns, tiles = ctx.saved_tensors
        draw: _Draw = ctx.draw
        fixed = not patterns.is_floating_point()
        grad_patterns = None if fixed else torch.empty_like(patterns)
        grad_tiles = None if tiles is None else torch.empty(draw.blocks.programs, device=weight.device)
        with torch.cuda.device_of(weight):
            _backward[(draw.blocks.programs,)](
                weight,
                patterns,
                tiles,
                grad_masked.contiguous(),
                grad_kept,
                grad_squares,
                grad_patterns,
                grad_tiles,
                *draw.arguments(weight),
                FIXED=fixed,
                **draw.blocks.constants(),
            )
        if grad_tiles is not None:
            grad_tiles = grad_tiles.view(*tiles.shape, draw.blocks.chunks).sum(-1).to(tiles.dtype)
        return None, grad_patterns, grad_tiles, None


def sampled_weight(
    weight: Tensor,
    patterns: Tensor,
    tiles: Tensor | None,
    tile: TileShape,
    temperatures: Temperatures,
    stream: Sequence[int],
    *,
    first_row: int = 0,
    rows: int | None = None,
    packed: Tensor | None = None,
) -> Masked:
    """`patch.learn.soft_mask.masked_weight` with the noise that `patch.learn.philox` defines, computed in float32.

    Args:
        weight: ``[N, K]``, floating, on a GPU (in the interpreter on the CPU); gets no gradient.
        patterns: logits ``[6, N, K/4]``, float32 or bfloat16, or fixed patterns, uint8 ``[N, K/4]``.
        tiles: logits ``[R, C]``, float32 or bfloat16; None for ``t = 0``.
        tile: ``(rows, cols)``.
        temperatures: temperature and scales.
        stream: names the noise; its key is ``stream_seed("masks", *stream)``.
        first_row: where in the whole weight these rows begin; they get the noise that they get there.
        rows: of the whole weight; None if this is all of it.
        packed: the row of `pack` that says the same as temperatures and stream, on the device of the weight;
            made, if None.

    Raises:
        UserError: if the whole weight has 2**31 elements or more.
    """
    shape = weight.shape[0], weight.shape[1]
    if (rows or shape[0]) * shape[1] >= 2**31:
        raise UserError(f"weight {rows or shape[0]}x{shape[1]}: the fused soft mask reaches 2**31 elements, give fewer")
    if tiles is None:
        tile, first_tile = (min(shape[0], _PSEUDO_TILE[0]), min(shape[1], _PSEUDO_TILE[1])), 0
    else:
        first_tile = first_row // tile[0] * tiles.shape[1]
        # The last rows of a weight may be fewer than a tile has.
        tile = min(shape[0], tile[0]), tile[1]
    first_group = first_row * shape[1] // GROUP
    if packed is None:
        packed = pack(temperatures, [stream])[0].to(weight.device)
    draw = _Draw(_blocks(shape, tile), packed, first_group, first_tile)
    arguments = weight.detach().contiguous(), patterns.contiguous(), None if tiles is None else tiles.contiguous()
    return Masked(*_MaskedWeight.apply(*arguments, draw))
