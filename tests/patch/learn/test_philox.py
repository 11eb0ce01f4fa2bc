"""The counter-based noise: its generator against published answers, its distribution, its independence."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patch.learn import philox

# Random123's known answers: rounds, counter and key of all zeros or all ones, words.
KNOWN = [
    pytest.param(7, 0, "5f6fb709 0d893f64 4f121f81 4f730a48", id="7-zeros"),
    pytest.param(10, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="10-zeros"),
    pytest.param(7, 0xFFFFFFFF, "5207ddc2 45165e59 4d8ee751 8c52f662", id="7-ones"),
    pytest.param(10, 0xFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="10-ones"),
]


@pytest.mark.parametrize(("rounds", "word", "answer"), KNOWN)
def test_words_are_the_published_ones(rounds: int, word: int, answer: str) -> None:
    counter = torch.full((2,), word)
    for lane in torch.stack(philox.words(word << 32 | word, (counter,) * 4, rounds)).T:
        assert " ".join(f"{int(value):08x}" for value in lane) == answer


def distance(sample: Tensor, cumulative: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's distance between a sample and a distribution, in units of its 1/sqrt(n) fluctuation."""
    ordered = sample.flatten().sort().values
    expected = cumulative(ordered)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return max((expected - steps[:-1]).max().item(), (steps[1:] - expected).max().item()) * math.sqrt(len(ordered))


@pytest.mark.parametrize("plane", range(6))
def test_pattern_noise_is_gumbel(plane: int) -> None:
    noise = philox.pattern_noise(1234, 500, 400)[plane]
    # Exceeded by one sample in 50 000 of the right distribution.
    assert distance(noise, lambda x: torch.exp(-torch.exp(-x))) < 2.4
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.04)


def test_tile_noise_is_logistic() -> None:
    noise = philox.tile_noise(1234, 500, 400)
    assert distance(noise, torch.sigmoid) < 2.4
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, abs=0.06)


def test_noise_is_independent_between_planes_neighbours_keys_and_kinds() -> None:
    here = philox.pattern_noise(7, 1, 40001)[:, 0]
    next_key = philox.pattern_noise(8, 1, 40000)[:, 0]
    high_key = philox.pattern_noise(7 + 2**40, 1, 40000)[:, 0]
    tiles = philox.tile_noise(7, 1, 40000)
    uncorrelated = torch.corrcoef(torch.cat([here[:, :-1], here[:, 1:], next_key, high_key, tiles]))
    assert (uncorrelated - torch.eye(len(uncorrelated))).abs().max() < 0.03, "six standard deviations"


@pytest.mark.parametrize("bits", [0, 2**21 - 1], ids=["least", "greatest"])
def test_noise_is_finite_at_the_ends(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    word = {0: 0, 2**21 - 1: 0xFFFFF800}[bits]
    monkeypatch.setattr(philox, "words", lambda key, counters: tuple(torch.full_like(c, word) for c in counters))
    bound = 22 * math.log(2)
    gumbel, logistic = philox.pattern_noise(0, 1, 1)[:4], philox.tile_noise(0, 1, 1)
    assert gumbel.isfinite().all() and -math.log(bound) - 1e-6 <= gumbel.min() and gumbel.max() <= bound
    assert logistic.abs().item() == pytest.approx(bound, abs=1e-6)


def test_noise_depends_on_the_place_alone() -> None:
    """Of a weight of as many columns and more rows, the first rows draw the same."""
    assert torch.equal(philox.pattern_noise(3, 5, 8), philox.pattern_noise(3, 9, 8)[:, :5])
    assert torch.equal(philox.tile_noise(3, 5, 8), philox.tile_noise(3, 9, 8)[:5])
