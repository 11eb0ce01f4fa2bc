"""Exact budgets: the total over the model is within one tile of the target, whatever the scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patch.budget import UniformBudget, cut_globally
from patch.errors import UserError
from patch.mask import tile_sizes
from patch.tiles import tile_grid

WEIGHTS = {"q": (64, 96), "k": (40, 96), "down": (96, 132)}
TILES = [pytest.param((16, 32), id="16x32"), pytest.param((24, 20), id="24x20"), pytest.param((40, 96), id="40x96")]
TARGETS = [0.0, 0.01, 0.25, 0.35, 0.45, 0.5]


def scores_and_sizes(tile: tuple[int, int], seed: int) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(tile_grid(shape, tile), generator=generator) for name, shape in WEIGHTS.items()}
    return scores, {name: tile_sizes(shape, tile) for name, shape in WEIGHTS.items()}


def zeros(maps: dict, sizes: dict) -> int:
    return sum(int(sizes[name][~maps[name]].sum()) // 2 for name in maps)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tile", TILES)
def test_global_cut_is_the_nearest_that_whole_tiles_allow(tile: tuple, target: float) -> None:
    scores, sizes = scores_and_sizes(tile, 1)
    maps = cut_globally(scores, sizes, target)
    total = sum(int(s.sum()) for s in sizes.values())
    largest = max(int(s.max()) for s in sizes.values()) // 2
    assert abs(zeros(maps, sizes) - target * total) <= largest / 2
    sparse = torch.cat([scores[n][~maps[n]] for n in maps])
    dense = torch.cat([scores[n][maps[n]] for n in maps])
    if len(sparse) and len(dense):
        assert sparse.max() <= dense.min(), "a tile was made sparse while one with a lower score stayed dense"


@given(seed=st.integers(0, 1000), target=st.floats(0, 0.5))
def test_uniform_budget_carries_rounding_across_weights(seed: int, target: float) -> None:
    scores, sizes = scores_and_sizes((16, 32), seed)
    budget = UniformBudget(target)
    maps = {name: budget.cut(scores[name], sizes[name]) for name in scores}
    total = sum(int(s.sum()) for s in sizes.values())
    assert abs(zeros(maps, sizes) - target * total) <= max(int(s.max()) for s in sizes.values()) / 4 + 1e-6
    for name in maps:
        share = zeros({name: maps[name]}, sizes) / int(sizes[name].sum())
        assert abs(share - target) <= 16 * 32 / int(sizes[name].sum()), "a weight strays by more than a tile"


def test_ties_are_cut_in_order_so_that_every_process_agrees() -> None:
    sizes = {"a": torch.full((2, 2), 16), "b": torch.full((1, 2), 16)}
    maps = cut_globally({name: torch.zeros(size.shape) for name, size in sizes.items()}, sizes, 0.25)
    assert maps["a"].tolist() == [[False, False], [False, True]] and maps["b"].all()


@pytest.mark.parametrize("target", [-0.1, 0.51, float("nan")])
def test_targets_that_hybrid_tiles_cannot_reach_are_refused(target: float) -> None:
    scores, sizes = scores_and_sizes((16, 32), 0)
    with pytest.raises(UserError, match=r"hybrid tiles reach 0 to 0\.5"):
        cut_globally(scores, sizes, target)
    with pytest.raises(UserError, match=r"hybrid tiles reach 0 to 0\.5"):
        UniformBudget(target)


def test_scores_that_are_not_finite_are_refused() -> None:
    scores, sizes = scores_and_sizes((16, 32), 0)
    scores["q"][0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        cut_globally(scores, sizes, 0.25)
