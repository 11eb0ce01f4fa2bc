"""Quantised weights on disk: the convention that servers read, checkpoints that come back, what is damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from patch.audit import audit
from patch.checkpoint import INFO_FILE, content_hash, load_info, load_masks, save_checkpoint
from patch.compressed import KEY, names_of, precision_of, quantisation_config, tensors_of, weight_of
from patch.errors import UserError
from patch.layers import prunable_linears
from patch.mask import HybridMask, best_patterns
from patch.oneshot.gptq import quantise_model
from patch.quantise.linear import QuantisedLinear
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import Quantised
from patch.simulate import install, load_quantised
from patch.weights import prunable_weights

UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(24).reshape(2, 12)
EVERY = pytest.mark.parametrize("precision", PRECISIONS)


def masked_model(tied: bool = True) -> tuple[LlamaForCausalLM, dict[str, HybridMask]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    masks = {}
    for name, linear in prunable_linears(model).items():
        n, k = linear.weight.shape
        dense = torch.rand(-(-n // 16), -(-k // 16), generator=torch.Generator().manual_seed(n * k)) < 0.4
        masks[name] = HybridMask((n, k), (16, 16), dense, best_patterns(linear.weight.abs()))
        with torch.no_grad():
            linear.weight.copy_(masks[name].apply(linear.weight))
            if linear.bias is not None:
                linear.bias.normal_()
    return model, masks


def windows() -> Tensor:
    return torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))


def quantised_model(
    precision: str, tied: bool = True
) -> tuple[LlamaForCausalLM, dict[str, HybridMask], dict[str, Quantised]]:
    model, masks = masked_model(tied)
    return model, masks, quantise_model(model, PRECISIONS[precision], windows(), "cpu", masks).weights


def save(path: Path, precision: str, tied: bool = True) -> dict[str, Quantised]:
    model, masks, weights = quantised_model(precision, tied)
    save_checkpoint(path, model, None, masks, {"structure": "hybrid", "precision": precision}, quantised=weights)
    assert not hasattr(model.config, KEY)
    return weights


@EVERY
def test_a_weight_comes_back_from_its_tensors(precision: str) -> None:
    _, _, weights = quantised_model(precision)
    for name, weight in weights.items():
        tensors = tensors_of(name, weight, PRECISIONS[precision])
        assert tuple(tensors) == names_of(name, PRECISIONS[precision])
        group = weight.group if PRECISIONS[precision].grouped else None
        about = (name, tuple(weight.values.shape), PRECISIONS[precision])
        back = weight_of(*about, group, tensors.__getitem__)
        with pytest.raises(UserError, match="the configuration says"):
            weight_of(*about, 8, tensors.__getitem__)
        assert torch.equal(back.values.float(), weight.values.float()) and torch.equal(back.scales, weight.scales)


def test_eight_values_are_a_word_the_first_lowest() -> None:
    values = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 7] * 4], dtype=torch.int8)
    tensors = tensors_of("w", Quantised(values, torch.ones(1, 1)), PRECISIONS["int4"])
    assert tensors["w.weight_packed"].tolist() == [[0xFCBA9810 - (1 << 32)] * 4]
    assert tensors["w.weight_shape"].tolist() == [1, 32]
    assert tensors["w.weight_scale"].dtype == torch.bfloat16


@EVERY
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_checkpoint_comes_back_as_what_it_computes(precision: str, tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "out"
    weights = save(path, precision, tied)
    model, masks, _ = quantised_model(precision, tied)
    install(model, weights, PRECISIONS[precision])
    loaded, missing = load_quantised(path, torch.float32)
    assert missing == []
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-6, atol=1e-6)
    for name, linear in prunable_linears(loaded).items():
        assert isinstance(linear, QuantisedLinear)
        assert torch.equal(linear.scales, weights[name].scales)
    found = load_masks(path)
    assert all(torch.equal(found[name].keep(), mask.keep()) for name, mask in masks.items())
    assert load_info(path, verify=True)["precision"] == precision and load_info(path)["format"] == 3


@EVERY
def test_an_audit_shows_bits_and_scales(precision: str, tmp_path: Path) -> None:
    weights = save(tmp_path / "out", precision)
    rows = audit(tmp_path / "out")
    assert [row.layer for row in rows] == list(weights)
    assert {row.bits for row in rows} == {PRECISIONS[precision].bits} and not any(row.violating for row in rows)
    for row, weight in zip(rows, weights.values(), strict=True):
        assert row.scales == (weight.group, float(weight.scales.min()), float(weight.scales.max()))
    read = dict(prunable_weights(tmp_path / "out"))
    assert all(torch.equal(read[name], weight.dequantised()) for name, weight in weights.items())
    assert content_hash(tmp_path / "out") != content_hash_of_unquantised(tmp_path)


def content_hash_of_unquantised(folder: Path) -> str:
    model, masks = masked_model()
    save_checkpoint(folder / "plain", model, None, masks, {"structure": "hybrid"})
    assert load_info(folder / "plain")["format"] == 2
    return content_hash(folder / "plain")


@EVERY
def test_transformers_loads_it_where_the_package_is(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    weights = save(tmp_path / "out", precision)
    auto: Any = AutoModelForCausalLM
    model, report = auto.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, _ = load_quantised(tmp_path / "out", torch.float32)
    with torch.no_grad():
        # Weights are decompressed at the first pass; activations stay as they are there, or are rounded as here.
        theirs = model(TOKENS).logits
        difference = (theirs - ours(TOKENS).logits).norm() / theirs.norm()
    assert difference < (1e-4 if precision == "int4" else 0.02)
    for name, weight in weights.items():
        own = model.get_submodule(name).weight.float()
        torch.testing.assert_close(own, weight.dequantised(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "about",
    [
        pytest.param({"quant_method": "gptq", "bits": 4}, id="gptq"),
        pytest.param({"quant_method": "compressed-tensors", "format": "pack-quantized"}, id="no-groups"),
        pytest.param({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}, id="two-groups"),
    ],
)
def test_what_others_quantised_is_not_ours(about: dict[str, Any]) -> None:
    assert precision_of({}) is None and precision_of({KEY: about}) is None
    ours = quantisation_config(PRECISIONS["int4"], 64, ["lm_head"])
    assert precision_of({KEY: ours}) is PRECISIONS["int4"]
    ours["config_groups"]["group_0"]["weights"]["symmetric"] = False
    assert precision_of({KEY: ours}) is None


def test_a_model_that_is_not_what_its_weights_stand_for_is_not_saved(tmp_path: Path) -> None:
    model, masks, weights = quantised_model("int8")
    info = {"structure": "hybrid", "precision": "int8"}
    for wrong, message in (
        ({name: weight for name, weight in weights.items() if name != UP}, f"{UP} is not quantised"),
        ({}, "but 0 quantised weights"),
        (weights | {UP: Quantised(weights[UP].values, weights[UP].scales * 2)}, f"{UP}: the model's weight is not"),
    ):
        with pytest.raises(UserError, match=message):
            save_checkpoint(tmp_path / "out", model, None, masks, info, quantised=wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("precision", "part", "damage", "message"),
    [
        pytest.param("fp8", "weight_scale", lambda t: t * float("nan"), "scale of row 0", id="scale-nan"),
        pytest.param("fp8", "weight_scale", lambda t: t[:-1].clone(), "scales are", id="scale-shape"),
        pytest.param("int8", "weight", lambda t: t.float(), "values are torch.float32", id="values-dtype"),
        pytest.param("int4", "weight_packed", lambda t: t[:, :-1].clone(), "packed values are", id="packed-shape"),
        pytest.param("int4", "weight_shape", lambda t: t + 1, "packed values are", id="said-shape"),
        pytest.param("int4", "weight_scale", lambda t: t * 0, "scale of row 0, group 0 is 0", id="scale-zero"),
        pytest.param("int4", "weight_packed", None, "is missing", id="missing"),
    ],
)
def test_damaged_tensors_are_named(precision: str, part: str, damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    save(path, precision)
    tensors = load_file(path / "model.safetensors")
    tensor = tensors.pop(f"{UP}.{part}")
    if damage:
        tensors[f"{UP}.{part}"] = damage(tensor).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message) as refused:
        load_quantised(path, torch.float32)
    assert UP in str(refused.value)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "out", "fp8")
    file = tmp_path / "out" / INFO_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 4}))
    with pytest.raises(UserError, match="format 4 is newer than 3"):
        load_info(tmp_path / "out")
