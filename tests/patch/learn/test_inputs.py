"""Sizes of inputs: against the model's own, what a scale leaves as it was, and how ranks share the work."""

import pytest
import torch
from tiny_learner import RAGGED, tiny_model, words
from torch import Tensor, nn

from patch.layers import prunable_linears
from patch.learn import soft_mask
from patch.learn.distributed import ALONE, Ranks
from patch.learn.inputs import input_scales
from patch.learn.masked_model import MaskedLinear
from patch.learn.recipe import PATCH_JOINT

SEQUENCES = words(0, 6, 16)


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """What each linear is given, ``[tokens, K]``."""
    seen: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].flatten(0, 1)}))
        for name, linear in prunable_linears(model).items()
    ]
    with torch.no_grad():
        model(input_ids=SEQUENCES)
    for hook in hooks:
        hook.remove()
    return seen


def test_they_are_shares_of_each_token_to_the_nearest_power_of_two() -> None:
    model = tiny_model()
    with torch.no_grad():
        # One input far larger than others, one that is never there, and one token that is larger than all others.
        model.model.layers[0].post_attention_layernorm.weight[3] = 3.0
        model.model.layers[0].post_attention_layernorm.weight[5] = 0.0
        model.model.embed_tokens.weight[int(SEQUENCES[0, 0])] *= 1000
    found = input_scales(model, SEQUENCES, at_once=4)
    for name, given in inputs_of(model).items():
        weight = prunable_linears(model)[name].weight.detach()
        sizes = (given.square() / given.square().sum(1, keepdim=True)).mean(0).sqrt()
        wanted = sizes * weight.norm() / (weight * sizes).norm()
        exponents = found[name].log2()
        assert torch.equal(exponents, exponents.round())
        torch.testing.assert_close(exponents, wanted.clamp(1 / 16, 16).log2(), rtol=0, atol=0.5 + 1e-4)
        assert float((weight * found[name]).norm()) == pytest.approx(float(weight.norm()), rel=0.2)
    assert float(found["model.layers.0.mlp.up_proj"][5]) == 1 / 16


def test_of_nothing_but_zeros_all_count_alike() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
        model.model.layers[0].self_attn.q_proj.weight *= 1000
    scale = input_scales(model, SEQUENCES)["model.layers.0.self_attn.q_proj"]
    assert bool(scale.isfinite().all()) and len(scale.unique()) == 1


def test_ranks_share_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    given: list[list[Tensor]] = []
    alone = input_scales(model, SEQUENCES)
    monkeypatch.setattr(Ranks, "total", lambda self, part: given[-1].append(part) or part)
    for rank in range(4):
        given.append([])
        input_scales(model, SEQUENCES, Ranks(rank, 4))
    sums = [sum(shares) for shares in zip(*given, strict=True)]
    monkeypatch.setattr(Ranks, "total", lambda self, part: sums.pop(0))
    for found, expected in zip(input_scales(model, SEQUENCES).values(), alone.values(), strict=True):
        # Sums in another order may fall on the other side of the middle of two powers.
        assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_scale_counts_in_the_kept_size_alone(dtype: torch.dtype) -> None:
    linear = nn.Linear(40, 48, bias=False, dtype=dtype)
    scale = torch.arange(-4, 4).repeat(5).float().exp2()
    masked = [
        MaskedLinear(linear, RAGGED, None, soft_mask.sampled_weight, ALONE, linear.weight, each)
        for each in (None, scale)
    ]
    logits = torch.randn(6, 48, 10, generator=torch.Generator().manual_seed(0))
    for each in masked:
        each.patterns, each.tiles = logits.clone().requires_grad_(), torch.zeros(2, 2, requires_grad=True)
        each.begin(PATCH_JOINT.at(1000), (0, 1, 2, 3), None)
    plain, scaled = (each.draw() for each in masked)
    if dtype == torch.float16:
        torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=2.0**-20)
    else:
        assert torch.equal(scaled, plain)
    assert masked[0].sums is not None and masked[1].sums is not None
    assert torch.equal(masked[0].sums[0], masked[1].sums[0])
    expected = (plain.detach().float() * scale).square().sum()
    torch.testing.assert_close(masked[1].sums[1], expected, rtol=1e-2, atol=0)
    assert masked[1].size() == pytest.approx(float((linear.weight.detach().float() * scale).norm()), rel=1e-6)
