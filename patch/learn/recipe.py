"""Hyperparameters of learning: one frozen dataclass, the published recipes by name, and what they set at each step.

A recipe is plain JSON data, because it is part of a trial's definition and so of its hash. Shorter ones are derived:

    >>> import dataclasses
    >>> demo = dataclasses.replace(PATCH_JOINT, steps=150, batch=8, microbatch=8, length=256)
    >>> demo.at(75).tau
    2.025
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from patch.errors import UserError
from patch.quantise.precisions import PRECISIONS

Mode = Literal["joint", "tile", "maskllm"]
WeightPenalty = Literal["norm", "square"]
Density = Literal["sampled", "expected"]
TileRanking = Literal["weight", "model"]
LogitDtype = Literal["float32", "bfloat16"]
PatternStart = Literal["noisy", "prior"]
PenaltyBy = Literal["weights", "outputs"]
Span = tuple[float, float]

# Marks fields younger than published rows: where they hold their default, a recipe's definition leaves them out, so
# that what was defined before keeps its hash.
ADDED = {"added": True}
# Marks those of them that no published method has.
DEPARTURE = ADDED | {"ours": True}
# Marks fields that say how learning runs. What is learned does not depend on them, and so no hash does.
RUNNING = {"running": True}


@dataclass(frozen=True)
class Temperatures:
    """How soft the masks of one step are.

    Attributes:
        tau: temperature of the pattern samples, positive.
        pattern_scale: factor of the pattern logits.
        tile_scale: factor of the tile logits.
        tile_tau: temperature of the tile samples, positive; None for that of the patterns.
    """

    tau: float
    pattern_scale: float
    tile_scale: float
    tile_tau: float | None = None

    @property
    def of_tiles(self) -> float:
        """Temperature of the tile samples."""
        return self.tau if self.tile_tau is None else self.tile_tau


@dataclass(frozen=True)
class Settings:
    """What a recipe sets at one step.

    Attributes:
        lr: learning rate.
        tau: temperature of the pattern samples.
        pattern_scale: factor of the pattern logits.
        tile_tau: temperature of the tile samples.
        tile_scale: factor of the tile logits.
        weight_penalty: factor of the kept weights' size, which is rewarded.
    """

    lr: float
    tau: float
    pattern_scale: float
    tile_tau: float
    tile_scale: float
    weight_penalty: float

    @property
    def temperatures(self) -> Temperatures:
        """How soft the masks are."""
        return Temperatures(self.tau, self.pattern_scale, self.tile_scale, self.tile_tau)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how masks are learned, but for model, text, target, tile shape and seed.

    Penalties, priors and schedules are those of PATCH (Hourri et al., arXiv:2509.23410) and MaskLLM (Fang et al.,
    arXiv:2409.17481); ``distillation``, ``block_distillation``, ``density``, ``logit_dtype``, ``tile_ranking``,
    ``precision`` and ``weight_penalty_by`` are in neither.

    Attributes:
        mode: ``joint`` learns tiles and patterns, ``tile`` tiles over the prior's patterns, ``maskllm`` patterns alone.
        steps: optimizer steps; 0 hardens the initial logits.
        batch: sequences a step.
        microbatch: sequences a forward pass, each pass with noise of its own; divides ``batch``.
        length: tokens a sequence.
        lr: learning rate after warm-up, from which a cosine leads down to ``lr_end`` at the last step.
        lr_end: see ``lr``.
        warmup: steps in which the learning rate rises linearly from 0.
        betas, eps, weight_decay: of AdamW.
        clip: largest norm of all gradients together; None does not clip.
        tau: first and last temperature of the samples; linear in the step, as both scales are.
        tile_tau: that of the tile samples, where it is another than that of the patterns; None if it is not.
        pattern_scale: first and last factor of the pattern logits.
        tile_scale: first and last factor of the tile logits.
        logit_std: standard deviation of the initial logits.
        pattern_start: what the prior does to the initial pattern logits: ``noisy``, it is added to them (MaskLLM);
            ``prior``, it replaces them, so that every group starts at the prior's pattern (PATCH). Without a prior
            they are noise.
        pattern_prior: in standard deviations, how much one shared kept element lifts a pattern's initial logit.
        tile_prior: in standard deviations, how far the initial logits of dense and 2:4 tiles lie from zero.
        sparsity_penalty: lambda_s, factor of ``|density - target density|``; ``maskllm`` has a fixed density and no use
            for it.
        weight_penalty: lambda_w, factor of the kept weights' size; falls linearly to 0 at the last step.
        weight_penalty_kind: ``norm``: sum of ``||W * M||`` over the sum of ``||W||`` (Frobenius, PATCH); ``square``:
            sum of ``(W * M)^2`` (MaskLLM).
        activation_checkpointing: recompute each block in the backward pass, its masks included. Device memory then
            holds the masks of one block; without it, which is faster, those of the whole model.
        checkpoint_every: steps between checkpoints of the learner.
        log_every: steps between entries of the history.
        distillation: share of the loss that is the Kullback-Leibler divergence from the dense model's next-token
            distribution instead of the cross entropy of the text; 0 to 1.
        block_distillation: factor of what is added to the loss: the squared distance of the hidden state after a block
            from the dense model's, over that one's square; the mean over blocks and tokens. Holds the dense model's
            hidden states of a micro-batch in memory.
        density: what the sparsity penalty acts on: ``sampled``, that of the soft masks of the step; ``expected``, that
            of the masks which the tile logits would draw at temperature zero, ``sigmoid(tile_scale * logit)`` a tile.
        logit_dtype: of logits, their gradients and both moments; ``bfloat16`` takes half the memory.
        precision: of the weights that masks are laid over: one of `patch.quantise.precisions.PRECISIONS`, rounded to
            nearest, so that masks are learned for what quantising will leave; None takes them as they are. The dense
            model that is learned from, and the weights that the masks are for in the end, are never rounded.
        tile_ranking: which tiles start as dense: ``weight``, of every weight the same share, the best by the prior's
            scores; ``model``, the most sensitive of all weights by what making each 2:4 would cost the model
            (`patch.learn.sensitivity`), exactly at the target.
        weight_penalty_by: what the size of a kept weight is: ``weights``, its magnitude; ``outputs``, that times the
            size of its input (`patch.learn.inputs`), as in Wanda's scores: what is rewarded is output that is kept.

    Raises:
        UserError: naming the first value that does not fit.
    """

    mode: Mode
    steps: int
    batch: int
    microbatch: int
    length: int
    lr: float
    lr_end: float
    warmup: int
    betas: Span
    eps: float
    weight_decay: float
    clip: float | None
    tau: Span
    pattern_scale: Span
    tile_scale: Span
    logit_std: float
    pattern_prior: float
    tile_prior: float
    sparsity_penalty: float
    weight_penalty: float
    weight_penalty_kind: WeightPenalty
    activation_checkpointing: bool = field(default=True, metadata=RUNNING)
    checkpoint_every: int = field(default=100, metadata=RUNNING)
    log_every: int = field(default=10, metadata=RUNNING)
    distillation: float = field(default=0.0, metadata=DEPARTURE)
    density: Density = field(default="sampled", metadata=DEPARTURE)
    logit_dtype: LogitDtype = field(default="float32", metadata=DEPARTURE)
    tile_ranking: TileRanking = field(default="weight", metadata=DEPARTURE)
    block_distillation: float = field(default=0.0, metadata=DEPARTURE)
    pattern_start: PatternStart = field(default="noisy", metadata=ADDED)
    tile_tau: Span | None = field(default=None, metadata=ADDED)
    precision: str | None = field(default=None, metadata=DEPARTURE)
    weight_penalty_by: PenaltyBy = field(default="weights", metadata=DEPARTURE)

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("weight_penalty_kind", self.weight_penalty_kind, get_args(WeightPenalty))
        check_choice("density", self.density, get_args(Density))
        check_choice("logit_dtype", self.logit_dtype, get_args(LogitDtype))
        check_choice("tile_ranking", self.tile_ranking, get_args(TileRanking))
        check_choice("pattern_start", self.pattern_start, get_args(PatternStart))
        check_choice("weight_penalty_by", self.weight_penalty_by, get_args(PenaltyBy))
        for name, least in (("steps", 0), ("warmup", 0), ("batch", 1), ("microbatch", 1), ("length", 2)):
            check_whole(name, getattr(self, name), least)
        for name in ("checkpoint_every", "log_every"):
            check_whole(name, getattr(self, name), 1)
        if self.batch % self.microbatch:
            raise UserError(
                f"recipe: microbatch {self.microbatch} does not divide batch {self.batch}: choose one that does"
            )
        check_descent(self)
        respell(self, number, ("logit_std",), positive=True)
        respell(self, number, ("pattern_prior", "tile_prior", "sparsity_penalty", "weight_penalty"), positive=False)
        respell(self, span, ("tau", "pattern_scale", "tile_scale"), positive=True)
        if self.tile_tau is not None:
            respell(self, span, ("tile_tau",), positive=True)
        if self.mode == "maskllm" and self.tile_ranking == "model":
            raise UserError("recipe: tile_ranking 'model': maskllm has no dense tiles to choose; leave it at 'weight'")

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model runs beside the masked one, to be learned from."""
        return self.distillation > 0 or self.block_distillation > 0

    def substance(self) -> dict[str, Any]:
        """Everything that what is learned depends on, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in HOW_IT_RUNS}

    def at(self, step: int) -> Settings:
        """The settings of step 0, 1, ... ``steps - 1``."""
        progress = step / max(1, self.steps)
        return Settings(
            lr=learning_rate(step, self.steps, self.warmup, self.lr, self.lr_end),
            tau=_linear(self.tau, progress),
            pattern_scale=_linear(self.pattern_scale, progress),
            tile_tau=_linear(self.tile_tau or self.tau, progress),
            tile_scale=_linear(self.tile_scale, progress),
            weight_penalty=self.weight_penalty * (1 - progress),
        )


HOW_IT_RUNS = frozenset(each.name for each in dataclasses.fields(Recipe) if each.metadata.get("running"))
ADDED_DEFAULTS = {each.name: each.default for each in dataclasses.fields(Recipe) if each.metadata.get("added")}
# What no published method has.
OURS = frozenset(each.name for each in dataclasses.fields(Recipe) if each.metadata.get("ours"))


def spelled(value: Any) -> str:
    """A setting's value as people write it: ``4,0.05``, ``false``, ``none``."""
    if isinstance(value, tuple | list):
        return ",".join(map(spelled, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def learning_rate(step: int, steps: int, warmup: int, lr: float, lr_end: float) -> float:
    """Rises linearly from 0 to ``lr`` in the warm-up, from which a cosine leads down to ``lr_end`` at the last step."""
    if step < warmup:
        return lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr_end + (lr - lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(span: Span, progress: float) -> float:
    return span[0] + (span[1] - span[0]) * progress


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"recipe: {name} {value!r}: give one of {', '.join(choices)}")


def check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"recipe: {name} {value!r}: give a whole number from {least}")


def number(name: str, value: object, positive: bool) -> float:
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not real or value < 0 or (positive and value == 0):  # type: ignore[operator]
        raise UserError(f"recipe: {name} {value!r}: give a {'positive number' if positive else 'number from 0'}")
    return float(value) + 0.0  # type: ignore[arg-type]  # -0.0 becomes 0.0


def span(name: str, value: object, positive: bool) -> Span:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError(f"recipe: {name} {value!r}: give two numbers")
    return number(name, value[0], positive), number(name, value[1], positive)


def respell(recipe: Any, read: Callable[[str, object, bool], object], names: Iterable[str], positive: bool) -> None:
    """Read settings by `number` or `span`. Equal ones get one spelling, since a recipe is hashed: 1 becomes 1.0, a list
    from JSON a tuple."""
    for name in names:
        object.__setattr__(recipe, name, read(name, getattr(recipe, name), positive))


def check_descent(recipe: Any) -> None:
    """Check what recipes of masks and of recovery have in common: how steps are taken, and towards what.

    Raises:
        UserError: naming the first value that does not fit.
    """
    if recipe.precision is not None:
        check_choice("precision", recipe.precision, tuple(PRECISIONS))
    if not isinstance(recipe.activation_checkpointing, bool):
        raise UserError(f"recipe: activation_checkpointing {recipe.activation_checkpointing!r}: give true or false")
    respell(recipe, number, ("lr", "eps"), positive=True)
    respell(recipe, number, ("lr_end", "weight_decay", "distillation", "block_distillation"), positive=False)
    if recipe.clip is not None:
        respell(recipe, number, ("clip",), positive=True)
    respell(recipe, span, ("betas",), positive=False)
    if max(recipe.betas) >= 1:
        raise UserError(f"recipe: betas {recipe.betas}: give two numbers from 0 up to, not including, 1")
    if recipe.distillation > 1:
        raise UserError(f"recipe: distillation {recipe.distillation}: give a share of the loss, 0 to 1")
    if recipe.lr_end > recipe.lr:
        raise UserError(
            f"recipe: lr_end {recipe.lr_end} is above lr {recipe.lr}: the learning rate falls from lr to lr_end"
        )


# Hourri et al., PATCH: settings of each run as the released code's table has them. That code ran transformers' Trainer,
# whose defaults it kept where it set nothing: eps, clip and a cosine to zero; 5 steps of warm-up are its own.
PATCH_JOINT = Recipe(
    mode="joint",
    steps=2000,
    batch=256,
    microbatch=1,
    length=4096,
    lr=1e-3,
    lr_end=0.0,
    warmup=5,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.0,
    clip=1.0,
    tau=(4.0, 0.05),
    pattern_scale=(100.0, 500.0),
    tile_scale=(25.0, 350.0),
    logit_std=0.014,
    pattern_prior=3.0,
    tile_prior=3.0,
    sparsity_penalty=7.0,
    weight_penalty=10.0,
    weight_penalty_kind="norm",
    pattern_start="prior",
)
PATCH_JOINT_SPARSER = dataclasses.replace(PATCH_JOINT, tile_tau=(2.0, 0.05))
PATCH_TILE = dataclasses.replace(
    PATCH_JOINT,
    mode="tile",
    lr=1e-4,
    tile_tau=(2.0, 0.05),
    tile_scale=(100.0, 500.0),
    sparsity_penalty=3.0,
    weight_penalty=0.1,
)
PATCH_TILE_13B = dataclasses.replace(PATCH_TILE, lr=1e-3, sparsity_penalty=2.0, weight_penalty=0.05)
# The patterns under PATCH tile, which that code learned by itself, not MaskLLM's.
PATCH_MASKLLM = dataclasses.replace(
    PATCH_JOINT, mode="maskllm", lr=1e-4, weight_decay=0.1, sparsity_penalty=0.0, weight_penalty=0.0
)

# Fang et al., MaskLLM: scales as in the published scripts (the code's own default is ten times that); its multiplier of
# ten is of the whole schedule of the learning rate, both ends.
MASKLLM = dataclasses.replace(
    PATCH_JOINT,
    mode="maskllm",
    lr=5e-4,
    lr_end=5e-5,
    warmup=0,
    eps=1e-5,
    weight_decay=0.1,
    logit_std=0.01,
    sparsity_penalty=0.0,
    weight_penalty=1e-5,
    weight_penalty_kind="square",
    pattern_start="noisy",
)

# Every published run by its name.
PUBLISHED = {
    "patch-joint-45": PATCH_JOINT,
    "patch-joint-35-25": PATCH_JOINT_SPARSER,
    "patch-tile-7b-8b": PATCH_TILE,
    "patch-tile-13b": PATCH_TILE_13B,
    "maskllm-of-patch": PATCH_MASKLLM,
    "maskllm": MASKLLM,
}

# What the rows of the first studies call published, and is not quite: pattern logits start with noise, tiles have the
# settings of PATCH joint, and MaskLLM's learning rate ends at a tenth of its own.
EARLIER = {
    "patch-joint": dataclasses.replace(PATCH_JOINT, pattern_start="noisy"),
    "patch-tile": dataclasses.replace(PATCH_JOINT, mode="tile", pattern_start="noisy"),
    "maskllm": dataclasses.replace(MASKLLM, lr_end=5e-6),
}

# Ours, as changes of a published one: the dense model guides learning, by its predictions, by its hidden states, and by
# what each tile costs it. Of all that was tried it lowers PATCH joint's perplexity most at equal sparsity and tokens
# (studies ``recipe-ablation`` and ``embedded-distillation``, on text that is not reported).
GUIDED: dict[str, Any] = {
    "distillation": 1.0,
    "block_distillation": 10.0,
    "tile_ranking": "model",
    "tile_prior": 30.0,
}
# What of it is about patterns: all that MaskLLM can be guided by, which chooses no tiles.
GUIDED_PATTERNS = {name: value for name, value in GUIDED.items() if not name.startswith("tile_")}
# By name, what a recipe changes of the published one.
CHANGES: dict[str, dict[str, Any]] = {"published": {}, "guided": GUIDED}
