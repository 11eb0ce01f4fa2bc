"""Hybrid masks against element-by-element definitions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patch.errors import UserError
from patch.mask import (
    KEPT_PAIRS,
    HybridMask,
    best_patterns,
    decode_patterns,
    encode_patterns,
    expand_tiles,
    infer,
    pattern_table,
    tile_sizes,
    tile_sums,
)
from patch.tiles import tile_grid

SHAPES = [
    pytest.param((64, 64), (64, 64), id="one-tile"),
    pytest.param((128, 256), (64, 128), id="even"),
    pytest.param((100, 132), (64, 64), id="ragged-both"),
    pytest.param((7, 20), (3, 8), id="tiny-odd"),
    pytest.param((576, 192), (192, 192), id="smollm2-kv"),
    pytest.param((5, 4), (5, 4), id="one-group-wide"),
]
MAPS = ["all-dense", "all-2:4", "mixed"]


def make_mask(shape: tuple[int, int], tile: tuple[int, int], kind: str, seed: int = 0) -> HybridMask:
    generator = torch.Generator().manual_seed(seed)
    grid = tile_grid(shape, tile)
    dense = {
        "all-dense": torch.ones(grid, dtype=torch.bool),
        "all-2:4": torch.zeros(grid, dtype=torch.bool),
        "mixed": torch.rand(grid, generator=generator) < 0.5,
    }[kind]
    patterns = torch.randint(0, 6, (shape[0], shape[1] // 4), generator=generator, dtype=torch.uint8)
    return HybridMask(shape, tile, dense, patterns)


def keep_by_element(mask: HybridMask) -> torch.Tensor:
    keep = torch.zeros(mask.shape, dtype=torch.bool)
    for row, col in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
        in_dense_tile = mask.dense[row // mask.tile[0], col // mask.tile[1]]
        keep[row, col] = in_dense_tile or col % 4 in KEPT_PAIRS[mask.patterns[row, col // 4]]
    return keep


def test_patterns_are_the_six_pairs_in_lexicographic_order() -> None:
    assert list(KEPT_PAIRS) == sorted(itertools.combinations(range(4), 2))
    assert pattern_table().nonzero()[:, 1].reshape(6, 2).tolist() == [list(pair) for pair in KEPT_PAIRS]


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_keep_zeros_and_sparsity_match_the_definition(shape: tuple, tile: tuple, kind: str) -> None:
    mask = make_mask(shape, tile, kind)
    expected = keep_by_element(mask)
    assert torch.equal(mask.keep(), expected)
    assert mask.zeros == int((~expected).sum())
    assert mask.sparsity == pytest.approx((~expected).double().mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_apply_keeps_bits_and_drops_even_nan(dtype: torch.dtype) -> None:
    mask = make_mask((8, 16), (4, 8), "mixed")
    weight = torch.randn(8, 16).to(dtype)
    keep = mask.keep()
    weight[~keep] = float("nan")
    weight[keep.nonzero()[0][0], keep.nonzero()[0][1]] = -0.0
    masked = mask.apply(weight)
    assert torch.equal(masked[keep].view(torch.uint8), weight[keep].view(torch.uint8))
    assert (masked[~keep] == 0).all() and not masked[~keep].signbit().any()


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_tile_sizes_sums_and_expansion_agree_with_loops(shape: tuple, tile: tuple) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    sizes, sums = tile_sizes(shape, tile), tile_sums(values, tile)
    for i, j in itertools.product(*map(range, tile_grid(shape, tile))):
        block = values[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
        assert sizes[i, j] == block.numel()
        assert sums[i, j].item() == pytest.approx(block.sum().item())
    assert expand_tiles(sizes, shape, tile).shape == shape
    assert torch.equal(tile_sums(torch.ones(shape, dtype=torch.int64), tile), sizes)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=8, max_size=8), min_size=1, max_size=6))
def test_best_patterns_keep_the_two_largest_and_prefer_the_earlier(rows: list[list[int]]) -> None:
    keep = decode_patterns(best_patterns(torch.tensor(rows)))
    for row, kept in zip(rows, keep.tolist(), strict=True):
        for start in (0, 4):
            order = sorted(range(4), key=lambda i, start=start, row=row: (-row[start + i], i))
            assert [i for i in range(4) if kept[start + i]] == sorted(order[:2])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_encoding_patterns_inverts_decoding(patterns: list[int]) -> None:
    expected = torch.tensor(patterns, dtype=torch.uint8)[None]
    assert torch.equal(encode_patterns(decode_patterns(expected)), expected)


def test_encoding_names_the_group_that_is_not_two_of_four() -> None:
    keep = decode_patterns(torch.zeros(2, 3, dtype=torch.uint8))
    keep[1, 6] = True
    with pytest.raises(UserError, match=r"row 1, columns 4\.\.7 keep 3 of 4"):
        encode_patterns(keep)


def test_masks_are_equal_whatever_dense_tiles_would_keep() -> None:
    mask = make_mask((8, 16), (4, 8), "mixed")
    in_dense = expand_tiles(mask.dense, mask.shape, mask.tile)[:, ::4]
    other = HybridMask(mask.shape, mask.tile, mask.dense, mask.patterns.where(~in_dense, 5 - mask.patterns))
    assert mask.equal(other)
    flipped = HybridMask(mask.shape, mask.tile, ~mask.dense, mask.patterns)
    assert not mask.equal(flipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_infer_reads_back_what_was_applied(shape: tuple, tile: tuple, kind: str, dtype: torch.dtype) -> None:
    mask = make_mask(shape, tile, kind)
    weight = torch.randn(shape).to(dtype)
    weight[weight == 0] = 1
    found = infer(mask.apply(weight), tile)
    assert mask.equal(found.mask)
    assert not found.violating.any()


def test_infer_tells_stray_zeros_from_violations() -> None:
    weight = torch.ones(64, 128)
    weight[3, 5] = 0  # one stray zero: still dense
    weight[:, 64::2] = 0  # 2:4 everywhere in the second tile ...
    weight[10, 66] = 1  # ... but for one group
    found = infer(weight, (64, 64))
    assert found.mask.dense.tolist() == [[True, True]]
    assert found.violating.tolist() == [[False, True]]


def test_infer_takes_more_than_two_zeros_as_two_four() -> None:
    found = infer(torch.zeros(4, 8), (4, 8))
    assert found.two_four.all() and found.mask.zeros == 16


@pytest.mark.parametrize(
    ("shape", "tile", "message"),
    [
        pytest.param((8, 16), (4, 6), "multiple of 4", id="columns-cut-a-group"),
        pytest.param((8, 16), (0, 4), "positive", id="empty-tile"),
        pytest.param((8, 16), (16, 16), "larger than the weight 8x16", id="too-tall"),
        pytest.param((8, 16), (4, 32), "larger than the weight 8x16", id="too-wide"),
        pytest.param((8, 18), (4, 4), "in_features must be a multiple of 4", id="odd-weight"),
    ],
)
def test_bad_tiles_are_refused(shape: tuple, tile: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tile_grid(shape, tile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"dense": torch.ones(3, 2, dtype=torch.bool)}, "tile map", id="wrong-grid"),
        pytest.param({"dense": torch.ones(2, 2)}, "tile map", id="float-map"),
        pytest.param({"patterns": torch.zeros(8, 3, dtype=torch.uint8)}, "patterns", id="wrong-groups"),
        pytest.param({"patterns": torch.zeros(8, 4, dtype=torch.int64)}, "patterns", id="wrong-dtype"),
        pytest.param({"patterns": torch.full((8, 4), 6, dtype=torch.uint8)}, "out of range", id="no-such-pattern"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    parts = {"dense": torch.ones(2, 2, dtype=torch.bool), "patterns": torch.zeros(8, 4, dtype=torch.uint8)}
    with pytest.raises(UserError, match=message):
        HybridMask((8, 16), (4, 8), **(parts | change))


def test_a_mask_refuses_another_weights_shape() -> None:
    with pytest.raises(UserError, match="mask is for"):
        make_mask((8, 16), (4, 8), "mixed").apply(torch.ones(16, 8))
