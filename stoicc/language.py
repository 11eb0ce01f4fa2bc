"""What a kernel author writes to reach sparse tensor cores from Gluon.

A *fragment* is the A operand of one instruction in registers: an int32 tensor ``[4 warps, 32 lanes, 4 registers]``,
each word two 16-bit values, loaded from the fragment order of ``stoicc.format``. ``x`` is a ``[tokens, 64]`` tile of
activations in shared memory, K-major with 128-byte swizzle.

    acc = dot_24(values, metadata, x, acc, start=0, selector=0)     wgmma, 2:4, 32 columns of K       sm_90a
    acc = dot_dense(values, x, acc, start=0)                        wgmma, dense, 16 columns of K     sm_90a
    acc = mma_24(a, b, metadata, acc, selector=0)                   mma.sp, 2:4, 32 columns           sm_80 and newer
    acc = mma_dense(a, b, acc)                                      mma, dense, 16 columns            sm_80 and newer

The first two only mark a dense instruction; they need ``stoicc.lowering`` active while the kernel is compiled.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from stoicc.format import DENSE_UNITS, SPARSE_UNITS, SPARSE_VALUE_UNITS, UNIT_WORDS
from stoicc.lowering import VERSION

FRAGMENT = gl.constexpr(gl.BlockedLayout([1, 1, 4], [1, 32, 1], [4, 1, 1], [2, 1, 0]))

# Words of a record, and where its metadata starts.
RECORD_24 = gl.constexpr(SPARSE_UNITS * UNIT_WORDS)
RECORD_DENSE = gl.constexpr(DENSE_UNITS * UNIT_WORDS)
METADATA = gl.constexpr(SPARSE_VALUE_UNITS * UNIT_WORDS)

_CONSTRAINTS_24 = gl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r,r,r")
_CONSTRAINTS_DENSE = gl.constexpr("=r,=r,=r,=r,r,r,r,r")
_MARK_24 = gl.constexpr(f"stoicc.{VERSION} sparse $4 $5 $6 $7 $8 ")
_MARK_REMOTE = gl.constexpr(f"stoicc.{VERSION} remote $1")
_MARK_DENSE = gl.constexpr(f"stoicc.{VERSION} dense $4 $5 $6 $7")


@gluon.jit
def dot_24(values, metadata, x, acc, start: gl.constexpr, selector: gl.constexpr):
    """``acc + W @ x[:, start : start + 32]^T`` for 64 rows of a 2:4 weight, asynchronous.

    Args:
        values: int32 ``[4, 32, 4]`` in ``FRAGMENT`` layout, the kept values of one k-step.
        metadata: int32 ``[4, 32, 1]`` in the same layout, the record's metadata words.
        x: shared memory ``[tokens, 64]``, bfloat16 or float16, at least 64 tokens.
        acc: float32 ``[64, tokens]``.
        start: the first column of ``x``, 0 or 32.
        selector: which lanes' metadata words belong to this k-step, 0 or 1.
    """
    mark: gl.constexpr = _MARK_24 + ("1" if selector else "0")
    words = metadata.broadcast_to([4, 32, 4])
    gl.inline_asm_elementwise(mark, _CONSTRAINTS_24, [values, words], gl.int32, False, 4)
    return warpgroup_mma(_placeholder(x), x.slice(start, 16, 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def dot_dense(values, x, acc, start: gl.constexpr):
    """``acc + W @ x[:, start : start + 16]^T`` for 64 rows of a dense weight, asynchronous; arguments as ``dot_24``."""
    gl.inline_asm_elementwise(_MARK_DENSE, _CONSTRAINTS_DENSE, [values], gl.int32, False, 4)
    return warpgroup_mma(_placeholder(x), x.slice(start, 16, 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _placeholder(x):
    # Any 64 x 16 operand: the lowering replaces it by the registers of the mark.
    return x.slice(0, 64, 0).slice(0, 16, 1)


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


_OPERANDS_24 = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f")
_OPERANDS_DENSE = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f")


@gluon.constexpr_function
def _instruction_24(dtype, selector):
    kind = "bf16.bf16" if dtype == gl.bfloat16 else "f16.f16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$16,$17,$18,$19}}, $12, {selector};"
    )


@gluon.constexpr_function
def _instruction_dense(dtype, half):
    kind = "bf16.bf16" if dtype == gl.bfloat16 else "f16.f16"
    x = "$10,$11" if half else "$8,$9"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{{x}}}, {{$12,$13,$14,$15}};"
    )


@gluon.jit
def mma_24(values, x, metadata, acc, selector: gl.constexpr, dtype: gl.constexpr):
    """``acc + W @ x^T`` for 16 x 32 elements of a 2:4 weight against 8 tokens, by one warp.

    All tensors are broadcast against each other over their leading dimensions; the last two are 32 lanes and the four
    registers of one instruction, which must lie in one thread.

    Args:
        values: int32, the kept values of one k-step in fragment order.
        x: int32; register ``r`` of lane ``4q + p`` holds columns ``8r + 2p`` and ``8r + 2p + 1`` of token ``q``.
        metadata: int32, the record's metadata words.
        acc: float32; lane ``4q + p`` holds rows ``q`` (two registers) and ``q + 8``, tokens ``2p`` and ``2p + 1``.
        selector: 0 or 1, the k-step of the record.
        dtype: what the words are pairs of, ``gl.bfloat16`` or ``gl.float16``.
    """
    return gl.inline_asm_elementwise(
        _instruction_24(dtype, selector), _OPERANDS_24, [values, x, metadata, acc], gl.float32, True, 4
    )


@gluon.jit
def mma_dense(values, x, acc, half: gl.constexpr, dtype: gl.constexpr):
    """The same for 16 x 16 elements of a dense weight, against registers ``2 * half`` and ``2 * half + 1`` of ``x``."""
    return gl.inline_asm_elementwise(
        _instruction_dense(dtype, half), _OPERANDS_DENSE, [values, x, acc], gl.float32, True, 4
    )
