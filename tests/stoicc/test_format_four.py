"""The packed layout of 4 bits: packs and unpacks exactly, is what its documentation says, and refuses anything else."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from stoicc_hybrids import random_mask
from torch import Tensor

from patch.errors import UserError
from patch.mask import HybridMask
from patch.quantise.values import quantise_groups
from patch.tiles import TileShape
from stoicc.format import HybridWeight, dequantised, mask_of, pack, scales_of, unpack

SHAPES = [
    pytest.param((192, 256), (64, 128), 0.5, id="blocks"),
    pytest.param((384, 640), (128, 128), 0.5, id="band-2"),
    pytest.param((200, 384), (64, 64), 0.9, id="narrow-tiles"),
    pytest.param((65, 256), (32, 32), 0.95, id="tiles-below-a-block"),
    pytest.param((1, 128), (1, 128), 1.0, id="one-row"),
    pytest.param((128, 256), (64, 128), 0.0, id="all-dense"),
    pytest.param((128, 256), (64, 128), 1.0, id="all-two-four"),
]


def operands(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values of all sixteen, and scales of which few are alike."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8)
    return values, (torch.rand(n, k // 128, generator=generator) + 0.01).bfloat16().float()


def packed(n: int, k: int, tile: TileShape, share: float) -> tuple[HybridWeight, HybridMask, Tensor, Tensor]:
    mask = random_mask(n, k, (min(tile[0], n), min(tile[1], k)), share, uneven=True, seed=n)
    values, scales = operands(n, k)
    return pack(values, mask, scales), mask, values.masked_fill(~mask.keep(), 0), scales


@pytest.mark.parametrize(("shape", "tile", "share"), SHAPES)
def test_round_trip(shape: tuple[int, int], tile: TileShape, share: float) -> None:
    hybrid, _, values, scales = packed(*shape, tile, share)
    assert hybrid.dtype == torch.int4 and hybrid.scales is None
    for same in (hybrid, hybrid.copy(), hybrid.to("cpu"), rebuilt(hybrid)):
        assert unpack(same).dtype == torch.int8 and torch.equal(unpack(same), values)
        assert torch.equal(scales_of(same), scales)
        assert torch.equal(dequantised(same), values * scales.repeat_interleave(128, 1))
    again = pack(unpack(hybrid), mask_of(hybrid), scales_of(hybrid))
    assert all(torch.equal(part, again.parts()[name]) for name, part in hybrid.parts().items())
    assert 0 < hybrid.sparse_share < 1 or hybrid.sparse_share == share


def nibble(word: int, place: int) -> int:
    return word >> 4 * place & 15


def stored(words: list[int], row: int, column: int, columns: int) -> int:
    """The value at a row and stored column of a record's words, which has ``columns`` a row."""
    warp, half, q = row // 16, row % 16 // 8, row % 8
    k_step, p, right, pair = column // 16, column % 8 // 2, column % 16 // 8, column % 2
    word = words[warp * columns * 2 + k_step // 4 * 128 + 4 * (4 * q + p) + k_step % 4]
    found = nibble(word, half + 2 * right + 4 * pair)
    return found - 16 if found > 7 else found


def kept(words: list[int], row: int, group: int) -> tuple[int, int]:
    """The positions that a 2:4 record keeps of a row's group of four."""
    warp, half, q = row // 16, row % 16 // 8, row % 8
    lane = 4 * q + 2 * (group % 16 // 8) + group % 8 // 4
    found = nibble(words[512 + 128 * (group // 16) + 32 * warp + lane] >> 16 * half, group % 4)
    return found & 3, found >> 2


def naive(hybrid: HybridWeight) -> tuple[Tensor, Tensor]:
    """Values ``[N, K]`` and scales ``[N, K / 128]``, element by element."""
    words = hybrid.records.flatten().tolist()
    values = torch.zeros(hybrid.panels * 64, hybrid.steps * 128, dtype=torch.int8)
    halves = torch.zeros(hybrid.panels * 64, hybrid.steps, dtype=torch.int16)
    at = 0
    for panel in range(hybrid.panels):
        assert int(hybrid.starts[panel]) * 32 == at
        for index, column in enumerate(hybrid.columns[panel].tolist()):
            sparse = index < int(hybrid.sparse_blocks[panel])
            record = words[at : at + 32 * (25 if sparse else 33)]
            at += len(record)
            for row in range(64):
                here = [0] * 128
                for group in range(32 if sparse else 0):
                    for slot, place in enumerate(kept(record, row, group)):
                        here[4 * group + place] = stored(record, row, 2 * group + slot, 64)
                if not sparse:
                    here = [stored(record, row, c, 128) for c in range(128)]
                values[64 * panel + row, 128 * column : 128 * column + 128] = torch.tensor(here, dtype=torch.int8)
                half = record[-32 + 8 * (row // 16) + row % 8] >> 16 * (row % 16 // 8) & 0xFFFF
                halves[64 * panel + row, column] = half
    assert at == len(words)
    n, k = hybrid.shape
    return values[:n, :k], halves.view(torch.bfloat16).float()[:n]


@pytest.mark.parametrize(("shape", "tile", "share"), SHAPES[:5])
def test_records_are_as_documented(shape: tuple[int, int], tile: TileShape, share: float) -> None:
    hybrid, _, values, scales = packed(*shape, tile, share)
    found, its_scales = naive(hybrid)
    assert torch.equal(found, values) and torch.equal(its_scales, scales)


def test_two_four_takes_three_bits_a_weight_dense_four_and_both_scales() -> None:
    for share, bits in ((1.0, 3), (0.0, 4)):
        hybrid, *_ = packed(1024, 1024, (64, 128), share)
        # The scales are two bytes for 128 weights; what is left are the schedule's columns.
        assert hybrid.nbytes / 1024**2 == pytest.approx(bits / 8 + 2 / 128, rel=0.003)


def rebuilt(hybrid: HybridWeight, **changes: Any) -> HybridWeight:
    values = {field.name: getattr(hybrid, field.name) for field in fields(hybrid) if field.init}
    return HybridWeight(**{**values, **changes})


VALUES, SCALES = operands(64, 256)
MASK = random_mask(64, 256, (64, 128), 0.5)


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        pytest.param(VALUES, SCALES.repeat_interleave(2, 1), r"scales are .*\(64, 4\).*\(64, 2\)", id="groups-of-64"),
        pytest.param(VALUES, SCALES[:63], r"\(63, 2\), need float32 \(64, 2\)", id="rows"),
        pytest.param(VALUES, SCALES.double(), "float64", id="scales-dtype"),
        pytest.param(VALUES, SCALES + 1e-5, "numbers of bfloat16", id="not-bfloat16"),
        pytest.param(VALUES, -SCALES, r"scales\[0, 0\] is -0\..*positive", id="negative"),
        pytest.param(VALUES, SCALES.index_fill(1, torch.tensor(1), float("nan")), r"scales\[0, 1\] is nan", id="nan"),
        pytest.param(VALUES, SCALES * float("inf"), r"is inf: .*finite", id="infinite"),
        pytest.param(VALUES * 2, SCALES, r"values lie in -16\.\.14, not -8\.\.7", id="range"),
        pytest.param(VALUES.to(torch.uint8), SCALES, "torch.uint8", id="dtype"),
    ],
)
def test_operands_that_cannot_be(values: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(values, MASK, scales)


def test_inputs_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(UserError, match="64x192: INT4 is packed in whole groups of 128 inputs"):
        pack(VALUES[:, :192], random_mask(64, 192, (64, 64), 0.5), torch.ones(64, 3))
    hybrid = pack(VALUES, MASK, SCALES)
    with pytest.raises(UserError, match="64x264: of int4 in_features must be a multiple of 128"):
        rebuilt(hybrid, shape=(64, 264))


def test_damage_is_named() -> None:
    hybrid = pack(VALUES, MASK, SCALES)
    first = int(hybrid.columns[0, 0])
    records = hybrid.records.clone()
    # Of the first 2:4 record the second 64 columns' word of lane 0 of warp 1: row 16, groups 16 to 19.
    records[20 + 1, 0] &= ~15
    with pytest.raises(UserError, match="row 16, group 16 keeps positions 0 and 0"):
        rebuilt(hybrid, records=records)
    records = hybrid.records.clone()
    records[24, 8 + 3] = 0x3F80  # row 16 + 3 is one, row 16 + 11 zero
    with pytest.raises(UserError, match=rf"scales\[27, {first}\] is 0\.0"):
        rebuilt(hybrid, records=records)
    with pytest.raises(UserError, match=r"of torch\.int4 has scales"):
        rebuilt(hybrid, scales=torch.ones(64))
    with pytest.raises(UserError, match="records"):
        rebuilt(hybrid, records=hybrid.records.reshape(-1, 64))
    with pytest.raises(UserError, match="starts"):
        rebuilt(hybrid, dtype=torch.int8, records=hybrid.records[:56].reshape(-1, 128), scales=torch.ones(64))


def test_without_data_only_kinds_are_checked() -> None:
    hybrid = pack(VALUES, MASK, SCALES)
    meta = {name: part.to("meta") for name, part in hybrid.parts().items()}
    assert rebuilt(hybrid, **meta).device.type == "meta"
    with pytest.raises(UserError, match="records"):
        rebuilt(hybrid, **meta | {"records": meta["records"].to(torch.int64)})


def test_groups_are_rounded_to_nearest() -> None:
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[2, :128] = 0
    found = quantise_groups(weight, 128)
    assert found.group == 128 and torch.equal(found.scales, found.scales.bfloat16().float())
    largest = weight.float().reshape(5, 2, 128).abs().amax(2)
    assert bool((found.scales <= (largest / 7).clamp(min=1)).all())
    step = found.scales.repeat_interleave(128, 1)
    nearest = (weight.float() / step).round().clamp(-8, 7)
    assert torch.equal(found.values.float(), nearest)
    with pytest.raises(UserError, match="not finite"):
        quantise_groups(torch.full((1, 128), float("nan")), 128)
