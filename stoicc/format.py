"""The packed layout of a hybrid weight, and how a masked weight gets into it and out again.

The unit of packing is a *block* of 64 rows of 128 bytes, so one format serves every tile shape and precision: a block
whose tiles are all 2:4 is stored as 2:4, any other block densely. A *panel* is a row of blocks, 64 output features.
Each block is one contiguous *record*:

                   columns  values       metadata
    2:4,   16 bits   64     4096 bytes    512 bytes    9 units, 0.5625 of a dense block
    2:4,    8 bits  128     4096 bytes   1024 bytes   10 units, 0.625
    dense                   8192 bytes                16 units

A *unit* is 512 bytes. Weights of 8 bits, ``float8_e4m3fn`` or ``int8``, carry a scale for each output feature. Their
blocks are twice as wide so that kernels move the same bytes at a time in every precision, whole 128-byte rows of
activations; tiles of 64 columns are 2:4 only where two neighbours are. Within a panel the 2:4 records come first, then
the dense ones.

The order of columns serves kernels that compute several panels at once from one stream of activations. A *band* is one
panel, or two whose block maps are equal everywhere (so for tiles of at least 128 rows); two neighbouring bands are a
*group*. Both bands of a group see the block columns in the same order, the group's *walk*, sorted by what they hold:

    (2:4, 2:4)  (2:4, dense)  (dense, dense)  (dense, 2:4)

and each panel's records lie in the order of the walk. So the first band turns from 2:4 to dense once, the second turns
to dense and back, and between turns the records that a kernel needs are one contiguous stretch of memory. The first
panel's ``columns`` are the walk of its group.

Values are stored in *fragment order*: the order in which tensor cores want their left operand in registers, which is
the same for ``wgmma`` (A in registers), ``mma.m16n8k16`` and ``mma.sp.m16n8k32``, and byte for byte for those of twice
the depth that take 8 bits: two neighbouring values stand where one of 16 bits does. A thread fetches the four registers
of one instruction as one 16-byte load straight from global memory, and weights never pass through shared memory. For
the four groups of 16 rows (*warps*) of a block, each k-step (16 stored columns) is 32 lanes x 8 values; lane ``4q +
p`` holds rows ``q`` and ``q + 8``, stored columns ``2p, 2p+1`` and ``2p+8, 2p+9``.

Metadata of 16 bits is one 32-bit word a lane. With ``s = p // 2`` the k-step and ``p' = p % 2``, the low half-word
tells row ``q``, groups ``8s + 4p' .. 8s + 4p' + 3``, the high half-word row ``q + 8``, the same groups; a group is
one nibble, ``first | second << 2``, the two kept positions in ascending order. So one word a thread serves both
k-steps of a record, chosen by the instruction's selector.

Metadata of 8 bits is a word a lane for each of the record's two k-steps of 64 columns: lane ``4q + p`` has row
``q + 8 * (p % 2)``, and of the k-step's 16 groups the eight from ``8 * (p // 2)`` on, the first in the lowest nibble.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_edges

from patch.errors import UserError
from patch.mask import GROUP, KEPT_PAIRS, HybridMask, TileShape, check_tile, expand_tiles, infer
from patch.quantise.values import LARGEST

BLOCK = 64
ROW_BYTES = 128
UNIT_BYTES = 512
UNIT_WORDS = UNIT_BYTES // 4
DENSE_UNITS = 16
SPARSE_VALUE_UNITS = 8
DTYPES = (torch.bfloat16, torch.float16)
# With a scale for each output feature.
SCALED = tuple(LARGEST)

# Packing gathers and permutes a few panels at a time, so that its working memory does not grow with the weight.
PANELS_AT_ONCE = 32

_BITS = {1: torch.int8, 2: torch.int16}
# Nibbles of a record's rows and groups, cut up, and the order that makes eight of them each lane's words.
_METADATA = {
    # warp, half, q, k-step, p', group -> warp, q, k-step, p', half, group
    2: ((4, 2, 8, 2, 2, 4), (0, 2, 3, 4, 1, 5)),
    # warp, half, q, k-step, eight of groups, group -> k-step, warp, q, eight of groups, half, group
    1: ((4, 2, 8, 2, 2, 8), (3, 0, 2, 4, 1, 5)),
}


def block_columns(dtype: torch.dtype) -> int:
    """Columns of a block of this dtype: 64 of 16 bits, 128 of 8."""
    return ROW_BYTES // dtype.itemsize


def sparse_units(dtype: torch.dtype) -> int:
    """Units of a 2:4 record: its values, and a word of metadata for each eight groups."""
    return SPARSE_VALUE_UNITS + 2 // dtype.itemsize


@dataclass(frozen=True, eq=False)
class HybridWeight:
    """A packed hybrid weight.

    Attributes:
        shape: ``(N, K)`` of the weight; both are padded to whole blocks with zeros inside the records.
        tile: ``(rows, cols)`` of the mask's tiles; says what was asked for, the records are of blocks.
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float8_e4m3fn`` or ``torch.int8``.
        records: int32 ``[units, 128]``, the records of all panels one after the other.
        starts: int32 ``[panels + 1]``, the unit at which each panel's records start; the last is the number of units.
        columns: int32 ``[panels, steps]``, which block column each of a panel's records holds, 2:4 records first.
        sparse_blocks: int32 ``[panels]``, how many of a panel's records are 2:4.
        leads: int32 ``[panels]``, how many steps of the group's walk come before the panel's first dense block.
        band: panels of a band, one or two.
        scales: float32 ``[N]``, what each output feature's values are multiplied by; of weights of 8 bits only.
        orders: int32 ``[..., 4]``, made from the others: ``order(1)``, ``order(2)`` and ``order(4)``, concatenated.

    Raises:
        UserError: if any invariant does not hold, naming the part and the first place where it fails. Kernels trust a
            HybridWeight: an index out of range or metadata that is not ascending can not get past construction.
    """

    shape: tuple[int, int]
    tile: TileShape
    dtype: torch.dtype
    records: Tensor
    starts: Tensor
    columns: Tensor
    sparse_blocks: Tensor
    leads: Tensor
    band: int
    scales: Tensor | None = None
    orders: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        object.__setattr__(self, "tile", check_tile(self.tile))
        _check_kinds(self)
        if not self.records.is_meta:
            _check_schedule(self)
            _check_metadata(self)
            _check_scales(self)
        object.__setattr__(self, "orders", torch.cat([self.order(1), self.order(2), self.order(4)]))

    @property
    def panels(self) -> int:
        """Rows of blocks, ``ceil(N / 64)``."""
        return -(-self.shape[0] // BLOCK)

    @property
    def steps(self) -> int:
        """Columns of blocks, ``ceil(K / 64)``, of 8 bits ``ceil(K / 128)``."""
        return -(-self.shape[1] // block_columns(self.dtype))

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.records.device

    @property
    def nbytes(self) -> int:
        """Bytes of its parts together."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def sparse_share(self) -> float:
        """Share of the blocks that are 2:4, in [0, 1]."""
        return float(self.sparse_blocks.sum()) / (self.panels * self.steps)

    def block_map(self) -> Tensor:
        """bool ``[panels, steps]``, True where the block is stored densely."""
        return _dense_blocks(self.columns, self.sparse_blocks)

    @classmethod
    def trusted(cls, *values: object) -> "HybridWeight":
        """A weight of parts that were checked before, without checking them again: for the path of every call."""
        weight = object.__new__(cls)
        for part, value in zip(fields(cls), values, strict=True):
            object.__setattr__(weight, part.name, value)
        return weight

    def order(self, group: int) -> Tensor:
        """int32 ``[ceil(panels / group), 4]``: groups of panels by falling bytes, and where their records are.

        Of each group its index, the units at which its first and its second panel start (the first's again where there
        is no second), and how many records of the first are 2:4: one load tells a thread block where to begin.
        """
        units = _padded((self.starts[1:] - self.starts[:-1])[:, None], group).reshape(-1, group).sum(1)
        index = units.argsort(descending=True, stable=True)
        first = index * group
        second = (first + min(1, group - 1)).clamp(max=self.panels - 1)
        entries = (index, self.starts[first], self.starts[second], self.sparse_blocks[first])
        return torch.stack([entry.to(torch.int32) for entry in entries], dim=1)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name."""
        names = ("records", "starts", "columns", "sparse_blocks", "leads", "scales")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def copy(self) -> "HybridWeight":
        """The same weight in memory of its own."""
        copied = {name: part.clone() for name, part in self.parts().items()}
        scales = copied.pop("scales", None)
        kinds = (self.shape, self.tile, self.dtype)
        return HybridWeight.trusted(*kinds, *copied.values(), self.band, scales, self.orders.clone())

    def to(self, device: torch.device | str) -> "HybridWeight":
        """The same weight on a device, every invariant checked."""
        moved = {name: part.to(device) for name, part in self.parts().items()}
        return HybridWeight(self.shape, self.tile, self.dtype, **moved, band=self.band)


def pack(weight: Tensor, mask: HybridMask, scales: Tensor | None = None) -> HybridWeight:
    """Pack ``mask.apply(weight)``; ``unpack`` gives it back bit for bit.

    Packs from the mask, never from ``weight != 0``: a kept weight may be zero and stays in its slot.

    Args:
        weight: ``[N, K]`` on any device, bfloat16 or float16, or the values of a weight quantised to float8_e4m3fn or
            int8; K a multiple of eight.
        mask: its hybrid mask, on any device.
        scales: float32 ``[N]``, what each output feature's values are multiplied by; of quantised weights.

    Raises:
        UserError: if the dtype is none of these, shapes differ, K is not a multiple of eight, or scales are missing,
            not wanted, or not all positive and finite.
    """
    if weight.dtype not in (*DTYPES, *SCALED):
        raise UserError(
            f"cannot pack a weight of {weight.dtype}: convert it to bfloat16 or float16, or quantise it to "
            "float8_e4m3fn or int8"
        )
    if tuple(weight.shape) != mask.shape:
        raise UserError(f"mask is for a weight of {mask.shape}, got {tuple(weight.shape)}")
    n, k = mask.shape
    if k % 8:
        raise UserError(f"weight {n}x{k}: in_features must be a multiple of 8, so that rows of activations are aligned")
    mask = mask.to(weight.device)
    width, units_24 = block_columns(weight.dtype), sparse_units(weight.dtype)
    edges = (0, -k % width, 0, -n % BLOCK)
    # As integers: torch may change the bits of a NaN that it moves.
    kept = pad_edges(weight.detach().view(_BITS[weight.itemsize]).masked_fill(~mask.keep(), 0), edges)
    patterns = pad_edges(mask.patterns, (0, -(k // GROUP) % (width // GROUP), 0, -n % BLOCK))
    panels, steps = kept.shape[0] // BLOCK, kept.shape[1] // width

    tiles_dense = pad_edges(expand_tiles(mask.dense, mask.shape, mask.tile), edges)
    dense = _blocks(tiles_dense, width).flatten(2).any(-1)
    band = 2 if _uniform(dense, 2) else 1
    walks = _walks(dense, band)
    columns = _stored_order(dense, walks).to(torch.int32)
    leads = _leads(dense, walks).to(torch.int32)
    sparse_blocks = (~dense).sum(1, dtype=torch.int32)
    units = units_24 * sparse_blocks + DENSE_UNITS * (steps - sparse_blocks)
    starts = pad_edges(units.cumsum(0, dtype=torch.int32), (1, 0))
    records = torch.empty(int(starts[-1]), UNIT_WORDS, dtype=torch.int32, device=weight.device)

    sorted_dense = _dense_blocks_in_order(steps, sparse_blocks)
    place = _record_units(starts, sparse_blocks, steps, units_24)
    for first in range(0, panels, PANELS_AT_ONCE):
        rows = slice(first, min(first + PANELS_AT_ONCE, panels))
        stretch = slice(rows.start * BLOCK, rows.stop * BLOCK)
        blocks = _take(_blocks(kept[stretch], width), columns[rows])
        groups = _take(_blocks(patterns[stretch], width // GROUP), columns[rows])
        is_dense = sorted_dense[rows]
        for kind, units_each, encoded in (
            (~is_dense, units_24, _encode_sparse(blocks[~is_dense], groups[~is_dense])),
            (is_dense, DENSE_UNITS, _to_fragments(blocks[is_dense])),
        ):
            targets = place[rows][kind][:, None] + torch.arange(units_each, device=weight.device)
            records[targets.flatten()] = encoded.reshape(-1, UNIT_WORDS)
    if scales is not None:
        scales = scales.detach().to(weight.device)
    return HybridWeight(
        mask.shape, mask.tile, weight.dtype, records, starts, columns, sparse_blocks, leads, band, scales
    )


def pack_masked(weight: Tensor, tile: TileShape) -> HybridWeight:
    """Pack a weight that is already masked, such as one of a published checkpoint, by the pattern of its zeros.

    Args:
        weight: ``[N, K]``, as `pack` takes it; tiles of ``tile`` are 2:4 where every group of four has two zeros.

    Raises:
        UserError: as ``pack``.
    """
    return pack(weight, infer(weight, tile).mask)


def unpack(hybrid: HybridWeight) -> Tensor:
    """The masked weight ``[N, K]`` in the weight's dtype, on its device; of 8 bits its values without their scales."""
    n, k = hybrid.shape
    device = hybrid.device
    width, units_24 = block_columns(hybrid.dtype), sparse_units(hybrid.dtype)
    is_dense = _dense_blocks_in_order(hybrid.steps, hybrid.sparse_blocks)
    place = _record_units(hybrid.starts, hybrid.sparse_blocks, hybrid.steps, units_24)
    panel = torch.arange(hybrid.panels, device=device)[:, None].expand_as(place)
    bits = _BITS[hybrid.dtype.itemsize]
    weight = torch.empty(hybrid.panels, hybrid.steps, BLOCK, width, dtype=bits, device=device)
    for kind, units_each, decode in (
        (~is_dense, units_24, _decode_sparse),
        (is_dense, DENSE_UNITS, _from_fragments),
    ):
        sources = place[kind][:, None] + torch.arange(units_each, device=device)
        found = hybrid.records[sources.flatten()].reshape(-1, units_each * UNIT_WORDS)
        weight[panel[kind], hybrid.columns[kind].long()] = decode(found, bits)
    whole = weight.transpose(1, 2).reshape(hybrid.panels * BLOCK, hybrid.steps * width)
    return whole[:n, :k].contiguous().view(hybrid.dtype)


def mask_of(hybrid: HybridWeight) -> HybridMask:
    """The mask of a packed weight, on its device: tiles are its blocks, so what it packs again is what it was."""
    n, k = hybrid.shape
    width = block_columns(hybrid.dtype)
    sparse = ~_dense_blocks_in_order(hybrid.steps, hybrid.sparse_blocks)
    shape = (hybrid.panels, hybrid.steps, BLOCK, width // GROUP)
    patterns = torch.zeros(shape, dtype=torch.uint8, device=hybrid.device)
    of_nibble = torch.zeros(16, dtype=torch.uint8, device=hybrid.device)
    for pattern, (first, second) in enumerate(KEPT_PAIRS):
        of_nibble[first | second << 2] = pattern
    for first, nibbles in _metadata_nibbles(hybrid):
        some = slice(first, first + PANELS_AT_ONCE)
        panel = first + torch.arange(len(sparse[some]), device=hybrid.device)[:, None].expand_as(sparse[some])
        patterns[panel[sparse[some]], hybrid.columns[some][sparse[some]].long()] = of_nibble[nibbles.long()]
    whole = patterns.transpose(1, 2).reshape(hybrid.panels * BLOCK, -1)[:n, : k // GROUP].contiguous()
    return HybridMask((n, k), (min(BLOCK, n), min(width, k)), hybrid.block_map(), whole)


def _metadata_nibbles(hybrid: HybridWeight) -> Iterator[tuple[int, Tensor]]:
    """Some panels at a time: the first one's number, and the nibbles of their 2:4 records ``[records, 64, groups]``."""
    units = sparse_units(hybrid.dtype)
    place = _record_units(hybrid.starts, hybrid.sparse_blocks, hybrid.steps, units)
    sparse = ~_dense_blocks_in_order(hybrid.steps, hybrid.sparse_blocks)
    for first in range(0, hybrid.panels, PANELS_AT_ONCE):
        rows = slice(first, first + PANELS_AT_ONCE)
        own = place[rows][sparse[rows]][:, None] + torch.arange(SPARSE_VALUE_UNITS, units, device=place.device)
        yield first, _nibbles(hybrid.records[own].flatten(1))


def _blocks(matrix: Tensor, width: int) -> Tensor:
    """``[panels * 64, steps * width]`` seen as ``[panels, steps, 64, width]``."""
    return matrix.reshape(-1, BLOCK, matrix.shape[1] // width, width).transpose(1, 2)


def _take(blocks: Tensor, columns: Tensor) -> Tensor:
    """Blocks ``[P, S, 64, x]`` of each panel in the order of ``columns`` ``[P, S]``."""
    panel = torch.arange(blocks.shape[0], device=blocks.device)[:, None]
    return blocks[panel, columns.long()]


def _dense_blocks_in_order(steps: int, sparse_blocks: Tensor) -> Tensor:
    """bool ``[panels, steps]``: whether each record, in the panel's order, is dense."""
    return torch.arange(steps, device=sparse_blocks.device) >= sparse_blocks[:, None]


def _dense_blocks(columns: Tensor, sparse_blocks: Tensor) -> Tensor:
    in_order = _dense_blocks_in_order(columns.shape[1], sparse_blocks)
    return torch.zeros_like(in_order).scatter_(1, columns.long(), in_order)


def _uniform(dense: Tensor, band: int) -> bool:
    """Whether all panels of every band of ``dense`` ``[panels, steps]`` have the same block map."""
    bands = _padded(dense, band).reshape(-1, band, dense.shape[1])
    return bool((bands == bands[:, :1]).all())


def _walks(dense: Tensor, band: int) -> Tensor:
    """int64 ``[panels, steps]``: the walk of each panel's group."""
    panels, steps = dense.shape
    bands = _padded(dense, 2 * band).reshape(-1, 2, band, steps)[:, :, 0].int()
    first, second = bands[:, 0], bands[:, 1]
    # Rank in the order above: (2:4, 2:4) 0, (2:4, dense) 1, (dense, dense) 2, (dense, 2:4) 3.
    walk = (2 * first + (first ^ second)).argsort(dim=1, stable=True)
    return walk.repeat_interleave(2 * band, 0)[:panels]


def _stored_order(dense: Tensor, walks: Tensor) -> Tensor:
    """The walk with each panel's own 2:4 blocks first."""
    return walks.gather(1, dense.gather(1, walks).int().argsort(dim=1, stable=True))


def _leads(dense: Tensor, walks: Tensor) -> Tensor:
    return (dense.gather(1, walks).cumsum(1) == 0).sum(1)


def _padded(per_panel: Tensor, multiple: int) -> Tensor:
    """``per_panel`` ``[panels, ...]`` with the last panel repeated up to a multiple of ``multiple`` panels."""
    missing = -len(per_panel) % multiple
    return torch.cat([per_panel, per_panel[-1:].expand(missing, *per_panel.shape[1:])])


def _record_units(starts: Tensor, sparse_blocks: Tensor, steps: int, units_24: int) -> Tensor:
    """int64 ``[panels, steps]``: the unit at which each record, in the panel's order, starts."""
    position = torch.arange(steps, device=starts.device)
    sparse = sparse_blocks[:, None]
    units = units_24 * torch.minimum(position, sparse) + DENSE_UNITS * (position - sparse).clamp(min=0)
    return starts[:-1, None].long() + units


def _to_fragments(blocks: Tensor) -> Tensor:
    """Bits of values ``[n, 64, c]`` to int32 ``[n, words]`` in fragment order; rows are a multiple of 32 bytes."""
    halves = blocks.contiguous().view(torch.int16)
    n, _, cols = halves.shape
    split = halves.reshape(n, 4, 2, 8, cols // 16, 2, 4, 2)  # n, warp, half, q, step, half, p, pair
    return split.permute(0, 1, 4, 3, 6, 5, 2, 7).reshape(n, BLOCK * cols).view(torch.int32)


def _from_fragments(words: Tensor, bits: torch.dtype) -> Tensor:
    """The inverse of ``_to_fragments``: int32 ``[n, words]`` to values ``[n, 64, c]`` as ``bits``."""
    n = words.shape[0]
    cols = words.shape[1] * 2 // BLOCK
    split = words.contiguous().view(torch.int16).reshape(n, 4, cols // 16, 8, 4, 2, 2, 2)
    return split.permute(0, 1, 6, 3, 2, 5, 4, 7).reshape(n, BLOCK, cols).view(bits)


def _encode_sparse(blocks: Tensor, patterns: Tensor) -> Tensor:
    """Values and metadata of 2:4 blocks: bits ``[n, 64, c]``, patterns ``[n, 64, c / 4]`` to int32 ``[n, words]``."""
    pairs = torch.tensor(KEPT_PAIRS, device=blocks.device)[patterns.long()]  # n, 64, groups, 2
    values = blocks.reshape(*patterns.shape, GROUP).gather(-1, pairs).flatten(2)
    shape, order = _METADATA[blocks.itemsize]
    n = blocks.shape[0]
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).reshape(n, *shape).permute(0, *(1 + axis for axis in order))
    by_word = nibbles.reshape(n, BLOCK * patterns.shape[2] // 8, 8)
    words = (by_word << (4 * torch.arange(8, device=blocks.device))).sum(-1)
    # The top bit of a word is a bit of metadata, not a sign.
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return torch.cat([_to_fragments(values), signed], dim=1)


def _nibbles(words: Tensor) -> Tensor:
    """Metadata words ``[n, 128]``, of 8 bits ``[n, 256]``, to nibbles ``[n, 64, groups]``."""
    n = words.shape[0]
    shape, order = _METADATA[2 if words.shape[1] == UNIT_WORDS else 1]
    nibbles = words[..., None] >> 4 * torch.arange(8, device=words.device) & 15
    stored = nibbles.reshape(n, *(shape[axis] for axis in order))
    back = sorted(range(len(order)), key=order.__getitem__)
    return stored.permute(0, *(1 + axis for axis in back)).reshape(n, BLOCK, words.shape[1] // 8)


def _decode_sparse(words: Tensor, bits: torch.dtype) -> Tensor:
    """The inverse of ``_encode_sparse``: int32 ``[n, words]`` to masked blocks ``[n, 64, c]`` as ``bits``."""
    values = _from_fragments(words[:, : SPARSE_VALUE_UNITS * UNIT_WORDS], bits)
    nibbles = _nibbles(words[:, SPARSE_VALUE_UNITS * UNIT_WORDS :])
    pairs = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
    blocks = torch.zeros(*nibbles.shape, GROUP, dtype=bits, device=words.device)
    blocks.scatter_(-1, pairs, values.reshape(*nibbles.shape, 2))
    return blocks.flatten(2)


def _check_kinds(hybrid: HybridWeight) -> None:
    n, k = hybrid.shape
    if n < 1 or k < 8 or k % 8:
        raise UserError(f"packed weight {n}x{k}: in_features must be a positive multiple of 8")
    if hybrid.dtype not in (*DTYPES, *SCALED):
        raise UserError(f"packed weight has dtype {hybrid.dtype}, needs bfloat16, float16, float8_e4m3fn or int8")
    if hybrid.dtype in DTYPES and hybrid.scales is not None:
        raise UserError(f"packed weight of {hybrid.dtype} has scales: only float8_e4m3fn and int8 take them")
    if hybrid.dtype in SCALED and hybrid.scales is None:
        raise UserError(f"packed weight of {hybrid.dtype} has no scales: it needs float32 ({n},), one for each feature")
    wanted = {
        "records": (len(hybrid.records) if hybrid.records.dim() else 0, UNIT_WORDS),
        "starts": (hybrid.panels + 1,),
        "columns": (hybrid.panels, hybrid.steps),
        "sparse_blocks": (hybrid.panels,),
        "leads": (hybrid.panels,),
        "scales": (n,),
    }
    if hybrid.band not in (1, 2):
        raise UserError(f"packed bands have {hybrid.band} panels, need 1 or 2")
    for name, part in hybrid.parts().items():
        shape, dtype = wanted[name], torch.float32 if name == "scales" else torch.int32
        if part.dtype != dtype or tuple(part.shape) != shape:
            needed = str(dtype).removeprefix("torch.")
            raise UserError(f"packed {name} is {part.dtype} {tuple(part.shape)}, needs {needed} {shape}")
        if part.device != hybrid.device:
            raise UserError(f"packed {name} is on {part.device}, records are on {hybrid.device}")
        if not part.is_contiguous():
            raise UserError(f"packed {name} has strides {part.stride()}, needs a contiguous tensor")


def _check_schedule(hybrid: HybridWeight) -> None:
    sparse = hybrid.sparse_blocks.long()
    if bool(((sparse < 0) | (sparse > hybrid.steps)).any()):
        raise UserError(f"packed sparse_blocks lie in {int(sparse.min())}..{int(sparse.max())}, not 0..{hybrid.steps}")
    units = sparse_units(hybrid.dtype) * sparse + DENSE_UNITS * (hybrid.steps - sparse)
    starts = pad_edges(units.cumsum(0), (1, 0))
    wrong = (starts != hybrid.starts).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise UserError(f"packed starts[{at}] is {int(hybrid.starts[at])}, its panels need {int(starts[at])}")
    if hybrid.records.shape[0] != int(starts[-1]):
        raise UserError(f"packed records have {hybrid.records.shape[0]} units, their panels need {int(starts[-1])}")
    ordered = hybrid.columns.sort(dim=1).values
    wrong = (ordered != torch.arange(hybrid.steps, device=hybrid.device)).any(1).nonzero()
    if len(wrong):
        raise UserError(f"packed columns of panel {int(wrong[0, 0])} are not each of 0..{hybrid.steps - 1} once")
    dense = hybrid.block_map()
    if not _uniform(dense, hybrid.band):
        raise UserError(f"packed bands of {hybrid.band} panels hold panels with different block maps")
    walks = _walks(dense, hybrid.band)
    for name, expected in (("columns", _stored_order(dense, walks)), ("leads", _leads(dense, walks))):
        wrong = (getattr(hybrid, name) != expected).nonzero()
        if len(wrong):
            raise UserError(f"packed {name} of panel {int(wrong[0, 0])} are not in the order of its group's walk")


def _check_metadata(hybrid: HybridWeight) -> None:
    for first, nibbles in _metadata_nibbles(hybrid):
        wrong = (nibbles & 3) >= (nibbles >> 2)
        if bool(wrong.any()):
            record, row, group = (int(i) for i in wrong.nonzero()[0])
            raise UserError(
                f"packed metadata: 2:4 record {record} from panel {first} on, row {row}, group {group} keeps positions "
                f"{int(nibbles[record, row, group]) & 3} and {int(nibbles[record, row, group]) >> 2}, not ascending"
            )


def _check_scales(hybrid: HybridWeight) -> None:
    if hybrid.scales is None:
        return
    wrong = (~(hybrid.scales.isfinite() & (hybrid.scales > 0))).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise UserError(f"packed scales[{at}] is {float(hybrid.scales[at])}: scales must be positive and finite")
