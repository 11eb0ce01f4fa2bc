"""Studies of the embedded model, which a laptop runs in minutes."""

import functools
from typing import Any, get_args

from experiments.eval.names import EMBEDDED_TASK
from experiments.studies.build import (
    RANKED,
    TARGETS,
    Trials,
    dense,
    fewer_blocks,
    in_fewer_bits,
    joined,
    learned,
    one_shot,
    one_shot_frontier,
    quantised,
    refitted,
    rounded_and_recovered,
    trials,
)
from experiments.studies.trial import Calibration, Evaluation, Perplexity, Pruning
from patch.learn.recipe import GUIDED, GUIDED_PATTERNS, TileRanking
from patch.methods import members
from patch.tiles import TileShape

_CALIBRATION = Calibration("embedded/train", windows=512, length=128)

_TILE = (64, 64)

_EVALUATION = Evaluation((Perplexity("embedded/test", 256),), (EMBEDDED_TASK,))


def _learned(method: str, sparsity: float, tile: TileShape = _TILE, **changes: Any) -> Pruning:
    """A learned mask of the embedded model.

    Recipes are the published ones, cut short: steps and batch by what two cores do in minutes, the learning rates,
    which fewer steps want higher, on the validation excerpt.
    """
    short: dict[str, Any] = {
        "steps": 120,
        "batch": 16,
        "microbatch": 16,
        "length": 128,
        "activation_checkpointing": False,
        "checkpoint_every": 10,
        "log_every": 5,
        "lr": {"maskllm": 2e-3, "patch-joint": 3e-3}[method],
    }
    return learned(
        "embedded", method, sparsity, tile, "embedded/train", _CALIBRATION, earlier=True, **(short | changes)
    )


def _demo() -> list[Pruning]:
    """The demo's prunings of the embedded model."""
    return [
        dense("embedded"),
        *(one_shot("embedded", method, "2:4", 0.5, _TILE, _CALIBRATION) for method in members("one-shot")),
        _learned("maskllm", 0.5),
        *(_learned("patch-joint", target) for target in TARGETS),
    ]


def demo() -> Trials:
    """The whole path on the embedded model, in minutes on two cores: eight methods and FP8; perplexity and a task."""
    prunings = _demo()
    rounded = [quantised(each, "fp8", _CALIBRATION) for each in prunings if each.method == "sparsegpt"]
    return trials([*prunings, *rounded], _EVALUATION)


def tiles() -> Trials:
    """Perplexity against the tile shape at 35% sparsity, of the embedded model; its learning is the demo's."""
    shapes = ((16, 16), (32, 32), (64, 64), (128, 128), (32, 64), (64, 32), (64, 128), (128, 64))
    prunings = [_learned("patch-joint", 0.35, tile) for tile in shapes]
    return trials([dense("embedded"), *prunings], _EVALUATION)


def _ablation(*changes: dict[str, Any]) -> Trials:
    """PATCH joint at 45% on the embedded model with each of some changes of the recipe, two seeds, validation text."""
    prunings = [_learned("patch-joint", 0.45, seed=seed, **change) for change in changes for seed in (0, 1)]
    return trials([dense("embedded"), *prunings], Evaluation((Perplexity("embedded/validation", 256),)))


def priors() -> Trials:
    """Which tiles should start as dense: PATCH joint at 45% on the embedded model, two seeds, on validation text."""
    return _ablation(
        {},
        {"tile_prior": 0.0},
        {"tile_ranking": "model"},
        {"tile_ranking": "model", "tile_prior": 30.0},
        {"tile_ranking": "model", "tile_prior": 100.0},
        {"tile_prior": 30.0},
    )


def rankings() -> Trials:
    """What ranking the tiles of one-shot hybrid masks over the model adds, on the embedded model; refitted too."""
    prunings = [
        one_shot("embedded", method, "hybrid", target, _TILE, _CALIBRATION, ranking)
        for method in ("wanda", "sparsegpt")
        for target in TARGETS
        for ranking in get_args(TileRanking)
    ]
    best = [pruning for pruning in prunings if (pruning.method, pruning.tile_ranking) == ("sparsegpt", "model")]
    fitted = [refitted(pruning, _CALIBRATION) for pruning in best]
    return trials([dense("embedded"), *prunings, *fitted], _EVALUATION)


def distillation() -> Trials:
    """What learning from the dense model adds: PATCH joint at 45% on the embedded model, two seeds, validation text."""
    return _ablation(
        {},
        {"distillation": 1.0},
        RANKED,
        *(RANKED | {"block_distillation": factor} for factor in (1.0, 10.0, 100.0)),
    )


def guidance() -> Trials:
    """How much of what guided tiles gain 2:4 masks gain too: MaskLLM and PATCH joint at 45%, as published and guided.

    Of the embedded model, two seeds, validation text.
    """
    recipes: dict[str, tuple[float, tuple[dict[str, Any], ...]]] = {
        "maskllm": (0.5, ({}, GUIDED_PATTERNS)),
        "patch-joint": (0.45, ({}, GUIDED)),
    }
    prunings = [
        _learned(method, target, seed=seed, **change)
        for method, (target, changes) in recipes.items()
        for change in changes
        for seed in (0, 1)
    ]
    return trials([dense("embedded"), *prunings], Evaluation((Perplexity("embedded/validation", 256),)))


def precisions() -> Trials:
    """Whether a mask that is learned over quantised weights is better in few bits than one learned over those as given.

    PATCH joint at 45% on the embedded model, each mask as it is, in FP8 and in INT4, on validation text.
    """
    masks = [_learned("patch-joint", 0.45, **RANKED, steps=60, precision=name) for name in (None, "fp8", "int4")]
    each = [
        mask if name is None else quantised(mask, name, _CALIBRATION, sink_aware=True)
        for mask in masks
        for name in (None, "fp8", "int4")
    ]
    return trials([dense("embedded"), *each], Evaluation((Perplexity("embedded/validation", 256),)))


def recovered_bits() -> Trials:
    """Whether what is kept had better be trained as it will be rounded: INT4 of two masks of the embedded model.

    One drops nothing, so that training it is training the dense model. Compared on validation text.
    """
    one = functools.partial(one_shot, "embedded", tile=_TILE, calibration=_CALIBRATION)
    steps: dict[str, Any] = {"steps": 60, "batch": 16, "microbatch": 16, "length": 128, "warmup": 10}
    masks = (one("magnitude", "hybrid", 0.0), one("sparsegpt", "hybrid", 0.45, tile_ranking="model"))
    each = rounded_and_recovered(masks, "int4", "embedded/train", _CALIBRATION, **steps)
    return trials([dense("embedded"), *each], Evaluation((Perplexity("embedded/validation", 256),)))


def refit() -> Trials:
    """What fitting the kept weights adds to every mask of the demo."""
    prunings = _demo()
    fitted = [refitted(pruning, _CALIBRATION) for pruning in prunings if pruning.method != "dense"]
    return trials([*prunings, *fitted], _EVALUATION)


def frontier() -> Trials:
    """Accuracy and speed of the same checkpoints, of the embedded model; its learning is the demo's."""
    prunings = [*_demo(), *one_shot_frontier("embedded", _TILE, _CALIBRATION)]
    return joined(dict.fromkeys(prunings), _EVALUATION)


def bits() -> Trials:
    """What few bits cost after each mask, and the smaller dense model beside them, of the embedded model.

    Quantised without and with regard to sinks; INT4 of SparseGPT's masks also pruned and rounded in one sweep.
    Perplexity alone: how fast so small a model is says nothing, and its task cannot tell so small differences.
    """
    one = functools.partial(one_shot, "embedded", "sparsegpt", tile=_TILE, calibration=_CALIBRATION)
    masks = [one("2:4", 0.5), *(one("hybrid", target, tile_ranking="model") for target in TARGETS)]
    swept = [quantised(mask, "int4", _CALIBRATION, joint=True) for mask in masks]
    models = [dense("embedded"), *masks, fewer_blocks("embedded", 0.25, _CALIBRATION)]
    each = [*in_fewer_bits(models, _CALIBRATION), *swept, *in_fewer_bits(models, _CALIBRATION, sink_aware=True)]
    return trials(dict.fromkeys(each), Evaluation((Perplexity("embedded/test", 256),)))
