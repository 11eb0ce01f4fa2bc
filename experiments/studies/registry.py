"""The studies: one function per table or figure, published or ours, each returning its trials.

A study names its models, methods, targets, texts and recipes; nothing here runs. ``hts studies`` lists them and
``hts run NAME --dry-run`` shows the trials of one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from analysis.names import PAPER_TASKS
from experiments.data import models
from experiments.eval.tasks import EMBEDDED_TASK
from experiments.studies.trial import (
    LEARNED,
    ONE_SHOT,
    USUAL_PRIOR,
    Calibration,
    Evaluation,
    KernelGrid,
    Learning,
    ModelGrid,
    Packed,
    Perplexity,
    Pruning,
    Trial,
    needs_calibration,
)
from patch.errors import check_name
from patch.learn.recipe import GUIDED, HOW_IT_RUNS, RECIPES, Recipe, TileRanking
from patch.mask import TileShape

Trials = tuple[Trial, ...]
TARGETS = (0.45, 0.35, 0.25)


@dataclass(frozen=True)
class Study:
    """A named set of trials."""

    title: str
    trials: Callable[[], Trials]


def dense(model: str) -> Pruning:
    """The model as it is."""
    return Pruning(model, "dense", "dense", 0.0, revision=models.local_revision(model))


def one_shot(
    model: str,
    method: str,
    structure: str,
    sparsity: float,
    tile: TileShape | None,
    calibration: Calibration,
    tile_ranking: str = "weight",
) -> Pruning:
    """Magnitude, Wanda or SparseGPT; where no calibration text is needed, the hash ignores it."""
    check_name("one-shot method", method, ONE_SHOT)
    return Pruning(
        model,
        method,
        structure,
        sparsity,
        None if structure == "unstructured" else tile,
        calibration=calibration if needs_calibration(method, tile_ranking) else None,
        revision=models.local_revision(model),
        tile_ranking=tile_ranking,
    )


def learned(
    model: str,
    method: str,
    sparsity: float,
    tile: TileShape,
    text: str,
    calibration: Calibration,
    seed: int = 0,
    recipe: Recipe | None = None,
    start: str | None = "usual",
    **changes: Any,
) -> Pruning:
    """MaskLLM or PATCH, from the mask that SparseGPT finds on ``calibration``; tile mode, from the mask MaskLLM learns.

    Args:
        start: another method whose 2:4 mask it starts from, or None for random logits.
        recipe: the published one of the method by default.
        changes: fields of the recipe to replace.
    """
    check_name("learned method", method, LEARNED)
    chosen = dataclasses.replace(recipe or RECIPES[method], **changes)
    start = USUAL_PRIOR[method] if start == "usual" else start
    prior: Pruning | None
    if start is None:
        prior = None
    elif start == "maskllm":
        # Both stages run alike, on the same steps, batches, text and objective; rates and penalties stay their own.
        common = ("steps", "batch", "microbatch", "length", "distillation", "block_distillation", *HOW_IT_RUNS)
        shared = {name: getattr(chosen, name) for name in common}
        prior = learned(model, "maskllm", 0.5, tile, text, calibration, seed, **shared)
    else:
        prior = one_shot(model, start, "2:4", 0.5, tile, calibration)
    return Pruning(
        model,
        method,
        "2:4" if method == "maskllm" else "hybrid",
        sparsity,
        tile,
        seed,
        learning=Learning(text, chosen),
        prior=prior,
        revision=models.local_revision(model),
    )


# Guided by the dense model, but for its hidden states.
_RANKED = GUIDED | {"block_distillation": 0.0}

_EMBEDDED_CALIBRATION = Calibration("embedded/train", windows=512, length=128)
_EMBEDDED_TILE = (64, 64)


def _embedded_learned(method: str, sparsity: float, tile: TileShape = _EMBEDDED_TILE, **changes: Any) -> Pruning:
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
    return learned("embedded", method, sparsity, tile, "embedded/train", _EMBEDDED_CALIBRATION, **(short | changes))


def _embedded() -> list[Pruning]:
    """The demo's prunings of the embedded model."""
    return [
        dense("embedded"),
        *(one_shot("embedded", method, "2:4", 0.5, _EMBEDDED_TILE, _EMBEDDED_CALIBRATION) for method in ONE_SHOT),
        _embedded_learned("maskllm", 0.5),
        *(_embedded_learned("patch-joint", target) for target in TARGETS),
    ]


_EMBEDDED_EVALUATION = Evaluation((Perplexity("embedded/test", 256),), (EMBEDDED_TASK,))


def demo() -> Trials:
    """The whole path on the embedded model, in minutes on two cores: eight methods, perplexity and a task."""
    return _trials(_embedded(), _EMBEDDED_EVALUATION)


def embedded_tiles() -> Trials:
    """Perplexity against the tile shape at 35% sparsity, of the embedded model; its learning is the demo's."""
    shapes = ((16, 16), (32, 32), (64, 64), (128, 128), (32, 64), (64, 32), (64, 128), (128, 64))
    prunings = [_embedded_learned("patch-joint", 0.35, tile) for tile in shapes]
    return _trials([dense("embedded"), *prunings], _EMBEDDED_EVALUATION)


def _embedded_ablation(*changes: dict[str, Any]) -> Trials:
    """PATCH joint at 45% on the embedded model with each of some changes of the recipe, two seeds, validation text."""
    prunings = [_embedded_learned("patch-joint", 0.45, seed=seed, **change) for change in changes for seed in (0, 1)]
    return _trials([dense("embedded"), *prunings], Evaluation((Perplexity("embedded/validation", 256),)))


def embedded_priors() -> Trials:
    """Which tiles should start as dense: PATCH joint at 45% on the embedded model, two seeds, on validation text."""
    return _embedded_ablation(
        {},
        {"tile_prior": 0.0},
        {"tile_ranking": "model"},
        {"tile_ranking": "model", "tile_prior": 30.0},
        {"tile_ranking": "model", "tile_prior": 100.0},
        {"tile_prior": 30.0},
    )


def embedded_rankings() -> Trials:
    """What ranking the tiles of one-shot hybrid masks over the model adds, on the embedded model; refitted too."""
    prunings = [
        one_shot("embedded", method, "hybrid", target, _EMBEDDED_TILE, _EMBEDDED_CALIBRATION, ranking)
        for method in ("wanda", "sparsegpt")
        for target in TARGETS
        for ranking in get_args(TileRanking)
    ]
    best = [pruning for pruning in prunings if (pruning.method, pruning.tile_ranking) == ("sparsegpt", "model")]
    fitted = [refitted(pruning, _EMBEDDED_CALIBRATION) for pruning in best]
    return _trials([dense("embedded"), *prunings, *fitted], _EMBEDDED_EVALUATION)


def embedded_distillation() -> Trials:
    """What learning from the dense model adds: PATCH joint at 45% on the embedded model, two seeds, validation text."""
    return _embedded_ablation(
        {},
        {"distillation": 1.0},
        _RANKED,
        *(_RANKED | {"block_distillation": factor} for factor in (1.0, 10.0, 100.0)),
    )


def refitted(pruning: Pruning, text: Calibration) -> Pruning:
    """The same mask, and what it keeps fitted to the dense outputs on ``text``."""
    return dataclasses.replace(pruning, refit=text)


def embedded_refit() -> Trials:
    """What fitting the kept weights adds to every mask of the demo."""
    prunings = _embedded()
    fitted = [refitted(pruning, _EMBEDDED_CALIBRATION) for pruning in prunings if pruning.method != "dense"]
    return _trials([*prunings, *fitted], _EMBEDDED_EVALUATION)


# Where the tile statistics that small models learned are timed.
CARRIED = ("llama-2-7b", "llama-3.1-8b")


def joined(prunings: Iterable[Pruning], evaluation: Evaluation, carried: tuple[str, ...] = ()) -> Trials:
    """Accuracy and speed of the same artefacts: each pruning evaluated, packed, evaluated again, and timed.

    Args:
        carried: models of the registry on whose shapes the tile statistics of learned hybrid masks are timed too.
    """
    both, plain = (dataclasses.replace(evaluation, packed=Packed(carried=shapes)) for shapes in (carried, ()))
    return tuple(Trial(pruning, both if pruning.method in LEARNED else plain) for pruning in prunings)


def _one_shot_frontier(model: str, tile: TileShape, calibration: Calibration) -> list[Pruning]:
    """Wanda and SparseGPT: 2:4, hybrid at three sparsities, and unstructured 50%, whose speed is the contrast."""
    structures = [("2:4", 0.5), *(("hybrid", target) for target in TARGETS), ("unstructured", 0.5)]
    return [
        one_shot(model, method, structure, sparsity, tile, calibration)
        for method in ("wanda", "sparsegpt")
        for structure, sparsity in structures
    ]


def frontier() -> Trials:
    """Accuracy and speed of the same checkpoints, of the embedded model; its learning is the demo's."""
    prunings = [*_embedded(), *_one_shot_frontier("embedded", _EMBEDDED_TILE, _EMBEDDED_CALIBRATION)]
    return joined(dict.fromkeys(prunings), _EMBEDDED_EVALUATION)


def frontier_smollm2() -> Trials:
    """Accuracy and speed of the same checkpoints, of SmolLM2-135M; its learning is that of ``smollm2-learned``."""
    prunings = [
        dense("smollm2-135m"),
        *_one_shot_frontier("smollm2-135m", (64, 64), Calibration("novels", 128, 2048)),
        *(_smollm2("maskllm", 0.5, distillation=distillation) for distillation in (0.0, 1.0)),
        *(_smollm2("patch-joint", target, distillation=1.0) for target in TARGETS),
    ]
    return joined(prunings, _SMOLLM2_EVALUATION, CARRIED)


def published_frontier(model: str, method: str) -> Trials:
    """Accuracy and speed of the same checkpoints, of a model of the published tables.

    Args:
        method: that of its table, ``patch-joint`` or ``patch-tile``.
    """
    contrast = [
        one_shot(model, baseline, "unstructured", 0.5, None, Calibration()) for baseline in ("wanda", "sparsegpt")
    ]
    return joined([*_accuracy(model, method), *contrast], _PUBLISHED)


_SMOLLM2_EVALUATION = Evaluation((Perplexity("wikitext2/test", 2048),), (*PAPER_TASKS, "lambada_openai"), batch=8)


def smollm2_oneshot() -> Trials:
    """One-shot pruning of SmolLM2-135M: 2:4, unstructured 50%, and hybrid 64x64 tiles, on all tasks in full."""
    model, tile = "smollm2-135m", (64, 64)
    calibration = Calibration("novels", 128, 2048)
    return _trials(
        [
            dense(model),
            *(
                one_shot(model, method, structure, 0.5, tile, calibration)
                for method in ONE_SHOT
                for structure in ("2:4", "unstructured")
            ),
            *(
                one_shot(model, method, "hybrid", target, tile, calibration, ranking)
                for method in ("wanda", "sparsegpt")
                for target in TARGETS
                for ranking in get_args(TileRanking)
            ),
        ],
        _SMOLLM2_EVALUATION,
    )


# SmolLM2's tokens of learning: 2000 steps, as published, of 16 sequences of 1024 tokens: 32.8 million tokens in all.
_SMOLLM2_TEXT = "novels+wiki_leads"
_SMOLLM2_STEPS: dict[str, Any] = {
    "steps": 2000,
    "batch": 16,
    "microbatch": 16,
    "length": 1024,
    "activation_checkpointing": False,
    "checkpoint_every": 500,
    "log_every": 50,
}


def _smollm2(method: str, sparsity: float, tile: TileShape = (64, 64), **changes: Any) -> Pruning:
    """A mask of SmolLM2 learned on `_SMOLLM2_STEPS`, but for ``changes``."""
    calibration = Calibration("novels", 128, 2048)
    return learned("smollm2-135m", method, sparsity, tile, _SMOLLM2_TEXT, calibration, **(_SMOLLM2_STEPS | changes))


def smollm2_learned() -> Trials:
    """Learned masks of SmolLM2-135M on equal tokens: MaskLLM, PATCH joint, and tiles over fixed patterns; all tasks."""
    prunings = []
    for distillation in (0.0, 1.0):
        prunings += [
            _smollm2("maskllm", 0.5, distillation=distillation),
            *(_smollm2("patch-joint", target, distillation=distillation) for target in TARGETS),
            *(
                _smollm2("patch-tile", target, start=start, distillation=distillation)
                for start in ("maskllm", "sparsegpt")
                for target in TARGETS
            ),
        ]
    prunings += [_smollm2("patch-joint", target, **GUIDED) for target in TARGETS]
    return _trials([dense("smollm2-135m"), *prunings], _SMOLLM2_EVALUATION)


def _by_perplexity(others: Iterable[Pruning], shared: Iterable[Pruning]) -> Trials:
    """Masks of SmolLM2 that perplexity alone judges, beside trials of other studies, which have tasks too."""
    short = Evaluation(_SMOLLM2_EVALUATION.perplexity, batch=8)
    return _trials([dense("smollm2-135m"), *shared], _SMOLLM2_EVALUATION) + _trials(others, short)


def smollm2_tiles() -> Trials:
    """Perplexity against the tile shape at 35% sparsity, SmolLM2-135M on equal tokens, distilled."""
    shapes = ((32, 32), (128, 128), (192, 192), (64, 128), (128, 64))
    others = [_smollm2("patch-joint", 0.35, tile, distillation=1.0) for tile in shapes]
    return _by_perplexity(others, [_smollm2("patch-joint", 0.35, distillation=1.0)])


def smollm2_recipes() -> Trials:
    """Published recipes and ours at 45%, SmolLM2-135M on equal tokens: PATCH joint from two seeds, tiles from one."""
    recipes: tuple[dict[str, Any], ...] = ({}, {"distillation": 1.0}, GUIDED)
    joint = [[_smollm2("patch-joint", 0.45, seed=seed, **recipe) for recipe in recipes] for seed in (0, 1)]
    tile = [_smollm2("patch-tile", 0.45, start="sparsegpt", **recipe) for recipe in recipes]
    return _by_perplexity([*joint[1], tile[-1]], [*joint[0], *tile[:-1]])


def smollm2_refit() -> Trials:
    """What fitting the kept weights adds to masks of SmolLM2-135M: one-shot, 2:4 and hybrid, and learned ones."""
    model, tile = "smollm2-135m", (64, 64)
    calibration = Calibration("novels", 128, 2048)
    prunings = [
        *(
            one_shot(model, method, structure, target, tile, calibration)
            for method in ("wanda", "sparsegpt")
            for structure, target in (("2:4", 0.5), ("hybrid", 0.45))
        ),
        *(one_shot(model, "sparsegpt", "hybrid", target, tile, calibration, "model") for target in TARGETS),
    ]
    guided = [_smollm2("patch-joint", target, **GUIDED) for target in (0.45, 0.25)]
    fitted, fitted_guided = ([refitted(each, calibration) for each in some] for some in (prunings, guided))
    return _by_perplexity(fitted_guided, [*prunings, *fitted, *guided])


def recipe_ablation() -> Trials:
    """What each change of the published recipe does: PATCH joint at 45% on SmolLM2, 6.6 million tokens each.

    Compared on WikiText-2's validation text, which is not reported elsewhere. The published recipe, what helped it
    most, and what helped on top of that, are learned from two seeds.
    """
    distilled: dict[str, Any] = {"distillation": 1.0}
    finalists: list[dict[str, Any]] = [
        {},
        distilled,
        distilled | {"start": "wanda"},
        distilled | {"tile_prior": 0.0},
        distilled | {"start": "wanda", "tile_prior": 0.0, "lr": 2e-3},
        _RANKED,
        GUIDED,
    ]
    others: list[dict[str, Any]] = [
        {"lr": 3e-3},
        {"weight_penalty": 0.0},
        {"distillation": 0.5},
        distilled | {"lr": 3e-3},
        distilled | {"lr": 2e-3},
        distilled | {"weight_penalty": 0.0},
        distilled | {"density": "expected"},
        distilled | {"pattern_prior": 9.0},
        distilled | {"logit_dtype": "bfloat16"},
        distilled | {"tile_ranking": "model"},
        _RANKED | {"tile_prior": 100.0},
        _RANKED | {"start": "wanda"},
        _RANKED | {"block_distillation": 1.0},
    ]
    changes = [*finalists, *others, *(change | {"seed": 1} for change in finalists)]
    prunings = [_smollm2("patch-joint", 0.45, steps=400, **change) for change in changes]
    return _trials([dense("smollm2-135m"), *prunings], Evaluation((Perplexity("wikitext2/validation", 2048),), batch=8))


def _accuracy(model: str, method: str) -> list[Pruning]:
    """Dense, the 2:4 baselines, and PATCH at three sparsities, as the published accuracy tables have them."""
    tile, calibration = (128, 128), Calibration()
    return [
        dense(model),
        *(one_shot(model, baseline, "2:4", 0.5, tile, calibration) for baseline in ONE_SHOT),
        learned(model, "maskllm", 0.5, tile, "c4", calibration),
        *(learned(model, method, target, tile, "c4", calibration) for target in TARGETS),
    ]


# Models of the published tables that learn tiles and patterns jointly.
_SMALL = ("qwen2.5-0.5b", "llama-3.2-1b", "gemma-3-1b")


def accuracy_small() -> Trials:
    """The published accuracy table of models up to 1B parameters, where tiles and patterns are learned jointly."""
    return _trials([pruning for name in _SMALL for pruning in _accuracy(name, "patch-joint")], _PUBLISHED)


def guided_small() -> Trials:
    """The guided recipe on the models of ``accuracy-small``, beside its trials."""
    guided = [
        learned(name, "patch-joint", target, (128, 128), "c4", Calibration(), **GUIDED)
        for name in _SMALL
        for target in TARGETS
    ]
    return accuracy_small() + _trials(guided, _PUBLISHED)


def accuracy_large() -> Trials:
    """The published accuracy table of the larger models, where tiles are learned over MaskLLM's patterns."""
    names = ("llama-2-7b", "llama-3.1-8b")
    return _trials([pruning for name in names for pruning in _accuracy(name, "patch-tile")], _PUBLISHED)


def tile_shapes() -> Trials:
    """Perplexity against the tile shape at 35% sparsity."""
    # The keys and values of this model have 128 rows: no larger tile fits them.
    shapes = ((32, 32), (64, 64), (128, 128), (64, 128), (128, 64))
    prunings = [learned("qwen2.5-0.5b", "patch-joint", 0.35, tile, "c4", Calibration()) for tile in shapes]
    return _trials([dense("qwen2.5-0.5b"), *prunings], _PUBLISHED)


def sparsities() -> Trials:
    """Perplexity and accuracy from 0 to 50% in steps of 5."""
    model = "qwen2.5-0.5b"
    targets = [step / 20 for step in range(1, 11)]
    prunings = [learned(model, "patch-joint", target, (128, 128), "c4", Calibration()) for target in targets]
    return _trials([dense(model), *prunings], _PUBLISHED)


def priors() -> Trials:
    """What the learned mask owes to the one it starts from: none, each one-shot method, and MaskLLM's, at 45%."""
    model, tile = "qwen2.5-0.5b", (128, 128)
    prunings = [
        learned(model, "patch-joint", 0.45, tile, "c4", Calibration(), start=start)
        for start in (None, *ONE_SHOT, "maskllm")
    ]
    return _trials([dense(model), *prunings], _PUBLISHED)


def joint_or_tile() -> Trials:
    """Patterns and tiles learned together, against tiles over the patterns that MaskLLM learned."""
    model, tile = "qwen2.5-0.5b", (128, 128)
    prunings = [
        learned(model, method, target, tile, "c4", Calibration())
        for method in ("patch-joint", "patch-tile")
        for target in TARGETS
    ]
    return _trials([dense(model), learned(model, "maskllm", 0.5, tile, "c4", Calibration()), *prunings], _PUBLISHED)


# Models whose kernels are timed, with the tile shapes of each.
TIMED: dict[str, tuple[TileShape, ...]] = {
    "llama-2-7b": ((128, 128), (64, 64), (256, 256)),
    "llama-3.1-8b": ((128, 128),),
    "llama-3.2-1b": ((128, 128),),
    "qwen2.5-0.5b": ((128, 128),),
}


def _grids(grids: Mapping[str, KernelGrid | ModelGrid]) -> Trials:
    return tuple(
        Trial(Pruning(model, "dense", "dense", 0.0), Evaluation((), grid=grid)) for model, grid in grids.items()
    )


def speed_kernels() -> Trials:
    """Every linear of four models against dense and 2:4 libraries: by tokens, sparsity and tile shape."""
    return _grids({model: KernelGrid(tiles=tiles) for model, tiles in TIMED.items()})


def speed_models() -> Trials:
    """Decoding and prefill of whole models, hybrid against dense, with random weights."""
    return _grids({model: ModelGrid() for model in ("llama-2-7b", "llama-3.1-8b")})


_PUBLISHED = Evaluation((Perplexity("wikitext2/test", 4096),), PAPER_TASKS)


def _trials(prunings: Iterable[Pruning], evaluation: Evaluation) -> Trials:
    return tuple(Trial(pruning, evaluation) for pruning in prunings)


STUDIES = {
    "demo": Study("the whole path on the embedded model, in minutes on a CPU", demo),
    "embedded-tiles": Study("perplexity of the embedded model against tile shape at 35%", embedded_tiles),
    "embedded-distillation": Study(
        "what learning from the dense model adds on the embedded model, at 45%", embedded_distillation
    ),
    "embedded-priors": Study("which tiles of the embedded model should start as dense, at 45%", embedded_priors),
    "embedded-rankings": Study(
        "which tiles of one-shot hybrid masks stay dense, on the embedded model", embedded_rankings
    ),
    "embedded-refit": Study("what fitting the kept weights adds to the demo's masks", embedded_refit),
    "frontier": Study("accuracy and speed of the same checkpoints, the embedded model", frontier),
    "frontier-smollm2": Study("accuracy and speed of the same checkpoints, SmolLM2-135M", frontier_smollm2),
    **{
        f"frontier-{model}": Study(
            f"accuracy and speed of the same checkpoints, {model}", functools.partial(published_frontier, model, method)
        )
        for model, method in (
            ("qwen2.5-0.5b", "patch-joint"),
            ("llama-3.2-1b", "patch-joint"),
            ("llama-2-7b", "patch-tile"),
            ("llama-3.1-8b", "patch-tile"),
        )
    },
    "smollm2-oneshot": Study("one-shot methods and structures on SmolLM2-135M", smollm2_oneshot),
    "smollm2-learned": Study("learned masks of SmolLM2-135M on equal tokens", smollm2_learned),
    "smollm2-tiles": Study("perplexity of SmolLM2-135M against tile shape at 35%", smollm2_tiles),
    "smollm2-recipes": Study("recipes and seeds of SmolLM2-135M at 45% on equal tokens", smollm2_recipes),
    "smollm2-refit": Study("what fitting the kept weights adds to masks of SmolLM2-135M", smollm2_refit),
    "recipe-ablation": Study("what each change of the published recipe does, on SmolLM2-135M", recipe_ablation),
    "speed-kernels": Study("kernel speed of four models by tokens, sparsity and tile shape", speed_kernels),
    "speed-models": Study("end-to-end speed of LLaMA-2-7B and LLaMA-3.1-8B shapes", speed_models),
    "accuracy-small": Study("published accuracy table, models up to 1B", accuracy_small),
    "guided-small": Study("the guided recipe beside the published one, models up to 1B", guided_small),
    "accuracy-large": Study("published accuracy table, LLaMA-2-7B and LLaMA-3.1-8B", accuracy_large),
    "tile-shapes": Study("perplexity against tile shape at 35%", tile_shapes),
    "priors": Study("perplexity and accuracy against the mask that learning starts from", priors),
    "joint-or-tile": Study("tiles and patterns learned together, against tiles alone", joint_or_tile),
    "sparsities": Study("perplexity and accuracy from 0 to 50%", sparsities),
}
