"""Soft masks against element-by-element float64 definitions, their limits, and their noise."""

import hashlib
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patch.learn import soft_mask
from patch.mask import KEPT_PAIRS, HybridMask, best_patterns, decode_patterns, tile_sizes
from patch.tiles import tile_grid

SHAPES = [
    pytest.param((8, 16), (4, 8), id="even"),
    pytest.param((7, 20), (3, 8), id="ragged-both"),
    pytest.param((5, 4), (5, 4), id="one-tile-one-group-wide"),
    pytest.param((1, 12), (1, 8), id="one-row"),
]
TEMPERATURES = [
    pytest.param(4.0, 100.0, id="first-step"),
    pytest.param(0.05, 500.0, id="last-step"),
    pytest.param(1.0, 1.0, id="plain"),
]


def pattern_inputs(shape: tuple[int, int], std: float = 0.014) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(shape[0])
    size = (6, shape[0], shape[1] // 4)
    return torch.randn(size, generator=source).double() * std, soft_mask.gumbel(size, source, torch.float64)


def tile_inputs(shape: tuple[int, int], tile: tuple[int, int], std: float = 0.014) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(shape[1])
    size = tile_grid(shape, tile)
    return torch.randn(size, generator=source).double() * std, soft_mask.logistic(size, source, torch.float64)


def naive_patterns(logits: Tensor, noise: Tensor, tau: float, scale: float) -> Tensor:
    _, rows, groups = logits.shape
    mask = torch.zeros(rows, 4 * groups, dtype=torch.float64)
    for row, group in itertools.product(range(rows), range(groups)):
        scores = [(scale * logits[p, row, group].item() + noise[p, row, group].item()) / tau for p in range(6)]
        powers = [math.exp(score - max(scores)) for score in scores]
        for pair, power in zip(KEPT_PAIRS, powers, strict=True):
            for element in pair:
                mask[row, 4 * group + element] += power / sum(powers)
    return mask


def naive_tile(logit: float, noise: float, tau: float, scale: float) -> float:
    """The second of a two-way Gumbel-softmax over {0, scale * logit}, whose noises differ by ``noise``."""
    scores = [0.0, (scale * logit + noise) / tau]
    powers = [math.exp(score - max(scores)) for score in scores]
    return powers[1] / sum(powers)


@pytest.mark.parametrize(("tau", "scale"), TEMPERATURES)
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_soft_mask_is_the_definition(shape: tuple, tile: tuple, tau: float, scale: float) -> None:
    logits, noise = pattern_inputs(shape)
    tile_logits, tile_noise = tile_inputs(shape, tile)
    two_four = soft_mask.soft_patterns(logits, noise, tau, scale)
    tiles = soft_mask.soft_tiles(tile_logits, tile_noise, tau, scale)
    mask = soft_mask.soft_mask(tiles, two_four, tile)
    expected = naive_patterns(logits, noise, tau, scale)
    torch.testing.assert_close(two_four, expected, rtol=1e-9, atol=1e-12)
    for row, col in itertools.product(range(shape[0]), range(shape[1])):
        place = (row // tile[0], col // tile[1])
        t = naive_tile(tile_logits[place].item(), tile_noise[place].item(), tau, scale)
        assert mask[row, col].item() == pytest.approx(t + (1 - t) * expected[row, col].item(), abs=1e-12)


@pytest.mark.parametrize(("tau", "scale"), TEMPERATURES)
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_float32_is_near_the_definition(shape: tuple, tile: tuple, tau: float, scale: float) -> None:
    logits, noise = pattern_inputs(shape)
    two_four = soft_mask.soft_patterns(logits.float(), noise.float(), tau, scale)
    # What float32 noise and logits resolve is magnified by the scale over the temperature.
    torch.testing.assert_close(two_four.double(), naive_patterns(logits, noise, tau, scale), rtol=0, atol=1e-4)
    torch.testing.assert_close(two_four.view(shape[0], -1, 4).sum(-1), torch.full((shape[0], shape[1] // 4), 2.0))


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_gradients_are_those_of_finite_differences(shape: tuple, tile: tuple) -> None:
    logits, noise = pattern_inputs(shape, std=1.0)
    tile_logits, tile_noise = tile_inputs(shape, tile, std=1.0)

    def mask(patterns: Tensor, tiles: Tensor) -> Tensor:
        two_four = soft_mask.soft_patterns(patterns, noise, 0.7, 1.3)
        return soft_mask.soft_mask(soft_mask.soft_tiles(tiles, tile_noise, 0.9, 1.1), two_four, tile)

    assert torch.autograd.gradcheck(mask, (logits.requires_grad_(), tile_logits.requires_grad_()))


def test_without_tiles_every_tile_is_two_four() -> None:
    two_four = torch.rand(3, 8)
    assert torch.equal(soft_mask.soft_mask(None, two_four, (2, 4)), two_four)


@pytest.mark.parametrize("edge", [0.0, 1.0], ids=["all-2:4", "all-dense"])
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_certain_tiles_give_exact_masks(shape: tuple, tile: tuple, edge: float) -> None:
    fixed = decode_patterns(best_patterns(torch.rand(shape)))
    mask = soft_mask.soft_mask(torch.full(tile_grid(shape, tile), edge), fixed, tile)
    assert torch.equal(mask, torch.ones(shape) if edge else fixed.float())


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_a_vanishing_temperature_leaves_a_hybrid_mask(shape: tuple, tile: tuple) -> None:
    logits, noise = pattern_inputs(shape)
    tile_logits, tile_noise = tile_inputs(shape, tile)
    two_four = soft_mask.soft_patterns(logits, noise, 1e-9, 100)
    tiles = soft_mask.soft_tiles(tile_logits, tile_noise, 1e-9, 100)
    patterns = (100 * logits + noise).argmax(0).to(torch.uint8)
    hard = HybridMask(shape, tile, 100 * tile_logits + tile_noise > 0, patterns)
    # Shares are held at a floor far below the last place of one.
    torch.testing.assert_close(soft_mask.soft_mask(tiles, two_four, tile), hard.keep().double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("spread", [0.1, 10.0, 1e4])
def test_extreme_logits_keep_masks_and_gradients_finite(spread: float) -> None:
    logits = (torch.randn(6, 4, 5) * spread).requires_grad_()
    tile_logits = (torch.randn(2, 3) * spread).requires_grad_()
    source = torch.Generator().manual_seed(0)
    two_four = soft_mask.soft_patterns(logits, soft_mask.gumbel(logits.shape, source), 0.05, 500)
    tiles = soft_mask.soft_tiles(tile_logits, soft_mask.logistic(tile_logits.shape, source), 0.05, 500)
    mask = soft_mask.soft_mask(tiles, two_four, (2, 8))
    mask.square().sum().backward()
    assert mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1 + 1e-6
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert tile_logits.grad is not None and tile_logits.grad.isfinite().all()


def distance(sample: Tensor, cumulative: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's distance between a sample and a distribution, in units of its 1/sqrt(n) fluctuation."""
    ordered = sample.double().flatten().sort().values
    count = len(ordered)
    expected = cumulative(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return max((expected - steps[:-1]).max().item(), (steps[1:] - expected).max().item()) * math.sqrt(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_noise_has_its_distribution(dtype: torch.dtype) -> None:
    source = soft_mask.generator(soft_mask.stream_seed("distribution"), "cpu")
    gumbel = soft_mask.gumbel((6, 400, 100), source, dtype)
    logistic = soft_mask.logistic((400, 500), source, dtype)
    assert gumbel.dtype == logistic.dtype == dtype
    # Exceeded by one sample in 50 000 of the right distribution.
    assert distance(gumbel, lambda x: torch.exp(-torch.exp(-x))) < 2.4
    assert distance(logistic, torch.sigmoid) < 2.4
    assert gumbel.double().mean().item() == pytest.approx(0.5772, abs=0.01)
    assert gumbel.double().var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_noise_is_independent_between_patterns_and_streams() -> None:
    first, second = (
        soft_mask.gumbel((6, 20000), soft_mask.generator(soft_mask.stream_seed(0, i), "cpu")) for i in range(2)
    )
    correlation = torch.corrcoef(torch.cat([first, second]))
    assert (correlation - torch.eye(12)).abs().max() < 0.035, "five standard deviations of an independent sample"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("end", ["least", "greatest"])
def test_noise_is_finite_at_the_ends_of_the_lattice(
    monkeypatch: pytest.MonkeyPatch, end: str, dtype: torch.dtype
) -> None:
    value = 0.0 if end == "least" else 1 - 2.0 ** (-24 if dtype == torch.float32 else -53)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator: self.fill_(value))
    source = torch.Generator()
    assert soft_mask.gumbel((3,), source, dtype).isfinite().all()
    assert soft_mask.logistic((3,), source, dtype).isfinite().all()


def test_patterns_are_sampled_as_often_as_their_softmax_says() -> None:
    logits = torch.tensor([0.9, -0.5, 0.2, 0.0, 1.4, -2.0]).view(6, 1, 1).expand(6, 200, 1000)
    two_four = soft_mask.soft_patterns(logits, soft_mask.gumbel(logits.shape, soft_mask.generator(3, "cpu")), 1e-6, 1.0)
    shares = torch.bincount(best_patterns(two_four).flatten().long(), minlength=6) / 200_000
    torch.testing.assert_close(shares, torch.softmax(logits[:, 0, 0], 0), atol=0.006, rtol=0)


def test_tiles_are_sampled_as_often_as_their_sigmoid_says() -> None:
    logits = torch.full((400, 500), 0.7)
    tiles = soft_mask.soft_tiles(logits, soft_mask.logistic(logits.shape, soft_mask.generator(4, "cpu")), 1e-6, 2.0)
    assert tiles.mean().item() == pytest.approx(1 / (1 + math.exp(-1.4)), abs=0.005)


def test_seeds_are_as_documented_since_resumed_runs_and_other_ranks_must_agree() -> None:
    assert (
        soft_mask.stream_seed("patterns", 0, 1, 2, 3)
        == int(hashlib.sha256(b"patterns/0/1/2/3").hexdigest()[:16], 16) // 2
    )
    parts = [("patterns", 0, 1, 2, 3), ("tiles", 0, 1, 2, 3), ("patterns", 0, 12, 3), ("patterns", 1, 0, 2, 3)]
    assert len({soft_mask.stream_seed(*p) for p in parts}) == len(parts)


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_kept_elements_are_the_sum_of_the_soft_mask(shape: tuple, tile: tuple) -> None:
    logits, noise = pattern_inputs(shape)
    tiles = torch.rand(tile_grid(shape, tile), dtype=torch.float64)
    mask = soft_mask.soft_mask(tiles, soft_mask.soft_patterns(logits, noise, 1.0, 10.0), tile)
    kept = soft_mask.kept_elements(tiles, tile_sizes(shape, tile).double())
    torch.testing.assert_close(kept, mask.sum())


def test_pattern_prior_counts_shared_elements() -> None:
    patterns = torch.arange(6, dtype=torch.uint8).view(2, 3)
    prior = soft_mask.pattern_prior(patterns)
    for p, row, group in itertools.product(range(6), range(2), range(3)):
        shared = set(KEPT_PAIRS[p]) & set(KEPT_PAIRS[patterns[row, group]])
        assert prior[p, row, group] == len(shared) - 1


@pytest.mark.parametrize(
    ("sparsity", "dense"),
    [pytest.param(0.0, 12, id="dense"), pytest.param(0.35, 4, id="35%"), pytest.param(0.45, 1, id="45%"), (0.5, 0)],
)
def test_tile_prior_lifts_the_best_tiles(sparsity: float, dense: int) -> None:
    scores = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(3, 4).float()
    prior = soft_mask.tile_prior(scores, sparsity)
    assert torch.equal(prior == 1, scores >= 12 - dense)
    assert torch.equal(prior == -1, scores < 12 - dense)


def test_tile_prior_gives_ties_to_the_earlier_tile() -> None:
    assert soft_mask.tile_prior(torch.zeros(2, 2), 0.25).tolist() == [[1, 1], [-1, -1]]
