"""Unstructured sparsity, for contrast: loaded sparse, computed dense.

A plain kernel after the idea of Flash-LLM (Xia et al., 2023): weights that were dropped anywhere save memory traffic
but no arithmetic, for no tensor core skips them. A weight is stored in blocks of 64 x 64, a *bitmap* of one bit an
element and the kept values in row order. A thread block expands one block after the other in registers, each element
finding its value by counting the bits before it, and multiplies it like a dense one. Several thread blocks share the
blocks of one row where there are few rows (split K), so that a decode step fills the GPU.

    >>> packed = pack_unstructured(weight)      # of which any elements are zero
    >>> y = launch(x, packed, splits=1)         # float32
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad as pad_edges
from triton import knobs

from patch.errors import UserError

BLOCK = 64


@dataclass(frozen=True, eq=False)
class UnstructuredWeight:
    """A weight without its zeros.

    Attributes:
        shape: ``(N, K)``; both are padded to multiples of 64 with zeros, which are not stored.
        bits: int32 ``[panels, steps, 64, 2]``, a bit for each element of each block's rows, the first column lowest.
        values: ``[kept]`` of the weight's dtype, block after block, row after row.
        rows: int32 ``[panels, steps, 64]``, where in ``values`` each row of each block starts.
    """

    shape: tuple[int, int]
    bits: Tensor
    values: Tensor
    rows: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(part.numel() * part.element_size() for part in (self.bits, self.values, self.rows))


def pack_unstructured(weight: Tensor) -> UnstructuredWeight:
    """Pack a weight ``[N, K]`` of any floating dtype by its zeros.

    Raises:
        UserError: if it is not a matrix, or keeps 2**31 elements or more.
    """
    if weight.dim() != 2:
        raise UserError(f"cannot pack a weight of shape {tuple(weight.shape)}: it must be a matrix")
    n, k = weight.shape
    padded = pad_edges(weight.detach(), (0, -k % BLOCK, 0, -n % BLOCK))
    panels, steps = padded.shape[0] // BLOCK, padded.shape[1] // BLOCK
    blocks = padded.reshape(panels, BLOCK, steps, BLOCK).transpose(1, 2)
    kept = blocks != 0
    counts = kept.sum(-1).flatten()
    if int(counts.sum()) >= 1 << 31:
        raise UserError(f"weight {n}x{k} keeps {int(counts.sum())} elements: more than its 32-bit addresses reach")
    rows = (counts.cumsum(0) - counts).to(torch.int32).reshape(panels, steps, BLOCK)
    halves = kept.reshape(panels, steps, BLOCK, 2, 32).long() << torch.arange(32, device=weight.device)
    words = halves.sum(-1)
    # The top bit of a word is an element, not a sign.
    bits = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return UnstructuredWeight((n, k), bits, blocks[kept], rows)


def unpack_unstructured(packed: UnstructuredWeight) -> Tensor:
    """The weight ``[N, K]`` with its zeros, in its dtype."""
    n, k = packed.shape
    panels, steps = packed.rows.shape[:2]
    shifts = torch.arange(32, device=packed.bits.device)
    kept = (packed.bits[..., None] >> shifts & 1).bool().reshape(panels, steps, BLOCK, BLOCK)
    blocks = torch.zeros(kept.shape, dtype=packed.values.dtype, device=kept.device)
    blocks[kept] = packed.values
    return blocks.transpose(1, 2).reshape(panels * BLOCK, steps * BLOCK)[:n, :k].contiguous()


@triton.jit
def _ones(word):
    """How many bits of each word are set, by halving; portable, where a GPU has an instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit(do_not_specialize=["steps", "tokens", "out_features"])
def _unstructured_kernel(
    x, parts, bits, values, rows, steps, tokens, in_features, out_features, x_stride,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``parts[s] = x @ W^T`` over every ``SPLITS``-th block from ``s`` on; a thread block per panel, tokens, part."""
    panel = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    row = tl.arange(0, 64)[:, None]
    col = tl.arange(0, 64)[None, :]
    place = col % 32
    acc = tl.zeros([TOKENS, 64], tl.float32)
    for step in range(split, steps, SPLITS):
        at = (panel * steps + step).to(tl.int64) * 64
        first = tl.load(bits + (at + row) * 2)
        word = tl.load(bits + (at + row) * 2 + col // 32)
        # Bits of the row before this element: those below it in its word, and all of the first word.
        below = _ones(word & ((1 << place) - 1)) + tl.where(col >= 32, _ones(first), 0)
        kept = ((word >> place) & 1) != 0
        start = tl.load(rows + at + row)
        weight = tl.load(values + start + below, mask=kept, other=0.0)
        column = step * 64 + tl.arange(0, 64)
        mask = (token < tokens)[:, None] & (column < in_features)[None, :]
        inputs = tl.load(x + token.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        if UPCAST:
            acc += tl.dot(inputs.to(tl.float32), tl.trans(weight.to(tl.float32)), input_precision="ieee")
        else:
            acc += tl.dot(inputs, tl.trans(weight))
    feature = panel * 64 + tl.arange(0, 64)
    mask = (token < tokens)[:, None] & (feature < out_features)[None, :]
    line = split.to(tl.int64) * tokens + token.to(tl.int64)
    tl.store(parts + line[:, None] * out_features + feature[None, :], acc, mask=mask)


def launch(x: Tensor, packed: UnstructuredWeight, splits: int) -> Tensor:
    """``x @ W^T`` for ``x`` ``[tokens, K]`` with unit column stride, at least one token; float32 ``[tokens, N]``.

    Args:
        splits: parts into which the sum over K is cut, each of its own thread blocks.
    """
    tokens, (n, k) = x.shape[0], packed.shape
    panels, steps = packed.rows.shape[:2]
    parts = torch.empty(splits, tokens, n, dtype=torch.float32, device=x.device)
    block = min(64, max(16, triton.next_power_of_2(tokens)))
    _unstructured_kernel[(panels, triton.cdiv(tokens, block), splits)](
        x, parts, packed.bits, packed.values, packed.rows, steps, tokens, k, n, x.stride(0),
        TOKENS=block, SPLITS=splits, UPCAST=knobs.runtime.interpret,
    )  # fmt: skip
    return parts.sum(0)
