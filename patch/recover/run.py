"""One run of recovery: what both of its phases do with its state at every step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patch.learn.descent import Stopped, check_finite, clip_together
from patch.learn.distributed import Ranks
from patch.recover.kept import Kept
from patch.recover.recipe import RecoveryRecipe
from patch.recover.state import State, Training

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]

# How many times the first loss of distillation a later one may be before the rate is thought too high.
RISEN = 1.5


def has_risen(history: Sequence[Metrics]) -> bool:
    """Whether the last entry is the first of distillation whose loss is far above where it began."""
    losses = [entry["loss"] for entry in history if "block" not in entry]
    above = [loss > RISEN * losses[0] for loss in losses]
    return "block" not in history[-1] and above[-1] and not any(above[:-1])


@dataclass(frozen=True, eq=False)
class Run:
    """A run and whom it tells of its steps.

    Attributes:
        kept: by weight what its mask keeps.
        steps: of both phases.
        on_step: called after each step with its metrics.
        stop: asked before each pass; on any rank true ends the run, its checkpoint written.
        board: called with the metrics of each entry of the history.
    """

    recipe: RecoveryRecipe
    kept: Mapping[str, Kept]
    state: State
    ranks: Ranks
    device: torch.device
    seed: int
    steps: int
    on_step: Callable[[Metrics], None] | None = None
    stop: Callable[[], bool] | None = None
    board: Callable[[Metrics], None] = field(default=lambda entry: None)

    def check_stop(self) -> None:
        """Save and end the run, if it was told to stop.

        Raises:
            Stopped: if so.
        """
        if self.stop and self.ranks.agree(self.stop(), self.device):
            self.state.save()
            raise Stopped(self.state.step, self.steps, self.state.path)

    def descend(
        self,
        training: Training,
        lr: float,
        measured: Sequence[Tensor],
        names: Sequence[str],
        about: Metrics,
        last: bool,
    ) -> None:
        """Take an optimizer step by the gradients that are there; log it, and save where the recipe says so.

        Args:
            measured: one tensor ``[len(names)]`` a micro-batch.
            names: of what was measured, the loss first.
            about: what else is told of the step, such as its block.
            last: whether it is the last step of its phase or block, which the history has.
        """
        values = [weight.values for weight in training.weights.values()]
        norm = clip_together(values, self.recipe.clip, self.ranks, self.device)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        training.optimizer.step()
        # The one time in a step that the host waits for the device.
        told = [*self.ranks.mean(torch.stack(list(measured)).mean(0)).tolist(), float(norm)]
        state = self.state
        for quantity, value in (("loss", told[0]), ("gradient", told[-1])):
            check_finite(quantity, value, state.step + 1, self.steps, lr, state.path)
        state.step += 1
        state.unlogged.append(told)
        fields = [*names, "grad_norm"]
        if state.step % self.recipe.log_every == 0 or last:
            means = [sum(each) / len(each) for each in zip(*state.unlogged, strict=True)]
            state.history.append({"step": state.step, **about, **dict(zip(fields, means, strict=True)), "lr": lr})
            state.unlogged = []
            self.board(state.history[-1])
            if self.ranks.rank == 0 and has_risen(state.history):
                logger.warning(
                    "step %d of recovery: the loss is %.3g and began far lower: the rate, %.2g, is too high here, "
                    "and what comes out may be worse than what went in: take a smaller lr",
                    state.step,
                    state.history[-1]["loss"],
                    lr,
                )
        if state.step % self.recipe.checkpoint_every == 0:
            state.save()
        if self.on_step:
            self.on_step({"step": state.step, **about, **dict(zip(fields, told, strict=True)), "lr": lr})
