"""What every run that descends a gradient shares, whatever it learns: tokens, clipping, and how it ends."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from patch.errors import UserError
from patch.learn.distributed import Ranks


class LearningDiverged(UserError):
    """The loss or its gradient is not finite.

    Attributes:
        step: the step, counted from 1, that failed.
        checkpoint: the last good checkpoint, which is kept; None if there was none yet.
    """

    def __init__(self, step: int, steps: int, lr: float, quantity: str, checkpoint: Path | None) -> None:
        kept = (
            f"the last good checkpoint is kept in {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        )
        super().__init__(
            f"learning diverged: the {quantity} at step {step} of {steps} is not finite; {kept}. "
            f"Choose a lower lr than {lr:g}"
        )
        self.step = step
        self.checkpoint = checkpoint


class Stopped(UserError):
    """Learning was told to stop, and did so after writing its checkpoint."""

    def __init__(self, step: int, steps: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped after step {step} of {steps}, as asked: start it again, and it goes on from {checkpoint}"
        )


def check_finite(quantity: str, value: float, step: int, steps: int, lr: float, checkpoint: Path) -> None:
    """Raise if what a step measured is not finite.

    Raises:
        LearningDiverged: naming the step, counted from 1.
    """
    if not math.isfinite(value):
        raise LearningDiverged(step, steps, lr, quantity, checkpoint if checkpoint.exists() else None)


def check_tokens(tokens: Tensor, batch: int, length: int, model: Any) -> Tensor:
    """``tokens`` of a step, if they are int64 ``[batch, length]`` of the model's vocabulary.

    Raises:
        UserError: if they are not.
    """
    if tuple(tokens.shape) != (batch, length) or tokens.dtype != torch.int64:
        found = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise UserError(f"tokens of a step are {found}, the recipe needs int64 {(batch, length)}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(
            f"token {int(tokens.max())} is not in the model's vocabulary of {vocabulary}: another tokenizer?"
        )
    return tokens


def clip_together(parameters: Iterable[Tensor], most: float | None, ranks: Ranks, device: torch.device | str) -> Tensor:
    """Clip the gradients of all parameters, of all ranks, together to a norm of ``most``; their norm before that."""
    parameters = list(parameters)
    norm = get_total_norm([each.grad for each in parameters if each.grad is not None])
    if ranks.size > 1:
        norm = ranks.total(norm.to(device, torch.float32).square()).sqrt()
    if most is not None:
        clip_grads_with_norm_(parameters, most, norm)
    return norm
