"""Hyperparameters of recovery: one frozen dataclass, part of a trial's definition and so of its hash."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from patch.errors import UserError
from patch.learn.recipe import (
    ADDED,
    HOW_IT_RUNS,
    RUNNING,
    Span,
    check_choice,
    check_descent,
    check_whole,
    learning_rate,
    number,
    respell,
)

BlockTargets = Literal["dense", "sparse"]


@dataclass(frozen=True)
class RecoveryRecipe:
    """Everything that decides how kept weights are trained, but for model, mask, text and seed.

    Two phases, either of which may be left out; the first is, unless asked for. In it each decoder block alone is
    fitted to the dense block's outputs, on what the recovered blocks before it feed it, which takes the memory of one
    block. In the second the whole model is distilled from the dense one.

    Attributes:
        steps: optimizer steps of the second phase; 0 leaves it out.
        batch: sequences a step.
        microbatch: sequences a forward pass; divides ``batch``.
        length: tokens a sequence, in both phases.
        lr: learning rate after warm-up, from which a cosine leads down to ``lr_end`` at the last step.
        lr_end: see ``lr``.
        warmup: steps in which the learning rate rises linearly from 0.
        betas, eps, weight_decay: of AdamW, in both phases.
        clip: largest norm of all gradients together, in both phases; None does not clip.
        distillation: share of the loss that is the Kullback-Leibler divergence from the dense model's next-token
            distribution instead of the cross entropy of the text; 0 to 1.
        block_distillation: factor of what is added to it: the squared distance of the hidden state after a block from
            the dense model's, over that one's square; the mean over blocks and tokens.
        block_epochs: passes of the first phase over its windows; 0 leaves it out.
        block_windows: its windows.
        block_batch: windows a step; divides ``block_windows``.
        block_lr: learning rate at each block's start, from which a cosine leads down to 0.
        block_targets: what a block's outputs are fitted to: ``dense``, the hidden states of the dense model, so that a
            block makes up for those before it too; ``sparse``, those of the dense block on the same inputs.
        precision: one of `patch.quantise.precisions.PRECISIONS`: kept weights are rounded to it wherever they are
            used, by scales that are chosen at the start, and what is under the rounding takes the gradients. What comes
            out is rounded, so that quantising it to the same changes next to nothing. None trains them as they are.
        activation_checkpointing: recompute each block in the backward pass; device memory then holds the weights with
            their masks of one block, not of all.
        checkpoint_every: steps between checkpoints.
        log_every: steps between entries of the history.

    Raises:
        UserError: naming the first value that does not fit.
    """

    steps: int = 2000
    batch: int = 16
    microbatch: int = 16
    length: int = 1024
    lr: float = 4e-4
    lr_end: float = 0.0
    warmup: int = 50
    betas: Span = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    distillation: float = 1.0
    block_distillation: float = 0.0
    block_epochs: int = 0
    block_windows: int = 512
    block_batch: int = 8
    block_lr: float = 1e-4
    block_targets: BlockTargets = "dense"
    # Younger than published rows.
    precision: str | None = field(default=None, metadata=ADDED)
    activation_checkpointing: bool = field(default=False, metadata=RUNNING)
    checkpoint_every: int = field(default=200, metadata=RUNNING)
    log_every: int = field(default=10, metadata=RUNNING)

    def __post_init__(self) -> None:
        check_choice("block_targets", self.block_targets, get_args(BlockTargets))
        least = {"steps": 0, "warmup": 0, "block_epochs": 0, "length": 2}
        for name in ("batch", "microbatch", "block_windows", "block_batch", "checkpoint_every", "log_every", *least):
            check_whole(name, getattr(self, name), least.get(name, 1))
        for part, whole in (("microbatch", "batch"), ("block_batch", "block_windows")):
            parts, all_ = getattr(self, part), getattr(self, whole)
            if all_ % parts:
                raise UserError(f"recipe: {part} {parts} does not divide {whole} {all_}: choose one that does")
        check_descent(self)
        respell(self, number, ("block_lr",), positive=True)
        if not self.steps and not self.block_epochs:
            raise UserError("recipe: steps 0 and block_epochs 0 recover nothing: set one of them")

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model runs beside the sparse one in the second phase."""
        return self.distillation > 0 or self.block_distillation > 0

    @property
    def block_steps(self) -> int:
        """Optimizer steps of each block in the first phase."""
        return self.block_epochs * (self.block_windows // self.block_batch)

    @property
    def tokens(self) -> int:
        """Tokens that are seen, each as often as it is."""
        return self.length * (self.steps * self.batch + self.block_epochs * self.block_windows)

    def substance(self) -> dict[str, Any]:
        """Everything that what is trained depends on, by name."""
        left_out = HOW_IT_RUNS if self.precision else {*HOW_IT_RUNS, "precision"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ... of the second phase."""
        return learning_rate(step, self.steps, self.warmup, self.lr, self.lr_end)

    def block_lr_at(self, step: int) -> float:
        """The learning rate of a block's step 0, 1, ... in the first phase."""
        return learning_rate(step, self.block_steps, 0, self.block_lr, 0.0)
