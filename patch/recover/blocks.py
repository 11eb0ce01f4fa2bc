"""The first phase: each decoder block alone, fitted to the dense model on what the sparse one feeds it.

Neither the model nor its gradients ever lie on the device: one block does, with its kept values, their gradients and
moments, and the hidden states of the windows, of the sparse model and of the dense one. Of several processes each has
its share of every batch of windows, and holds those states alone.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from patch.layers import prunable_linears
from patch.learn.masked_model import MaskedBlock, distance, drawn, frozen
from patch.oneshot.calibration import Turn, in_turn
from patch.recover.kept import KeptWeight
from patch.recover.run import Run
from patch.recover.state import Training


def recover_blocks(model: nn.Module, run: Run, windows: Tensor) -> None:
    """Fit the kept values of every block in turn, from where the run is.

    Args:
        model: the dense one; it stays as it is, where it is.
        windows: token ids, int64 ``[block_windows, length]``.
    """
    recipe, state = run.recipe, run.state
    # Batches are the same whatever the number of ranks: those of which each has its share.
    batches = windows.split(recipe.block_batch)
    mine = torch.cat([run.ranks.sequences(batch) for batch in batches])
    names = {linear: name for name, linear in prunable_linears(model).items()}
    with frozen(model), in_turn(model, mine, run.device, recipe.block_batch // run.ranks.size) as (states, turns):
        dense, sparse = list(states), list(states)
        # Else the first block's states would stay in memory to the end.
        states.clear()
        for turn in turns:
            own = {names[each]: each for each in turn.block.modules() if isinstance(each, nn.Linear) and each in names}
            weights = {name: KeptWeight(linear, run.kept[name], state.values[name]) for name, linear in own.items()}
            linears = list(weights.values())
            masked: Callable[[Tensor], Tensor] = MaskedBlock(turn.run, linears, functools.partial(drawn, linears))
            targets = _outputs(turn.run, dense if recipe.block_targets == "dense" else sparse)
            done = min(state.step - turn.index * recipe.block_steps, recipe.block_steps)
            if done < recipe.block_steps:
                _fit(run, turn, Training(weights, recipe), masked, sparse, targets, done)
            sparse = _outputs(masked, sparse)
            if recipe.block_targets == "dense":
                dense = targets


@torch.no_grad()
def _outputs(block: Callable[[Tensor], Tensor], states: list[Tensor]) -> list[Tensor]:
    return [block(state) for state in states]


def _fit(
    run: Run,
    turn: Turn,
    training: Training,
    masked: Callable[[Tensor], Tensor],
    states: list[Tensor],
    targets: list[Tensor],
    done: int,
) -> None:
    recipe = run.recipe
    run.state.begin(training, done)
    for step in range(done, recipe.block_steps):
        run.check_stop()
        epoch, place = divmod(step, len(states))
        batch = _order(run.seed, turn.index, epoch, len(states))[place]
        with torch.enable_grad():
            off = distance(masked(states[batch]), targets[batch])
            (off / run.ranks.size).backward()
        last = step + 1 == recipe.block_steps
        run.descend(training, recipe.block_lr_at(step), [off.detach()[None]], ["loss"], {"block": turn.index}, last)
        training.optimizer.zero_grad()
    run.state.end()


def _order(seed: int, block: int, epoch: int, batches: int) -> list[int]:
    """The batches of an epoch in a random order of its own, the same in every process and version of the libraries."""
    order = np.random.PCG64([seed, block, epoch]).random_raw(batches).argsort(kind="stable")
    return [int(place) for place in order]
