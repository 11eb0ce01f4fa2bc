"""Studies of SmolLM2-135M, learned on equal tokens: what one GPU runs in hours."""

from collections.abc import Iterable
from typing import Any, get_args

from analysis.names import PAPER_TASKS
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
    recovered,
    refitted,
    trials,
)
from experiments.studies.trial import Calibration, Evaluation, Perplexity, Pruning
from patch.learn.recipe import GUIDED, GUIDED_PATTERNS, TileRanking
from patch.methods import members
from patch.tiles import TileShape

_EVALUATION = Evaluation((Perplexity("wikitext2/test", 2048),), (*PAPER_TASKS, "lambada_openai"), batch=8)

# SmolLM2's tokens of learning: 2000 steps, as published, of 16 sequences of 1024 tokens: 32.8 million tokens in all.
_TEXT = "novels+wiki_leads"

_STEPS: dict[str, Any] = {
    "steps": 2000,
    "batch": 16,
    "microbatch": 16,
    "length": 1024,
    "activation_checkpointing": False,
    "checkpoint_every": 500,
    "log_every": 50,
}

# Where the tile statistics that small models learned are timed.
_PROJECTED_ON = ("llama-2-7b", "llama-3.1-8b")


def _learned(method: str, sparsity: float, tile: TileShape = (64, 64), **changes: Any) -> Pruning:
    """A mask of SmolLM2 learned on `_STEPS`, but for ``changes``, as the first studies have it."""
    calibration = Calibration("novels", 128, 2048)
    return learned("smollm2-135m", method, sparsity, tile, _TEXT, calibration, earlier=True, **(_STEPS | changes))


def frontier() -> Trials:
    """Accuracy and speed of the same checkpoints, of SmolLM2-135M; its learning is that of ``smollm2-learned``."""
    prunings = [
        dense("smollm2-135m"),
        *one_shot_frontier("smollm2-135m", (64, 64), Calibration("novels", 128, 2048)),
        *(_learned("maskllm", 0.5, distillation=distillation) for distillation in (0.0, 1.0)),
        *(_learned("patch-joint", target, distillation=1.0) for target in TARGETS),
    ]
    return joined(prunings, _EVALUATION, _PROJECTED_ON)


def one_shot_masks() -> Trials:
    """One-shot pruning of SmolLM2-135M: 2:4, unstructured 50%, and hybrid 64x64 tiles, on all tasks in full."""
    model, tile = "smollm2-135m", (64, 64)
    calibration = Calibration("novels", 128, 2048)
    return trials(
        [
            dense(model),
            *(
                one_shot(model, method, structure, 0.5, tile, calibration)
                for method in members("one-shot")
                for structure in ("2:4", "unstructured")
            ),
            *(
                one_shot(model, method, "hybrid", target, tile, calibration, ranking)
                for method in ("wanda", "sparsegpt")
                for target in TARGETS
                for ranking in get_args(TileRanking)
            ),
        ],
        _EVALUATION,
    )


def learned_masks() -> Trials:
    """Learned masks of SmolLM2-135M on equal tokens: MaskLLM, PATCH joint, and tiles over fixed patterns; all tasks."""
    prunings = []
    for distillation in (0.0, 1.0):
        prunings += [
            _learned("maskllm", 0.5, distillation=distillation),
            *(_learned("patch-joint", target, distillation=distillation) for target in TARGETS),
            *(
                _learned("patch-tile", target, start=start, distillation=distillation)
                for start in ("maskllm", "sparsegpt")
                for target in TARGETS
            ),
        ]
    prunings += [_learned("patch-joint", target, **GUIDED) for target in TARGETS]
    return trials([dense("smollm2-135m"), *prunings], _EVALUATION)


# One mixture of text for calibration and learning.
_MIXTURE = Calibration(_TEXT, 128, 2048, drawn_from="stream")


def _as_published(method: str, sparsity: float, text: str = _TEXT, **changes: Any) -> Pruning:
    """A mask of SmolLM2 learned on `_STEPS`, but for ``changes``, from a start as published."""
    return learned("smollm2-135m", method, sparsity, (64, 64), text, _MIXTURE, **(_STEPS | changes))


def _one_shot(method: str, structure: str, sparsity: float, ranking: str = "weight", **changes: Any) -> Pruning:
    return one_shot("smollm2-135m", method, structure, sparsity, (64, 64), _MIXTURE, ranking, **changes)


def published() -> Trials:
    """Learned masks of SmolLM2-135M as published, and guided ones, which are ours, of MaskLLM too; all tasks.

    One mixture of text for calibration and learning. It supersedes ``smollm2-learned``, whose published recipes started
    from noise beside the prior, and ``smollm2-oneshot``, which saw fiction alone. Three seeds where two methods are
    close.
    """
    mask, one = _as_published, _one_shot
    return trials(
        [
            mask("maskllm", 0.5),
            *(mask("patch-joint", 0.45, seed=seed, **recipe) for seed in range(3) for recipe in ({}, GUIDED)),
            *(mask("maskllm", 0.5, seed=seed) for seed in (1, 2)),
            *(mask("maskllm", 0.5, seed=seed, **GUIDED_PATTERNS) for seed in range(3)),
            *(mask("patch-joint", target, **recipe) for target in (0.35, 0.25) for recipe in ({}, GUIDED)),
            *(mask("patch-tile", target) for target in TARGETS),
            dense("smollm2-135m"),
            one("sparsegpt", "2:4", 0.5),
            one("sparsegpt", "2:4", 0.5, weight_update=False),
            one("wanda", "2:4", 0.5),
            *(one("sparsegpt", "hybrid", target, "model") for target in TARGETS),
            *(one("sparsegpt", "unstructured", target) for target in TARGETS),
        ],
        _EVALUATION,
    )


def _each_kind() -> list[Pruning]:
    """A mask of every kind that kernels run: 2:4 of SparseGPT and MaskLLM, tiles ranked and guided."""
    return [
        _one_shot("sparsegpt", "2:4", 0.5),
        _as_published("maskllm", 0.5),
        *(_one_shot("sparsegpt", "hybrid", target, "model") for target in TARGETS),
        *(_as_published("patch-joint", target, **GUIDED) for target in TARGETS),
    ]


def bits() -> Trials:
    """Accuracy and speed of masks of SmolLM2-135M in every precision, dense models, smaller ones too, beside them.

    Its masks are those of ``smollm2-published``. Two of them are also quantised without regard to sinks.
    """
    smaller = [fewer_blocks("smollm2-135m", share, _MIXTURE) for share in (0.1, 0.2, 0.3)]
    models = in_fewer_bits([dense("smollm2-135m"), *smaller, *_each_kind()], _MIXTURE, sink_aware=True)
    before = in_fewer_bits([dense("smollm2-135m"), _as_published("patch-joint", 0.45, **GUIDED)], _MIXTURE)
    return joined(dict.fromkeys([*models, *before]), _EVALUATION, _PROJECTED_ON)


def sinks() -> Trials:
    """What regard to attention sinks does for SmolLM2-135M in few bits: little text, on which settings are chosen."""
    plain, seen = dense("smollm2-135m"), Calibration("wiki_leads", 32, 512, drawn_from="stream")
    rounded = [quantised(plain, name, seen, sink_aware=aware) for name in ("int4", "fp8") for aware in (False, True)]
    return trials([plain, *rounded], Evaluation((Perplexity("embedded/validation", 256),)))


# Of what is recovered, tokens are those of learning: 2000 steps of 16 sequences of 1024, after the blocks.
_RECOVERY: dict[str, Any] = {"steps": 2000, "batch": 16, "microbatch": 16, "length": 1024}

# Shares of the windows by how many are of an encyclopedia, whose texts begin anew in the end; of `_TEXT` 6% are.
_ENCYCLOPEDIC = {
    share: f"{novels}*novels+{leads}*wiki_leads+{docs}*wiki_docs"
    for share, novels, leads, docs in (
        (0.3, 0.7, 0.22, 0.08),
        (0.4, 0.6, 0.295, 0.105),
        (0.5, 0.5, 0.37, 0.13),
        (0.7, 0.3, 0.52, 0.18),
    )
}
# The best of `recovery_texts`, of which full runs repeat the encyclopedia 2.5 times as often: a smaller share of it.
_CHOSEN: dict[str, Any] = {"distillation": 0.5, "lr": 2e-4}


def recovered_masks() -> Trials:
    """What training the kept weights adds to each kind of mask of SmolLM2-135M, recovered on equal tokens; all tasks.

    The masks are those of ``smollm2-published``, of which learned ones saw as many tokens before; the unstructured ones
    are the contrast.
    """
    masks = [*_each_kind(), *(_one_shot("sparsegpt", "unstructured", target) for target in TARGETS)]
    trained = [recovered(mask, _TEXT, **_RECOVERY) for mask in masks]
    return trials([dense("smollm2-135m"), *masks, *trained], _EVALUATION)


def recovered_on_mixture() -> Trials:
    """As `recovered_masks`, on the mixture of text and by the loss that `recovery_texts` chose; all tasks.

    A mask that drops nothing is trained alike: what it gains is what the text does to any model, and no recovery.
    """
    masks = [*_each_kind(), _one_shot("magnitude", "hybrid", 0.0)]
    trained = [recovered(mask, _ENCYCLOPEDIC[0.4], **(_RECOVERY | _CHOSEN)) for mask in masks]
    return trials([dense("smollm2-135m"), *masks[:-1], *trained], _EVALUATION)


def recovery_ablation() -> Trials:
    """What each part of recovery does to the guided 45% mask of SmolLM2.

    Distillation takes 6.6 million tokens, blocks 0.5 million an epoch: what leaves one out saw fewer. Compared on
    WikiText-2's validation text, which is not reported elsewhere.
    """
    mask = _as_published("patch-joint", 0.45, **GUIDED)
    short = _RECOVERY | {"steps": 400}
    slow, fast, text = {"lr": 1e-4}, {"lr": 4e-4}, {"distillation": 0.0}
    both, blocks, model = {"block_epochs": 2}, {"block_epochs": 2, "steps": 0, "lr": 1e-4}, {"block_epochs": 0}
    changes: list[dict[str, Any]] = [
        *(both | {"lr": rate} for rate in (1e-4, 2e-4, 4e-4, 8e-4)),
        both | fast | text,
        blocks,
        blocks | {"block_targets": "sparse"},
        blocks | {"block_epochs": 8},
        blocks | {"block_lr": 3e-4},
        blocks | {"block_lr": 3e-5},
        model | slow,
        model | slow | text,
        model | slow | {"distillation": 0.5},
        model | slow | {"block_distillation": 1.0},
        model | slow | {"block_distillation": 10.0},
        model | fast,
        model | fast | text,
    ]
    others = [recovered(mask, _TEXT, **(short | change)) for change in changes]
    validation = Evaluation((Perplexity("wikitext2/validation", 2048),), batch=8)
    return trials([dense("smollm2-135m"), mask, *others], validation)


def recovery_texts() -> Trials:
    """Which text, loss and rate recover the guided 45% mask of SmolLM2 best, on 13.1 million tokens each.

    Compared on WikiText-2's validation text, which is not reported elsewhere.
    """
    mask = _as_published("patch-joint", 0.45, **GUIDED)
    settings = (
        (0.5, 0.5, 2e-4),
        (0.5, 0.5, 4e-4),
        (0.5, 0.0, 1e-4),
        (0.5, 0.0, 2e-4),
        (0.5, 1.0, 4e-4),
        (0.7, 0.5, 4e-4),
        (0.3, 0.5, 4e-4),
        (0.7, 0.0, 2e-4),
    )
    others = [
        recovered(mask, _ENCYCLOPEDIC[share], **(_RECOVERY | {"steps": 800, "distillation": distillation, "lr": rate}))
        for share, distillation, rate in settings
    ]
    validation = Evaluation((Perplexity("wikitext2/validation", 2048),), batch=8)
    return trials([dense("smollm2-135m"), mask, *others], validation)


def _by_perplexity(others: Iterable[Pruning], shared: Iterable[Pruning]) -> Trials:
    """Masks of SmolLM2 that perplexity alone judges, beside trials of other studies, which have tasks too."""
    short = Evaluation(_EVALUATION.perplexity, batch=8)
    return trials([dense("smollm2-135m"), *shared], _EVALUATION) + trials(others, short)


def tiles() -> Trials:
    """Perplexity against the tile shape at 35% sparsity, SmolLM2-135M on equal tokens, distilled."""
    shapes = ((32, 32), (128, 128), (192, 192), (64, 128), (128, 64))
    others = [_learned("patch-joint", 0.35, tile, distillation=1.0) for tile in shapes]
    return _by_perplexity(others, [_learned("patch-joint", 0.35, distillation=1.0)])


def recipes() -> Trials:
    """Published recipes and ours at 45%, SmolLM2-135M on equal tokens: PATCH joint from two seeds, tiles from one."""
    recipes: tuple[dict[str, Any], ...] = ({}, {"distillation": 1.0}, GUIDED)
    joint = [[_learned("patch-joint", 0.45, seed=seed, **recipe) for recipe in recipes] for seed in (0, 1)]
    tile = [_learned("patch-tile", 0.45, start="sparsegpt", **recipe) for recipe in recipes]
    return _by_perplexity([*joint[1], tile[-1]], [*joint[0], *tile[:-1]])


def refit() -> Trials:
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
    guided = [_learned("patch-joint", target, **GUIDED) for target in (0.45, 0.25)]
    fitted, fitted_guided = ([refitted(each, calibration) for each in some] for some in (prunings, guided))
    return _by_perplexity(fitted_guided, [*prunings, *fitted, *guided])


_VALIDATION = Evaluation((Perplexity("wikitext2/validation", 2048),), batch=8)


def _briefly(method: str = "patch-joint", **changes: Any) -> Pruning:
    """A mask at 45% from the right start, learned on 6.6 million tokens."""
    return _as_published(method, 0.45, **({"steps": 400} | changes))


# Changes of the guided recipe, each of which sees as many tokens as that.
IDEAS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "kept outputs rewarded": {"weight_penalty_by": "outputs"},
    "four masks a step": {"microbatch": 4},
    "twice the steps": {"batch": 8, "microbatch": 8, "steps": 800},
    "four times the steps": {"batch": 4, "microbatch": 4, "steps": 1600},
    "from Wanda": {"start": "wanda"},
    "harder masks": {"tau": (2.0, 0.05)},
    "faster": {"lr": 2e-3},
    "quiet where gradients are small": {"eps": 1e-5},
    "tiles may move": {"tile_prior": 3.0},
}


# What guided masks may be learned on instead.
OTHER_TEXTS = {
    "40% encyclopedia": _ENCYCLOPEDIC[0.4],
    "written by the model": "written",
    "half of it written by the model": "0.5*written+0.45*novels+0.05*wiki_leads",
}


def guided_ideas() -> Trials:
    """Whether the guided recipe can be made better, at 45% on SmolLM2, 6.6 million tokens each.

    Compared on WikiText-2's validation text, which is not reported elsewhere. Text that is nearer to it is no better
    recipe: what that does is there to be told from what recipes do, and from text that the dense model wrote itself.
    """
    prunings = [_briefly(seed=seed, **(GUIDED | change)) for seed in range(3) for change in IDEAS.values()]
    prunings += [_briefly(text=text, **GUIDED) for text in OTHER_TEXTS.values()]
    return trials([dense("smollm2-135m"), *prunings], _VALIDATION)


def guided_further() -> Trials:
    """What helped most among `guided_ideas` on 32.8 million tokens: many small steps, and text nearer to the reported.

    The guided masks beside them are those of ``smollm2-published``.
    """
    steps = GUIDED | {"batch": 4, "microbatch": 4, "steps": 8000}
    usual = [_as_published("patch-joint", target, **GUIDED) for target in TARGETS]
    others = [
        _as_published("patch-joint", target, text, **steps)
        for text in (_TEXT, _ENCYCLOPEDIC[0.4])
        for target in TARGETS
    ]
    return _by_perplexity(others, usual)


def recipe_effects() -> Trials:
    """The large effects of `recipe_ablation` from the right start, and tiles over SparseGPT's mask; validation text.

    MaskLLM too, guided as far as it can be: what guidance does without tiles.
    """
    distilled = {"distillation": 1.0}
    joint = [_briefly(**change) for change in ({}, distilled, RANKED, GUIDED)]
    tile = [_briefly("patch-tile", start="sparsegpt", **change) for change in ({}, distilled, RANKED)]
    patterns = [_as_published("maskllm", 0.5, steps=400, **change) for change in ({}, distilled, GUIDED_PATTERNS)]
    return trials([dense("smollm2-135m"), *joint, *tile, *patterns], _VALIDATION)


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
        RANKED,
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
        RANKED | {"tile_prior": 100.0},
        RANKED | {"start": "wanda"},
        RANKED | {"block_distillation": 1.0},
    ]
    changes = [*finalists, *others, *(change | {"seed": 1} for change in finalists)]
    prunings = [_learned("patch-joint", 0.45, steps=400, **change) for change in changes]
    return trials([dense("smollm2-135m"), *prunings], _VALIDATION)
