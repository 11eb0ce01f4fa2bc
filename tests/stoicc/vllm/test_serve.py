"""Masked and packed checkpoints in vLLM itself, on a CPU: `make test-vllm` has it in an environment of its own."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

# Before vLLM is imported: the engine in this process, and little memory.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

import torch
import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.parameter as vllm_parameter
from served_models import FAMILIES, checkpoints
from stoicc_hybrids import random_mask, random_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.config import LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins

import stoicc
from patch.checkpoint import load_masks, save_checkpoint
from patch.errors import UserError
from patch.mask import HybridMask
from patch.oneshot.gptq import quantise_model
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import quantise_groups
from patch.simulate import load_quantised
from stoicc import quantizer
from stoicc.linear import packed_modules
from stoicc.spec import Spec, StoiccConfig

PROMPTS = [list(range(5, 21)), [7, 3, 99, 12]]
TOKENS = 12


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any]]:
    """A masked and a packed checkpoint of a family, and what vLLM makes of the masked one as any model."""
    try:
        masked, packed = checkpoints(request.param, tmp_path_factory.mktemp(request.param))
    except UserError as error:
        pytest.skip(f"{request.param} cannot be had: {error}")
    return masked, packed, generated(masked)


def generated(path: Path, **options: Any) -> list[Any]:
    """Greedy tokens of each prompt, and whether the model's layers are packed."""
    options = {"enforce_eager": True, "max_model_len": 64, "dtype": "bfloat16", "disable_log_stats": True} | options
    model = LLM(str(path), skip_tokenizer_init=True, **options)
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    layers = model.apply_model(packed_layers)[0]
    del model
    cleanup_dist_env_and_memory()
    return [layers, *(list(output.outputs[0].token_ids) for output in outputs)]


def packed_layers(model: nn.Module) -> int:
    return sum(hasattr(module, "hybrid_kinds") for module in model.modules())


def test_the_plugin_is_found() -> None:
    load_general_plugins()
    for name in ("stoicc", "stoicc-fp8", "stoicc-int8", "stoicc-int4"):
        assert get_quantization_config(name).__module__ == "stoicc.vllm.plugin"


def test_greedy_tokens_are_those_of_the_masked_dense_model(served: tuple[Path, Path, list[Any]]) -> None:
    masked, packed, (dense_layers, *expected) = served
    assert dense_layers == 0 and len({token for text in expected for token in text}) > 4
    as_it_loads, *tokens = generated(masked, quantization="stoicc")
    assert as_it_loads > 0 and tokens == expected
    as_saved, *tokens = generated(packed)
    assert as_saved == as_it_loads and tokens == expected


@pytest.mark.parametrize(("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("int8", torch.int8)], ids=["fp8", "int8"])
def test_eight_bits_as_they_load_and_as_they_were_saved(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    masked, _ = checkpoints("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(masked, dtype=torch.bfloat16)
    stoicc.compile_model(model, load_masks(masked), dtype=dtype)
    stoicc.save_packed(tmp_path / "eight", model)
    layers, *tokens = generated(masked, quantization=f"stoicc-{name}")
    assert layers > 0 and [layers, *tokens] == generated(tmp_path / "eight")


def test_four_bits_as_they_load_are_the_weights_that_they_are_rounded_to(tmp_path: Path) -> None:
    masked, _ = checkpoints("llama", tmp_path)
    model, masks = AutoModelForCausalLM.from_pretrained(masked, dtype=torch.bfloat16), load_masks(masked)
    for name, linear in model.named_modules():
        if name in masks:
            linear.weight.data = quantise_groups(linear.weight.data, 128).dequantised().bfloat16()
    model.save_pretrained(tmp_path / "rounded")
    layers, *tokens = generated(masked, quantization="stoicc-int4")
    assert layers > 0 and tokens == generated(tmp_path / "rounded")[1:]


def test_compiled_graphs_take_the_packed_layers(tmp_path: Path) -> None:
    masked, packed = checkpoints("llama", tmp_path)
    assert generated(packed, enforce_eager=False)[1:] == generated(masked, enforce_eager=False)[1:]


def test_weights_that_vllm_makes_up_are_masked_before_they_are_packed(tmp_path: Path) -> None:
    masked, _ = checkpoints("llama", tmp_path)
    assert generated(masked, quantization="stoicc", load_format="dummy")[0] > 0


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_quantised_checkpoints_are_served_without_the_plugin(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM reads compressed-tensors; what it reads is what was written."""
    masked, _ = checkpoints("llama", tmp_path)
    quantised = quantise(masked, precision, tmp_path / "quantised")
    # vLLM's kernels of 4 bits need AVX-512, and those of int8 saturate without it. How it loads them does not.
    monkeypatch.setattr(CPUWNA16LinearKernel, "process_weights_after_loading", widen)
    monkeypatch.setattr(CPUWNA16LinearKernel, "apply_weights", multiply_widened)
    monkeypatch.setattr(CPUInt8ScaledMMLinearKernel, "process_weights_after_loading", lambda *_: None)
    monkeypatch.setattr(CPUInt8ScaledMMLinearKernel, "apply_weights", multiply_int8)
    model, _ = load_quantised(quantised, torch.bfloat16)
    if precision == "int4":
        model.save_pretrained(tmp_path / "same")
    else:
        # Beside ours, of the same values. Where the two round tokens apart, logits are some 0.3 off.
        stoicc.compile_model(model, load_masks(quantised))
        stoicc.save_packed(tmp_path / "same", model)
    torch.testing.assert_close(first_step(quantised), first_step(tmp_path / "same"), rtol=0, atol=0.5)


def first_step(path: Path) -> Tensor:
    """Log-probabilities of the whole vocabulary after each prompt: tokens would hang on ties of what is rounded."""
    options = {"enforce_eager": True, "max_model_len": 64, "dtype": "bfloat16", "max_logprobs": 256}
    model = LLM(str(path), skip_tokenizer_init=True, **options)
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=256, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], one, use_tqdm=False)
    del model
    cleanup_dist_env_and_memory()
    steps = [output.outputs[0].logprobs[0] for output in outputs]
    return torch.tensor([[step[token].logprob for token in range(256)] for step in steps])


def quantise(masked: Path, precision: str, to: Path) -> Path:
    """A masked checkpoint as `hts quantise` writes it."""
    model, masks = AutoModelForCausalLM.from_pretrained(masked, dtype=torch.bfloat16), load_masks(masked)
    weights = quantise_model(model, PRECISIONS[precision], torch.tensor([PROMPTS[0]]), "cpu", masks).weights
    info = {"structure": "hybrid", "precision": precision}
    save_checkpoint(to, model, None, masks, info, quantised=weights)
    return to


def widen(kernel: Any, layer: Any) -> None:
    """Instead of what vLLM does with weights of 4 bits: as it has loaded them, each times its scale."""
    words, scales = getattr(layer, kernel.w_q_name).data, getattr(layer, kernel.w_s_name).data.float()
    values = (words[..., None] >> 4 * torch.arange(8) & 15).flatten(1) - 8
    layer.widened = (values * scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)).bfloat16()


def multiply_widened(kernel: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, layer.widened, bias)


def multiply_int8(kernel: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Instead of what vLLM does with int8: as it has loaded the weights, exactly."""
    values, scales = (getattr(layer, name) for name in kernel.layer_param_names[:2])
    of_tokens = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    product = (x.float() / of_tokens).round() @ values.float().t() * of_tokens * scales.float().t()
    return (product if bias is None else product + bias).to(x.dtype)


def test_adapters_are_refused(tmp_path: Path) -> None:
    masked, _ = checkpoints("llama", tmp_path)
    with pytest.raises(UserError, match="packed weights take no LoRA adapters"):
        generated(masked, quantization="stoicc", enable_lora=True)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6)], ids=["no sparse cores", "no FP8"])
def test_gpus_that_cannot_run_it_are_refused(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_general_plugins()
    masked, _ = checkpoints("llama", tmp_path)
    method, needed = ("stoicc", 80) if capability < (8, 0) else ("stoicc-fp8", 89)
    about = ModelConfig(str(masked), quantization=method, skip_tokenizer_init=True, dtype="bfloat16")
    monkeypatch.setattr(current_platform, "get_device_capability", lambda *_: DeviceCapability(*capability))
    with pytest.raises(
        ValueError, match=f"Minimum capability: {needed}. Current capability: {''.join(map(str, capability))}"
    ):
        VllmConfig._get_quantization_config(about, LoadConfig())


def test_packed_eight_bit_floats_need_the_same_gpu() -> None:
    spec = Spec((("o", 64),), 128, (64, 128), 1, 16, False, "float8_e4m3fn")
    load_general_plugins()
    for dtype, needed in (("float8_e4m3fn", 89), ("int8", 80), ("bfloat16", 80)):
        about = StoiccConfig.of([replace(spec, dtype=dtype)]).to_dict()
        assert get_quantization_config("stoicc").from_config(about).get_min_capability() == needed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules": [], "format": 9}, "format 9, this version reads up to"),
        ({"modules": 5}, "quantization_config is damaged"),
        ({"modules": [{"parts": "o"}], "self": 1}, "quantization_config is damaged"),
        ({"weights": {}}, "names no masks: an unstructured checkpoint is served without --quantization"),
        ({"weights": 5}, "'weights' is no object"),
    ],
    ids=["newer", "modules", "parts", "unstructured", "weights"],
)
def test_configurations_are_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    load_general_plugins()
    with pytest.raises(UserError, match=message) as refused:
        get_quantization_config("stoicc").from_config(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spoil", ["elsewhere", "beside"])
def test_files_that_are_none_of_the_checkpoint_are_refused(spoil: str, tmp_path: Path) -> None:
    _, packed = checkpoints("llama", tmp_path)
    if spoil == "beside":
        (packed / "more.safetensors").write_bytes((packed / "model.safetensors").read_bytes())
    else:
        config = json.loads((packed / "config.json").read_text())
        config["quantization_config"]["files"]["../masked/model.safetensors"] = "0"
        config["quantization_config"]["digest"] = quantizer._digest(config)
        (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not know this file|which is elsewhere: do not trust it"):
        generated(packed)


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_weights_that_are_not_those_that_were_saved_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints("llama", tmp_path)
    # As of the hub, whose files the plugin looks up where vLLM finds them.
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / kind))
    load_general_plugins()
    file = tmp_path / kind / "model.safetensors"
    content = bytearray(file.read_bytes())
    for spoiled in (False, True):
        if spoiled:
            content[-1] ^= 1
            file.write_bytes(content)
        about = json.loads((tmp_path / kind / ("hybrid.json" if kind == "masked" else "config.json")).read_text())
        config: Any = get_quantization_config("stoicc").from_config(about.get("quantization_config", about))
        config.maybe_update_config(f"me/{tmp_path.name}", revision=f"{spoiled}")
        look = (
            config.masks if kind == "masked" else lambda config=config: config._method(["model.layers.0.mlp.down_proj"])
        )
        if not spoiled:
            assert look()
            continue
        with pytest.raises(UserError, match=r"model.safetensors: its SHA-256 is not the one in") as refused:
            look()
        assert "\n" not in str(refused.value)


# Layers as one of several processes has them


HIDDEN, HEAD = 256, 32
SIZES = {"q_proj": 256, "k_proj": 64, "v_proj": 64}
FUSED = {"qkv_proj": list(SIZES), "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(params=[(1, 0), (2, 0), (2, 1), (4, 0), (4, 3)], ids=lambda p: f"{p[1]} of {p[0]}")
def process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """One of several processes, as vLLM's layers see it, without the others."""
    size, rank = request.param
    load_general_plugins()
    for module in (vllm_linear, vllm_parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    with set_current_vllm_config(VllmConfig()), torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        yield size, rank
        torch.set_default_dtype(torch.float32)


def tensors(names: dict[str, int], columns: int) -> tuple[dict[str, HybridMask], dict[str, Tensor]]:
    masks = {
        f"m.{name}": random_mask(rows, columns, (64, 64), 0.6, seed=sum(name.encode())) for name, rows in names.items()
    }
    weights = {name: mask.apply(random_weight(*mask.shape, seed=sum(name.encode()))) for name, mask in masks.items()}
    return masks, weights


def masked_config(masks: dict[str, HybridMask]) -> Any:
    config = get_quantization_config("stoicc").from_config({"weights": dict.fromkeys(masks)})
    config.packed_modules_mapping = FUSED
    config._masks = dict(masks)
    return config


def packed_config(model: nn.Module) -> Any:
    about = StoiccConfig.of([module.spec for module in packed_modules(model)]).to_dict()
    config = get_quantization_config("stoicc").from_config(about)
    config.packed_modules_mapping = FUSED
    return config


def model_of(weights: dict[str, Tensor], biases: dict[str, Tensor]) -> nn.Module:
    model, inner = nn.Module(), nn.Module()
    model.add_module("m", inner)
    for name, weight in weights.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=name in biases, dtype=torch.bfloat16)
        linear.weight.data = weight.clone()
        if name in biases:
            linear.bias.data = biases[name].clone()
        inner.add_module(name[2:], linear)
    return model


def test_query_key_and_value(process: tuple[int, int]) -> None:
    """Two key heads on four processes: two hold the same."""
    size, rank = process
    masks, weights = tensors(SIZES, HIDDEN)
    biases = {name: random_weight(1, len(each), seed=sum(name.encode()))[0] for name, each in weights.items()}
    model = model_of(weights, biases)
    stoicc.compile_model(model, masks)
    x = torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    heads = max(HEAD, 64 // size)
    first = {"m.q_proj": rank * 256 // size} | dict.fromkeys(
        ("m.k_proj", "m.v_proj"), rank * 64 // size // heads * heads
    )
    wanted = []
    for name, start in first.items():
        part = slice(start, start + (256 // size if name == "m.q_proj" else heads))
        wanted.append(nn.functional.linear(x, weights[name][part], biases[name][part]))
    for config, loaded in ((masked_config(masks), model_of(weights, biases)), (packed_config(model), model)):
        layer = vllm_linear.QKVParallelLinear(HIDDEN, HEAD, 8, 2, bias=True, quant_config=config, prefix="m.qkv_proj")
        load(layer, loaded, dict(zip(SIZES, "qkv", strict=True)))
        torch.testing.assert_close(layer(x)[0], torch.cat(wanted, dim=1), rtol=0.02, atol=0.02)


def test_gate_and_up(process: tuple[int, int]) -> None:
    size, rank = process
    masks, weights = tensors({"gate_proj": 384, "up_proj": 384}, HIDDEN)
    model = model_of(weights, {})
    stoicc.compile_model(model, masks)
    x = torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    part = slice(rank * 384 // size, (rank + 1) * 384 // size)
    wanted = torch.cat([nn.functional.linear(x, weight[part]) for weight in weights.values()], dim=1)
    for config, loaded in ((masked_config(masks), model_of(weights, {})), (packed_config(model), model)):
        layer = vllm_linear.MergedColumnParallelLinear(
            HIDDEN, [384, 384], bias=False, quant_config=config, prefix="m.gate_up_proj"
        )
        load(layer, loaded, {"gate_proj": 0, "up_proj": 1})
        torch.testing.assert_close(layer(x)[0], wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("columns", [512, 384, 416])
def test_down(process: tuple[int, int], columns: int) -> None:
    """Also where slices are no whole tiles."""
    size, rank = process
    masks, weights = tensors({"down_proj": HIDDEN}, columns)
    model = model_of(weights, {})
    stoicc.compile_model(model, masks)
    part = slice(rank * columns // size, (rank + 1) * columns // size)
    x = torch.randn(3, columns // size, dtype=torch.bfloat16)
    for config, loaded in ((masked_config(masks), model_of(weights, {})), (packed_config(model), model)):
        layer = vllm_linear.RowParallelLinear(columns, HIDDEN, bias=False, quant_config=config, prefix="m.down_proj")
        load(layer, loaded, {"down_proj": None})
        wanted = nn.functional.linear(x, weights["m.down_proj"][:, part])
        torch.testing.assert_close(layer.quant_method.apply(layer, x), wanted, rtol=0.02, atol=0.02)


def test_slices_that_do_not_divide(process: tuple[int, int]) -> None:
    """A quarter of 528 columns is no multiple of 8: dense where the weights are, refused where they are packed."""
    size, rank = process
    columns = 528
    masks, weights = tensors({"down_proj": HIDDEN}, columns)
    masked, packed = model_of(weights, {}), model_of(weights, {})
    stoicc.compile_model(packed, masks)
    part = slice(rank * columns // size, (rank + 1) * columns // size)
    x = torch.randn(3, columns // size, dtype=torch.bfloat16)

    def layer(config: Any) -> Any:
        return vllm_linear.RowParallelLinear(columns, HIDDEN, bias=False, quant_config=config, prefix="m.down_proj")

    dense = layer(masked_config(masks))
    load(dense, masked, {"down_proj": None})
    assert hasattr(dense, "hybrid_kinds") is (size < 4)
    wanted = nn.functional.linear(x, weights["m.down_proj"][:, part])
    torch.testing.assert_close(dense.quant_method.apply(dense, x), wanted, rtol=0.02, atol=0.02)
    if size == 4:
        with pytest.raises(
            UserError, match="132 of its inputs fall to a process, not a multiple of 8: serve the masked"
        ):
            load(layer(packed_config(packed)), packed, {"down_proj": None})


def test_shapes_that_contradict_the_configuration(process: tuple[int, int]) -> None:
    masks, weights = tensors({"down_proj": HIDDEN}, 384)
    packed = model_of(weights, {})
    stoicc.compile_model(packed, masks)
    arguments = {"bias": False, "prefix": "m.down_proj"}
    with pytest.raises(UserError, match="down_proj is 256x384, the model's configuration says 256x512"):
        vllm_linear.RowParallelLinear(512, HIDDEN, quant_config=packed_config(packed), **arguments)
    layer = vllm_linear.RowParallelLinear(512, HIDDEN, quant_config=masked_config(masks), **arguments)
    with pytest.raises(UserError, match="down_proj is 256x384, the model's configuration says 256x512"):
        layer.quant_method.process_weights_after_loading(layer)


def load(layer: Any, model: nn.Module, shards: dict[str, Any]) -> None:
    """Give a layer of vLLM the tensors of a checkpoint's linears."""
    for name, tensor in model.state_dict().items():
        linear, kind = name.rsplit(".", 1)
        shard = shards[linear.removeprefix("m.")]
        parameter = getattr(layer, kind)
        parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)
