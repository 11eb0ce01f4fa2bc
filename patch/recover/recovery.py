"""Recovery of a sparse model: what its mask keeps is trained towards the dense model, the mask stays as it is.

PATCH and MaskLLM leave weights frozen, and so did every row here that does not say otherwise. What users of sparse
models do is train what is kept: block by block against the dense block's outputs (Guo et al., EBFT, arXiv:2402.12419),
then end to end by distillation (Kurtic et al., "Sparse fine-tuning", arXiv:2310.06927). Single weights fitted by least
squares made learned masks worse (`patch.oneshot.refit`): errors must be fitted through the block, on the inputs that
the sparse model feeds it.

What is trained is a vector a weight, of its kept elements in float32 (`patch.recover.kept`): there is no gradient and
no moment of what the mask drops, which is zero because nothing ever writes it. Embeddings, head, norms and biases stay
the dense model's. Several processes divide text and values as in learning (`patch.learn.distributed`), and a run that
is killed goes on from ``learner.pt``, on a CPU with the same bits.

    >>> recover(model, masks, weights, recipe, windows, batches, ...)  # the dense model becomes the recovered one
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from patch.errors import UserError
from patch.layers import decoder_blocks, require_linears
from patch.learn.distributed import ALONE, Ranks
from patch.learn.saved import CHECKPOINT, TEXTS
from patch.learn.tracking import curves
from patch.quantise.precisions import PRECISIONS, Precision, group_size
from patch.quantise.values import Grid
from patch.recover.blocks import recover_blocks
from patch.recover.distil import Batches, Implementation, distil
from patch.recover.kept import Kept
from patch.recover.recipe import RecoveryRecipe
from patch.recover.run import Metrics, Run
from patch.recover.state import State
from patch.tiles import TileShape


@dataclass(frozen=True)
class Recovered:
    """What happened.

    Attributes:
        history: one entry per `RecoveryRecipe.log_every` steps, and one for the last of each block and of all: ``step``
            (completed steps, of both phases), means since the entry before of ``loss``, ``grad_norm`` (before clipping)
            and, in the second phase, ``cross_entropy``; ``lr``, and in the first phase ``block``.
    """

    history: list[dict[str, float]]


def recover(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    weights: Iterable[tuple[str, Tensor]],
    recipe: RecoveryRecipe,
    *,
    windows: Tensor | None,
    batches: Batches,
    tile: TileShape,
    origin: str,
    seed: int,
    work: Path,
    device: torch.device | str,
    on_step: Callable[[Metrics], None] | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
    implementation: Implementation | None = None,
    track: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> Recovered:
    """Train the kept weights; the dense ``model`` becomes the recovered one, its dropped weights exactly zero.

    Args:
        model: the dense transformers model that was pruned; for the second phase on ``device``.
        keep: per prunable weight what its mask keeps, bool ``[N, K]`` on the CPU.
        weights: the sparse model's prunable weights ``[N, K]`` by name, which training starts from, in any order.
        windows: token ids of the first phase, int64 ``[block_windows, length]``; None where the recipe has none.
        batches: from the step of the second phase, counted from 0, to its tokens, int64 ``[batch, length]``.
        tile: ranks hold whole rows of tiles; any shape gives the same outcome.
        origin: what tells the sparse model from any other: a run is continued for the same one alone.
        seed: of the order of the first phase's windows.
        work: folder for ``learner.pt`` and ``tensorboard/``; a run found there is continued.
        on_step: called after each step with ``step`` (completed steps), ``loss``, ``grad_norm``, ``lr``, ``block`` or
            ``cross_entropy``, and ``tokens_per_second``.
        stop: asked before each pass; if true on any rank, the checkpoint is written and the run ends with `Stopped`.
        ranks: the processes that train together, each of which calls this with the same arguments.
        implementation: of the second phase; by default the fastest that the device allows.
        track: where the curves go beside TensorBoard: wandb or mlflow.
        texts: what ``windows`` and ``batches`` are of: digests by name; a run is continued on the same alone.

    Raises:
        UserError: if model, masks, weights, tokens or the checkpoint in ``work`` do not fit.
        LearningDiverged: if the loss or its gradient is not finite.
        Stopped: if ``stop`` says so.
        OSError: if ``work`` cannot be written.
    """
    device = torch.device(device)
    linears = require_linears(model, "recovery")
    _check_ranks(recipe, ranks)
    kept = {name: Kept(keep[name], tile, ranks) for name in _all_of(linears, keep)}
    given = dict(weights)
    values = _starting_values(linears, kept, given.items())
    if recipe.precision:
        grids = _grids(given, PRECISIONS[recipe.precision], device)
        kept = {name: replace(each, grid=grids[name]) for name, each in kept.items()}
    blocks = len(decoder_blocks(model)) if recipe.block_epochs else 0
    fingerprint = {
        "recipe": recipe.substance(),
        "seed": seed,
        "origin": origin,
        "weights": {name: (each.shape, str(linears[name].weight.dtype)) for name, each in kept.items()},
        TEXTS: dict(texts or {}),
    }
    state = State(kept, values, fingerprint, work / CHECKPOINT, ranks, device)
    state.resume()
    first = blocks * recipe.block_steps
    steps = first + recipe.steps
    if state.step < steps:
        if ranks.rank == 0:
            work.mkdir(parents=True, exist_ok=True)
        settings = {"seed": seed, **recipe.substance()}
        with curves(None if ranks.rank else work, state.step, settings, track) as places:

            def log(entry: Metrics) -> None:
                for place in places:
                    place.log(int(entry["step"]), entry)

            timed = _with_speed(on_step, recipe) if on_step else None
            run = Run(recipe, kept, state, ranks, device, seed, steps, timed, stop, log)
            if state.step < first:
                if windows is None or tuple(windows.shape) != (recipe.block_windows, recipe.length):
                    found = None if windows is None else tuple(windows.shape)
                    raise UserError(
                        f"windows of recovery are {found}, the recipe needs {(recipe.block_windows, recipe.length)}"
                    )
                recover_blocks(model, run, windows)
                state.save()
            if recipe.steps:
                distil(model, run, batches, implementation or Implementation.of(device, ranks))
        # Whoever is killed before the outcome is saved need not train again.
        state.save()
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(kept[name].weight(state.whole(name), linear.weight.dtype))
    return Recovered(state.history)


def _all_of(linears: Mapping[str, nn.Linear], keep: Mapping[str, Tensor]) -> Iterable[str]:
    for name, linear in linears.items():
        if name not in keep:
            raise UserError(f"{name}: there is no mask for it, and every prunable weight needs one to be recovered")
        if keep[name].shape != linear.weight.shape:
            found, wanted = tuple(keep[name].shape), tuple(linear.weight.shape)
            raise UserError(f"{name}: its mask is for a weight of {found}, the dense model's is {wanted}")
    if unknown := next((name for name in keep if name not in linears), None):
        raise UserError(f"there is a mask for {unknown!r}, which is no prunable weight of the dense model")
    return linears


def _starting_values(
    linears: Mapping[str, nn.Linear], kept: Mapping[str, Kept], weights: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in weights:
        if name not in kept or weight.shape != linears[name].weight.shape:
            raise UserError(f"{name} {tuple(weight.shape)} of the sparse model is no prunable weight of the dense one")
        if left := int(torch.count_nonzero(weight.cpu().masked_fill(kept[name].keep, 0))):
            raise UserError(f"{name}: {left} weights are not zero though the mask drops them: audit the checkpoint")
        if not weight.isfinite().all():
            raise UserError(f"{name}: the weight holds values that are not finite: the checkpoint is damaged")
        found[name] = kept[name].values_of(weight)
    if missing := next((name for name in kept if name not in found), None):
        raise UserError(f"{missing}: the sparse model has no such weight")
    # In the model's order, whatever theirs is.
    return {name: found[name] for name in kept}


def _grids(weights: Mapping[str, Tensor], precision: Precision, device: torch.device) -> dict[str, Grid]:
    """To what each weight ``[N, K]`` is rounded, on the CPU."""
    group = group_size({name: weight.shape[1] for name, weight in weights.items()}) if precision.grouped else 0
    found = {name: Grid.of(weight.to(device).float(), precision, group) for name, weight in weights.items()}
    return {name: grid.rows(slice(None), torch.device("cpu")) for name, grid in found.items()}


def _check_ranks(recipe: RecoveryRecipe, ranks: Ranks) -> None:
    for name in ("microbatch", *(("block_batch",) if recipe.block_epochs else ())):
        if getattr(recipe, name) % ranks.size:
            raise UserError(
                f"{name} {getattr(recipe, name)} cannot be divided among {ranks.size} processes: choose a multiple"
            )


def _with_speed(on_step: Callable[[Metrics], None], recipe: RecoveryRecipe) -> Callable[[Metrics], None]:
    """Adds how many tokens a second the step took."""
    before = time.perf_counter()

    def told(metrics: Metrics) -> None:
        nonlocal before
        seconds, before = time.perf_counter() - before, time.perf_counter()
        sequences = recipe.block_batch if "block" in metrics else recipe.batch
        on_step({**metrics, "tokens_per_second": sequences * recipe.length / seconds})

    return told
