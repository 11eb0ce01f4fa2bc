"""Whole models on packed weights: same logits, same text, and checkpoints that load as what they were."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stoicc_hybrids import random_mask
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import stoicc
from patch.errors import UserError
from patch.mask import HybridMask
from patch.prunable import prunable_linears
from stoicc.linear import HybridLinear, HybridPart, packed_modules

IDS = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(0))


def masked_model(share: float = 0.6, *, bias: bool = False) -> tuple[PreTrainedModel, dict[str, HybridMask]]:
    """A tiny random model whose weights are masked already, and its masks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attention_bias=bias,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    masks = {}
    for seed, (name, linear) in enumerate(prunable_linears(model).items()):
        masks[name] = random_mask(*linear.weight.shape, (64, 64), share, seed=seed)
        linear.weight.copy_(masks[name].apply(linear.weight))
        if linear.bias is not None:
            nn.init.normal_(linear.bias)
    return model, masks


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
def test_logits_are_the_masked_models(fuse: bool, bias: bool) -> None:
    model, masks = masked_model(bias=bias)
    expected = logits(model)
    report = stoicc.compile_model(model, masks, fuse=fuse)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.02)
    assert len(packed_modules(model)) == len(report.packed) == (8 if fuse else 14)
    assert sum(len(spec.parts) for spec in report.packed) == 14
    assert report.bytes_after < 0.8 * report.bytes_before
    assert not any(isinstance(module, nn.Linear) for module in model.model.layers.modules())


def test_greedy_text_is_the_masked_models() -> None:
    model, masks = masked_model()
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    expected = model.generate(IDS, **settings)
    stoicc.compile_model(model, masks)
    assert torch.equal(model.generate(IDS, **settings), expected)


def test_one_graph_under_torch_compile() -> None:
    model, masks = masked_model()
    stoicc.compile_model(model, masks)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS).logits, logits(model))


def test_all_dense_masks_leave_the_linears() -> None:
    model, masks = masked_model()
    name = "model.layers.0.mlp.down_proj"
    masks[name] = HybridMask(masks[name].shape, (64, 64), torch.ones_like(masks[name].dense), masks[name].patterns)
    report = stoicc.compile_model(model, masks)
    assert report.dense == (name,)
    assert isinstance(model.get_submodule(name), nn.Linear)
    assert "1 kept dense" in str(report)


def test_projections_whose_maps_do_not_stack_stay_apart() -> None:
    model, masks = masked_model()
    name = "model.layers.0.self_attn.k_proj"
    masks[name] = random_mask(*masks[name].shape, (32, 32), 0.5)
    stoicc.compile_model(model, masks)
    layer = model.model.layers[0]
    assert all(type(getattr(layer.self_attn, f"{p}_proj")) is HybridLinear for p in "qkv")
    assert type(layer.mlp.up_proj) is HybridPart


def test_a_part_called_out_of_turn_computes_its_own() -> None:
    model, masks = masked_model()
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    stoicc.compile_model(model, masks)
    mlp = model.model.layers[0].mlp
    first, second = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    mlp.gate_proj(first)
    torch.testing.assert_close(mlp.up_proj(second), second @ weight.T)
    torch.testing.assert_close(mlp.up_proj(first), first @ weight.T)


@pytest.mark.parametrize("case", ["unknown", "not-linear", "shape", "dtype"])
def test_what_does_not_fit_changes_nothing(case: str) -> None:
    model, masks = masked_model()
    mask = masks["model.layers.1.mlp.down_proj"]
    if case == "unknown":
        masks["model.layers.7.mlp.down_proj"] = mask
    elif case == "not-linear":
        masks["model.norm"] = mask
    elif case == "shape":
        masks["model.layers.1.mlp.down_proj"] = masks["model.layers.1.mlp.up_proj"]
    else:
        model.float()
    with pytest.raises(UserError):
        stoicc.compile_model(model, masks)
    assert not packed_modules(model)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Tensor]:
    model, masks = masked_model(bias=True)
    stoicc.compile_model(model, masks)
    path = stoicc.save_packed(tmp_path / "packed", model)
    return path, logits(model)


def test_a_packed_checkpoint_loads_packed(packed: tuple[Path, Tensor]) -> None:
    path, expected = packed
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert len(packed_modules(model)) == 8
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.05)


def damage(path: Path, name: str, index: tuple[int, ...], value: int) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name][index] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "index", "value"), [("columns", (0, 0), 99), ("starts", (1,), 1), ("records", (8, 0), -1)], ids=str
)
def test_a_damaged_checkpoint_is_refused_by_module(
    packed: tuple[Path, Tensor], part: str, index: tuple[int, ...], value: int
) -> None:
    path, _ = packed
    damage(path, f"model.layers.1.mlp.gate_proj.{part}", index, value)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate_proj"):
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def test_a_newer_format_is_refused(packed: tuple[Path, Tensor]) -> None:
    path, _ = packed
    config = path / "config.json"
    config.write_text(config.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2"):
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def test_a_model_that_is_not_packed_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compile_model"):
        stoicc.save_packed(tmp_path / "out", masked_model()[0])
