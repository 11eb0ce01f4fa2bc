"""A tiny model, masks for it, and checkpoints of both: what tests of checkpoints and audits write and read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patch.checkpoint import save_checkpoint
from patch.layers import prunable_linears
from patch.mask import HybridMask
from patch.tiles import tile_grid

TILE = (16, 16)
UP = "model.layers.0.mlp.up_proj"


def tiny_model(tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two blocks; no tile of 16x16 fits evenly into 36x24, 24x36 (rows of nine groups), 32x24, 24x32 or 16x24."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=50,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def random_masks(model: LlamaForCausalLM, tile: tuple[int, int] = TILE) -> dict[str, HybridMask]:
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, linear in prunable_linears(model).items():
        n, k = linear.weight.shape
        dense = torch.rand(tile_grid((n, k), tile), generator=generator) < 0.5
        patterns = torch.randint(0, 6, (n, k // 4), generator=generator, dtype=torch.uint8)
        masks[name] = HybridMask((n, k), tile, dense, patterns)
    return masks


@torch.no_grad()
def apply_masks(model: LlamaForCausalLM, masks: Mapping[str, HybridMask]) -> None:
    for name, linear in prunable_linears(model).items():
        linear.weight.copy_(masks[name].apply(linear.weight))


def pruned_model(
    tied: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, dict[str, HybridMask]]:
    model = tiny_model(tied, dtype)
    masks = random_masks(model, TILE)
    apply_masks(model, masks)
    return model, masks


def info_for(masks: Mapping[str, HybridMask], **more: Any) -> dict[str, Any]:
    zeros = {name: mask.zeros for name, mask in masks.items()}
    return {"method": "wanda", "structure": "hybrid", "target": 0.25, "seed": 0, "zeros": zeros, **more}


def save_tiny(path: Path) -> Path:
    """A complete hybrid checkpoint with tile scores for one weight."""
    model, masks = pruned_model()
    scores = {UP: torch.rand(masks[UP].dense.shape)}
    save_checkpoint(path, model, tiny_tokenizer(), masks, info_for(masks), scores)
    return path


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])
