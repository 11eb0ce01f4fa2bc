"""The packed layout of a hybrid weight, and how a masked weight gets into it and out again.

The unit of packing is a *block* of 64 rows of 64 or 128 columns, so one format serves every tile shape and precision: a
block whose tiles are all 2:4 is stored as 2:4, any other block densely. A *panel* is a row of blocks, 64 output
features. Each block is one contiguous *record*, a whole number of *units*:

              columns  unit        kind    values       metadata     scales
    16 bits     64     512 bytes   2:4     4096 bytes    512 bytes                9 units, 0.5625 of a dense block
                                   dense   8192 bytes                            16
     8 bits    128     512 bytes   2:4     4096 bytes   1024 bytes               10 units, 0.625
                                   dense   8192 bytes                            16
     4 bits    128     128 bytes   2:4     2048 bytes   1024 bytes   128 bytes   25 units, 0.76
                                   dense   4096 bytes                128 bytes   33

Weights of 8 bits, ``float8_e4m3fn`` or ``int8``, carry a scale for each output feature beside the records. Weights of
4 bits, ``int4``, have one for each feature and group of 128 inputs, so for each row of a block: they lie in its record,
and K is a whole number of groups. Blocks of fewer bits are twice as wide: of 8 so that kernels move the same bytes at a
time as of 16, whole 128-byte rows of activations, of 4 since a group is. Tiles of 64 columns are then 2:4 only where
two neighbours are. Within a panel the 2:4 records come first, then the dense ones.

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

Values of 4 bits are widened to 16 in registers, so a lane's eight values of a k-step are one word: of the four
registers that it becomes, ``r`` has its first value in nibble ``r`` and its second in nibble ``r + 4``, each in two's
complement. A 16-byte load brings four k-steps. Metadata is that of 16 bits, of the block's first 64 columns and then of
the others. Last comes for each warp a word for each ``q``: the scales of row ``q``, in the low half-word, and of row
``q + 8``, as bfloat16.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_edges

from patch.errors import UserError
from patch.mask import KEPT_PAIRS, HybridMask, expand_tiles, infer
from patch.quantise.values import INT4_RANGE, LARGEST
from patch.tiles import GROUP, TileShape, check_tile

BLOCK = 64
ROW_BYTES = 128
DTYPES = (torch.bfloat16, torch.float16)
# With a scale for each output feature.
SCALED = tuple(LARGEST)
# With a scale for each feature and group of inputs.
GROUPED: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch has it, its stubs do not
# Inputs of such a group, the columns of a block.
SCALE_GROUP = 128


@dataclass(frozen=True)
class Layout:
    """How blocks of one precision are stored.

    Attributes:
        columns: of a block.
        unit: words of a unit.
        sparse, dense: units of a record.
        metadata: the word of a 2:4 record at which its metadata starts.
    """

    columns: int
    unit: int
    sparse: int
    dense: int
    metadata: int


# By bits of a value.
LAYOUTS = {
    16: Layout(columns=64, unit=128, sparse=9, dense=16, metadata=1024),
    8: Layout(columns=128, unit=128, sparse=10, dense=16, metadata=1024),
    4: Layout(columns=SCALE_GROUP, unit=32, sparse=25, dense=33, metadata=512),
}

# Packing gathers and permutes a few panels at a time, so that its working memory does not grow with the weight.
PANELS_AT_ONCE = 32

_BITS = {1: torch.int8, 2: torch.int16}
# Nibbles of a record's rows and groups, cut up, and the order that makes eight of them each lane's words.
_METADATA = {
    # warp, half, q, k-step, p', group -> warp, q, k-step, p', half, group
    16: ((4, 2, 8, 2, 2, 4), (0, 2, 3, 4, 1, 5)),
    # warp, half, q, k-step, eight of groups, group -> k-step, warp, q, eight of groups, half, group
    8: ((4, 2, 8, 2, 2, 8), (3, 0, 2, 4, 1, 5)),
    # warp, half, q, 64 columns, k-step, p', group -> 64 columns, and then as of 16 bits
    4: ((4, 2, 8, 2, 2, 2, 4), (3, 0, 2, 4, 5, 1, 6)),
}


def bits_of(dtype: torch.dtype) -> int:
    """Bits of a value: 16, 8 or 4."""
    return 4 if dtype == GROUPED else 8 * dtype.itemsize


def check_dtype(dtype: object) -> torch.dtype:
    """What is given, if weights of that dtype can be packed.

    Raises:
        UserError: naming it, if not.
    """
    if not isinstance(dtype, torch.dtype) or dtype not in (*DTYPES, *SCALED, GROUPED):
        raise UserError(f"packed weight has dtype {dtype}, needs bfloat16, float16, float8_e4m3fn, int8 or int4")
    return dtype


def layout_of(dtype: torch.dtype) -> Layout:
    """How blocks of values of this dtype are stored."""
    return LAYOUTS[bits_of(dtype)]


def block_columns(dtype: torch.dtype) -> int:
    """Columns of a block of this dtype: 64 of 16 bits, 128 of 8 and 4."""
    return layout_of(dtype).columns


@dataclass(frozen=True, eq=False)
class HybridWeight:
    """A packed hybrid weight.

    Attributes:
        shape: ``(N, K)`` of the weight; both are padded to whole blocks with zeros inside the records.
        tile: ``(rows, cols)`` of the mask's tiles; says what was asked for, the records are of blocks.
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float8_e4m3fn``, ``torch.int8`` or ``torch.int4``.
        records: int32 ``[units, 128]``, of 4 bits ``[units, 32]``, the records of all panels one after the other.
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
        """Columns of blocks, ``ceil(K / 64)``, of fewer bits ``ceil(K / 128)``."""
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
            int8; K a multiple of eight. Of INT4 int8 from -8 to 7, K a multiple of 128.
        mask: its hybrid mask, on any device.
        scales: float32 ``[N]``, what each output feature's values are multiplied by; of quantised weights. Of INT4
            ``[N, K / 128]``, numbers of bfloat16.

    Raises:
        UserError: if the dtype is none of these, shapes differ, K is not a multiple of eight, or scales are missing,
            not wanted, or not all positive and finite.
    """
    dtype = GROUPED if weight.dtype == torch.int8 and scales is not None and scales.dim() == 2 else weight.dtype
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
    if dtype == GROUPED:
        _check_grouped(weight, scales)
    mask = mask.to(weight.device)
    bits, layout = bits_of(dtype), layout_of(dtype)
    width = layout.columns
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
    units = layout.sparse * sparse_blocks + layout.dense * (steps - sparse_blocks)
    starts = pad_edges(units.cumsum(0, dtype=torch.int32), (1, 0))
    records = torch.empty(int(starts[-1]), layout.unit, dtype=torch.int32, device=weight.device)

    sorted_dense = _dense_blocks_in_order(steps, sparse_blocks)
    place = _record_units(starts, sparse_blocks, steps, layout)
    if scales is not None:
        scales = scales.detach().to(weight.device)
    by_block = _scale_words(scales, columns) if dtype == GROUPED and scales is not None else None
    for first in range(0, panels, PANELS_AT_ONCE):
        rows = slice(first, min(first + PANELS_AT_ONCE, panels))
        stretch = slice(rows.start * BLOCK, rows.stop * BLOCK)
        blocks = _take(_blocks(kept[stretch], width), columns[rows])
        groups = _take(_blocks(patterns[stretch], width // GROUP), columns[rows])
        is_dense = sorted_dense[rows]
        for kind, units_each, encoded in (
            (~is_dense, layout.sparse, _encode_sparse(blocks[~is_dense], groups[~is_dense], bits)),
            (is_dense, layout.dense, _to_fragments(blocks[is_dense], bits)),
        ):
            if by_block is not None:
                encoded = torch.cat([encoded, by_block[rows][kind]], dim=1)
            targets = place[rows][kind][:, None] + torch.arange(units_each, device=weight.device)
            records[targets.flatten()] = encoded.reshape(-1, layout.unit)
    beside = None if by_block is not None else scales
    return HybridWeight(mask.shape, mask.tile, dtype, records, starts, columns, sparse_blocks, leads, band, beside)


def pack_masked(weight: Tensor, tile: TileShape) -> HybridWeight:
    """Pack a weight that is already masked, such as one of a published checkpoint, by the pattern of its zeros.

    Args:
        weight: ``[N, K]``, as `pack` takes it; tiles of ``tile`` are 2:4 where every group of four has two zeros.

    Raises:
        UserError: as ``pack``.
    """
    return pack(weight, infer(weight, tile).mask)


def unpack(hybrid: HybridWeight) -> Tensor:
    """The masked weight ``[N, K]`` in the weight's dtype, on its device; quantised, its values without their scales.

    Values of 4 bits are int8.
    """
    n, k = hybrid.shape
    device = hybrid.device
    bits, layout = bits_of(hybrid.dtype), layout_of(hybrid.dtype)
    is_dense = _dense_blocks_in_order(hybrid.steps, hybrid.sparse_blocks)
    place = _record_units(hybrid.starts, hybrid.sparse_blocks, hybrid.steps, layout)
    panel = torch.arange(hybrid.panels, device=device)[:, None].expand_as(place)
    kept = _BITS[hybrid.dtype.itemsize]
    weight = torch.empty(hybrid.panels, hybrid.steps, BLOCK, layout.columns, dtype=kept, device=device)
    for kind, units_each, decode in (
        (~is_dense, layout.sparse, _decode_sparse),
        (is_dense, layout.dense, _decode_dense),
    ):
        sources = place[kind][:, None] + torch.arange(units_each, device=device)
        found = hybrid.records[sources.flatten()].reshape(-1, units_each * layout.unit)
        weight[panel[kind], hybrid.columns[kind].long()] = decode(found, bits)
    whole = weight.transpose(1, 2).reshape(hybrid.panels * BLOCK, hybrid.steps * layout.columns)[:n, :k].contiguous()
    return whole if hybrid.dtype == GROUPED else whole.view(hybrid.dtype)


def scales_of(hybrid: HybridWeight) -> Tensor:
    """float32 ``[N, groups]`` of a quantised weight, what the values of each group of its inputs are multiplied by."""
    if hybrid.scales is not None:
        return hybrid.scales[:, None]
    words = hybrid.records[_scale_units(hybrid)].reshape(hybrid.panels, hybrid.steps, 4, 8)
    halves = words.contiguous().view(torch.bfloat16).reshape(hybrid.panels, hybrid.steps, 4, 8, 2)
    stored = halves.transpose(3, 4).reshape(hybrid.panels, hybrid.steps, BLOCK).float()
    index = hybrid.columns.long()[..., None].expand_as(stored)
    by_column = torch.empty_like(stored).scatter_(1, index, stored)
    return by_column.transpose(1, 2).reshape(hybrid.panels * BLOCK, hybrid.steps)[: hybrid.shape[0]].contiguous()


def dequantised(hybrid: HybridWeight) -> Tensor:
    """What the values and scales of a quantised weight stand for, float32 ``[N, K]``."""
    scales = scales_of(hybrid)
    return unpack(hybrid).float() * scales.repeat_interleave(hybrid.shape[1] // scales.shape[1], 1)


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
    bits, layout = bits_of(hybrid.dtype), layout_of(hybrid.dtype)
    place = _record_units(hybrid.starts, hybrid.sparse_blocks, hybrid.steps, layout)
    begin, units = layout.metadata // layout.unit, 2 * layout.columns // layout.unit
    sparse = ~_dense_blocks_in_order(hybrid.steps, hybrid.sparse_blocks)
    for first in range(0, hybrid.panels, PANELS_AT_ONCE):
        rows = slice(first, first + PANELS_AT_ONCE)
        own = place[rows][sparse[rows]][:, None] + torch.arange(begin, begin + units, device=place.device)
        yield first, _nibbles(hybrid.records[own].flatten(1), bits)


def _scale_units(hybrid: HybridWeight) -> Tensor:
    """int64 ``[panels, steps]``: the unit of each record's scales, its last, in the panel's order."""
    layout = layout_of(hybrid.dtype)
    dense = _dense_blocks_in_order(hybrid.steps, hybrid.sparse_blocks)
    place = _record_units(hybrid.starts, hybrid.sparse_blocks, hybrid.steps, layout)
    return place + torch.where(dense, layout.dense, layout.sparse) - 1


def _scale_words(scales: Tensor, columns: Tensor) -> Tensor:
    """int32 ``[panels, steps, 32]``: the scales ``[N, steps]`` of each record, in the panel's order."""
    panels, steps = columns.shape
    padded = pad_edges(scales, (0, 0, 0, panels * BLOCK - len(scales)), value=1.0).to(torch.bfloat16)
    by_block = padded.reshape(panels, BLOCK, steps).transpose(1, 2)
    stored = by_block.gather(1, columns.long()[..., None].expand_as(by_block))
    halves = stored.reshape(panels, steps, 4, 2, 8).transpose(3, 4).contiguous()
    return halves.view(torch.int32).reshape(panels, steps, 32)


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


def _record_units(starts: Tensor, sparse_blocks: Tensor, steps: int, layout: Layout) -> Tensor:
    """int64 ``[panels, steps]``: the unit at which each record, in the panel's order, starts."""
    position = torch.arange(steps, device=starts.device)
    sparse = sparse_blocks[:, None]
    units = layout.sparse * torch.minimum(position, sparse) + layout.dense * (position - sparse).clamp(min=0)
    return starts[:-1, None].long() + units


def _to_fragments(blocks: Tensor, bits: int) -> Tensor:
    """Bits of values ``[n, 64, c]`` to int32 ``[n, words]`` in fragment order; rows are a multiple of 32 bytes."""
    if bits == 4:
        n, _, cols = blocks.shape
        split = blocks.reshape(n, 4, 2, 8, cols // 64, 4, 2, 4, 2)  # n, warp, half, q, 64 columns, step, right, p, pair
        return _words(split.permute(0, 1, 4, 3, 7, 5, 8, 6, 2).reshape(n, BLOCK * cols // 8, 8))
    halves = blocks.contiguous().view(torch.int16)
    n, _, cols = halves.shape
    split = halves.reshape(n, 4, 2, 8, cols // 16, 2, 4, 2)  # n, warp, half, q, step, half, p, pair
    return split.permute(0, 1, 4, 3, 6, 5, 2, 7).reshape(n, BLOCK * cols).view(torch.int32)


def _from_fragments(words: Tensor, bits: int) -> Tensor:
    """The inverse of ``_to_fragments``: int32 ``[n, words]`` to values ``[n, 64, c]``, as integers of their bytes."""
    n = words.shape[0]
    if bits == 4:
        cols = words.shape[1] * 8 // BLOCK
        split = _eighths(words).reshape(n, 4, cols // 64, 8, 4, 4, 2, 2, 2)
        values = split.permute(0, 1, 8, 3, 2, 5, 7, 4, 6).reshape(n, BLOCK, cols)
        return ((values ^ 8) - 8).to(torch.int8)
    cols = words.shape[1] * 2 // BLOCK
    split = words.contiguous().view(torch.int16).reshape(n, 4, cols // 16, 8, 4, 2, 2, 2)
    return split.permute(0, 1, 6, 3, 2, 5, 4, 7).reshape(n, BLOCK, cols).view(_BITS[bits // 8])


def _words(nibbles: Tensor) -> Tensor:
    """Integers ``[..., 8]``, of which four bits count, to int32 words ``[...]``, the first in the lowest bits."""
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=nibbles.device)
    return ((nibbles.to(torch.int32) & 15) << shifts).sum(-1, dtype=torch.int32)


def _eighths(words: Tensor) -> Tensor:
    """The inverse of ``_words``: int32 ``[...]`` to int32 ``[..., 8]``, 0 to 15."""
    return words[..., None] >> 4 * torch.arange(8, dtype=torch.int32, device=words.device) & 15


def _encode_sparse(blocks: Tensor, patterns: Tensor, bits: int) -> Tensor:
    """Values and metadata of 2:4 blocks: bits ``[n, 64, c]``, patterns ``[n, 64, c / 4]`` to int32 ``[n, words]``."""
    pairs = torch.tensor(KEPT_PAIRS, device=blocks.device)[patterns.long()]  # n, 64, groups, 2
    values = blocks.reshape(*patterns.shape, GROUP).gather(-1, pairs).flatten(2)
    shape, order = _METADATA[bits]
    n = blocks.shape[0]
    nibbles = (pairs[..., 0] | pairs[..., 1] << 2).reshape(n, *shape).permute(0, *(1 + axis for axis in order))
    words = _words(nibbles.reshape(n, BLOCK * patterns.shape[2] // 8, 8))
    return torch.cat([_to_fragments(values, bits), words], dim=1)


def _nibbles(words: Tensor, bits: int) -> Tensor:
    """Metadata words of records ``[n, words]`` to nibbles ``[n, 64, groups]``."""
    n = words.shape[0]
    shape, order = _METADATA[bits]
    stored = _eighths(words).reshape(n, *(shape[axis] for axis in order))
    back = sorted(range(len(order)), key=order.__getitem__)
    return stored.permute(0, *(1 + axis for axis in back)).reshape(n, BLOCK, words.shape[1] // 8)


def _decode_dense(words: Tensor, bits: int) -> Tensor:
    """Dense records, int32 ``[n, words]``, to blocks ``[n, 64, c]``, as integers of their bytes."""
    return _from_fragments(words[:, : BLOCK * LAYOUTS[bits].columns * bits // 32], bits)


def _decode_sparse(words: Tensor, bits: int) -> Tensor:
    """The inverse of ``_encode_sparse``: int32 ``[n, words]`` to masked blocks ``[n, 64, c]``."""
    layout = LAYOUTS[bits]
    values = _from_fragments(words[:, : layout.metadata], bits)
    nibbles = _nibbles(words[:, layout.metadata : layout.metadata + 2 * layout.columns], bits)
    pairs = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
    blocks = torch.zeros(*nibbles.shape, GROUP, dtype=values.dtype, device=words.device)
    blocks.scatter_(-1, pairs, values.reshape(*nibbles.shape, 2))
    return blocks.flatten(2)


def _check_grouped(weight: Tensor, scales: Tensor | None) -> None:
    """Check values and scales of INT4 before they are packed."""
    n, k = weight.shape
    if k % SCALE_GROUP:
        raise UserError(f"weight {n}x{k}: INT4 is packed in whole groups of {SCALE_GROUP} inputs")
    if scales is None or tuple(scales.shape) != (n, k // SCALE_GROUP) or scales.dtype != torch.float32:
        found = None if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
        raise UserError(
            f"INT4 scales are {found}, need float32 {(n, k // SCALE_GROUP)}: a scale for each {SCALE_GROUP} inputs "
            f"(of INT8 {(n,)}, for each feature)"
        )
    if weight.numel() and not INT4_RANGE[0] <= int(weight.min()) <= int(weight.max()) <= INT4_RANGE[1]:
        raise UserError(f"INT4 values lie in {int(weight.min())}..{int(weight.max())}, not -8..7")
    if not torch.equal(scales.to(torch.bfloat16).float().nan_to_num(), scales.nan_to_num()):
        raise UserError("INT4 scales are not all numbers of bfloat16, as which they are packed: round them")


def _check_kinds(hybrid: HybridWeight) -> None:
    n, k = hybrid.shape
    if n < 1 or k < 8 or k % 8:
        raise UserError(f"packed weight {n}x{k}: in_features must be a positive multiple of 8")
    check_dtype(hybrid.dtype)
    if hybrid.dtype not in SCALED and hybrid.scales is not None:
        raise UserError(f"packed weight of {hybrid.dtype} has scales: only float8_e4m3fn and int8 take them")
    if hybrid.dtype == GROUPED and k % SCALE_GROUP:
        raise UserError(f"packed weight {n}x{k}: of int4 in_features must be a multiple of {SCALE_GROUP}, a group")
    if hybrid.dtype in SCALED and hybrid.scales is None:
        raise UserError(f"packed weight of {hybrid.dtype} has no scales: it needs float32 ({n},), one for each feature")
    wanted = {
        "records": (len(hybrid.records) if hybrid.records.dim() else 0, layout_of(hybrid.dtype).unit),
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
    layout = layout_of(hybrid.dtype)
    units = layout.sparse * sparse + layout.dense * (hybrid.steps - sparse)
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
    if hybrid.dtype in DTYPES:
        return
    scales = scales_of(hybrid)
    wrong = (~(scales.isfinite() & (scales > 0))).nonzero()
    if len(wrong):
        row, group = (int(place) for place in wrong[0])
        at = f"{row}" if hybrid.scales is not None else f"{row}, {group}"
        raise UserError(f"packed scales[{at}] is {float(scales[row, group])}: scales must be positive and finite")
