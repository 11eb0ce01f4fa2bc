"""What a kernel author writes to reach sparse tensor cores from Gluon.

A *fragment* is the A operand of one instruction in registers: an int32 tensor ``[4 warps, 32 lanes, 4 registers]``,
each word two 16-bit or four 8-bit values, loaded from the fragment order of ``stoicc.format``. ``x`` is a tile of
activations in shared memory, ``[tokens, 64]`` of 16 bits or ``[tokens, 128]`` of 8, K-major with 128-byte swizzle.

    acc = dot_24(values, metadata, x, acc, start=0, selector=0)     wgmma, 2:4, 32 columns of K       sm_90a
    acc = dot_dense(values, x, acc, start=0)                        wgmma, dense, 16 columns of K     sm_90a
    acc = mma_24(a, b, metadata, acc, selector=0)                   mma.sp, 2:4, 32 columns           sm_80 and newer
    acc = mma_dense(a, b, acc)                                      mma, dense, 16 columns            sm_80 and newer

Of 8 bits each takes twice the columns; ``float8e4nv`` needs sm_89, and on Hopper ``mma`` widens it to half precision.
Values of 4 bits become fragments of 16 by ``widen``.

The first two only mark a dense instruction; they need ``stoicc.lowering`` active while the kernel is compiled.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from stoicc.format import LAYOUTS
from stoicc.lowering import VERSION

FRAGMENT = gl.constexpr(gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0]))

GLUON_DTYPE = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.int8: gl.int8,
}

# Words of a dense record, and where the metadata of a 2:4 one starts; of 16 and of 8 bits.
RECORD_DENSE = gl.constexpr(LAYOUTS[16].dense * LAYOUTS[16].unit)
METADATA = gl.constexpr(LAYOUTS[16].metadata)

_CONSTRAINTS_24 = gl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r,r,r")
_CONSTRAINTS_DENSE = gl.constexpr("=r,=r,=r,=r,r,r,r,r")
_MARK_24 = gl.constexpr(f"stoicc.{VERSION} sparse $4 $5 $6 $7 $8 ")
_MARK_REMOTE = gl.constexpr(f"stoicc.{VERSION} remote $1")
_MARK_DENSE = gl.constexpr(f"stoicc.{VERSION} dense $4 $5 $6 $7")


@gluon.constexpr_function
def unit_words(bits):
    """Words of a unit of records of values of so many bits."""
    return LAYOUTS[bits].unit


@gluon.constexpr_function
def words_24(bits):
    """Words of a 2:4 record of values of so many bits."""
    return LAYOUTS[bits].sparse * LAYOUTS[bits].unit


@gluon.constexpr_function
def words_dense(bits):
    """Words of a dense record."""
    return LAYOUTS[bits].dense * LAYOUTS[bits].unit


@gluon.constexpr_function
def words_values(bits, two_four):
    """Words of a record's values, after which comes what else it has."""
    return LAYOUTS[bits].metadata * (1 if two_four else 2)


@gluon.constexpr_function
def record_24(dtype):
    """Words of a 2:4 record of values of ``dtype``."""
    return words_24(dtype.primitive_bitwidth)


@gluon.jit
def dot_24(values, metadata, x, acc, start: gl.constexpr, selector: gl.constexpr, stand_in=None):
    """``acc + W @ x[:, start : start + 32]^T`` for 64 rows of a 2:4 weight, asynchronous; of 8 bits 64 columns.

    Args:
        values: int32 ``[4, 32, 4]`` in ``FRAGMENT`` layout, the kept values of one k-step; of 128 rows eight warps.
        metadata: int32 ``[4, 32, 1]`` in the same layout, the record's metadata words.
        x: shared memory of at least 64 tokens: ``[tokens, 64]`` of 16 bits, ``[tokens, 128]`` of 8.
        acc: float32 ``[64, tokens]``, of int8 int32.
        start: the first column of ``x``, 0 or half of them.
        selector: which lanes' metadata words belong to this k-step, 0 or 1; of 8 bits 0.
        stand_in: any shared memory of as many rows as ``acc`` and the kind of ``x``, where that has fewer.
    """
    mark: gl.constexpr = _MARK_24 + ("1" if selector else "0")
    words = metadata.broadcast_to(values.shape)
    gl.inline_asm_elementwise(mark, _CONSTRAINTS_24, [values, words], gl.int32, False, 4)
    return warpgroup_mma(_placeholder(x, stand_in), _columns(x, start), acc, is_async=True)


@gluon.jit
def dot_dense(values, x, acc, start: gl.constexpr, stand_in=None):
    """``acc + W @ x[:, start : start + 16]^T`` for 64 rows of a dense weight, asynchronous; of 8 bits 32 columns."""
    gl.inline_asm_elementwise(_MARK_DENSE, _CONSTRAINTS_DENSE, [values], gl.int32, False, 4)
    return warpgroup_mma(_placeholder(x, stand_in), _columns(x, start), acc, is_async=True)


@gluon.jit
def _columns(x, start: gl.constexpr):
    return x.slice(start, x.shape[1] // 4, 1).permute((1, 0))


@gluon.jit
def _placeholder(x, stand_in):
    # Any operand of 64 rows: the lowering replaces it by the registers of the mark.
    operand = x.slice(0, 64, 0) if stand_in is None else stand_in
    return operand.slice(0, x.shape[1] // 4, 1)


@gluon.constexpr_function
def _cluster_barrier(size, threads):
    return (
        f"stoicc.{VERSION} cluster {size} {threads}\n"
        "fence.mbarrier_init.release.cluster;\n"
        "barrier.cluster.arrive.release;\n"
        "barrier.cluster.wait.acquire;\n"
        "mov.b32 $0, 0;"
    )


@gluon.constexpr_function
def _quiet_mark(threads):
    return f"stoicc.{VERSION} quiet {threads}\nmov.b32 $0, 0;"


@gluon.constexpr_function
def _multicast(mask):
    return f"stoicc.{VERSION} multicast {mask}"


@gluon.jit
def cluster_barrier(SIZE: gl.constexpr, THREADS: gl.constexpr):
    """Make the kernel one of clusters of ``SIZE`` blocks, and wait here for all of them.

    What they have written and the barriers they have set up can then be seen by each other. To be called once, by the
    ``THREADS`` threads of the default partition.
    """
    gl.inline_asm_elementwise(_cluster_barrier(SIZE, THREADS), "=r", [], gl.int32, False, 1)


@gluon.jit
def quiet(THREADS: gl.constexpr):
    """In partitions of ``THREADS`` threads, warps wait at ``mbarrier``s and arrive at them each for itself.

    So as many must arrive as there are warps. For partitions whose warps share no memory but by bulk copies, ``wgmma``
    and barriers of their own.
    """
    gl.inline_asm_elementwise(_quiet_mark(THREADS), "=r", [], gl.int32, False, 1)


@gluon.jit
def wait_for_previous():
    """Go on when the kernel before on the stream is done and what it wrote can be seen.

    For kernels that are launched with ``launch_pdl``, which begin before that. Hopper and newer.
    """
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r,~{memory}", [], gl.int32, False, 1)


@gluon.jit
def let_next_begin():
    """The next kernel on the stream may begin, once every block of this one has said so or ended.

    It begins early only if it was launched with ``launch_pdl``, and must wait itself for what this kernel writes.
    Hopper and newer.
    """
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def multicast_next(MASK: gl.constexpr):
    """The bulk copy that follows lands in the shared memory of every block of the cluster whose bit is set."""
    gl.inline_asm_elementwise(_multicast(MASK), "=r", [], gl.int32, False, 1)


@gluon.jit
def remote_next(rank):
    """The ``mbarrier.arrive`` that follows is at the same barrier of the cluster's block ``rank``."""
    gl.inline_asm_elementwise(_MARK_REMOTE, "=r,r", [rank], gl.int32, False, 1)


@gluon.constexpr_function
def _operands(inputs, dtype):
    kind = "r" if dtype == gl.int8 else "f"
    return ",".join([f"={kind}"] * 4 + ["r"] * inputs + [kind] * 4)


@gluon.constexpr_function
def _types(dtype):
    name = {gl.bfloat16: "bf16", gl.float16: "f16", gl.float8e4nv: "e4m3", gl.int8: "s8"}[dtype]
    accumulator = "s32" if dtype == gl.int8 else "f32"
    return f"row.col.{accumulator}.{name}.{name}.{accumulator}"


@gluon.constexpr_function
def _instruction_24(dtype, selector):
    depth = 512 // dtype.primitive_bitwidth
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k{depth}.{_types(dtype)} "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$16,$17,$18,$19}}, $12, {selector};"
    )


@gluon.constexpr_function
def _instruction_dense(dtype, half):
    depth = 256 // dtype.primitive_bitwidth
    x = "$10,$11" if half else "$8,$9"
    return (
        f"mma.sync.aligned.m16n8k{depth}.{_types(dtype)} "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{{x}}}, {{$12,$13,$14,$15}};"
    )


@gluon.constexpr_function
def accumulator(dtype):
    """What products of values of ``dtype`` are added up in."""
    return gl.int32 if dtype == gl.int8 else gl.float32


@gluon.jit
def mma_24(values, x, metadata, acc, selector: gl.constexpr, dtype: gl.constexpr):
    """``acc + W @ x^T`` for 16 x 32 elements of a 2:4 weight against 8 tokens, by one warp; of 8 bits 16 x 64.

    All tensors are broadcast against each other over their leading dimensions; the last two are 32 lanes and the four
    registers of one instruction, which must lie in one thread.

    Args:
        values: int32, the kept values of one k-step in fragment order.
        x: int32; register ``r`` of lane ``4q + p`` holds bytes ``16r + 4p`` to ``+ 3`` of token ``q``.
        metadata: int32, the record's metadata words.
        acc: float32, of int8 int32; lane ``4q + p`` holds rows ``q`` (two registers) and ``q + 8``, tokens ``2p`` and
            ``2p + 1``.
        selector: 0 or 1, the k-step of the record; of 8 bits 0.
        dtype: what the words hold: ``gl.bfloat16``, ``gl.float16``, ``gl.float8e4nv`` or ``gl.int8``.
    """
    return gl.inline_asm_elementwise(
        _instruction_24(dtype, selector), _operands(12, dtype), [values, x, metadata, acc], acc.dtype, True, 4
    )


@gluon.jit
def mma_dense(values, x, acc, half: gl.constexpr, dtype: gl.constexpr):
    """The same for half the columns of a dense weight, against registers ``2 * half`` and ``2 * half + 1`` of ``x``."""
    return gl.inline_asm_elementwise(
        _instruction_dense(dtype, half), _operands(8, dtype), [values, x, acc], acc.dtype, True, 4
    )


@gluon.constexpr_function
def _widening(dtype):
    # In the mantissa, where the last bit counts one, a nibble less its sign bit's place is added to a power of two and
    # eight; taken away again, what is left is the integer, exactly.
    kind, magic, one = {gl.bfloat16: ("bf16x2", 0x4308, 0x3F80), gl.float16: ("f16x2", 0x6408, 0x3C00)}[dtype]
    both = 0x10001
    lines = [".reg .b32 shifted, biased, one, bias;", f"mov.b32 one, {hex(one * both)};"]
    lines.append(f"mov.b32 bias, {hex((magic | 0x8000) * both)};")
    for step in range(4):
        for register in range(4):
            word = f"${16 + step}"
            if register:
                lines.append(f"shr.u32 shifted, {word}, {4 * register};")
                word = "shifted"
            lines.append(f"lop3.b32 biased, {word}, 0x000f000f, {hex(magic * both)}, 0x6a;")
            lines.append(f"fma.rn.{kind} ${4 * step + register}, biased, one, bias;")
    return "{ " + " ".join(lines) + " }"


_WIDENED = gl.constexpr(",".join(["=r"] * 16 + ["r"] * 4))


@gluon.jit
def widen(words, dtype: gl.constexpr):
    """The fragments of four k-steps, four int32 tensors like ``words``, each two values of 16 bits a word.

    Args:
        words: int32, values of 4 bits in fragment order; the last dimension is a word for each k-step.
        dtype: of the values that they become, ``gl.bfloat16`` or ``gl.float16``.
    """
    return gl.inline_asm_elementwise(
        _widening(dtype), _WIDENED, [words], (gl.int32, gl.int32, gl.int32, gl.int32), True, 4
    )


@gluon.jit
def scaled_by(part, words, register):
    """``part``, float32 sums of one group of inputs, times the scales of their rows.

    Args:
        words: int32, the record's words of scales.
        register: int32, the index along the last dimension of ``part``: rows ``q`` twice, then ``q + 8``.
    """
    scales = gl.where(register < 2, words << 16, words & -65536)
    return part * scales.to(gl.float32, bitcast=True)
