"""INT4 models, packed: the same as their simulation, on disk too, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stoicc_hybrids import random_mask
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import stoicc
from experiments.data.models import load_packable
from experiments.publish.card import origin
from patch import simulate
from patch.errors import UserError
from patch.layers import prunable_linears
from patch.mask import HybridMask
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import Quantised, quantise_groups
from stoicc.format import unpack
from stoicc.linear import HybridLinear, packed_modules
from stoicc.matmul import linear, linear_op
from stoicc.spec import Spec

IDS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(1))
FIRST = "model.layers.0.self_attn.q_proj"


def simulated(
    inputs: int = 256, group: int = 128, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, dict[str, HybridMask], dict[str, Quantised]]:
    """A model of INT4 as it is evaluated, its masks and its weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": inputs, "num_hidden_layers": 2, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    # As from_pretrained does: without the buffers of the rotary embedding.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    linears = prunable_linears(model)
    masks = {
        name: random_mask(*part.weight.shape, (64, 128 if inputs % 128 == 0 else 64), 0.6, seed=number)
        for number, (name, part) in enumerate(linears.items())
    }
    weights = {name: quantise_groups(mask.apply(linears[name].weight.detach()), group) for name, mask in masks.items()}
    simulate.install(model, weights, PRECISIONS["int4"])
    return model, masks, weights


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_packed_model_is_its_simulation_and_survives_the_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    model, masks, weights = simulated(384, dtype=dtype)
    expected = logits(model)
    before = {name: model.get_submodule(name).weight.clone() for name in masks}
    report = stoicc.compile_model(model, masks)
    assert sum(len(spec.parts) for spec in report.packed) == 14 and {spec.dtype for spec in report.packed} == {"int4"}
    assert len(report.packed) == 8, "query, key and value are one product, gate and up another"
    # Query, key and value are one product on a CPU too, of other sums.
    torch.testing.assert_close(logits(model), expected, rtol=2e-2, atol=2e-2)
    for name in masks if dtype == torch.bfloat16 else ():
        assert torch.equal(model.get_submodule(name).weight, before[name])
    for module in packed_modules(model):
        assert torch.equal(unpack(module.checked()), torch.cat([weights[part].values for part, _ in module.spec.parts]))
    text = model.generate(IDS, max_new_tokens=4, do_sample=False)
    stoicc.save_packed(tmp_path / "packed", model)
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["format"] == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(IDS, max_new_tokens=4, do_sample=False), text)
    assert HybridLinear.empty(packed_modules(model)[0].spec, dtype).weight.is_meta

    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    records = tensors[f"{FIRST}.records"]
    records[24] = 0  # the scales of the first 2:4 record
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"SHA-256"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_damaged_scales_are_named() -> None:
    model, masks, _ = simulated()
    stoicc.compile_model(model, masks)
    module = packed_modules(model)[0]
    module.records[24] = 0
    with pytest.raises(UserError, match=rf"{FIRST}: packed scales\[0, \d\] is 0\.0: scales must be positive"):
        module.refresh()


def test_what_cannot_be_packed_is_refused_before_anything_is_changed() -> None:
    model, masks, _ = simulated(448, group=64)
    with pytest.raises(UserError, match="its INT4 has groups of 64 inputs, packed weights have 128: run it unpacked"):
        stoicc.compile_model(model, masks)
    assert not packed_modules(model)
    model, masks, _ = simulated()
    with pytest.raises(UserError, match=r"INT4 already, it cannot become torch\.int8"):
        stoicc.compile_model(model, masks, dtype=torch.int8)


@pytest.mark.parametrize("dtype", ["float32", "int32", "nothing"])
def test_an_empty_module_of_what_is_not_packed_is_refused(dtype: str) -> None:
    with pytest.raises(UserError, match=rf"dtype .*{dtype}, needs bfloat16"):
        HybridLinear.empty(Spec((("one", 64),), 128, (64, 128), 1, 33, False, dtype), torch.bfloat16)


X = torch.randn(6, 256)


@pytest.mark.parametrize(
    "x", [X, X.reshape(2, 3, 256), X[0], X[:0], X.repeat(1, 2)[:, ::2]],
    ids=["matrix", "batch", "vector", "no-tokens", "strided"],
)  # fmt: skip
def test_a_product_is_that_of_the_weight_that_is_evaluated(x: Tensor) -> None:
    mask = random_mask(200, 256, (64, 128), 0.5)
    weight = quantise_groups(mask.apply(torch.randn(200, 256)), 128)
    hybrid = stoicc.pack(weight.values, mask, weight.scales)
    for dtype in (torch.bfloat16, torch.float16):
        bias = torch.randn(200).to(dtype)
        y = linear(x.to(dtype), hybrid, bias)
        assert torch.equal(y, nn.functional.linear(x.to(dtype), weight.dequantised().to(dtype), bias))
    with pytest.raises(UserError, match=r"activations are torch\.float32, .* torch\.int4: .*bfloat16 or float16"):
        linear(x, hybrid)


def test_it_is_a_well_formed_operator() -> None:
    mask = random_mask(64, 256, (64, 128), 0.5)
    weight = quantise_groups(mask.apply(torch.randn(64, 256)), 128)
    hybrid = stoicc.pack(weight.values, mask, weight.scales)
    parts = (*hybrid.parts().values(), hybrid.orders)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    torch.library.opcheck(linear_op, (x, *parts, None, torch.int4, [64, 256], [64, 128], hybrid.band))


def test_the_command_packs_an_int4_checkpoint(hts: Any, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    # The tiny model has no whole group: one of wider layers, with its tokenizer.
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig.from_pretrained(
        tiny_model, hidden_size=128, intermediate_size=256, num_hidden_layers=1, head_dim=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen = ["--calibration", tiny_text, "--windows", 2, "--length", 16]
    tiles = ["--structure", "hybrid", "--sparsity", 0.25, "--tile", "64x128"]
    four, packed = tmp_path / "four", tmp_path / "packed"
    code, _, err = hts("prune", tmp_path / "model", "--method", "magnitude", *tiles, "--out", tmp_path / "masked")
    assert code == 0, err
    code, _, err = hts("quantise", tmp_path / "masked", "--precision", "int4", *seen, "--out", four)
    assert code == 0, err
    code, out, err = hts("pack", four, packed)
    assert code == 0 and "7 linears packed into 4" in out, err
    assert (origin(four)["dtype"], origin(packed)["packed"], origin(packed)["dtype"]) == ("int4", "int4", "int4")
    code, _, err = hts("pack", four, tmp_path / "other", "--dtype", "int8")
    assert code == 1 and "INT4 already, and packed so: leave out --dtype" in err
    simulation, packed_model = (load_packable(str(path))[0] for path in (four, packed))
    assert {spec.dtype for spec in packed_model.config.quantization_config.specs()} == {"int4"}
    torch.testing.assert_close(logits(packed_model), logits(simulation), rtol=2e-2, atol=2e-2)
    for path in (four, packed):
        code, _, err = hts("eval", path, "--perplexity", f"{tiny_text}@32")
        assert code == 0, err
