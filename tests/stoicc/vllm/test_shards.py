"""What each process of a server holds of a masked model, without a server."""

import sys
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from stoicc_hybrids import random_mask, random_weight

import stoicc.vllm
from patch.errors import UserError
from patch.mask import HybridMask
from patch.quantise.values import quantise_groups, quantise_weight
from patch.tiles import TileShape
from stoicc.format import GROUPED, dequantised, mask_of, pack, unpack
from stoicc.spec import Spec
from stoicc.vllm.shards import (
    Part,
    Slice,
    layer_mask,
    pack_layer,
    packable,
    parts_of,
    repacked,
    sliced,
    slices,
    stacked,
    whole_rows,
)

TILES = [(128, 128), (64, 64), (48, 20), (32, 128)]


def whole(name: str, rows: int, columns: int) -> Slice:
    return Slice(name, range(rows), range(columns))


# Which rows and columns


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_column_parallel_parts_are_rows(rank: int) -> None:
    held = slices(["gate", "up"], [32, 32], 256, 64, 64, rank)
    rows = range(32 * rank, 32 * rank + 32)
    assert held == [Slice("gate", rows, range(64)), Slice("up", rows, range(64))]


def test_row_parallel_layers_are_columns() -> None:
    assert slices(["down"], [64], 64, 48, 96, 1) == [Slice("down", range(64), range(48, 96))]


@pytest.mark.parametrize(("rank", "heads"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_key_and_value_heads_fewer_than_processes_are_held_twice(rank: int, heads: int) -> None:
    # Eight query heads and two key heads of 16, on four processes.
    query, key, value = slices(list("qkv"), [32, 16, 16], 256, 128, 128, rank, [1, 2, 2])
    assert query.rows == range(32 * rank, 32 * rank + 32)
    assert key.rows == value.rows == range(16 * heads, 16 * heads + 16)


def test_a_layer_that_each_process_holds_whole() -> None:
    assert slices(["gate"], [40], 40, 64, 64, 3) == [whole("gate", 40, 64)]


def test_parts_that_the_checkpoint_has_in_one_weight() -> None:
    first, second = slices(["gate_up"], [32, 32], 128, 64, 64, 1)
    assert first == Slice("gate_up", range(32, 64), range(64)) and second == Slice("gate_up", range(96, 128), range(64))


@pytest.mark.parametrize(
    ("columns", "fits"),
    [(range(64), True), (range(40, 80), True), (range(2, 66), False), (range(4), False), (range(36, 72), False)],
)
def test_slices_that_cut_groups_cannot_be_packed(columns: range, fits: bool) -> None:
    assert packable([Slice("down", range(64), columns)], None) is fits


@pytest.mark.parametrize(("columns", "fits"), [(range(128, 384), True), (range(64), False)])
def test_slices_of_four_bits_are_of_whole_groups(columns: range, fits: bool) -> None:
    assert packable([Slice("down", range(64), columns)], GROUPED) is fits


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_rows_of_whole_linears(processes: int) -> None:
    sizes, copies = (
        [256 // processes, max(64 // processes, 32), max(64 // processes, 32)],
        [1, *[max(1, processes // 2)] * 2],
    )
    held = sum(sizes) * processes
    assert whole_rows(list("qkv"), sizes, held, copies) == {"q": 256, "k": 64, "v": 64}
    assert whole_rows(["qkv"], sizes, held, copies) == {"qkv": 384}
    assert whole_rows(["down"], [96], 96) == {"down": 96}


@pytest.mark.parametrize(("version", "registered"), [("0.19.2", False), ("0.20.0", True), ("dev", True)])
def test_a_server_that_is_too_old_is_told_in_one_line(
    version: str, registered: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version, raising=False)
    monkeypatch.setitem(sys.modules, "stoicc.vllm.plugin", ModuleType("plugin"))
    monkeypatch.setattr(stoicc.vllm, "version", lambda _: "1")
    stoicc.vllm.register()
    said = [record.getMessage() for record in caplog.records]
    assert said == [] if registered else f"0.20 and newer, this is {version}: update vLLM" in "".join(said)
    assert len(said) == (0 if registered else 1) and not any("\n" in line for line in said)


# Masks


def cut(mask: HybridMask, held: Slice) -> torch.Tensor:
    return mask.keep()[held.rows.start : held.rows.stop, held.columns.start : held.columns.stop]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (range(256), range(320)),
        (range(128, 256), range(320)),
        (range(256), range(160, 320)),
        (range(86, 172), range(8)),
        (range(200, 201), range(40, 120)),
    ],
    ids=str,
)
def test_a_slice_keeps_what_the_whole_keeps(tile: TileShape, rows: range, columns: range) -> None:
    mask = random_mask(256, 320, tile, 0.6)
    part = sliced(mask, rows, columns)
    assert torch.equal(part.keep(), cut(mask, Slice("", rows, columns)))


def test_slices_on_borders_keep_their_tiles() -> None:
    part = sliced(random_mask(256, 256, (64, 128), 0.5), range(64, 256), range(128, 256))
    assert part.tile == (64, 128) and part.dense.shape == (3, 1)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_stacked_masks_keep_what_each_keeps(tile: TileShape) -> None:
    masks = [random_mask(rows, 256, tile, 0.5, seed=rows) for rows in (192, 160, 139)]
    assert torch.equal(stacked(masks).keep(), torch.cat([mask.keep() for mask in masks]))


def test_parts_without_a_mask_are_dense() -> None:
    masks = {"k": random_mask(64, 128, (32, 32), 1.0)}
    mask = layer_mask([whole("q", 96, 128), whole("k", 64, 128)], masks)
    assert bool(mask.keep()[:96].all()) and torch.equal(mask.keep()[96:], masks["k"].keep())


def test_a_packed_weight_tells_its_mask() -> None:
    for n, k, tile in ((128, 256, (64, 64)), (200, 328, (128, 128)), (40, 24, (8, 8))):
        weight, mask = random_weight(n, k), random_mask(n, k, tile, 0.7)
        hybrid = pack(weight, mask)
        again = pack(unpack(hybrid), mask_of(hybrid))
        assert all(torch.equal(part, again.parts()[name]) for name, part in hybrid.parts().items())
        assert again.band == hybrid.band


def test_a_kept_zero_stays_in_its_slot_when_packed_again() -> None:
    hybrid = pack(torch.zeros(64, 64, dtype=torch.bfloat16), random_mask(64, 64, (64, 64), 1.0))
    assert torch.equal(pack(unpack(hybrid), mask_of(hybrid)).records, hybrid.records)


# Layers, in one process and in two and four


SIZES = {"q": 256, "k": 128, "v": 128}
K = 384


def model(dtype: torch.dtype | None, tile: TileShape) -> tuple[dict[str, HybridMask], dict[str, torch.Tensor]]:
    masks = {name: random_mask(rows, K, tile, 0.6, seed=rows + ord(name)) for name, rows in SIZES.items()}
    weights = {name: masks[name].apply(random_weight(rows, K, seed=ord(name))) for name, rows in SIZES.items()}
    return masks, weights


def held_by(rank: int, processes: int) -> list[Slice]:
    sizes = [rows // processes for rows in SIZES.values()]
    return slices(list(SIZES), sizes, sum(SIZES.values()), K, K, rank)


def joined(held: Sequence[Slice], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[each.name][each.rows.start : each.rows.stop] for each in held])


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("tile", [(128, 128), (48, 64)], ids=str)
def test_masked_layers_are_packed_as_each_process_holds_them(processes: int, tile: TileShape) -> None:
    masks, weights = model(None, tile)
    for rank in range(processes):
        held = held_by(rank, processes)
        local = joined(held, weights)
        hybrid = pack_layer(local, layer_mask(held, masks), None)
        assert torch.equal(unpack(hybrid), local) and hybrid.sparse_share > 0


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_packed_layers_are_cut_as_each_process_holds_them(processes: int, dtype: torch.dtype | None) -> None:
    masks, weights = model(dtype, (64, 128))
    names = tuple(SIZES.items())
    fused, mask = torch.cat(list(weights.values())), stacked(list(masks.values()))
    values, scales = (fused, None) if dtype is None else quantise_weight(fused, dtype)
    hybrid = pack(values, mask, scales)
    spec = Spec(names, K, hybrid.tile, hybrid.band, len(hybrid.records), False, str(hybrid.dtype)[len("torch.") :])
    parts = parts_of(spec, hybrid)
    for rank in range(processes):
        held = held_by(rank, processes)
        local = repacked(held, parts)
        wanted = joined(held, {name: part.values for name, part in parts.items()})
        assert torch.equal(unpack(local).view(torch.uint8), wanted.view(torch.uint8))
        if dtype is not None:
            assert local.scales is not None and scales is not None
            rows = torch.cat([torch.arange(each.rows.start, each.rows.stop) + _before(each.name) for each in held])
            assert torch.equal(local.scales, scales[rows])
    assert torch.equal(unpack(repacked(held_by(0, 1), parts)).view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("processes", [1, 2])
def test_packed_layers_of_four_bits_are_cut_by_rows_and_by_whole_groups(processes: int) -> None:
    mask = random_mask(256, 512, (64, 128), 0.5)
    weight = quantise_groups(mask.apply(random_weight(256, 512)), 128)
    hybrid = pack(weight.values, mask, weight.scales)
    spec = Spec((("o", 128), ("p", 128)), 512, hybrid.tile, hybrid.band, len(hybrid.records), False, "int4")
    parts = parts_of(spec, hybrid)
    rows, columns = 128 // processes, 512 // processes
    for rank in range(processes):
        across = [Slice(name, range(rows * rank, rows * (rank + 1)), range(512)) for name in "op"]
        along = [Slice("o", range(128), range(columns * rank, columns * (rank + 1)))]
        for held in (across, along):
            local = repacked(held, parts)
            chosen = slice(held[0].columns.start, held[0].columns.stop)
            kept = [torch.arange(part.rows.start, part.rows.stop) + 128 * (part.name == "p") for part in held]
            assert local.dtype == torch.int4
            assert torch.equal(dequantised(local), weight.dequantised()[torch.cat(kept), chosen])
    with pytest.raises(UserError, match="INT4 is packed in whole groups of 128 inputs"):
        repacked([Slice("o", range(128), range(64))], parts)


def _before(name: str) -> int:
    names = list(SIZES)
    return sum(SIZES[other] for other in names[: names.index(name)])


def test_a_dense_linear_beside_packed_ones() -> None:
    masks, weights = model(None, (64, 64))
    parts = {name: Part(weights[name], masks[name] if name != "q" else None) for name in SIZES}
    assert torch.equal(unpack(repacked(held_by(1, 2), parts)), joined(held_by(1, 2), weights))


def test_columns_of_a_row_parallel_layer() -> None:
    mask = random_mask(128, 512, (128, 128), 0.5)
    weight = mask.apply(random_weight(128, 512))
    for rank in range(4):
        held = slices(["down"], [128], 128, 128, 512, rank)
        local = repacked(held, {"down": Part(weight, mask)})
        assert torch.equal(unpack(local), weight[:, 128 * rank : 128 * rank + 128])


def test_masks_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="are not zero though the mask drops them"):
        pack_layer(random_weight(64, 64), random_mask(64, 64, (64, 64), 1.0), None)


def test_linears_of_several_precisions_in_one_layer_are_refused() -> None:
    mask = random_mask(64, 64, (64, 64), 1.0)
    values, scales = quantise_weight(mask.apply(random_weight(64, 64)), torch.int8)
    parts = {"gate": Part(values, mask, scales), "up": Part(random_weight(64, 64), mask)}
    with pytest.raises(UserError, match="gate, up are of bfloat16, int8"):
        repacked([whole("gate", 64, 64), whole("up", 64, 64)], parts)
