"""Which matrices are prunable: small models of every kind of decoder, by what they are made of."""

from collections.abc import Callable

import pytest
import torch
from decoder_families import make, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.eval.perplexity import perplexity
from patch.errors import UserError
from patch.layers import (
    check_coverage,
    check_shared,
    coverage,
    decoder_blocks,
    prunable_linears,
    prunable_matrices,
    require_linears,
)
from patch.oneshot import prune_model
from patch.oneshot.calibration import calibrate
from patch.oneshot.refit import refit_model
from patch.oneshot.wanda import InputNorm

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
WHOLE = ("llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "falcon", "bloom", "mpt", *MIXTURES)


def zeros(model: PreTrainedModel) -> float:
    """Share of zeros of all matrices in the blocks but routers and gates, counted in the parameters themselves."""
    matrices = [
        parameter
        for name, parameter in decoder_blocks(model).named_parameters()
        if parameter.ndim >= 2
        and not name.endswith(("mlp.gate.weight", "router.weight", "shared_expert_gate.weight", "bias"))
    ]
    return sum(int((each == 0).sum()) for each in matrices) / sum(each.numel() for each in matrices)


@pytest.mark.parametrize(
    ("method", "family"),
    [("magnitude", each) for each in WHOLE]
    + [(method, each) for method in ("wanda", "sparsegpt") for each in ("llama", "gpt2", "bloom", *MIXTURES)],
)
def test_every_family_is_pruned_whole(method: str, family: str) -> None:
    model = make(family)
    assert coverage(model).share == 1 and check_coverage(model).left == ()
    layers = prune_model(model, method, "2:4", 0.5, (16, 16), windows(), "cpu")
    assert sum(layer.zeros for layer in layers.values()) / sum(layer.elements for layer in layers.values()) == 0.5
    assert zeros(model) == pytest.approx(0.5, abs=1e-3)
    for name, matrix in prunable_matrices(model).items():
        mask = layers[name].mask
        assert mask is not None and not matrix.weight[~mask.keep()].any()


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_and_gates_stay(family: str) -> None:
    model = make(family)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    prune_model(model, "wanda", "2:4", 0.5, (16, 16), windows(), "cpu")
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {matrix.parameter for matrix in prunable_matrices(model).values()}
    assert not any(part in name for name in changed for part in ("router", "mlp.gate.", "shared_expert_gate", "bias"))


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_is_judged_by_the_tokens_that_are_routed_to_it(family: str) -> None:
    model, seen = make(family), {}
    for block in calibrate(model, windows(), "cpu", 2, InputNorm):
        if block.index == 0:
            seen = {name: statistic.norm() for name, statistic in block.statistics.items()}
    experts = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.experts"))
    entered: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda _, args: entered.append((args[0].detach(), args[1])))
    with torch.no_grad():
        model(windows())
    states, chosen = entered[0]
    for expert in range(4):
        routed = states.reshape(-1, 32)[(chosen == expert).any(-1).flatten()].double()
        expected = routed.square().mean(0).sqrt()
        got = seen[f"model.layers.0.mlp.experts.gate_up_proj.{expert}"]
        torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "least"), [("jamba", 0.9), ("recurrent_gemma", 0.9), ("llama4_text", 0.2)])
def test_what_is_not_covered_is_refused_or_said(family: str, least: float) -> None:
    """Llama 4 multiplies all experts at once and does not say along which side their inputs lie."""
    model = make(family)
    with pytest.raises(UserError, match=r"only \d+\.\d% .*--partial"):
        check_coverage(model)
    assert least < check_coverage(model, partial=True).share < 1


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_learning_and_packing_refuse_what_is_no_linear(family: str) -> None:
    with pytest.raises(UserError, match="learning covers Linear weights alone"):
        require_linears(make(family), "learning")
    assert list(require_linears(make("llama"), "learning")) == list(prunable_linears(make("llama")))


def test_weights_and_blocks_that_are_used_twice_are_refused() -> None:
    model = make("llama")
    check_shared(model)
    layers = decoder_blocks(model)
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is the same weight as .*layers\.0"):
        prune_model(model, "magnitude", "2:4", 0.5, (16, 16), None, "cpu")
    model = make("gpt2")
    blocks = decoder_blocks(model)
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight is the same weight"):
        prune_model(model, "magnitude", "2:4", 0.5, (16, 16), None, "cpu")
    model = make("llama")
    blocks = decoder_blocks(model)
    blocks[1] = blocks[0]
    with pytest.raises(UserError, match="same decoder block more than once"):
        prune_model(model, "magnitude", "2:4", 0.5, (16, 16), None, "cpu")


def test_offloaded_weights_are_refused() -> None:
    """Those that accelerate keeps on a disk, or on the CPU, have no values where the model is."""
    model = make("llama")
    model.model.layers[1].to("meta")
    attempts: list[Callable[[], object]] = [
        lambda: prune_model(model, "magnitude", "2:4", 0.5, (16, 16), None, "cpu"),
        lambda: refit_model(model, {}, windows(), "cpu"),
        lambda: perplexity(model, windows(), "cpu", 2),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight is offloaded"):
            attempt()


def test_inputs_that_are_shared_in_the_first_batch_only() -> None:
    """Two linears read one tensor for the first windows and two different ones for the rest."""

    class Attention(nn.Module):
        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj

        def forward(self, states: Tensor) -> Tensor:
            calls = getattr(self, "calls", 0)
            self.calls = calls + 1
            other = states if calls % 3 == 0 else states * 2
            return self.down_proj(torch.sigmoid(self.gate_proj(states)) * self.up_proj(other))

    model = make("llama")
    for layer in decoder_blocks(model):
        layer.mlp = Attention(layer.mlp)
    for block in calibrate(model, windows(), "cpu", 2, InputNorm):
        for layer in decoder_blocks(model):
            layer.mlp.calls = 0
        gate, up = (block.statistics[f"model.layers.{block.index}.mlp.{part}_proj"] for part in ("gate", "up"))
        assert gate is not up
        assert (up.norm() > gate.norm()).all()


def test_a_weight_that_is_run_in_some_batches_only_shares_no_statistic() -> None:
    class Sometimes(nn.Module):
        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj
            self.calls = 0

        def forward(self, states: Tensor) -> Tensor:
            self.calls += 1
            gate = self.gate_proj(states)
            return self.down_proj(gate * self.up_proj(states) if self.calls % 3 == 0 else gate)

    model = make("llama")
    for layer in decoder_blocks(model):
        layer.mlp = Sometimes(layer.mlp)
    for block in calibrate(model, windows(), "cpu", 2, InputNorm):
        for layer in decoder_blocks(model):
            layer.mlp.calls = 0
        gate, up = (block.statistics[f"model.layers.{block.index}.mlp.{part}_proj"] for part in ("gate", "up"))
        assert gate is not up and not torch.equal(gate.norm(), up.norm())
