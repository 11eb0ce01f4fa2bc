"""The cost of single tiles: against derivatives of the soft mask, against measured divergences, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_learner import RAGGED, magnitude_prior, tiny_model, words
from torch import Tensor

from patch.errors import UserError
from patch.layers import prunable_linears
from patch.learn import soft_mask
from patch.learn.distributed import Ranks
from patch.learn.sensitivity import tile_sensitivity
from patch.mask import decode_patterns
from patch.tiles import tile_grid

SEQUENCES = words(0, 6, 16)


def patterns_of(model: torch.nn.Module) -> dict[str, Tensor]:
    patterns = magnitude_prior(model).patterns
    assert patterns is not None
    return dict(patterns)


def test_it_is_the_square_of_the_derivative_by_the_tile() -> None:
    model = tiny_model()
    patterns = patterns_of(model)
    found = tile_sensitivity(model, patterns, RAGGED, SEQUENCES, seed=3)
    for name, linear in prunable_linears(model).items():
        expected = torch.zeros(tile_grid(linear.weight.shape, RAGGED), dtype=torch.float64)
        for index, sequence in enumerate(SEQUENCES):
            tiles = torch.ones(expected.shape, requires_grad=True)
            weight = linear.weight.detach() * soft_mask.soft_mask(
                tiles, decode_patterns(patterns[name]).float(), RAGGED
            )
            logits = torch.func.functional_call(model, {f"{name}.weight": weight}, kwargs={"input_ids": sequence[None]})
            logits = logits.logits[0]
            source = soft_mask.generator(soft_mask.stream_seed("sensitivity", 3, index), "cpu")
            drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=source)[:, 0]
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), tiles)
            expected += slope.double().square()
        torch.testing.assert_close(found[name].double(), expected / (2 * SEQUENCES.numel()), rtol=1e-3, atol=1e-9)


def test_it_predicts_what_a_tile_costs() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
        model.lm_head.weight.mul_(5)
    patterns, sequences = patterns_of(model), words(1, 300, 16)
    predicted = tile_sensitivity(model, patterns, RAGGED, sequences, seed=0)
    with torch.no_grad():
        dense = torch.log_softmax(model(input_ids=sequences).logits, -1)
    name = "model.layers.1.mlp.down_proj"
    measured = torch.zeros_like(predicted[name])
    weight = prunable_linears(model)[name].weight.detach()
    for tile in range(measured.numel()):
        tiles = torch.ones(measured.numel()).index_fill(0, torch.tensor(tile), 0).view(measured.shape)
        masked = weight * soft_mask.soft_mask(tiles, decode_patterns(patterns[name]).float(), RAGGED)
        with torch.no_grad():
            logits = torch.func.functional_call(
                model, {f"{name}.weight": masked}, kwargs={"input_ids": sequences}
            ).logits
        other = torch.log_softmax(logits, -1)
        measured.view(-1)[tile] = (dense.exp() * (dense - other)).sum(-1).mean()
    # A mean of 300 squares has a standard error of 8%, and what is beyond second order is small here.
    ratio = predicted[name] / measured
    assert math.exp(ratio.log().mean().item()) == pytest.approx(1, abs=0.15)
    assert ratio.log().abs().max() < 0.5


def test_ranks_share_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    alone = tile_sensitivity(model, patterns_of(model), RAGGED, SEQUENCES, seed=0)
    parts: list[list[Tensor]] = []
    monkeypatch.setattr(Ranks, "total", lambda self, part: parts[self.rank].append(part) or part)
    for rank in range(4):
        parts.append([])
        tile_sensitivity(model, patterns_of(model), RAGGED, SEQUENCES, seed=0, ranks=Ranks(rank, 4))
    for whole, *shares in zip(alone.values(), *parts, strict=True):
        torch.testing.assert_close(sum(shares) / (2 * SEQUENCES.numel()), whole)


def test_the_model_stays_as_it_is() -> None:
    model = tiny_model().train()
    frozen = prunable_linears(model)["model.layers.0.self_attn.q_proj"].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tile_sensitivity(model, patterns_of(model), RAGGED, SEQUENCES, seed=0)
    assert model.training and not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_patterns_that_do_not_fit_are_named() -> None:
    model = tiny_model()
    patterns = patterns_of(model)
    name = list(patterns)[3]
    wrong = patterns | {name: patterns[name][1:]}
    del patterns[name]
    for given, said in ((patterns, "there are no patterns"), (wrong, r"patterns are \(63, 16\), need \(64, 16\)")):
        with pytest.raises(UserError, match=f"{name}: {said}"):
            tile_sensitivity(model, given, RAGGED, SEQUENCES, seed=0)
