"""A tiny model that was pruned, and short recoveries of it: what tests of recovery work on."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_learner import RAGGED, magnitude_prior, tiny_model, words
from torch import Tensor, nn

from patch.layers import prunable_linears
from patch.mask import HybridMask
from patch.recover.recipe import RecoveryRecipe
from patch.recover.recovery import Recovered, recover
from patch.tiles import tile_grid

SHORT = RecoveryRecipe(
    steps=6,
    batch=4,
    microbatch=2,
    length=16,
    lr=0.003,
    warmup=2,
    block_epochs=2,
    block_windows=8,
    block_batch=4,
    block_lr=0.003,
    checkpoint_every=3,
    log_every=3,
)
PHASES = {
    "both": SHORT,
    "blocks": dataclasses.replace(SHORT, steps=0),
    "distil": dataclasses.replace(SHORT, block_epochs=0),
}


def dense_model(dtype: torch.dtype = torch.float32) -> Any:
    """With weights so large that the blocks matter to its predictions."""
    return tiny_model(dtype, initializer_range=0.15)


def hybrid_masks(model: nn.Module) -> dict[str, HybridMask]:
    """Every second tile dense, the rest 2:4 by magnitude."""
    patterns = magnitude_prior(model).patterns
    assert patterns is not None
    masks = {}
    for name, linear in prunable_linears(model).items():
        shape = (linear.out_features, linear.in_features)
        dense = torch.arange(tile_grid(shape, RAGGED)[0] * tile_grid(shape, RAGGED)[1]) % 2 == 0
        masks[name] = HybridMask(shape, RAGGED, dense.view(tile_grid(shape, RAGGED)), patterns[name])
    return masks


def kept_by(masks: Mapping[str, HybridMask]) -> dict[str, Tensor]:
    return {name: mask.keep() for name, mask in masks.items()}


def sparse_weights(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: linear.weight.detach().cpu() * keep[name] for name, linear in prunable_linears(model).items()}


def run(
    recipe: RecoveryRecipe,
    work: Path,
    model: nn.Module | None = None,
    keep: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    stop: Callable[[], bool] | None = None,
    **changes: Any,
) -> tuple[nn.Module, Recovered]:
    """The recovered model, and what happened."""
    model = model if model is not None else dense_model()
    keep = keep if keep is not None else kept_by(hybrid_masks(dense_model()))
    arguments: dict[str, Any] = {
        "windows": words(999, recipe.block_windows, recipe.length),
        "batches": lambda step: words(step, recipe.batch, recipe.length),
        "tile": RAGGED,
        "origin": "a checkpoint",
        "seed": 0,
        "work": work,
        "device": "cpu",
    }
    weights = sparse_weights(model, keep) if weights is None else weights
    return model, recover(model, keep, weights.items(), recipe, stop=stop, **(arguments | changes))


def linears(model: nn.Module) -> dict[str, Tensor]:
    return {name: linear.weight.detach() for name, linear in prunable_linears(model).items()}


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(left.state_dict().values(), right.state_dict().values(), strict=True))
