"""The second phase: the whole sparse model learns the dense one's predictions, its masks as they are.

The passes are those of learning (`patch.learn.masked_model.Losses`), with the kept values in place of soft masks.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patch.layers import prunable_linears
from patch.learn.cuda_graph import Passes
from patch.learn.descent import check_tokens
from patch.learn.distributed import ALONE, Ranks
from patch.learn.masked_model import Losses, frozen
from patch.recover.kept import KeptWeight
from patch.recover.run import Run
from patch.recover.state import Training

Batches = Callable[[int], Tensor]


@dataclass(frozen=True)
class Implementation:
    """How a step is computed, as `patch.learn.learner.Implementation` says; on a CPU plainly.

    Attributes:
        compiled: run decoder blocks and losses through ``torch.compile``.
        captured: replay forward and backward passes as a CUDA graph.
        ahead: exchange a block's weights and their gradients between processes while other blocks run.
    """

    compiled: bool = False
    captured: bool = False
    ahead: bool = False

    @classmethod
    def of(cls, device: torch.device, ranks: Ranks = ALONE) -> "Implementation":
        """The fastest on a device."""
        gpu = device.type == "cuda"
        return cls(compiled=gpu, captured=gpu, ahead=ranks.size > 1)


def distil(model: nn.Module, run: Run, batches: Batches, how: Implementation) -> None:
    """Train the kept values of the whole model, from where the run is.

    Args:
        model: the dense one, on the run's device; it stays as it is.
        batches: from the step of this phase, counted from 0, to its tokens, int64 ``[batch, length]``.
    """
    recipe, state, ranks = run.recipe, run.state, run.ranks
    before = run.steps - recipe.steps
    linears = prunable_linears(model)
    weights = {name: KeptWeight(linear, run.kept[name], state.values[name]) for name, linear in linears.items()}
    training = Training(weights, recipe)
    state.begin(training, state.step - before)
    losses = Losses(model, weights, recipe, how.compiled, how.ahead)
    tokens_here = torch.zeros((recipe.microbatch // ranks.size, recipe.length), dtype=torch.int64, device=run.device)
    with torch.enable_grad(), frozen(model), closing(_passes(losses, training, run, tokens_here, how)) as passes:
        for step in range(state.step - before, recipe.steps):
            tokens = check_tokens(batches(step), recipe.batch, recipe.length, model)
            measured = []
            for part in tokens.split(recipe.microbatch):
                run.check_stop()
                tokens_here.copy_(ranks.sequences(part))
                measured.append(passes())
            last = step + 1 == recipe.steps
            run.descend(training, recipe.lr_at(step), measured, ["loss", "cross_entropy"], _WHOLE, last)
            passes.forget_gradients()
    state.end()


_WHOLE: Mapping[str, float] = {}


def _passes(losses: Losses, training: Training, run: Run, tokens: Tensor, how: Implementation) -> Passes:
    recipe = run.recipe

    def backward() -> Tensor:
        loss, cross_entropy = losses(tokens)
        # Summed over ranks, each with its share of the text.
        (loss / (run.ranks.size * (recipe.batch // recipe.microbatch))).backward()
        return torch.stack([loss.detach(), cross_entropy.detach()])

    def drop_gradients(keep_memory: bool) -> None:
        training.optimizer.zero_grad(set_to_none=not keep_memory)

    return Passes(backward, drop_gradients, how.captured, accumulates=recipe.batch > recipe.microbatch)
