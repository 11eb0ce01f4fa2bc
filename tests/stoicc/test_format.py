"""The packed layout: nothing is lost, every word is where the module says, and nothing malformed gets through."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stoicc_hybrids import random_hybrid, random_mask, random_weight
from torch import Tensor

from patch.errors import UserError
from patch.mask import HybridMask, TileShape
from stoicc.format import BLOCK, DENSE_UNITS, SPARSE_UNITS, HybridWeight, pack, pack_masked, unpack

TILES = [(rows, cols) for rows in (64, 128, 256) for cols in (64, 128, 256)] + [(32, 32)]


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert left.shape == right.shape
    assert torch.equal(left.view(torch.int16), right.view(torch.int16))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0], ids=["dense", "mixed", "two-four"])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("shape", [(576, 512), (256, 576), (1536, 264), (264, 1536)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_unpacks_to_the_masked_weight(shape: tuple[int, int], tile: TileShape, share: float) -> None:
    weight, mask = random_weight(*shape), random_mask(*shape, tile, share)
    assert_same_bits(unpack(pack(weight, mask)), mask.apply(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(192, 11008), (11008, 192)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_long_ragged_shapes_in_both_dtypes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, mask = random_weight(*shape, dtype), random_mask(*shape, (64, 64), 0.5)
    assert_same_bits(unpack(pack(weight, mask)), mask.apply(weight))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), k=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_shape(n: int, k: int, share: float, seed: int) -> None:
    tile = (min(n, 64), min(8 * k, 64))
    weight, mask = random_weight(n, 8 * k, seed=seed), random_mask(n, 8 * k, tile, share, seed=seed)
    assert_same_bits(unpack(pack(weight, mask)), mask.apply(weight))


def test_kept_zeros_and_special_values_stay_in_their_slots() -> None:
    weight = random_weight(128, 128)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan")]
    weight.view(-1)[:: len(special)] = 0.0
    for place, value in enumerate(special):
        weight.view(-1)[place :: 3 * len(special)] = value
    mask = random_mask(128, 128, (64, 64), 0.75)
    assert_same_bits(unpack(pack(weight, mask)), mask.apply(weight))


def naive_record(hybrid: HybridWeight, panel: int, step: int) -> Tensor:
    """A block read element by element from its record, by the words of the module's description."""
    sparse = int(hybrid.sparse_blocks[panel])
    unit = int(hybrid.starts[panel]) + SPARSE_UNITS * min(step, sparse) + DENSE_UNITS * max(step - sparse, 0)
    two_four = step < sparse
    words = hybrid.records.view(-1)[unit * 128 :]
    halves = words.contiguous().view(hybrid.dtype)
    block = torch.zeros(BLOCK, BLOCK, dtype=hybrid.dtype)
    for row in range(BLOCK):
        warp, q, high = row // 16, row % 8, row % 16 // 8
        for stored in range(32 if two_four else 64):
            k_step, lane = stored // 16, 4 * q + stored % 8 // 2
            register = 2 * (stored % 16 // 8) + high
            value = halves[((warp * (2 if two_four else 4) + k_step) * 32 + lane) * 8 + 2 * register + stored % 2]
            col = stored
            if two_four:
                group = stored // 2
                p = 2 * (group // 8) + group % 8 // 4
                word = int(words[1024 + warp * 32 + 4 * q + p])
                nibble = word >> (16 * high + 4 * (group % 4)) & 15
                col = 4 * group + (nibble & 3 if stored % 2 == 0 else nibble >> 2)
            block[row, col] = value
    return block


@pytest.mark.parametrize("tile", [(64, 64), (128, 64)], ids=["band1", "band2"])
def test_every_word_is_where_the_description_says(tile: TileShape) -> None:
    weight, mask = random_weight(256, 192), random_mask(256, 192, tile, 0.5, seed=3)
    hybrid, masked = pack(weight, mask), mask.apply(weight)
    for panel in range(4):
        for step in range(3):
            column = int(hybrid.columns[panel, step])
            expected = masked[panel * 64 : panel * 64 + 64, column * 64 : column * 64 + 64]
            assert torch.equal(naive_record(hybrid, panel, step), expected), (panel, step)


@pytest.mark.parametrize("tile", [(64, 64), (128, 64), (256, 128)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_both_bands_see_the_walk_in_order(tile: TileShape) -> None:
    hybrid = random_hybrid(1024, 1024, tile, 0.5, uneven=True)
    dense = hybrid.block_map()
    assert hybrid.band == (1 if tile[0] == 64 else 2)
    for panel in range(hybrid.panels):
        walk = hybrid.columns[panel // (2 * hybrid.band) * 2 * hybrid.band].tolist()
        kinds = [bool(dense[panel, column]) for column in walk]
        lead, sparse = int(hybrid.leads[panel]), int(hybrid.sparse_blocks[panel])
        trailing = sparse - lead
        assert kinds == [False] * lead + [True] * (len(walk) - sparse) + [False] * trailing
        stored = [c for c in walk if not dense[panel, c]] + [c for c in walk if dense[panel, c]]
        assert hybrid.columns[panel].tolist() == stored


def test_two_four_takes_at_most_0_565_of_the_bytes() -> None:
    hybrid = random_hybrid(4096, 4096, (128, 128), 1.0)
    assert hybrid.nbytes <= 0.565 * hybrid.dense_nbytes
    assert hybrid.sparse_share == 1.0


def test_a_masked_checkpoint_packs_by_its_zeros() -> None:
    weight, mask = random_weight(256, 256), random_mask(256, 256, (128, 64), 0.5)
    hybrid = pack_masked(mask.apply(weight), (128, 64))
    assert_same_bits(unpack(hybrid), mask.apply(weight))
    assert torch.equal(hybrid.block_map(), pack(weight, mask).block_map())


def broken(part: str, value: object) -> dict[str, object]:
    hybrid = random_hybrid(256, 256, (64, 64), 0.5)
    parts: dict[str, object] = {f.name: getattr(hybrid, f.name) for f in dataclasses.fields(hybrid)}
    change = value(parts[part].clone() if isinstance(parts[part], Tensor) else parts[part])  # type: ignore[operator]
    return parts | {part: change}


def poke(index: tuple[int, ...], value: int):  # type: ignore[no-untyped-def]
    def change(part: Tensor) -> Tensor:
        part[index] = value
        return part

    return change


BROKEN = {
    "records-short": ("records", lambda r: r[:-1], "records"),
    "records-dtype": ("records", lambda r: r.long(), "records"),
    "records-strided": ("records", lambda r: r.repeat(1, 2)[:, ::2], "strides"),
    "starts-wrong": ("starts", poke((1,), 5), "starts"),
    "starts-short": ("starts", lambda s: s[:-1], "starts"),
    "columns-twice": ("columns", lambda c: c[:, :1].expand(-1, 4).contiguous(), "columns"),
    "columns-out-of-range": ("columns", poke((0, 0), 4), "columns"),
    "columns-not-walked": ("columns", lambda c: c.flip(1).contiguous(), "columns|leads|starts"),
    "sparse-blocks-negative": ("sparse_blocks", poke((0,), -1), "sparse_blocks"),
    "sparse-blocks-too-many": ("sparse_blocks", poke((0,), 5), "sparse_blocks"),
    "leads-wrong": ("leads", poke((0,), 4), "leads"),
    "band": ("band", lambda b: 3, "bands"),
    "shape": ("shape", lambda s: (256, 254), "multiple of 8"),
    "dtype": ("dtype", lambda d: torch.float32, "dtype"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_whatever_is_malformed_is_refused_by_name(case: str) -> None:
    part, change, message = BROKEN[case]
    with pytest.raises(UserError, match=message):
        HybridWeight(**broken(part, change))  # type: ignore[arg-type]


def test_metadata_must_be_ascending() -> None:
    hybrid = random_hybrid(64, 64, (64, 64), 1.0)
    hybrid.records[8, 5] ^= 0x3  # the first kept position of one group now is another
    hybrid.records[8, 5] |= 0xF
    parts = {f.name: getattr(hybrid, f.name) for f in dataclasses.fields(hybrid)}
    with pytest.raises(UserError, match=r"metadata.*row .*group .*not ascending"):
        HybridWeight(**parts)


@pytest.mark.parametrize(
    ("weight", "mask", "message"),
    [
        pytest.param(random_weight(64, 64).float(), random_mask(64, 64, (64, 64), 1), "float32", id="dtype"),
        pytest.param(random_weight(64, 64), random_mask(64, 128, (64, 64), 1), "mask is for", id="shape"),
        pytest.param(random_weight(64, 68), random_mask(64, 68, (64, 68), 1), "multiple of 8", id="columns"),
    ],
)
def test_what_cannot_be_packed(weight: Tensor, mask: HybridMask, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(weight, mask)
