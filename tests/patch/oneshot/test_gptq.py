"""INT4 in SparseGPT's sweep, and quantised models: against a float64 sweep, zeros that stay, what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from patch.errors import UserError
from patch.layers import prunable_linears
from patch.mask import HybridMask, best_patterns
from patch.oneshot import prune_model, sparsegpt
from patch.oneshot.gptq import quantise_model
from patch.oneshot.sparsegpt import (
    InputHessian,
    InverseFactor,
    SinkHessian,
    inverse_factor,
    largest_first,
    quantise_hybrid,
    quantise_in_order,
    quantise_masked,
)
from patch.quantise import reference
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import Quantised, quantise_weight

GROUP = 32


def inputs_of(columns: int, dead: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = (torch.randn(600, columns, generator=generator) @ mixing) * (
        torch.rand(columns, generator=generator) + 0.1
    )
    if dead is not None:
        inputs[:, dead] = 0
    return inputs


def hessian_of(inputs: Tensor) -> Tensor:
    statistic = InputHessian(inputs.shape[1])
    statistic.add(inputs, 4)
    return statistic.hessian()


def damped(hessian: Tensor) -> Tensor:
    hessian = hessian.clone()
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    hessian.diagonal().add_(sparsegpt.DAMPING * hessian.diagonal().mean())
    return hessian


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def error_of(quantised: Quantised, weight: Tensor, inputs: Tensor) -> float:
    exact = inputs.double() @ weight.double().T
    return float(((inputs.double() @ quantised.dequantised().double().T) - exact).norm() / exact.norm())


@pytest.mark.parametrize("columns", [32, 160], ids=["one-group", "two-blocks"])
@pytest.mark.parametrize("share", [0.5, 1.0], ids=["masked", "dense"])
def test_the_sweep_does_as_one_inverse_a_column(columns: int, share: float) -> None:
    weight, hessian = weight_of(6, columns), hessian_of(inputs_of(columns))
    keep = torch.rand(6, columns, generator=torch.Generator().manual_seed(2)) < share
    found = quantise_masked(weight, inverse_factor(hessian), keep, GROUP)
    values, scales = reference.sweep(weight * keep, damped(hessian), keep, GROUP)
    # Where a value is at the middle between two, float32 may take the other, and what follows makes up for it.
    assert (found.values.double() == values).double().mean() > 0.95
    assert (found.scales.double() == scales).double().mean() > 0.9
    assert not bool(found.values[~keep].any())


def test_passing_errors_on_halves_them() -> None:
    weight, inputs = weight_of(48, 128), inputs_of(128)
    keep = torch.ones_like(weight, dtype=torch.bool)
    swept = quantise_masked(weight, inverse_factor(hessian_of(inputs)), keep, GROUP)
    alone = quantise_masked(weight, InverseFactor(torch.eye(128), torch.zeros(128, dtype=torch.bool)), keep, GROUP)
    assert error_of(swept, weight, inputs) < 0.7 * error_of(alone, weight, inputs) < 0.2


@pytest.mark.parametrize("columns", [32, 160], ids=["one-group", "two-blocks"])
@pytest.mark.parametrize("share", [0.5, 1.0], ids=["masked", "dense"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_order_the_sweep_does_as_one_inverse_a_column(precision: str, share: float, columns: int) -> None:
    weight, hessian = weight_of(6, columns), hessian_of(inputs_of(columns, dead=3))
    keep = torch.rand(6, columns, generator=torch.Generator().manual_seed(2)) < share
    about, ordered = PRECISIONS[precision], largest_first(hessian)
    order = ordered.order.tolist()
    assert order == sorted(range(columns), key=lambda column: -hessian[column, column]) and order[-1] == 3
    found = quantise_in_order(weight, ordered, keep, about, GROUP)
    values, scales = reference.sweep_in_order(weight, damped(hessian), keep, order, about, GROUP)
    # Where a value is at the middle between two, float32 may take the other, and what follows makes up for it.
    assert (found.values.double() == values).double().mean() > 0.95
    torch.testing.assert_close(found.scales.double(), scales, rtol=1e-6, atol=0)
    assert not bool(found.values.float()[~keep].any())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("share", [0.5, 1.0], ids=["masked", "dense"])
def test_passing_errors_on_from_the_largest_inputs_loses_less(share: float, precision: str) -> None:
    inputs = (
        inputs_of(128) * torch.logspace(-1, 1, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(3))]
    )
    keep = torch.rand(48, 128, generator=torch.Generator().manual_seed(4)) < share
    weight, about = weight_of(48, 128) * keep, PRECISIONS[precision]
    ordered = quantise_in_order(weight, largest_first(hessian_of(inputs)), keep, about, GROUP)
    if about.grouped:
        other = quantise_masked(weight, inverse_factor(hessian_of(inputs)), keep, GROUP)
    else:
        values, scales = quantise_weight(weight, getattr(torch, about.dtype))
        other = Quantised(values, scales[:, None])
    assert error_of(ordered, weight, inputs) < (0.97 if about.grouped else 0.9) * error_of(other, weight, inputs)


@pytest.mark.parametrize("size", [1, 30], ids=["as-often", "as-large"])
def test_the_first_token_of_a_window_counts_as_all_others(size: int) -> None:
    inputs = inputs_of(32).reshape(6, 100, 32)
    inputs[:, 0] = inputs[:, 0] / inputs[:, 0].norm() * size
    found = SinkHessian(32, "cpu", 100)
    found.add(inputs[:4].flatten(0, 1), 4)
    found.add(inputs[4:].flatten(0, 1), 2)
    first, others = inputs[:, 0].double(), inputs[:, 1:].flatten(0, 1).double()
    often = min(99, float(others.square().sum() / first.square().sum()))
    assert (often == 99) == (size == 1)
    expected = 2 / 6 * (often * first.T @ first + others.T @ others)
    torch.testing.assert_close(found.hessian().double(), expected, rtol=1e-4, atol=1e-3)
    # Some of the tokens alone: which were first is not known.
    some, plain = SinkHessian(32, "cpu", 100), InputHessian(32)
    for statistic in (some, plain):
        statistic.add(inputs[0, :70], 1)
    assert torch.equal(some.hessian(), plain.hessian())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sink_that_is_told_apart_is_not_rounded_away(precision: str) -> None:
    """Its inputs are all alike, and the weight makes so little of them that what is left is as small as rounding."""
    inputs, weight = inputs_of(128).reshape(6, 100, 128), weight_of(48, 128)
    sink = torch.randn(128, generator=torch.Generator().manual_seed(5))
    inputs[:, 0] = sink
    weight -= (weight @ sink)[:, None] * sink / sink.square().sum() * 0.9
    keep, errors = torch.ones_like(weight, dtype=torch.bool), []
    for statistic in (InputHessian(128), SinkHessian(128, "cpu", 100)):
        statistic.add(inputs.flatten(0, 1), 6)
        ordered = largest_first(statistic.hessian())
        quantised = quantise_in_order(weight, ordered, keep, PRECISIONS[precision], GROUP)
        errors.append(error_of(quantised, weight, sink[None]))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("dense", [False, True], ids=["2:4", "all-dense"])
def test_pruned_and_rounded_in_one_sweep(dense: bool) -> None:
    weight, inputs = weight_of(32, 128), inputs_of(128)
    factor = inverse_factor(hessian_of(inputs))
    tiles = torch.full((2, 4), dense)
    found, mask = quantise_hybrid(weight, factor, (16, 32), tiles, GROUP)
    assert mask.sparsity == (0.0 if dense else 0.5)
    assert not bool(found.values[~mask.keep()].any())
    if dense:
        assert torch.equal(found.values, quantise_masked(weight, factor, mask.keep(), GROUP).values)
        return
    # No worse than rounding what SparseGPT kept to nearest.
    pruned, own = sparsegpt.prune_hybrid(weight, factor, (16, 32), tiles)
    still = InverseFactor(torch.eye(128), torch.zeros(128, dtype=torch.bool))
    rounded = quantise_masked(pruned, still, own.keep(), GROUP)
    assert error_of(found, weight, inputs) < error_of(rounded, weight, inputs)


def test_a_dead_input_is_rounded_to_nearest() -> None:
    weight, hessian = weight_of(8, 64), hessian_of(inputs_of(64, dead=5))
    keep = torch.ones_like(weight, dtype=torch.bool)
    found = quantise_masked(weight, inverse_factor(hessian), keep, GROUP)
    half = found.scales[:, 0] / 2
    inside = weight[:, 5].abs() < 7 * found.scales[:, 0]
    assert bool(((found.dequantised()[:, 5] - weight[:, 5]).abs() <= half * 1.001)[inside].all()) and bool(inside.any())


def make_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


WINDOWS = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))


def masks_of(model: nn.Module) -> dict[str, HybridMask]:
    masks = {}
    for name, linear in prunable_linears(model).items():
        n, k = linear.weight.shape
        dense = torch.rand(-(-n // 16), -(-k // 32), generator=torch.Generator().manual_seed(n + k)) < 0.3
        masks[name] = HybridMask((n, k), (16, 32), dense, best_patterns(linear.weight.abs()))
        with torch.no_grad():
            linear.weight.copy_(masks[name].apply(linear.weight))
    return masks


@pytest.mark.parametrize("sink_aware", [False, True], ids=["", "sink-aware"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_models_weights_become_what_is_returned(precision: str, masked: bool, sink_aware: bool) -> None:
    model = make_model()
    masks = masks_of(model) if masked else {}
    before = copy.deepcopy(model)
    done: list[tuple[int, int]] = []
    found = quantise_model(
        model,
        PRECISIONS[precision],
        WINDOWS,
        "cpu",
        masks,
        sink_aware=sink_aware,
        batch=2,
        on_block=lambda *n: done.append(n),
    )
    linears = prunable_linears(model)
    assert list(found.weights) == list(linears) and done == [(1, 2), (2, 2)]
    for name, quantised in found.weights.items():
        assert torch.equal(linears[name].weight, quantised.dequantised())
        if masked:
            assert not bool(quantised.values.float()[~masks[name].keep()].any())
        assert quantised.group == (32 if precision == "int4" else linears[name].in_features)
    with torch.no_grad():
        near, exact = model(input_ids=WINDOWS).logits, before(input_ids=WINDOWS).logits
    assert 0 < (near - exact).norm() / exact.norm() < {"fp8": 0.1, "int8": 0.03, "int4": 0.3}[precision]


def test_a_model_pruned_and_rounded_in_one_sweep() -> None:
    model = make_model(torch.bfloat16)
    layers = prune_model(model, "sparsegpt", "hybrid", 0.35, (16, 32), WINDOWS, "cpu", int4=True)
    for name, linear in prunable_linears(model).items():
        quantised, mask = layers[name].quantised, layers[name].mask
        assert quantised is not None and mask is not None
        assert torch.equal(linear.weight, quantised.dequantised().bfloat16())
        assert not bool(quantised.values[~mask.keep()].any())


def test_what_cannot_be_quantised_is_refused_before_a_weight_changes() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="INT4 needs calibration windows"):
        quantise_model(model, PRECISIONS["int4"], None, "cpu", {})
    for method, structure, sparsity in (("wanda", "2:4", 0.5), ("sparsegpt", "unstructured", 0.5)):
        with pytest.raises(UserError, match="does not prune and round in one sweep"):
            prune_model(model, method, structure, sparsity, (16, 32), WINDOWS, "cpu", int4=True)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    with torch.no_grad():
        prunable_linears(model)["model.layers.1.mlp.up_proj"].weight[3, 4] = float("inf")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: the weight holds values that are not finite"):
        quantise_model(model, PRECISIONS["fp8"], None, "cpu", {})
