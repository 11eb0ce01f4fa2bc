"""The packed layout: packs and unpacks bit for bit, is what its documentation says, and refuses anything else."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stoicc_hybrids import random_hybrid, random_mask, random_weight
from torch import Tensor

from patch.errors import UserError
from patch.mask import KEPT_PAIRS, HybridMask, expand_tiles
from patch.tiles import TileShape, tile_grid
from stoicc.format import HybridWeight, pack, pack_masked, unpack

TILES = [(rows, cols) for rows in (64, 128, 256) for cols in (64, 128, 256)]
RAGGED = [
    (576, 192),
    (192, 576),
    (1536, 72),
    (8, 11008),
    (11008, 8),
    (72, 1536),
    (200, 344),
    (65, 8),
    (1, 64),
    (63, 136),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
EIGHT = [torch.float8_e4m3fn, torch.int8]
# On a CPU, torch's gather and scatter_ give bfloat16 NaNs another payload and quiet float16 ones.


def size_id(size: Any) -> str | None:
    """``64x128`` for pairs; other parameters keep pytest's own id."""
    return f"{size[0]}x{size[1]}" if isinstance(size, tuple) else str(size).removeprefix("torch.")


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view({1: torch.int8, 2: torch.int16}[values.itemsize])


def packed_with_scales(weight: Tensor, mask: HybridMask) -> HybridWeight:
    """``pack``, of 8 bits with scales of which no two are alike."""
    eight = weight.dtype in EIGHT
    return pack(weight, mask, torch.linspace(0.5, 2, weight.shape[0]) if eight else None)


def random_bits(n: int, k: int, dtype: torch.dtype, seed: int = 0, *, nans: bool = False) -> Tensor:
    """A weight of any bits there are: infinities, subnormals, both zeros; on demand NaNs of all payloads."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in EIGHT:
        return torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8).view(dtype)
    weight = torch.randint(-(1 << 15), 1 << 15, (n, k), generator=generator).to(torch.int16).view(dtype)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf")], dtype=dtype)
    chosen = special[torch.randint(0, 4, (n, k), generator=generator)]
    other = (torch.rand(n, k, generator=generator) < 0.3) | (weight.isnan() & (not nans))
    return torch.where(other, bits(chosen), bits(weight)).view(dtype)


def assert_round_trip(weight: Tensor, mask: HybridMask) -> HybridWeight:
    packed = packed_with_scales(weight, mask)
    unpacked = unpack(packed)
    assert unpacked.dtype == weight.dtype and unpacked.shape == weight.shape
    assert torch.equal(bits(unpacked), bits(weight).masked_fill(~mask.keep(), 0))
    return packed


def fitting(tile: TileShape, n: int, k: int) -> TileShape:
    """The tile, no larger than the weight."""
    return min(tile[0], n), min(tile[1], k)


def stored_densely(mask: HybridMask, width: int = 64) -> Tensor:
    """bool ``[panels, steps]``: the blocks of 64 rows that hold any of a dense tile, found block by block."""
    dense = expand_tiles(mask.dense, mask.shape, mask.tile)
    rows, cols = range(0, mask.shape[0], 64), range(0, mask.shape[1], width)
    return torch.tensor([[bool(dense[r : r + 64, c : c + width].any()) for c in cols] for r in rows])


# Round trip


@pytest.mark.parametrize("dtype", DTYPES, ids=size_id)
@pytest.mark.parametrize("tile", [*TILES, (32, 32)], ids=size_id)
def test_round_trip_of_every_tile_shape(tile: TileShape, dtype: torch.dtype) -> None:
    mask = random_mask(576, 704, tile, 0.5, seed=sum(tile))
    packed = assert_round_trip(random_bits(576, 704, dtype), mask)
    assert packed.tile == tile
    assert torch.equal(packed.block_map(), stored_densely(mask, 128 if dtype in EIGHT else 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=size_id)
@pytest.mark.parametrize("shape", RAGGED, ids=size_id)
@pytest.mark.parametrize("tile", [(64, 64), (128, 256), (32, 32)], ids=size_id)
def test_round_trip_of_ragged_shapes(tile: TileShape, shape: tuple[int, int], dtype: torch.dtype) -> None:
    mask = random_mask(*shape, fitting(tile, *shape), 0.6)
    assert_round_trip(random_bits(*shape, dtype), mask)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["all-dense", "all-two-four"])
@pytest.mark.parametrize("shape", [(256, 320), (200, 344)], ids=size_id)
def test_round_trip_of_one_kind_only(shape: tuple[int, int], share: float) -> None:
    packed = assert_round_trip(random_bits(*shape, torch.bfloat16), random_mask(*shape, (64, 64), share))
    assert packed.sparse_share == share


@settings(max_examples=60)
@given(data=st.data())
def test_round_trip_of_any_shape(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300), "n")
    k = 8 * data.draw(st.integers(1, 40), "k / 8")
    tile = (
        data.draw(st.integers(1, min(n, 130)), "tile rows"),
        4 * data.draw(st.integers(1, min(k // 4, 40)), "cols / 4"),
    )
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    seed = data.draw(st.integers(0, 1000), "seed")
    mask = random_mask(n, k, tile, data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]), "share"), uneven=True, seed=seed)
    assert_round_trip(random_bits(n, k, dtype, seed), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=size_id)
def test_round_trip_of_every_nan(dtype: torch.dtype) -> None:
    assert_round_trip(random_bits(512, 512, dtype, nans=True), random_mask(512, 512, (64, 64), 0.5))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(0.0, id="zero"),
        pytest.param(-0.0, id="minus-zero"),
        pytest.param(float("inf"), id="inf"),
        pytest.param(float("nan"), id="nan"),
    ],
)
def test_kept_slots_come_from_the_mask_and_not_from_the_values(value: float) -> None:
    mask = random_mask(64, 64, (64, 64), 1.0, seed=3)
    packed = assert_round_trip(torch.full((64, 64), value, dtype=torch.bfloat16), mask)
    assert torch.equal(naive_patterns(packed)[0, 0], mask.patterns)


def test_strided_weight_that_needs_a_gradient() -> None:
    weight = random_bits(320, 128, torch.float16).T.requires_grad_()
    packed = pack(weight, random_mask(128, 320, (64, 64), 0.5))
    assert not packed.records.requires_grad
    assert torch.equal(bits(unpack(packed)), bits(random_mask(128, 320, (64, 64), 0.5).apply(weight.detach())))


@pytest.mark.parametrize("tile", [(64, 64), (128, 128), (32, 32)], ids=size_id)
def test_plain_masked_weight_packs_as_with_its_mask(tile: TileShape) -> None:
    mask = random_mask(320, 448, tile, 0.5)
    weight = torch.randn(320, 448).clamp(min=0.1).to(torch.bfloat16)
    expected, found = pack(weight, mask), pack_masked(mask.apply(weight), tile)
    assert found.band == expected.band
    for name, part in expected.parts().items():
        assert torch.equal(part, found.parts()[name]), name


# Size


@pytest.mark.parametrize("shape", [(1024, 1024), (256, 11008), (11008, 256), (576, 576)], ids=size_id)
def test_two_four_takes_at_most_0565_of_the_bytes(shape: tuple[int, int]) -> None:
    packed = random_hybrid(*shape, (64, 64), 1.0)
    assert packed.nbytes == sum(part.numel() * 4 for part in packed.parts().values())
    assert packed.nbytes <= 0.565 * 2 * shape[0] * shape[1]


@pytest.mark.parametrize("dtype", EIGHT, ids=size_id)
@pytest.mark.parametrize("shape", [(1024, 1024), (256, 11008), (11008, 256), (640, 640)], ids=size_id)
def test_two_four_of_eight_bits_takes_at_most_063_of_the_bytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = packed_with_scales(random_bits(*shape, dtype), random_mask(*shape, (64, 64), 1.0))
    # Without the scales, which a dense weight of 8 bits has as well.
    assert packed.nbytes - 4 * shape[0] <= 0.63 * shape[0] * shape[1]


def test_dense_takes_no_more_than_its_bytes_and_the_schedule() -> None:
    packed = random_hybrid(512, 512, (64, 64), 0.0)
    assert packed.records.numel() * 4 == 2 * 512 * 512
    assert packed.nbytes <= 1.001 * 2 * 512 * 512


# The layout, as documented


def _natural(hybrid: HybridWeight) -> list[list[int]]:
    """The units at which each panel's records start, by adding up the sizes of those before."""
    starts, unit = [], 0
    for panel in range(hybrid.panels):
        assert int(hybrid.starts[panel]) == unit
        starts.append([])
        for index in range(hybrid.steps):
            starts[-1].append(unit)
            sparse = 10 if hybrid.dtype in EIGHT else 9
            unit += sparse if index < int(hybrid.sparse_blocks[panel]) else 16
    assert int(hybrid.starts[-1]) == unit == hybrid.records.shape[0]
    return starts


def _value(halves: list[int], base: int, row: int, column: int, columns: int) -> int:
    """The 16 bits at ``row`` and stored ``column`` of a record that starts at ``base`` and stores ``columns`` a row."""
    warp, q, half = row // 16, row % 8, row % 16 // 8
    k_step, p, right = column // 16, column % 8 // 2, column % 16 // 8
    register = half + 2 * right  # of one instruction: rows q and q + 8, then columns from 8 on
    lane = 4 * q + p
    fragment = warp * (columns // 16) + k_step
    return halves[base + fragment * 256 + lane * 8 + register * 2 + column % 2]


def _byte(numbers: list[int], base: int, row: int, column: int, columns: int) -> int:
    """The 8 bits at ``row`` and stored ``column``, of the record's bytes: in pairs where those of 16 bits are."""
    warp, q, half = row // 16, row % 8, row % 16 // 8
    k_step, p, right = column // 32, column % 16 // 4, column % 32 // 16
    lane, register = 4 * q + p, half + 2 * right
    return numbers[base + (warp * (columns // 32) + k_step) * 512 + lane * 16 + register * 4 + column % 4]


def _nibble_of_eight(words: list[int], base: int, row: int, group: int) -> int:
    warp, q, half = row // 16, row % 8, row % 16 // 8
    k_step, eight, place = group // 16, group % 16 // 8, group % 8
    return words[base + 128 * k_step + warp * 32 + 4 * q + 2 * eight + half] >> 4 * place & 15


def _nibble(words: list[int], base: int, row: int, group: int) -> int:
    warp, q, half = row // 16, row % 8, row % 16 // 8
    s, p = group // 8, group % 8 // 4
    word = words[base + warp * 32 + 4 * q + 2 * s + p] & 0xFFFFFFFF
    return (word >> 16 if half else word & 0xFFFF) >> 4 * (group % 4) & 15


def naive_unpack(hybrid: HybridWeight) -> Tensor:
    """The bits of ``[N, K]``, element by element."""
    eight = hybrid.dtype in EIGHT
    kind, width = (torch.int8, 128) if eight else (torch.int16, 64)
    value, nibble_of = (_byte, _nibble_of_eight) if eight else (_value, _nibble)
    numbers = hybrid.records.view(kind).flatten().tolist()
    unit_values = 512 // kind.itemsize
    words = hybrid.records.flatten().tolist()
    weight = torch.zeros(hybrid.panels * 64, hybrid.steps * width, dtype=kind)
    for panel, units in enumerate(_natural(hybrid)):
        for index, unit in enumerate(units):
            base = unit * unit_values
            block = [[0] * width for _ in range(64)]
            for row in range(64):
                if index >= int(hybrid.sparse_blocks[panel]):
                    block[row] = [value(numbers, base, row, column, width) for column in range(width)]
                    continue
                for group in range(width // 4):
                    nibble = nibble_of(words, (unit + 8) * 128, row, group)
                    for slot, place in enumerate((nibble & 3, nibble >> 2)):
                        block[row][4 * group + place] = value(numbers, base, row, 2 * group + slot, width // 2)
            column = width * int(hybrid.columns[panel, index])
            weight[64 * panel : 64 * panel + 64, column : column + width] = torch.tensor(block, dtype=kind)
    return weight[: hybrid.shape[0], : hybrid.shape[1]]


def naive_patterns(hybrid: HybridWeight) -> dict[tuple[int, int], Tensor]:
    """uint8 ``[64, 16]`` of each 2:4 block by panel and block column, as metadata says."""
    words = hybrid.records.flatten().tolist()
    found = {}
    for panel, units in enumerate(_natural(hybrid)):
        for index, unit in enumerate(units[: int(hybrid.sparse_blocks[panel])]):
            nibbles = [[_nibble(words, (unit + 8) * 128, row, group) for group in range(16)] for row in range(64)]
            patterns = [[KEPT_PAIRS.index((nibble & 3, nibble >> 2)) for nibble in row] for row in nibbles]
            found[panel, int(hybrid.columns[panel, index])] = torch.tensor(patterns, dtype=torch.uint8)
    return found


def naive_walk(dense: Tensor, group: int, band: int) -> list[int]:
    """The order in which both bands of ``group`` see block columns; a band that is missing is like the last panel."""
    first, second = (dense[min((2 * group + i) * band, len(dense) - 1)].tolist() for i in (0, 1))
    order = [(False, False), (False, True), (True, True), (True, False)]
    return sorted(range(dense.shape[1]), key=lambda column: (order.index((first[column], second[column])), column))


LAYOUTS = [
    pytest.param((192, 256), (64, 64), 1, id="band-1"),
    pytest.param((384, 320), (128, 64), 2, id="band-2"),
    pytest.param((200, 136), (64, 64), 1, id="ragged"),
    pytest.param((320, 192), (32, 32), 1, id="tiles-below-a-block"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=size_id)
@pytest.mark.parametrize(("shape", "tile", "band"), LAYOUTS)
def test_records_are_as_documented(shape: tuple[int, int], tile: TileShape, band: int, dtype: torch.dtype) -> None:
    mask = random_mask(*shape, tile, 0.85 if tile == (32, 32) else 0.5, seed=1)
    weight = random_bits(*shape, dtype)
    packed = packed_with_scales(weight, mask)
    if dtype not in EIGHT:  # in wider blocks panels may be alike that are not in these
        assert packed.band == band
    assert torch.equal(naive_unpack(packed), bits(weight).masked_fill(~mask.keep(), 0))


def test_metadata_is_the_masks_patterns() -> None:
    mask = random_mask(256, 192, (64, 64), 0.6, seed=1)
    found = naive_patterns(pack(random_weight(256, 192), mask))
    assert sorted(found) == [tuple(at) for at in (~mask.dense).nonzero().tolist()]
    for (panel, column), patterns in found.items():
        assert torch.equal(patterns, mask.patterns[64 * panel : 64 * panel + 64, 16 * column : 16 * column + 16])


@pytest.mark.parametrize("rows", [64, 128, 256])
@pytest.mark.parametrize("panels", range(1, 10))
def test_columns_follow_the_walk_of_their_group(panels: int, rows: int) -> None:
    n = 64 * panels
    mask = random_mask(n, 832, (min(rows, n), 64), 0.5, seed=panels)
    packed = pack(random_weight(n, 832), mask)
    dense = stored_densely(mask)
    pairs = zip(dense[0::2], dense[1::2], strict=False)
    assert packed.band == (2 if all(torch.equal(a, b) for a, b in pairs) else 1)
    for panel in range(panels):
        walk = naive_walk(dense, panel // (2 * packed.band), packed.band)
        own = [column for column in walk if not dense[panel, column]] + [
            column for column in walk if dense[panel, column]
        ]
        assert packed.columns[panel].tolist() == own
        lead = next((i for i, column in enumerate(walk) if dense[panel, column]), len(walk))
        assert int(packed.leads[panel]) == lead
        if panel % (2 * packed.band) == 0:
            assert packed.columns[panel].tolist() == walk


@pytest.mark.parametrize("group", [1, 2, 4])
def test_order_is_by_falling_bytes(group: int) -> None:
    packed = random_hybrid(64 * 11, 512, (64, 64), 0.5, uneven=True)
    entries = packed.order(group).tolist()
    order = [index for index, *_ in entries]
    units = (packed.starts[1:] - packed.starts[:-1]).tolist()
    units += [units[-1]] * (-len(units) % group)
    sizes = [sum(units[i : i + group]) for i in range(0, len(units), group)]
    assert sorted(order) == list(range(len(sizes)))
    assert [sizes[i] for i in order] == sorted(sizes, reverse=True)
    for index, start, second, sparse in entries:
        last = packed.panels - 1
        assert start == packed.starts[index * group]
        assert second == packed.starts[min(index * group + min(group - 1, 1), last)]
        assert sparse == packed.sparse_blocks[index * group]


def test_orders_are_those_of_one_two_and_four_panels() -> None:
    packed = random_hybrid(64 * 5, 128, (64, 64), 0.5)
    assert packed.orders.tolist() == [*packed.order(1).tolist(), *packed.order(2).tolist(), *packed.order(4).tolist()]
    assert packed.orders.shape == (5 + 3 + 2, 4)


def test_copy_shares_no_memory() -> None:
    packed = random_hybrid(128, 128, (64, 64), 0.5)
    copied = packed.copy()
    before = unpack(copied)
    packed.records.zero_()
    assert torch.equal(unpack(copied), before)
    assert (copied.shape, copied.tile, copied.dtype, copied.band) == (
        packed.shape,
        packed.tile,
        packed.dtype,
        packed.band,
    )


def test_without_data_only_kinds_are_checked() -> None:
    packed = random_hybrid(128, 128, (64, 64), 0.5)
    meta = {name: part.to("meta") for name, part in packed.parts().items()}
    assert HybridWeight(packed.shape, packed.tile, packed.dtype, **meta, band=packed.band).device.type == "meta"
    with pytest.raises(UserError, match="columns"):
        HybridWeight(packed.shape, packed.tile, packed.dtype, **{**meta, "columns": meta["leads"]}, band=packed.band)


# What is refused


def rebuilt(hybrid: HybridWeight, **changes: Any) -> HybridWeight:
    values = {field.name: getattr(hybrid, field.name) for field in fields(hybrid) if field.init}
    return HybridWeight(**{**values, **changes})


def changed(part: Tensor, at: tuple[int, ...], value: int) -> Tensor:
    part = part.clone()
    part[at] = value
    return part


def swapped(part: Tensor, row: int, i: int, j: int) -> Tensor:
    part = part.clone()
    part[row, [i, j]] = part[row, [j, i]]
    return part


def with_nibble(hybrid: HybridWeight, panel: int, row: int, group: int, nibble: int) -> Tensor:
    """The records with one nibble of a panel's first record replaced."""
    records = hybrid.records.clone()
    unit = int(hybrid.starts[panel]) + 8
    lane = 4 * (row % 8) + 2 * (group // 8) + group % 8 // 4
    at = (unit, row // 16 * 32 + lane)
    shift = 16 * (row % 16 // 8) + 4 * (group % 4)
    word = int(records[at]) & 0xFFFFFFFF & ~(15 << shift) | nibble << shift
    records[at] = word - (1 << 32) if word >= 1 << 31 else word
    return records


@pytest.fixture(scope="module")
def hybrid() -> HybridWeight:
    """Four panels of four blocks, each panel with at least two 2:4 and one dense block, no two alike."""
    dense = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    mask = random_mask(256, 256, (64, 64), 0.5)
    return pack(random_weight(256, 256), HybridMask(mask.shape, mask.tile, dense, mask.patterns))


Change = Callable[[HybridWeight], dict[str, Any]]
REFUSED: list[tuple[str, Change, str]] = [
    ("shape-no-rows", lambda h: {"shape": (0, 256)}, "multiple of 8"),
    ("shape-inputs", lambda h: {"shape": (256, 252)}, "in_features must be a positive multiple of 8"),
    ("shape-more-panels", lambda h: {"shape": (320, 256)}, "starts"),
    ("shape-more-steps", lambda h: {"shape": (256, 320)}, "columns"),
    ("tile", lambda h: {"tile": (64, 63)}, "tile"),
    ("dtype", lambda h: {"dtype": torch.float32}, "dtype torch.float32"),
    ("band-3", lambda h: {"band": 3}, "bands"),
    ("band-0", lambda h: {"band": 0}, "bands"),
    ("band-not-uniform", lambda h: {"band": 2}, "different block maps"),
    ("records-dtype", lambda h: {"records": h.records.long()}, "records is torch.int64"),
    ("records-width", lambda h: {"records": h.records[:, :64].contiguous()}, "records"),
    ("records-flat", lambda h: {"records": h.records.flatten()}, "records"),
    ("records-short", lambda h: {"records": h.records[:-1]}, "records have"),
    ("records-long", lambda h: {"records": torch.cat([h.records, h.records[:1]])}, "records have"),
    ("records-strides", lambda h: {"records": h.records.T.contiguous().T}, "records has strides"),
    ("records-device", lambda h: {"records": h.records.to("meta")}, "records are on meta"),
    ("starts-device", lambda h: {"starts": h.starts.to("meta")}, "starts is on meta"),
    ("starts-dtype", lambda h: {"starts": h.starts.long()}, "starts"),
    ("starts-short", lambda h: {"starts": h.starts[:-1]}, "starts"),
    ("starts-first", lambda h: {"starts": changed(h.starts, (0,), 1)}, r"starts\[0\] is 1"),
    ("starts-middle", lambda h: {"starts": changed(h.starts, (2,), -5)}, r"starts\[2\] is -5"),
    ("starts-last", lambda h: {"starts": changed(h.starts, (4,), 2**31 - 1)}, r"starts\[4\]"),
    ("sparse-blocks-dtype", lambda h: {"sparse_blocks": h.sparse_blocks.short()}, "sparse_blocks"),
    (
        "sparse-blocks-negative",
        lambda h: {"sparse_blocks": changed(h.sparse_blocks, (1,), -1)},
        "sparse_blocks lie in -1",
    ),
    (
        "sparse-blocks-above",
        lambda h: {"sparse_blocks": changed(h.sparse_blocks, (1,), 5)},
        "sparse_blocks lie in 2..5",
    ),
    ("sparse-blocks-other", lambda h: {"sparse_blocks": changed(h.sparse_blocks, (2,), 1)}, r"starts\[3\]"),
    ("columns-shape", lambda h: {"columns": h.columns[:, :3].contiguous()}, "columns"),
    ("columns-strides", lambda h: {"columns": h.columns.T.contiguous().T}, "columns has strides"),
    ("columns-twice", lambda h: {"columns": changed(h.columns, (2, 0), int(h.columns[2, 1]))}, "columns of panel 2"),
    ("columns-above", lambda h: {"columns": changed(h.columns, (3, 3), 4)}, "columns of panel 3"),
    ("columns-negative", lambda h: {"columns": changed(h.columns, (1, 0), -1)}, "columns of panel 1"),
    ("columns-order-two-four", lambda h: {"columns": swapped(h.columns, 2, 0, 1)}, "columns of panel 2 .* walk"),
    ("columns-order-dense", lambda h: {"columns": swapped(h.columns, 0, 2, 3)}, "columns of panel 0 .* walk"),
    ("leads-shape", lambda h: {"leads": h.leads[:, None]}, "leads"),
    ("leads-above", lambda h: {"leads": h.leads + 1}, "leads of panel 0"),
    ("leads-one", lambda h: {"leads": changed(h.leads, (3,), -1)}, "leads of panel 3"),
    ("metadata-equal", lambda h: {"records": with_nibble(h, 0, 0, 0, 0b0101)}, "metadata: .* row 0, group 0 "),
    ("metadata-falling", lambda h: {"records": with_nibble(h, 2, 45, 13, 0b0010)}, "metadata: .* row 45, group 13 "),
    ("metadata-zero", lambda h: {"records": with_nibble(h, 3, 63, 15, 0)}, "metadata: .* row 63, group 15 "),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_broken_invariant_is_named(hybrid: HybridWeight, change: Change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rebuilt(hybrid, **change(hybrid))


def test_what_is_not_broken_is_accepted(hybrid: HybridWeight) -> None:
    again = rebuilt(hybrid, records=with_nibble(hybrid, 0, 9, 3, 0b1101))
    assert naive_patterns(again)[0, 0][9, 3] == KEPT_PAIRS.index((1, 3))


def test_walk_depends_on_the_band() -> None:
    """Two bands of one panel have other groups than one of two, so the band may not be changed."""
    packed = random_hybrid(512, 512, (128, 64), 0.5, seed=2)
    assert packed.band == 2
    with pytest.raises(UserError, match="walk"):
        rebuilt(packed, band=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.float8_e5m2], ids=size_id)
def test_pack_refuses_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=str(dtype)):
        pack(torch.zeros(64, 64).to(dtype), random_mask(64, 64, (64, 64), 1.0))


SCALES: list[tuple[str, torch.dtype, Tensor | None, str]] = [
    ("missing", torch.float8_e4m3fn, None, r"has no scales: it needs float32 \(64,\)"),
    ("not-wanted", torch.bfloat16, torch.ones(64), "has scales: only float8_e4m3fn and int8"),
    ("shape", torch.int8, torch.ones(63), r"scales is torch.float32 \(63,\), needs float32 \(64,\)"),
    ("dtype", torch.int8, torch.ones(64).double(), r"scales is torch.float64"),
    ("zero", torch.int8, torch.ones(64).index_fill(0, torch.tensor([3]), 0.0), r"scales\[3\] is 0.0: .*positive"),
    ("negative", torch.float8_e4m3fn, torch.linspace(1, -1, 64), r"scales\[32\] is -0.0"),
    ("nan", torch.float8_e4m3fn, torch.full((64,), float("nan")), r"scales\[0\] is nan: .*finite"),
    ("infinite", torch.float8_e4m3fn, torch.full((64,), float("inf")), r"scales\[0\] is inf"),
]


@pytest.mark.parametrize(("dtype", "scales", "message"), [pytest.param(*case[1:], id=case[0]) for case in SCALES])
def test_scales_that_cannot_be(dtype: torch.dtype, scales: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(torch.zeros(64, 64).to(dtype), random_mask(64, 64, (64, 64), 1.0), scales)


def test_eight_bits_survive_a_move_and_a_copy() -> None:
    packed = packed_with_scales(random_bits(192, 384, torch.int8), random_mask(192, 384, (64, 128), 0.5))
    for again in (packed.to("cpu"), packed.copy(), rebuilt(packed)):
        assert again.parts().keys() == packed.parts().keys() and "scales" in again.parts()
        assert torch.equal(unpack(again), unpack(packed))
        assert again.scales is not None and packed.scales is not None and torch.equal(again.scales, packed.scales)


def test_metadata_of_eight_bits_is_checked() -> None:
    packed = packed_with_scales(random_bits(64, 256, torch.int8), random_mask(64, 256, (64, 128), 1.0))
    records = packed.records.clone()
    # Row 9 of the second k-step's groups from 8 on, the first of them.
    records[9, 4 * 1 + 2 + 1] &= ~15
    with pytest.raises(UserError, match="row 9, group 24 keeps positions 0 and 0"):
        rebuilt(packed, records=records)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (64,)], ids=str)
def test_pack_refuses_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"mask is for a weight of \(64, 64\)"):
        pack(torch.zeros(shape, dtype=torch.bfloat16), random_mask(64, 64, (64, 64), 1.0))


def test_pack_refuses_inputs_that_are_no_multiple_of_eight() -> None:
    with pytest.raises(UserError, match="64x60: in_features must be a multiple of 8"):
        pack(random_weight(64, 60), random_mask(64, 60, (64, 60), 1.0))


def test_pack_masked_refuses_dtype() -> None:
    with pytest.raises(UserError, match="float32"):
        pack_masked(torch.randn(64, 64), (64, 64))


def test_grid_of_helpers() -> None:
    """The helper of these tests that finds blocks agrees with the grid of tiles where tiles are blocks."""
    mask = random_mask(200, 344, (64, 64), 0.5)
    assert stored_densely(mask).shape == tile_grid((200, 344), (64, 64))
    assert torch.equal(stored_densely(mask), mask.dense)
