"""Packed modules in a transformers model, and packed checkpoints, on a CPU."""

import json
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stoicc_hybrids import random_mask
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import stoicc
from patch.errors import UserError
from patch.layers import prunable_linears
from patch.mask import HybridMask
from patch.quantise.values import quantise_weight
from patch.tiles import TileShape
from stoicc import quantizer
from stoicc.format import pack
from stoicc.linear import DenseLinear8, HybridLinear, HybridPart, packed_modules
from stoicc.matmul import product
from stoicc.spec import Spec

Masks = dict[str, HybridMask]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
LINEARS = 14
IDS = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))
QKV = "model.layers.0.self_attn"


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    # As from_pretrained does: without the buffers of the rotary embedding.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def some_masks(model: nn.Module, share: float = 0.6, tile: TileShape = (64, 64)) -> Masks:
    linears = prunable_linears(model).items()
    return {name: random_mask(*linear.weight.shape, tile, share, seed=i) for i, (name, linear) in enumerate(linears)}


@torch.no_grad()
def masked(model: nn.Module, masks: Masks) -> nn.Module:
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.copy_(mask.apply(weight))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To within what another order of summation changes in bfloat16."""
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


# compile_model


# Where siblings do not stack, the first is packed before the second asks whether they do, and is then no nn.Linear.


@pytest.mark.parametrize(
    ("tile", "fuse"),
    [
        pytest.param((64, 64), True, id="64x64-fused"),
        pytest.param((64, 64), False, id="64x64-unfused"),
        pytest.param((64, 128), True, id="64x128-fused"),
        pytest.param((64, 128), False, id="64x128-unfused"),
        pytest.param((128, 64), True, id="128x64-fused"),
        pytest.param((128, 64), False, id="128x64-unfused"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_are_those_of_the_masked_model(kind: str, tile: TileShape, fuse: bool) -> None:
    model = tiny_model(kind)
    masks = some_masks(model, tile=tile)
    expected = logits(masked(model, masks))
    report = stoicc.compile_model(model, masks, fuse=fuse)
    assert_same(logits(model), expected)
    assert sum(len(spec.parts) for spec in report.packed) == LINEARS
    assert not [name for name, module in prunable_linears(model).items() if isinstance(module, nn.Linear)]


def test_masks_are_applied_while_packing() -> None:
    dense, model = tiny_model(), tiny_model()
    masks = some_masks(model)
    stoicc.compile_model(model, masks)
    assert not torch.allclose(logits(model), logits(dense), atol=0.05)
    assert_same(logits(model), logits(masked(dense, masks)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_siblings_are_fused(dtype: torch.dtype) -> None:
    model = tiny_model("qwen2", dtype)
    expected = {name: linear.bias for name, linear in prunable_linears(model).items()}
    report = stoicc.compile_model(model, some_masks(model))
    fused = [tuple(name.split(".")[-1] for name, _ in spec.parts) for spec in report.packed]
    assert sorted(fused) == sorted(
        [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] * 2
    )
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, HybridLinear) and attention.q_proj.spec.shape == (512, 256)
    assert [isinstance(part, HybridPart) for part in (attention.k_proj, attention.v_proj)] == [True, True]
    assert [part.out_features for part in (attention.q_proj, attention.k_proj, attention.v_proj)] == [256, 128, 128]
    assert torch.equal(attention.q_proj.bias, torch.cat([expected[f"{QKV}.{p}_proj"] for p in "qkv"]))
    assert attention.o_proj.bias is None


def test_siblings_whose_tiles_differ_are_not_fused() -> None:
    model = tiny_model()
    masks = some_masks(model)
    weight = model.get_submodule(f"{QKV}.k_proj").weight
    masks[f"{QKV}.k_proj"] = random_mask(*weight.shape, (128, 64), 0.5)
    expected = logits(masked(model, masks))
    report = stoicc.compile_model(model, masks)
    assert [len(spec.parts) for spec in report.packed if spec.parts[0][0].startswith(QKV)] == [1, 1, 1, 1]
    assert_same(logits(model), expected)


def test_siblings_that_end_within_a_tile_are_not_fused() -> None:
    """All but the last must be whole tiles: 448 rows are not whole tiles of 128."""
    model = tiny_model()
    report = stoicc.compile_model(model, some_masks(model, tile=(128, 64)))
    assert [len(spec.parts) for spec in report.packed if "mlp.gate_proj" in spec.parts[0][0]] == [1, 1]


def test_only_some_masks() -> None:
    model = tiny_model()
    masks = {name: mask for name, mask in some_masks(model).items() if not name.endswith(("v_proj", "down_proj"))}
    expected = logits(masked(model, masks))
    stoicc.compile_model(model, masks)
    assert_same(logits(model), expected)
    assert isinstance(model.get_submodule(f"{QKV}.v_proj"), nn.Linear)
    assert isinstance(model.get_submodule(f"{QKV}.k_proj"), HybridLinear)


def test_all_dense_masks_keep_their_linears() -> None:
    model = tiny_model()
    masks = some_masks(model)
    name = "model.layers.1.mlp.down_proj"
    masks[name].dense[:] = True
    kept, before = model.get_submodule(name), model.get_submodule(name).weight.clone()
    report = stoicc.compile_model(model, masks)
    assert report.dense == (name,)
    assert model.get_submodule(name) is kept and torch.equal(kept.weight, before)


def test_report_counts_bytes() -> None:
    model = tiny_model()
    masks = some_masks(model)
    masks["model.layers.1.mlp.down_proj"].dense[:] = True
    sizes = {name: 2 * linear.weight.numel() for name, linear in prunable_linears(model).items()}
    report = stoicc.compile_model(model, masks)
    packed = sum(module.checked().nbytes for module in packed_modules(model))
    assert report.bytes_before == sum(sizes.values())
    assert report.bytes_after == packed + sizes["model.layers.1.mlp.down_proj"]
    assert report.bytes_after < 0.8 * report.bytes_before
    assert report.packed == tuple(module.spec for module in packed_modules(model))
    counts = r"13 linears packed into 7, 1 kept dense, 0 kept since they would be slower: "
    assert re.fullmatch(counts + r"2\.16 MB -> 1\.\d\d MB \(0\.\d\dx\)", str(report))


def test_full_graph_compiles() -> None:
    model = tiny_model()
    stoicc.compile_model(model, some_masks(model))
    expected = logits(model)
    torch._dynamo.reset()
    assert_same(logits(torch.compile(model, fullgraph=True, backend="eager")), expected)


def test_dense_weights_are_freed() -> None:
    model = tiny_model()
    stoicc.compile_model(model, some_masks(model))
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "proj" in name] and "lm_head.weight" in names


BEFORE_ANYTHING_CHANGES: list[Any] = [
    pytest.param(
        lambda model, masks: masks.update({"model.nothing": masks[f"{QKV}.q_proj"]}), "model.nothing", id="unknown"
    ),
    pytest.param(
        lambda model, masks: masks.update({"model.norm": masks[f"{QKV}.q_proj"]}), "LlamaRMSNorm", id="no-linear"
    ),
    pytest.param(
        lambda model, masks: masks.update({"model.layers.1.mlp.down_proj": masks[f"{QKV}.q_proj"]}),
        r"model.layers.1.mlp.down_proj: mask is for a weight of \(256, 256\), the model's is \(256, 448\)",
        id="shape",
    ),
    pytest.param(
        lambda model, masks: model.model.layers[1].mlp.down_proj.float(),
        "model.layers.1.mlp.down_proj: weight is torch.float32",
        id="float32",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BEFORE_ANYTHING_CHANGES)
def test_refused_before_anything_changes(spoil: Callable[[nn.Module, Masks], Any], message: str) -> None:
    model = tiny_model()
    masks = some_masks(model)
    spoil(model, masks)
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        stoicc.compile_model(model, masks)
    assert dict(model.named_modules()) == modules


def test_inputs_that_cannot_be_packed_are_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(60, 64)).to(torch.bfloat16)
    first = model[0]
    masks = {str(i): random_mask(*model[i].weight.shape, (64, 4), 0.5) for i in (0, 1)}
    with pytest.raises(UserError, match="multiple of 8"):
        stoicc.compile_model(model, masks)
    assert model[0] is first


# Fused parts


@pytest.fixture
def attention() -> tuple[HybridLinear, HybridPart, HybridPart, Callable[[Tensor, int], Tensor]]:
    """The fused projections of one block, and what each computes."""
    model = tiny_model("qwen2")
    block = model.model.layers[0].self_attn
    masked(model, masks := some_masks(model))
    linears = [block.q_proj, block.k_proj, block.v_proj]
    stoicc.compile_model(model, masks)

    def expected(x: Tensor, index: int) -> Tensor:
        return linears[index](x).detach()

    return block.q_proj, block.k_proj, block.v_proj, expected


def some_activations(seed: int, tokens: int = 5) -> Tensor:
    return torch.randn(1, tokens, 256, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_parts_take_what_the_first_has_computed(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, expected = attention
    products = []
    module_of_linears = sys.modules[HybridLinear.__module__]
    monkeypatch.setattr(module_of_linears, "product", lambda *a, **k: products.append(a) or product(*a, **k))
    x = some_activations(0)
    for index, module in enumerate((q, k, v)):
        assert_same(module(x), expected(x, index))
    assert len(products) == 1


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 2, 1), (1,), (2, 2), (0, 1, 1, 2, 2)], ids=str)
def test_parts_in_any_order(attention: Any, order: tuple[int, ...]) -> None:
    *modules, expected = attention
    x = some_activations(0)
    for index in order:
        assert_same(modules[index](x), expected(x, index))


def test_parts_with_other_activations(attention: Any) -> None:
    q, k, v, expected = attention
    x, other = some_activations(0), some_activations(1, tokens=3)
    q(x)
    assert_same(k(other), expected(other, 1))
    assert_same(k(x.clone()), expected(x, 1))
    assert_same(v(x), expected(x, 2))
    assert_same(v(other), expected(other, 2))
    assert_same(k(x), expected(x, 1))


def test_last_part_lets_go_of_the_results(attention: Any) -> None:
    q, k, v, _ = attention
    x = some_activations(0)
    q(x), k(x), v(x)
    assert q._results is None


def test_parts_after_the_activations_were_written_in_place(attention: Any) -> None:
    q, k, _, expected = attention
    x = some_activations(0)
    q(x)
    x.copy_(some_activations(1))
    assert_same(k(x), expected(x, 1))


# Packed checkpoints


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Tensor, Tensor]:
    """A packed checkpoint, its model, and the masked dense model's logits and greedy text."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # no near ties
    masks = some_masks(model)
    masks["model.layers.1.mlp.down_proj"].dense[:] = True
    masked(model, masks)
    expected, text = logits(model), generated(model)
    stoicc.compile_model(model, masks)
    path = tmp_path_factory.mktemp("packed") / "checkpoint"
    assert stoicc.save_packed(path, model) == path
    return path, model, expected, text


def generated(model: nn.Module) -> Tensor:
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)


def loaded(path: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.bfloat16, **options}).eval()


def without_hashes(path: Path) -> None:
    """As checkpoints of before: what else is checked must notice."""
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["files"], config["quantization_config"]["digest"]
    (path / "config.json").write_text(json.dumps(config))


def damaged(packed: tuple[Path, Any, Any, Any], to: Path, spoil: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the checkpoint whose tensors ``spoil`` has changed."""
    to.mkdir()
    for file in packed[0].iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    without_hashes(to)
    tensors = load_file(to / "model.safetensors")
    spoil(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def with_config(packed: tuple[Path, Any, Any, Any], to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the checkpoint whose quantization_config is changed."""
    damaged(packed, to, lambda tensors: None)
    config = json.loads((to / "config.json").read_text())
    change(config["quantization_config"])
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_loads_what_was_saved(packed: tuple[Path, nn.Module, Tensor, Tensor]) -> None:
    path, model, expected, _ = packed
    again = loaded(path)
    assert torch.equal(logits(again), logits(model))
    assert_same(logits(again), expected)
    assert [module.spec for module in packed_modules(again)] == [module.spec for module in packed_modules(model)]
    assert isinstance(again.model.layers[1].mlp.down_proj, nn.Linear)
    for found, saved in zip(packed_modules(again), packed_modules(model), strict=True):
        assert torch.equal(found.orders, saved.orders)


def test_checkpoints_of_sixteen_bits_can_be_read_by_earlier_versions(packed: Any) -> None:
    assert json.loads((packed[0] / "config.json").read_text())["quantization_config"]["format"] == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_model_of_eight_bits_survives_the_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    masks = some_masks(model, tile=(64, 128))
    expected = logits(masked(model, masks))
    report = stoicc.compile_model(model, masks, dtype=dtype)
    assert sum(len(spec.parts) for spec in report.packed) == LINEARS
    found = logits(model)
    assert (found - expected).norm() <= 0.1 * expected.norm()
    stoicc.save_packed(tmp_path / "packed", model)
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["format"] == 2
    assert torch.equal(logits(loaded(tmp_path / "packed")), found)

    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    tensors[f"{QKV}.q_proj.scales"][3] = -1
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    without_hashes(tmp_path / "packed")
    with pytest.raises(UserError, match=rf"{QKV}\.q_proj: packed scales\[3\] is -1"):
        loaded(tmp_path / "packed")


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch's product of FP8 on a CPU took one scale for all rows")
def test_what_is_left_dense_in_eight_bits_computes_the_same_and_is_not_saved() -> None:
    mask = random_mask(320, 256, (64, 128), 0.5)
    values, scales = quantise_weight(mask.apply(torch.randn(320, 256).bfloat16()), torch.float8_e4m3fn)
    hybrid = pack(values, mask, scales)
    bias = torch.randn(320).bfloat16()
    left = DenseLinear8(hybrid, (("layer.k", 192), ("layer.v", 128)), bias)
    layer = torch.nn.Sequential(OrderedDict(k=left, v=HybridPart(left, 1)))
    x = torch.randn(2, 5, 256).bfloat16()
    expected = stoicc.linear(x, hybrid, bias)
    for found, part in zip((layer.k(x), layer.v(x)), expected.split([192, 128], dim=-1), strict=True):
        assert found.dtype == x.dtype and (found - part).norm() <= 0.01 * part.norm()
    assert torch.equal(layer.v.weight.float(), (values.float() * scales[:, None]).bfloat16()[192:].float())
    assert left.nbytes == 320 * 256 + 4 * 320
    for save in (layer.state_dict, lambda: stoicc.save_packed("nowhere", layer)):
        with pytest.raises(UserError, match=r"layer\.k was left dense in FP8 and cannot be saved.*without `tokens`"):
            save()
    packed = HybridLinear(
        Spec((("other", 320),), 256, (64, 128), 1, len(hybrid.records), False, "float8_e4m3fn"), hybrid, None
    )
    for precise in (True, False):
        stoicc.add_up_precisely(torch.nn.Sequential(layer, packed), precise)
        assert left.precise == packed.precise == precise
    with pytest.raises(UserError, match="no packed FP8 linears"):
        stoicc.add_up_precisely(torch.nn.Linear(2, 2))


def test_a_model_is_compiled_to_add_up_precisely_where_it_has_eight_bits() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(256, 320)).bfloat16()
    masks = {"0": random_mask(320, 256, (64, 128), 0.5)}
    for dtype in (None, torch.int8):
        with pytest.raises(UserError, match="precise sums are of FP8: give dtype="):
            stoicc.compile_model(layers, masks, dtype=dtype, precise=True)
    assert isinstance(layers[0], torch.nn.Linear)
    stoicc.compile_model(layers, masks, dtype=torch.float8_e4m3fn, precise=True)
    assert isinstance(layers[0], HybridLinear) and layers[0].precise


def test_weights_are_quantised_to_eight_bits_only() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=r"cannot quantise to torch\.float16"):
        stoicc.compile_model(model, some_masks(model), dtype=torch.float16)


@pytest.mark.parametrize("kept", ["weight", "weight_packed"])
def test_what_transformers_quantised_as_it_loaded_is_named(kept: str) -> None:
    model = tiny_model()
    masks = some_masks(model)
    linear = model.get_submodule(next(iter(masks)))
    del linear.weight
    linear.register_buffer(kept, torch.zeros(4, dtype=torch.int32))
    linear.register_buffer("weight_scale", torch.ones(4))
    with pytest.raises(UserError, match=r"quantised as transformers loads it.*hts pack"):
        stoicc.compile_model(model, masks)


def test_a_weight_that_cannot_be_quantised_is_named_before_anything_changes() -> None:
    model = tiny_model()
    masks = some_masks(model)
    modules, last = dict(model.named_modules()), list(masks)[-1]
    with torch.no_grad():
        model.get_submodule(last).weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=f"{last}: its weight has values that are not finite"):
        stoicc.compile_model(model, masks, dtype=torch.int8)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("tokens", [16, (0,), (-1, 4), (1.5,), ("1",)], ids=str)
def test_numbers_of_tokens_that_cannot_be(tokens: Any) -> None:
    with pytest.raises(UserError, match=r"tokens are .* must be positive whole numbers"):
        stoicc.compile_model(nn.Sequential(nn.Linear(64, 64)).bfloat16(), {}, tokens=tokens)


def test_a_path_in_place_of_masks_says_what_loads_them() -> None:
    masks: Any = "pruned"
    with pytest.raises(UserError, match=r"masks are 'pruned': .*load_masks\('pruned'\)"):
        stoicc.compile_model(nn.Sequential(nn.Linear(64, 64)).bfloat16(), masks)


def test_checkpoint_holds_no_dense_weights(packed: tuple[Path, nn.Module, Tensor, Tensor]) -> None:
    path, model, *_ = packed
    tensors = load_file(path / "model.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    dense = 2 * sum(parameter.numel() for parameter in tiny_model("qwen2").parameters())
    hybrid = sum(module.checked().nbytes for module in packed_modules(model))
    kept = sum(2 * parameter.numel() for parameter in model.parameters())
    biases = sum(2 * module.bias.numel() for module in packed_modules(model) if module.bias is not None)
    assert size == hybrid + kept + biases < 0.9 * dense
    assert size <= (path / "model.safetensors").stat().st_size <= size + 20_000
    assert not any(name.endswith("_proj.weight") for name in tensors if "layers.1.mlp.down" not in name)


def test_greedy_text_is_the_masked_models(packed: tuple[Path, nn.Module, Tensor, Tensor]) -> None:
    path, model, _, text = packed
    assert torch.equal(generated(model), text)
    assert torch.equal(generated(loaded(path)), text)


def test_loaded_again_and_saved_again(packed: tuple[Path, nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    again = loaded(packed[0])
    stoicc.save_packed(tmp_path / "again", again)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (packed[0] / "model.safetensors").read_bytes()


def nibbles_zero(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.q_proj.records"][8, 5] = 0


def columns_swapped(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.q_proj.columns"][0] = tensors[f"{QKV}.q_proj.columns"][0].flip(0)


def columns_out_of_range(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.q_proj.columns"][3, 0] = 1 << 20


def starts_moved(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.q_proj.starts"][2] += 1


def sparse_blocks_negative(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.q_proj.sparse_blocks"][1] = -1


def leads_moved(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.q_proj.leads"][0] += 1


DAMAGE = [
    (nibbles_zero, "metadata"),
    (columns_swapped, "columns"),
    (columns_out_of_range, "columns of panel 3"),
    (starts_moved, r"starts\[2\]"),
    (sparse_blocks_negative, "sparse_blocks"),
    (leads_moved, "leads"),
]


@pytest.mark.parametrize(("spoil", "message"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_tensors_are_refused_with_their_module(
    packed: Any, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = damaged(packed, tmp_path / "damaged", spoil)
    with pytest.raises(UserError, match=rf"{QKV}\.q_proj: .*{message}"):
        loaded(path)


def test_tensors_of_another_size_are_refused(packed: Any, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{QKV}.q_proj.records"] = tensors[f"{QKV}.q_proj.records"][:-1].contiguous()

    with pytest.raises(Exception, match=r"q_proj|size mismatch|mismatched"):
        loaded(damaged(packed, tmp_path / "damaged", cut))


@pytest.mark.parametrize("part", ["records", "starts", "columns", "sparse_blocks", "leads"])
def test_missing_tensors_are_refused(packed: Any, tmp_path: Path, part: str) -> None:
    path = damaged(packed, tmp_path / "damaged", lambda tensors: tensors.__delitem__(f"{QKV}.q_proj.{part}"))
    with pytest.raises(UserError, match=rf"{QKV}\.q_proj"):
        loaded(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c.update(format=4), "has format 4, this version reads up to 3", id="newer-format"),
        *(
            pytest.param(
                lambda c, dtype=dtype: c["modules"][0].update(dtype=dtype),
                rf"damaged \({QKV}\.q_proj: packed weight has dtype .*{dtype}, needs bfloat16",
                id=dtype,
            )
            for dtype in ("float32", "int32", "bool", "nn", "bfloat17")
        ),
        *(
            pytest.param(
                lambda c, old=old, dtype=dtype: [c.update(format=old), c["modules"][0].update(dtype=dtype)],
                rf"damaged \({QKV}\.q_proj: {dtype} in format {old}, known since {since}\)",
                id=f"{dtype}-in-format-{old}",
            )
            for old, dtype, since in ((1, "int4", 3), (2, "int4", 3), (1, "int8", 2))
        ),
        pytest.param(lambda c: c["modules"][0].pop("band"), "quantization_config is damaged", id="field-missing"),
        pytest.param(lambda c: c["modules"][0].update(speed=9), "quantization_config is damaged", id="field-unknown"),
        pytest.param(lambda c: c["modules"][0].update(units="many"), "quantization_config is damaged", id="wrong-type"),
        pytest.param(lambda c: c["modules"][0].update(band=3), "bands have 3", id="band"),
        *(
            pytest.param(
                lambda c, modules=modules: c.update(modules=modules),
                "quantization_config is damaged",
                id=f"modules-{name}",
            )
            for name, modules in (("number", 5), ("numbers", [1, 2]), ("null", None), ("nested", [[["a"]]]))
        ),
        pytest.param(
            lambda c: c["modules"][0]["parts"][0].__setitem__(1, 2**40),
            "quantization_config is damaged",
            id="too-large",
        ),
        pytest.param(
            lambda c: c["modules"][0].update(in_features=2**30), r"is said to be \d+x1073741824", id="huge-inputs"
        ),
    ],
)
def test_damaged_config_is_refused(
    packed: Any, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = with_config(packed, tmp_path / "changed", change)
    with pytest.raises(UserError, match=message):
        loaded(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../elsewhere.safetensors": "0"}, "'../elsewhere.safetensors' among its files, which is elsewhere"),
        ({"/etc/hostname": "0"}, "'/etc/hostname' among its files, which is elsewhere"),
        ({"a/../../b": "0"}, "which is elsewhere"),
        ([], "names no files"),
        ("all", "names no files"),
    ],
    ids=["above", "root", "through a folder", "list", "text"],
)
def test_files_that_are_none_of_the_checkpoint_are_not_read(
    packed: Any, tmp_path: Path, files: Any, message: str
) -> None:
    """Also where the digest, which anyone can compute, is right."""
    path = with_config(packed, tmp_path / "hostile", lambda c: c.update(files=files))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["digest"] = quantizer._digest(config)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        loaded(path)


def test_float32_is_refused(packed: Any) -> None:
    with pytest.raises(UserError, match=r"bfloat16 or float16, not torch.float32"):
        loaded(packed[0], dtype=torch.float32)


def test_only_packed_models_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no packed weights"):
        stoicc.save_packed(tmp_path / "checkpoint", tiny_model())
    assert not (tmp_path / "checkpoint").exists()


def test_nothing_is_overwritten(packed: Any) -> None:
    with pytest.raises(UserError, match="already there"):
        stoicc.save_packed(packed[0], packed[1])


def test_dense_checkpoints_cannot_be_packed_as_they_load(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="only packed checkpoints"):
        loaded(tmp_path / "dense", quantization_config=stoicc.StoiccConfig())


def test_a_packed_checkpoint_loads_in_its_own_dtype_only(packed: tuple[Path, nn.Module, Tensor, Tensor]) -> None:
    with pytest.raises(UserError, match=r"packed weights are bfloat16, the model is loaded as torch\.float16"):
        AutoModelForCausalLM.from_pretrained(packed[0], dtype=torch.float16)


def test_activations_of_another_dtype_are_refused(attention: Any) -> None:
    with pytest.raises(UserError, match=r"activations are torch\.float16, the packed weight torch\.bfloat16"):
        attention[0](some_activations(0).half())


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_byte_is_noticed(packed: Any, tmp_path: Path, name: str, place: float) -> None:
    shutil.copytree(packed[0], tmp_path / "damaged")
    content = bytearray((tmp_path / "damaged" / name).read_bytes())
    at = int(place * len(content))
    # A digit that is not a number's first stays a digit, so that it is JSON still.
    while name == "config.json" and not content[at - 1 : at + 1].isdigit():
        at += 1
    content[at] ^= 1
    (tmp_path / "damaged" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"changed or damaged|quantization_config is damaged|format"):
        loaded(tmp_path / "damaged")


NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.update({NORM: t[NORM][:1].clone()}), rf"{NORM} is \[1\], the configuration says"),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1].clone()}), f"{EMBEDDING} is .*, the configuration says"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), f"{NORM} is I8, the model's is"),
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.update({"model.other": t[NORM].clone()}), "tensor model.other is no part of the model"),
    ],
    ids=["norm-of-one", "rows", "integers", "missing", "unexpected"],
)
def test_tensors_beside_the_packed_ones_are_checked_too(
    packed: Any, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        loaded(damaged(packed, tmp_path / "damaged", spoil))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["modules"].append(c["modules"][0]), "a linear is packed twice"),
        (lambda c: c["modules"][0].update(bias="no"), "bias 'no'"),
        (lambda c: c["modules"][0]["parts"][0].__setitem__(0, "model.layers.9.self_attn.q_proj"), "has no linear"),
        (lambda c: c["modules"].pop(), "is missing|is no part"),
    ],
    ids=["twice", "bias", "another-name", "dropped"],
)
def test_modules_are_the_models_linears(
    packed: Any, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        loaded(with_config(packed, tmp_path / "changed", change))


def test_save_pretrained_of_a_packed_model_is_a_packed_checkpoint(packed: Any, tmp_path: Path) -> None:
    """Also of one that was loaded, whose files had other hashes."""
    _, model, _, _ = packed
    model.save_pretrained(tmp_path / "plain")
    again = loaded(tmp_path / "plain")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "once more")
    assert torch.equal(logits(loaded(tmp_path / "once more")), logits(model))


def test_a_state_of_another_mask_takes_effect() -> None:
    first, second = tiny_model("qwen2"), tiny_model("qwen2")
    stoicc.compile_model(first, some_masks(first))
    other = {name: HybridMask(m.shape, m.tile, ~m.dense, m.patterns) for name, m in some_masks(second).items()}
    stoicc.compile_model(second, other, fuse=True, keep_dense=False)
    mine, theirs = packed_modules(first), packed_modules(second)
    taken = 0
    for module, source in zip(mine, theirs, strict=False):
        if module.spec == source.spec:
            module.load_state_dict(source.state_dict())
            assert torch.equal(module.orders, source.checked().orders)
            taken += 1
    broken = {name: tensor.clone() for name, tensor in mine[0].state_dict().items()}
    broken["starts"][-1] += 1
    with pytest.raises(UserError, match="q_proj"):
        mine[0].load_state_dict(broken)


def test_writes_between_siblings_are_seen_in_inference_mode(packed: Any) -> None:
    _, model, _, _ = packed
    attention = model.model.layers[0].self_attn
    with torch.inference_mode():
        x = torch.randn(2, attention.q_proj.in_features, dtype=torch.bfloat16)
        expected = attention.k_proj(x * 2)
        attention.q_proj(x)
        x.mul_(2)
        assert torch.equal(attention.k_proj(x), expected)


def test_packing_in_two_calls_saves_both(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    masks = some_masks(model)
    names = list(masks)
    half = {name: masks[name] for name in names if "layers.0" in name}
    expected = logits(masked(tiny_model("qwen2"), masks))
    stoicc.compile_model(model, half)
    stoicc.compile_model(model, {name: mask for name, mask in masks.items() if name not in half})
    model.save_pretrained(tmp_path / "both")
    torch.testing.assert_close(logits(loaded(tmp_path / "both")), expected, rtol=0.02, atol=0.02)


def test_parts_of_a_model_may_have_other_precisions(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    masks = some_masks(model)
    kinds = {"layers.0.self_attn": None, "layers.0.mlp": torch.int8, "layers.1": torch.float8_e4m3fn}
    for where, dtype in kinds.items():
        stoicc.compile_model(model, {name: mask for name, mask in masks.items() if where in name}, dtype=dtype)
    model.save_pretrained(tmp_path / "mixed")
    again = loaded(tmp_path / "mixed")
    assert {module.spec.dtype for module in packed_modules(again)} == {"bfloat16", "int8", "float8_e4m3fn"}
    assert torch.equal(logits(again), logits(model))


def test_other_files_may_be_missing_and_folders_have_hashes_too(packed: Any, tmp_path: Path) -> None:
    """As in the hub's cache, which holds what was asked for."""
    shutil.copytree(packed[0], tmp_path / "some")
    (tmp_path / "some" / "generation_config.json").unlink()
    loaded(tmp_path / "some")


def test_scales_of_another_dtype_are_refused() -> None:
    model = tiny_model("qwen2")
    stoicc.compile_model(model, some_masks(model, tile=(64, 128)), dtype=torch.int8)
    with pytest.raises(UserError, match=r"scales of the packed weight are torch\.float16, need float32"):
        logits(model.to(torch.float16))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.update({"model.narm.weight": t.pop(NORM)}), f"tensor {NORM} is missing"),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), f"{NORM} is F8_E4M3"),
    ],
    ids=["renamed", "float8"],
)
def test_names_and_dtypes_are_the_models(
    packed: Any, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        loaded(damaged(packed, tmp_path / "damaged", spoil))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "each"])
def test_a_packed_linear_has_the_masked_weight(fuse: bool) -> None:
    """Some models multiply by a linear's weight instead of calling it."""
    model = tiny_model()
    masks = some_masks(model)
    expected = {name: weight.clone() for name, weight in masked(model, masks).named_parameters()}
    stoicc.compile_model(model, masks, fuse=fuse)
    for name in masks:
        assert torch.equal(model.get_submodule(name).weight, expected[f"{name}.weight"])
    assert HybridLinear.empty(packed_modules(model)[0].spec, torch.bfloat16).weight.is_meta


def test_a_packed_linear_of_eight_bits_has_its_weight_with_its_scales() -> None:
    model = tiny_model()
    masks = some_masks(model)
    expected = {name: weight.clone() for name, weight in masked(model, masks).named_parameters()}
    stoicc.compile_model(model, masks, dtype=torch.float8_e4m3fn)
    for name in masks:
        torch.testing.assert_close(model.get_submodule(name).weight, expected[f"{name}.weight"], rtol=0.07, atol=1e-3)


def test_offloaded_weights_are_refused() -> None:
    model = tiny_model()
    masks = some_masks(model)
    model.lm_head.to("meta")
    with pytest.raises(UserError, match=r"lm_head\.weight is offloaded"):
        stoicc.compile_model(model, masks)
