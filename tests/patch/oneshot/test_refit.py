"""Fitting what a mask keeps: against a float64 system a row, what stays, what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from patch.errors import UserError
from patch.layers import prunable_linears
from patch.mask import HybridMask, best_patterns
from patch.oneshot import prune_model
from patch.oneshot.refit import MOST_STEPS, refit, refit_model
from patch.tiles import tile_grid

TILE = (16, 16)


def case(n: int, k: int, dense_share: float, seed: int = 0) -> tuple[Tensor, HybridMask, Tensor]:
    """A weight, a mask, and inputs ``[tokens, K]`` that depend on each other as activations do."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=source)
    grid = tile_grid((n, k), TILE)
    dense = torch.rand(grid, generator=source) < dense_share
    mixing = torch.randn(k, k, generator=source) / k**0.5 + torch.eye(k)
    inputs = torch.randn(4 * k, k, generator=source) @ mixing * torch.rand(k, generator=source).add(0.1)
    return weight, HybridMask((n, k), TILE, dense, best_patterns(weight.abs())), inputs


def hessian_of(inputs: Tensor) -> Tensor:
    return 2 * inputs.T @ inputs


def naive(weight: Tensor, keep: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """Row by row the normal equations of what it keeps, in float64."""
    weight, hessian = weight.double(), hessian.double()
    ridge = damping * hessian.diagonal().mean()
    fitted = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        system = hessian[kept][:, kept] + ridge * torch.eye(int(kept.sum()), dtype=torch.float64)
        dropped = weight[row].masked_fill(kept, 0)
        fitted[row, kept] = weight[row, kept] + torch.linalg.solve(system, (dropped @ hessian)[kept])
    return fitted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dense_share", [0.0, 0.4, 1.0], ids=["2:4", "hybrid", "dense"])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (40, 72), (64, 36)], ids=["one-tile", "ragged", "ragged-columns"])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_every_row_is_the_least_squares_solution(
    n: int, k: int, dense_share: float, dtype: torch.dtype, damping: float
) -> None:
    weight, mask, inputs = case(n, k, dense_share)
    weight, hessian = weight.to(dtype), hessian_of(inputs)
    fitted, fit = refit(weight, mask.keep(), hessian, damping)
    assert fitted.dtype == torch.float32
    assert fit.steps < MOST_STEPS
    expected = naive(weight, mask.keep(), hessian, damping)
    assert (fitted.double() - expected).norm() <= 1e-3 * expected.norm()
    assert not fitted[~mask.keep()].any()


@pytest.mark.parametrize("dense_share", [0.0, 0.4], ids=["2:4", "hybrid"])
def test_errors_are_those_of_the_outputs(dense_share: float) -> None:
    weight, mask, inputs = case(48, 64, dense_share)
    fitted, fit = refit(weight, mask.keep(), hessian_of(inputs))
    outputs = inputs @ weight.T

    def error(other: Tensor) -> float:
        return float((inputs @ other.T - outputs).square().sum() / outputs.square().sum())

    assert fit.error == pytest.approx(error(fitted), rel=1e-3)
    assert fit.masked_error == pytest.approx(error(mask.apply(weight)), rel=1e-3)
    assert fit.error < 0.8 * fit.masked_error


def test_nothing_dropped_changes_nothing() -> None:
    weight, mask, inputs = case(32, 64, 1.0)
    fitted, fit = refit(weight, mask.keep(), hessian_of(inputs))
    assert torch.equal(fitted, weight)
    assert (fit.masked_error, fit.error, fit.steps) == (0, 0, 0)


def test_inputs_that_are_always_zero_leave_their_weights_alone() -> None:
    weight, mask, inputs = case(32, 64, 0.0)
    inputs[:, ::3] = 0
    fitted, _ = refit(weight, mask.keep(), hessian_of(inputs))
    assert torch.equal(fitted[:, ::3], mask.apply(weight)[:, ::3])
    assert not torch.equal(fitted, mask.apply(weight))
    still, fit = refit(weight, mask.keep(), torch.zeros(64, 64))
    assert torch.equal(still, mask.apply(weight))
    assert fit.steps == 0


def make_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=61, max_position_embeddings=64, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config).to(dtype).eval()


WINDOWS = torch.randint(0, 61, (12, 32), generator=torch.Generator().manual_seed(1))


def masks_of(model: LlamaForCausalLM, structure: str = "hybrid") -> dict[str, HybridMask]:
    sparsity = 0.5 if structure == "2:4" else 0.35
    layers = prune_model(copy.deepcopy(model), "wanda", structure, sparsity, TILE, WINDOWS, "cpu")
    return {name: layer.mask for name, layer in layers.items() if layer.mask is not None}


def logits_error(model: LlamaForCausalLM, other: LlamaForCausalLM) -> float:
    with torch.no_grad():
        ours, theirs = (m(input_ids=WINDOWS).logits.double() for m in (model, other))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("structure", ["2:4", "hybrid"])
def test_a_fitted_model_is_nearer_to_the_dense_one(structure: str) -> None:
    dense = make_model()
    masks = masks_of(dense, structure)
    masked, fitted = copy.deepcopy(dense), copy.deepcopy(dense)
    for name, linear in prunable_linears(masked).items():
        linear.weight.data = masks[name].apply(linear.weight.data)
    seen: list[tuple[int, int]] = []
    fits = refit_model(fitted, masks, WINDOWS, "cpu", batch=4, on_block=lambda *done: seen.append(done))
    assert list(fits) == list(prunable_linears(dense))
    assert seen == [(1, 2), (2, 2)]
    assert logits_error(fitted, dense) < 0.9 * logits_error(masked, dense)
    for name, linear in prunable_linears(fitted).items():
        assert not linear.weight[~masks[name].keep()].any()
        assert fits[name].error <= fits[name].masked_error
    # What was not pruned is as it was.
    assert torch.equal(fitted.lm_head.weight, dense.lm_head.weight)


def test_the_same_windows_give_the_same_bits() -> None:
    dense = make_model(torch.bfloat16)
    masks = masks_of(dense)
    first, second = copy.deepcopy(dense), copy.deepcopy(dense)
    for model in (first, second):
        refit_model(model, masks, WINDOWS, "cpu")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def without(masks: dict[str, HybridMask], name: str) -> dict[str, HybridMask]:
    return {other: mask for other, mask in masks.items() if other != name}


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda masks: without(masks, FIRST), f"{FIRST}: there is no mask"),
        (lambda masks: masks | {"lm_head": masks[FIRST]}, "'lm_head', which is no prunable weight"),
        (lambda masks: masks | {FIRST: masks["model.layers.0.mlp.up_proj"]}, r"\(64, 32\), it is \(32, 32\)"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_masks_that_do_not_fit_are_refused_before_anything_changes(change: Any, said: str) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=said):
        refit_model(model, change(masks_of(model)), WINDOWS, "cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_gpu_fits_as_the_cpu_does(dtype: torch.dtype) -> None:
    weight, mask, inputs = case(200, 256, 0.3)
    weight, hessian = weight.to(dtype), hessian_of(inputs)
    here, fit = refit(weight, mask.keep(), hessian)
    there, other = refit(weight.cuda(), mask.keep().cuda(), hessian.cuda())
    assert (there.cpu() - here).norm() <= 1e-4 * here.norm()
    assert other.error == pytest.approx(fit.error, rel=1e-3)
