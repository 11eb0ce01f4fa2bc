"""Where learning starts: what one-shot pruning knows, and the logits that are made of it."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patch.contexts import evaluating, unwritten
from patch.errors import UserError
from patch.layers import check_shared, prunable_linears, require_linears
from patch.learn import soft_mask
from patch.learn.distributed import Ranks
from patch.learn.masked_model import MaskedLinear
from patch.learn.recipe import Recipe
from patch.learn.sensitivity import most_sensitive_tiles
from patch.learn.soft_mask import SampledWeight
from patch.mask import KEPT_PAIRS, best_patterns, tile_sizes
from patch.positions import check_model_length
from patch.quantise.precisions import PRECISIONS, group_size
from patch.quantise.values import rounded
from patch.tiles import GROUP, TileShape, check_sparsity

# Sequences that the dense model is looked at on: a mean of 128 squares, as of what a tile costs it, has a standard
# error of an eighth.
RANKED_BY = 128


@dataclass(frozen=True)
class Prior:
    """What one-shot pruning knows.

    Attributes:
        patterns: per weight, by its dotted name, the patterns of a 2:4 mask, uint8 ``[N, K/4]``; `Recipe.mode` ``tile``
            keeps them.
        tile_scores: per weight ``[R, C]``, higher = rather dense; compared within a weight.
        dense_tiles: per weight bool ``[R, C]``, the tiles that start as dense, whatever their scores; `learn` finds
            them where the recipe ranks the tiles of the whole model.
    """

    patterns: Mapping[str, Tensor] | None = None
    tile_scores: Mapping[str, Tensor] | None = None
    dense_tiles: Mapping[str, Tensor] | None = None


def first_sequences(recipe: Recipe, batches: Callable[[int], Tensor]) -> Tensor:
    """The sequences of the text that the dense model is looked at on, before learning begins."""
    steps = range(-(-RANKED_BY // recipe.batch))
    return torch.cat([batches(step) for step in steps])[:RANKED_BY]


def ranks_the_model(recipe: Recipe, prior: Prior) -> bool:
    return recipe.tile_ranking == "model" and prior.dense_tiles is None


def first_dense(
    model: nn.Module,
    recipe: Recipe,
    batches: Callable[[int], Tensor],
    sparsity: float,
    tile: TileShape,
    seed: int,
    prior: Prior,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """The tiles that cost the model most, by the first sequences of the text."""
    linears = prunable_linears(model)
    patterns = prior.patterns or {name: best_patterns(linear.weight.abs()) for name, linear in linears.items()}
    return most_sensitive_tiles(model, patterns, tile, first_sequences(recipe, batches), seed, sparsity, ranks)


def masked_linears(
    model: nn.Module,
    recipe: Recipe,
    sparsity: float,
    tile: TileShape,
    seed: int,
    prior: Prior,
    device: torch.device,
    sampled_weight: SampledWeight,
    ranks: Ranks,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, MaskedLinear]:
    """Check everything and initialise the logits; ``scales`` are of `patch.learn.inputs`."""
    check_sparsity(sparsity)
    if recipe.mode == "maskllm" and sparsity != 0.5:
        raise UserError(f"mode maskllm prunes every tile: its target sparsity is 0.5, not {sparsity}")
    if recipe.mode == "tile" and prior.patterns is None:
        raise UserError("mode tile keeps the patterns of a prior: give the patterns of a 2:4 mask")
    check_shared(model)
    check_model_length(model, recipe.length, "learning sequences")
    linears = require_linears(model, "learning")
    if not linears:
        raise UserError(f"{type(model).__name__} has no prunable weights")
    precision = PRECISIONS[recipe.precision] if recipe.precision else None
    grouped = precision is not None and precision.grouped
    group = group_size({name: linear.in_features for name, linear in linears.items()}) if grouped else 0
    prepared = {}
    for index, (name, linear) in enumerate(linears.items()):
        try:
            known = _of(prior, name)
            patterns, tiles, fixed = _prepare_linear(linear, recipe, sparsity, tile, (seed, index), known, device)
            weight = linear.weight if precision is None else rounded(linear.weight.detach(), precision, group)
            masked = MaskedLinear(linear, tile, fixed, sampled_weight, ranks, weight, scales[name] if scales else None)
            dtype = getattr(torch, recipe.logit_dtype)
            if patterns is not None:
                masked.patterns = patterns[:, masked.here].to(dtype, copy=ranks.size > 1).requires_grad_()
            if tiles is not None:
                masked.tiles = tiles[masked.tiles_here].to(dtype, copy=ranks.size > 1).requires_grad_()
            prepared[name] = masked
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    _check_used(model, linears)
    return prepared


class _Uses(TorchFunctionMode):
    """Notes which weights are computed with, whether by their linear or by the model itself (Mamba's time steps)."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self._watched = {id(weight) for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Asking for a dtype is no use of a weight; asking for its transpose is (Falcon).
        if getattr(func, "__name__", "") != "__get__" or isinstance(result, Tensor):
            self.seen |= self._watched & {id(each) for each in (*args, *(kwargs or {}).values())}
        return result


def _check_used(model: Any, linears: Mapping[str, nn.Linear]) -> None:
    """The gradient of a weight that the model does not use would be that of the penalties alone."""
    uses = _Uses(linear.weight for linear in linears.values())
    with torch.no_grad(), evaluating(model), unwritten(model), uses:
        device = model.get_input_embeddings().weight.device
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)
    unused = [name for name, linear in linears.items() if id(linear.weight) not in uses.seen]
    if unused:
        raise UserError(f"{unused[0]} takes no part in the model's forward pass: its mask cannot be learned")


def _kinds(prior: Prior) -> dict[str, Mapping[str, Tensor] | None]:
    return {"patterns": prior.patterns, "tile scores": prior.tile_scores, "dense tiles": prior.dense_tiles}


def _of(prior: Prior, name: str) -> dict[str, Tensor]:
    """What the prior knows of one weight, by its kind, on the CPU."""
    found: dict[str, Tensor] = {}
    for kind, known in _kinds(prior).items():
        if known is not None:
            if name not in known:
                raise UserError(f"the prior has no {kind} for it")
            found[kind] = known[name].cpu()
    return found


def _prepare_linear(
    linear: nn.Linear,
    recipe: Recipe,
    sparsity: float,
    tile: TileShape,
    stream: tuple[int, int],
    prior: Mapping[str, Tensor],
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check one weight's part; returns its initial pattern logits and tile logits, and its fixed patterns."""
    weight = linear.weight
    patterns, scores, dense = (prior.get(kind) for kind in ("patterns", "tile scores", "dense tiles"))
    if weight.device.type != device.type or (device.index is not None and weight.device != device):
        raise UserError(f"the weight is on {weight.device}, learning on {device}: move the model there first")
    if not weight.is_floating_point():
        raise UserError(f"the weight is {weight.dtype}: masks are learned over floating weights, load them unquantised")
    grid = tuple(tile_sizes(weight.shape, tile).shape)
    groups = (weight.shape[0], weight.shape[1] // GROUP)
    if patterns is not None:
        if patterns.dtype != torch.uint8 or tuple(patterns.shape) != groups:
            raise UserError(f"the prior's patterns are {patterns.dtype} {tuple(patterns.shape)}, need uint8 {groups}")
        if int(patterns.max()) >= len(KEPT_PAIRS):
            raise UserError(f"the prior's pattern {int(patterns.max())} is out of range 0..{len(KEPT_PAIRS) - 1}")
    if scores is not None:
        if tuple(scores.shape) != grid:
            raise UserError(
                f"the prior's tile scores are {tuple(scores.shape)}, tiles of {tile[0]}x{tile[1]} need {grid}"
            )
        if not torch.isfinite(scores).all():
            raise UserError("a tile score of the prior is not finite")
    if dense is not None and (dense.dtype != torch.bool or tuple(dense.shape) != grid):
        raise UserError(f"the prior's dense tiles are {dense.dtype} {tuple(dense.shape)}, need bool {grid}")
    learned_patterns = learned_tiles = None
    if recipe.mode != "tile":
        lift = None
        if patterns is not None and recipe.pattern_prior > 0:
            lift = recipe.pattern_prior * soft_mask.pattern_prior(patterns)
        seed_of_init = soft_mask.stream_seed("initial patterns", *stream)
        shape = (len(KEPT_PAIRS), *groups)
        noise = lift is None or recipe.pattern_start == "noisy"
        learned_patterns = _initial(shape, lift, recipe.logit_std, seed_of_init, weight.device, noise)
    if recipe.mode != "maskllm":
        if dense is not None:
            lift = recipe.tile_prior * (2.0 * dense - 1)
        else:
            lift = None if scores is None else recipe.tile_prior * soft_mask.tile_prior(scores, sparsity)
        seed_of_init = soft_mask.stream_seed("initial tiles", *stream)
        learned_tiles = _initial(grid, lift, recipe.logit_std, seed_of_init, weight.device)
    fixed = patterns if recipe.mode == "tile" else None
    return learned_patterns, learned_tiles, fixed


def _initial(
    shape: Sequence[int], lift: Tensor | None, std: float, seed: int, device: torch.device, noise: bool = True
) -> Tensor:
    """Normal logits, lifted by so many standard deviations; without ``noise``, what they are lifted by."""
    logits = torch.zeros(shape, device=device)
    if noise:
        logits.normal_(0, std, generator=soft_mask.generator(seed, device))
    if lift is not None:
        logits.add_(lift.to(device), alpha=std)
    return logits


def content_digest(prior: Prior) -> str:
    """Identifies a prior's content."""
    digest = hashlib.sha256()
    for kind, known in _kinds(prior).items():
        for name in sorted(known or {}):
            tensor = known[name].detach().cpu()  # type: ignore[index]
            values = tensor.double() if kind == "tile scores" else tensor
            digest.update(f"{kind} {name} {tuple(values.shape)}".encode())
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
