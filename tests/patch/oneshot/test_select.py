"""From scores to masks, against sorting by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patch.errors import UserError
from patch.oneshot.select import (
    drop_lowest,
    hybrid_mask,
    tile_losses,
    unstructured_per_row,
    unstructured_per_weight,
)
from patch.tiles import tile_grid


def kept_by_sorting(scores: list[float], dropped: int) -> list[bool]:
    # Highest first; among equals the earlier one first.
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = set(order[: len(scores) - dropped])
    return [i in kept for i in range(len(scores))]


# Few distinct values, so that most cuts go through ties.
SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.25]), min_size=1, max_size=40)


@given(scores=SCORES, share=st.floats(0, 1))
def test_exactly_the_lowest_are_dropped_ties_by_position(scores: list[float], share: float) -> None:
    count = round(share * len(scores))
    assert drop_lowest(torch.tensor(scores), count).tolist() == kept_by_sorting(scores, count)


@given(
    rows=st.integers(1, 5), cols=st.integers(1, 24), sparsity=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99)
)
def test_counts_are_exact_per_row_and_per_weight(rows: int, cols: int, sparsity: float, seed: int) -> None:
    scores = torch.randint(0, 6, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    by_row = unstructured_per_row(scores, sparsity)
    assert by_row.tolist() == [kept_by_sorting(row, round(sparsity * cols)) for row in scores.tolist()]
    by_weight = unstructured_per_weight(scores, sparsity)
    assert by_weight.flatten().tolist() == kept_by_sorting(scores.flatten().tolist(), round(sparsity * rows * cols))


def two_four_by_sorting(scores: Tensor) -> Tensor:
    rows = [
        [keep for start in range(0, len(row), 4) for keep in kept_by_sorting(row[start : start + 4], 2)]
        for row in scores.tolist()
    ]
    return torch.tensor(rows)


@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 6),
    tile_rows=st.integers(1, 7),
    tile_groups=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_hybrid_keeps_dense_tiles_whole_and_the_two_best_elsewhere(
    rows: int, groups: int, tile_rows: int, tile_groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tile = (min(tile_rows, rows), 4 * min(tile_groups, groups))
    scores = torch.randint(0, 4, (rows, 4 * groups), generator=generator).float()
    dense = torch.rand(tile_grid(scores.shape, tile), generator=generator) < 0.5
    two_four = two_four_by_sorting(scores)
    keep = hybrid_mask(scores, tile, dense).keep()
    losses = torch.zeros(dense.shape)
    for row in range(rows):
        for col in range(4 * groups):
            at = row // tile[0], col // tile[1]
            assert keep[row, col] == (dense[at] or two_four[row, col])
            losses[at] += 0 if two_four[row, col] else scores[row, col] ** 2
    assert torch.equal(tile_losses(scores, tile), losses)


@pytest.mark.parametrize("sparsity", [-0.01, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("select", [unstructured_per_row, unstructured_per_weight])
def test_sparsity_out_of_range_is_refused(select: object, sparsity: float) -> None:
    assert callable(select)
    with pytest.raises(UserError, match="unstructured pruning takes 0 up to"):
        select(torch.rand(4, 8), sparsity)
