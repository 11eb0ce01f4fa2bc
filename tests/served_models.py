"""Masked and packed checkpoints of the families that servers are tested with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import stoicc
from patch.checkpoint import save_checkpoint
from patch.oneshot import prune_model

SMOLLM2 = "smollm2"
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, head_dim=32),
    "llama-tied": lambda: LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=32),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=32),
}
FAMILIES = (*CONFIGS, SMOLLM2)


@torch.no_grad()
def make(family: str) -> PreTrainedModel:
    """A random model whose logits have no near ties, so that greedy text does not hang on the last bit."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif "layers" in name and parameter.dim() == 2:
            parameter.mul_(3)
    if model.config.tie_word_embeddings:
        # Not the embedding, which would drown what the blocks compute.
        model.model.norm.weight.add_(19)
    else:
        model.get_output_embeddings().weight.mul_(20)
    return model


def checkpoints(family: str, folder: Path) -> tuple[Path, Path]:
    """The places of a masked checkpoint and of the same, packed."""
    if family == SMOLLM2:
        from experiments.data.models import load_model

        model, _ = load_model("smollm2-135m")
    else:
        model = make(family)
    layers = prune_model(model, "magnitude", "hybrid", 0.35, (64, 64), None, "cpu")
    masks = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
    save_checkpoint(folder / "masked", model, None, masks, {"method": "magnitude", "structure": "hybrid"})
    stoicc.compile_model(model, masks)
    stoicc.save_packed(folder / "packed", model)
    return folder / "masked", folder / "packed"
