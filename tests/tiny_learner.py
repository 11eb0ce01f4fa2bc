"""A tiny model with a language of its own, and short recipes: what tests of learning learn on."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from patch.layers import prunable_linears
from patch.learn.prior import Prior
from patch.learn.recipe import PATCH_JOINT
from patch.mask import best_patterns, tile_sums

VOCABULARY = 32
RAGGED = (24, 20)

SHORT = {
    "joint": dataclasses.replace(
        PATCH_JOINT,
        steps=6,
        batch=4,
        microbatch=2,
        length=16,
        warmup=0,
        lr=0.01,
        log_every=2,
        checkpoint_every=2,
        activation_checkpointing=False,
        # Noise of its own in every logit: what starts alike would hide much.
        pattern_start="noisy",
    ),
}
SHORT["tile"] = dataclasses.replace(SHORT["joint"], mode="tile")
SHORT["maskllm"] = dataclasses.replace(
    SHORT["joint"], mode="maskllm", weight_penalty=1e-5, weight_penalty_kind="square", sparsity_penalty=0
)


def tiny_model(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A random model whose linears are not all multiples of the tile."""
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY}
    config = LlamaConfig(max_position_embeddings=64, **(sizes | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


def words(step: int, batch: int = 4, length: int = 16) -> Tensor:
    """Sentences of a language in which each token follows from the one before, but for some noise."""
    source = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=source)
    surprise = torch.rand((batch, length), generator=source) < 0.1
    for i in range(1, length):
        tokens[:, i] = torch.where(surprise[:, i], tokens[:, i], (5 * tokens[:, i - 1] + 3) % VOCABULARY)
    return tokens


def magnitude_prior(model: nn.Module, tile: tuple[int, int] = RAGGED) -> Prior:
    weights = {name: linear.weight.detach().float() for name, linear in prunable_linears(model).items()}
    return Prior(
        {name: best_patterns(weight.abs()) for name, weight in weights.items()},
        {name: tile_sums(weight.square(), tile) for name, weight in weights.items()},
    )
