"""Learning hybrid masks with the weights frozen: PATCH joint, PATCH tile, and MaskLLM.

The loss of one step, averaged over its micro-batches, each with noise of its own::

    cross entropy + lambda_s * |density - target| - lambda_w(step) * size of the kept weights

The first two terms are PATCH's (Hourri et al., arXiv:2509.23410), the third is MaskLLM's (Fang et al.,
arXiv:2409.17481).
Density is over all prunable weights, so tiles compete across layers. In the end the patterns are those of the highest
logits, and the tiles of the whole model are ranked by logit and cut exactly at the budget.

Instead of the text's cross entropy, or beside it, a recipe may ask for the divergence from the dense model's
predictions, or for its hidden states, which neither paper does. What a model with masked weights is, and that nothing
about it stays changed, is the matter of `patch.learn.masked_model`; how several processes share the work, of
`patch.learn.distributed`. On a GPU masks are drawn by fused kernels, blocks are compiled, and the passes of a
micro-batch are replayed as one CUDA graph (`Implementation`).

A run that is killed continues from ``learner.pt``, written every few steps. All noise is derived from the seed and the
step, so on a CPU with the same number of threads the resumed run ends with the same bits as an undisturbed one; CUDA
kernels that add in any order may differ in the last bits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from patch.budget import cut_globally
from patch.learn import soft_mask
from patch.learn.cuda_graph import Passes
from patch.learn.descent import Stopped, check_finite, check_tokens, clip_together
from patch.learn.distributed import ALONE, Ranks
from patch.learn.inputs import input_scales
from patch.learn.masked_model import Losses, MaskedLinear, frozen
from patch.learn.prior import Prior, content_digest, first_dense, first_sequences, masked_linears, ranks_the_model
from patch.learn.recipe import Recipe, Settings
from patch.learn.saved import CHECKPOINT, TEXTS
from patch.learn.soft_mask import SampledWeight
from patch.learn.state import State
from patch.learn.tracking import curves
from patch.mask import HybridMask
from patch.tiles import GROUP, check_tile

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Learned:
    """The outcome.

    Attributes:
        masks: per weight its hybrid mask, on the CPU; together they meet the sparsity budget.
        history: one entry per `Recipe.log_every` steps and one for the last step: ``step`` (completed steps); means
            since the entry before of ``loss``, ``cross_entropy``, ``density`` (of the soft masks) and ``grad_norm``
            (before clipping); ``hard_density`` (if tiles were cut at logit 0); ``tau``, ``pattern_scale``,
            ``tile_scale``, ``lr``; ``pattern_change_rate``, the share of groups whose best pattern is another than at
            the entry before, ``tile_change_rate``, the share of tiles on the other side of the budget's cut, and
            ``tiles_turned``, the share of those that are on another side than at the start.
            What a mode does not learn is left out.
    """

    masks: dict[str, HybridMask]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Implementation:
    """How a step is computed. A run that is continued with another one ends right, but not with the same bits.

    Attributes:
        sampled_weight: draws the soft masks, each implementation with noise of its own:
            `patch.learn.soft_mask.sampled_weight`, the eager reference, or on an NVIDIA GPU
            `patch.learn.soft_mask_triton.sampled_weight`, which is fused.
        compiled: run decoder blocks and losses through ``torch.compile``.
        captured: replay forward and backward passes as a CUDA graph; for fused masks.
        ahead: draw a block's masks, and exchange them and their gradients between processes, while other blocks run.
    """

    sampled_weight: SampledWeight
    compiled: bool = False
    captured: bool = False
    ahead: bool = False

    @classmethod
    def of(cls, device: torch.device, ranks: Ranks = ALONE) -> "Implementation":
        """The fastest on a device."""
        if device.type != "cuda":
            return cls(soft_mask.sampled_weight, ahead=ranks.size > 1)
        # Triton is there on Linux alone.
        from patch.learn import soft_mask_triton

        return cls(soft_mask_triton.sampled_weight, compiled=True, captured=True, ahead=ranks.size > 1)


def learn(
    model: nn.Module,
    recipe: Recipe,
    batches: Callable[[int], Tensor],
    *,
    sparsity: float,
    tile: Sequence[int],
    seed: int,
    prior: Prior,
    work: Path,
    device: torch.device | str,
    on_step: Callable[[Metrics], None] | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks = ALONE,
    implementation: Implementation | None = None,
    track: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> Learned:
    """Learn the masks of all prunable weights of a causal language model; the model itself stays as it is.

    Args:
        model: a transformers model on ``device``; weights of any floating dtype (masks and logits are float32).
        batches: from the step, counted from 0, to its tokens, int64 ``[batch, length]``; the same every time.
        sparsity: target over all prunable weights, 0 to 0.5; 0.5 for ``maskllm``.
        tile: ``(rows, cols)``.
        seed: of the initial logits and the noise.
        prior: where the logits start.
        work: folder for ``learner.pt`` and ``tensorboard/``; a run found there is continued.
        on_step: called after each step with ``step`` (completed steps), ``loss``, ``cross_entropy``, ``density``,
            ``grad_norm``, the settings of the step, and ``tokens_per_second``.
        stop: asked after each micro-batch; if true on any rank, the checkpoint of the last whole step is written and
            learning ends with `Stopped`.
        ranks: the processes that learn together, each of which calls this with the same arguments and gets the same
            outcome (`patch.learn.distributed`). One checkpoint serves any number of them.
        implementation: by default the fastest that the device allows.
        track: where the curves go beside TensorBoard: wandb or mlflow.
        texts: what ``batches`` are of: digests by name; a run is continued on the same alone.

    Raises:
        UserError: if target, tile, prior, model, tokens or the checkpoint in ``work`` do not fit.
        LearningDiverged: if the loss or its gradient is not finite.
        Stopped: if ``stop`` says so.
        OSError: if ``work`` cannot be written.
    """
    device = torch.device(device)
    how = implementation or Implementation.of(device, ranks)
    start, tile = prior, check_tile(tile)

    def tokens(number: int) -> Tensor:
        return check_tokens(batches(number), recipe.batch, recipe.length, model)

    if ranks_the_model(recipe, prior) and not ranks.agree((work / CHECKPOINT).exists(), device):
        start = replace(prior, dense_tiles=first_dense(model, recipe, tokens, sparsity, tile, seed, prior, ranks))
    scales = None
    if recipe.weight_penalty_by == "outputs":
        scales = input_scales(model, first_sequences(recipe, tokens), ranks, max(1, recipe.microbatch // ranks.size))
    linears = masked_linears(model, recipe, sparsity, tile, seed, start, device, how.sampled_weight, ranks, scales)
    fingerprint = {
        "recipe": recipe.substance(),
        "sparsity": sparsity,
        "tile": tile,
        "seed": seed,
        "weights": {name: (m.shape, str(m.linear.weight.dtype)) for name, m in linears.items()},
        "prior": content_digest(prior),
        TEXTS: dict(texts or {}),
    }
    state = State(linears, recipe, fingerprint, work / CHECKPOINT, ranks)
    run = _Run(linears, recipe, sparsity, seed, state, ranks)
    state.resume()
    if state.step < recipe.steps:
        if ranks.rank == 0:
            work.mkdir(parents=True, exist_ok=True)
        settings = {"sparsity": sparsity, "tile": "{}x{}".format(*tile), "seed": seed, **recipe.substance()}
        losses = Losses(model, linears, recipe, how.compiled, how.ahead)
        with (
            torch.enable_grad(),
            frozen(model),
            curves(None if ranks.rank else work, state.step, settings, track) as places,
            closing(_Step(run, losses, how.captured)) as step,
        ):
            while state.step < recipe.steps:
                started = time.perf_counter()
                metrics = run.advance(step, tokens(state.step), stop)
                if metrics is None:
                    state.save()
                    raise Stopped(state.step, recipe.steps, state.path)
                speed = {"tokens_per_second": recipe.batch * recipe.length / (time.perf_counter() - started)}
                if state.history and state.history[-1]["step"] == state.step:
                    for place in places:
                        place.log(state.step, state.history[-1] | speed)
                if state.step % recipe.checkpoint_every == 0 or state.step == recipe.steps:
                    for place in places:
                        place.flush()
                    state.save()
                if on_step:
                    on_step(metrics | speed)
    return Learned(run.harden(), state.history)


class _Run:
    """A run of learning: what a step does with the state."""

    def __init__(
        self, linears: dict[str, MaskedLinear], recipe: Recipe, sparsity: float, seed: int, state: State, ranks: Ranks
    ) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.state = state
        self._linears = linears
        self._sparsity = sparsity
        self._seed = seed
        self._elements = sum(m.linear.weight.numel() for m in linears.values())
        self._dense_size = sum(m.size() for m in linears.values())
        state.logged = self._best()
        state.started = {name: dense for name, (dense, _) in state.logged.items()}

    def advance(self, step: "_Step", tokens: Tensor, stop: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """Take one optimizer step on ``tokens`` ``[batch, length]``; returns its metrics, or None if told to stop."""
        settings = self.recipe.at(self.state.step)
        parts = []
        for index, part in enumerate(tokens.split(self.recipe.microbatch)):
            if stop and self.ranks.agree(stop(), self.state.device):
                return None
            parts.append(step(self.ranks.sequences(part), settings, index))
        sums = torch.stack(parts)
        norm = clip_together(self.state.logits.values(), self.recipe.clip, self.ranks, self.state.device)
        for group in self.state.optimizer.param_groups:
            group["lr"] = settings.lr
        self.state.optimizer.step()
        step.forget_gradients()
        # The one time in a step that the host waits for the device.
        loss, cross_entropy, density, grad_norm = [*self.ranks.mean(sums.mean(0)).tolist(), float(norm)]
        self._check_finite("loss", loss)
        self._check_finite("gradient", grad_norm)
        self.state.step += 1
        self.state.unlogged.append([loss, cross_entropy, density, grad_norm])
        if self.state.step % self.recipe.log_every == 0 or self.state.step == self.recipe.steps:
            self._log(settings)
        return self._entry([loss, cross_entropy, density, grad_norm], settings)

    def streams(self, index: int) -> list[tuple[int, ...]]:
        """The noise of each weight in one micro-batch of this step."""
        return [(self._seed, self.state.step, index, weight) for weight in range(len(self._linears))]

    def begin(self, settings: Settings, index: int, packed: Tensor | None) -> None:
        """Start a micro-batch; ``packed`` is a row a weight."""
        for weight, (masked, stream) in enumerate(zip(self._linears.values(), self.streams(index), strict=True)):
            masked.begin(settings, stream, None if packed is None else packed[weight])

    def backward(self, losses: Losses, tokens: Tensor, weight_penalty: Tensor, tile_scale: Tensor) -> Tensor:
        """Add a micro-batch's share of the gradient; returns its loss, cross entropy and density, ``[3]``."""
        for masked in self._linears.values():
            # What a failed capture left there was never computed.
            masked.sums = None
        loss, cross_entropy = losses(tokens)
        kept, squares = self._sums()
        density = kept.sum() / self._elements
        penalty = -weight_penalty * self._kept_size(squares)
        if self.recipe.mode != "maskllm":
            acted_on = density if self.recipe.density == "sampled" else self._expected_density(tile_scale)
            penalty = penalty + self.recipe.sparsity_penalty * (acted_on - (1 - self._sparsity)).abs()
        # Gradients of the text's part are summed over ranks, each with its share of the text; penalties are common.
        # Divided, so that neither gradient nor penalties depend on the size of a micro-batch.
        objective = loss / self.ranks.size + penalty
        (objective / (self.recipe.batch // self.recipe.microbatch)).backward()
        return torch.stack([(loss + penalty).detach(), cross_entropy.detach(), density.detach()])

    def drop_gradients(self, keep_memory: bool) -> None:
        """Gradients to nothing: zero, or gone."""
        self.state.optimizer.zero_grad(set_to_none=not keep_memory)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Kept elements and squares of the kept weights, one entry a weight."""
        kept, squares = zip(*(m.sums for m in self._linears.values() if m.sums is not None), strict=True)
        return self.ranks.total(torch.stack(kept)), self.ranks.total(torch.stack(squares))

    def _expected_density(self, tile_scale: Tensor) -> Tensor:
        kept = [
            soft_mask.kept_elements(torch.sigmoid(tile_scale * m.tiles.float()), m.sizes_here)
            for m in self._linears.values()
            if m.tiles is not None
        ]
        return self.ranks.total(torch.stack(kept)).sum() / self._elements

    def _kept_size(self, squares: Tensor) -> Tensor:
        if self.recipe.weight_penalty_kind == "square":
            return squares.sum()
        # A weight of zeros has no gradient, where the root would have an infinite one.
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt().sum() / self._dense_size

    def _check_finite(self, quantity: str, value: float) -> None:
        recipe, state = self.recipe, self.state
        check_finite(quantity, value, state.step + 1, recipe.steps, recipe.lr, state.path)

    def _entry(self, measured: Sequence[float], settings: Settings) -> dict[str, float]:
        names = ("loss", "cross_entropy", "density", "grad_norm")
        entry = {"step": self.state.step} | dict(zip(names, measured, strict=True))
        entry |= {"lr": settings.lr, "tau": settings.tau}
        if self.recipe.mode != "tile":
            entry["pattern_scale"] = settings.pattern_scale
        if self.recipe.mode != "maskllm":
            entry["tile_scale"] = settings.tile_scale
            if self.recipe.tile_tau is not None:
                entry["tile_tau"] = settings.tile_tau
        return entry

    def _log(self, settings: Settings) -> None:
        entry = self._entry([sum(values) / len(values) for values in zip(*self.state.unlogged, strict=True)], settings)
        before, self.state.logged, self.state.unlogged = self.state.logged, self._best(), []
        pairs = [(before[name], self.state.logged[name]) for name in before]
        if self.recipe.mode != "tile":
            changed = self.ranks.total(torch.stack([(old[1] != new[1]).sum() for old, new in pairs]))
            entry["pattern_change_rate"] = int(changed.sum()) * GROUP / self._elements
        if self.recipe.mode != "maskllm":
            changed = torch.stack([(old[0] != new[0]).sum() for old, new in pairs])
            tiles_of_all = sum(m.sizes.numel() for m in self._linears.values())
            entry["tile_change_rate"] = int(changed.sum()) / tiles_of_all
            if self.state.started:
                turned = [(self.state.started[name] != self.state.logged[name][0]).sum() for name in before]
                entry["tiles_turned"] = int(torch.stack(turned).sum()) / tiles_of_all
            tiles = [(m.all_tiles() > 0, m.sizes) for m in self._linears.values()]
            entry["hard_density"] = sum(float(soft_mask.kept_elements(*pair)) for pair in tiles) / self._elements
        self.state.history.append(entry)

    def _best(self) -> dict[str, tuple[Tensor, Tensor]]:
        """If learning stopped now: each weight's tile map, on the CPU, and the patterns of the rows here."""
        dense = self._cut()
        return {name: (dense[name], m.best_patterns()) for name, m in self._linears.items()}

    def _cut(self) -> dict[str, Tensor]:
        """The model's tiles cut exactly at the budget; on all ranks alike."""
        sizes = {name: m.sizes for name, m in self._linears.items()}
        return cut_globally({name: m.all_tiles() for name, m in self._linears.items()}, sizes, self._sparsity)

    def harden(self) -> dict[str, HybridMask]:
        """The hybrid masks if learning stopped now: best patterns, and tiles cut at the budget; on all ranks alike."""
        dense = self._cut()
        return {
            name: HybridMask(m.shape, m.tile, dense[name], m.whole_patterns(m.best_patterns()))
            for name, m in self._linears.items()
        }


class _Step:
    """Forward and backward pass of micro-batches, replayed as a CUDA graph if ``captured``."""

    def __init__(self, run: _Run, losses: Losses, captured: bool) -> None:
        self._run = run
        sequences = run.recipe.microbatch // run.ranks.size
        # What changes from one micro-batch to the next, where a captured graph finds it.
        self._tokens = torch.zeros((sequences, run.recipe.length), dtype=torch.int64, device=run.state.device)
        self._factors = torch.zeros(2, device=run.state.device)
        self._packed: Tensor | None = None
        if run.state.device.type == "cuda":
            from patch.learn.soft_mask_triton import PACKED

            self._packed = torch.zeros((len(run.streams(0)), PACKED), dtype=torch.int32, device=run.state.device)
        self._passes = Passes(
            lambda: run.backward(losses, self._tokens, *self._factors.unbind()),
            run.drop_gradients,
            captured,
            accumulates=run.recipe.batch > run.recipe.microbatch,
        )

    def __call__(self, tokens: Tensor, settings: Settings, index: int) -> Tensor:
        """Add a micro-batch's share of the gradient; returns its loss, cross entropy and density, ``[3]``.

        Args:
            tokens: this rank's, int64 ``[sequences, length]``.
            index: of the micro-batch in its step.
        """
        self._tokens.copy_(tokens)
        self._factors.copy_(torch.tensor([settings.weight_penalty, settings.tile_scale]))
        if self._packed is not None:
            from patch.learn.soft_mask_triton import pack

            self._packed.copy_(pack(settings.temperatures, self._run.streams(index)))
        self._run.begin(settings, index, self._packed)
        return self._passes()

    def close(self) -> None:
        """Let go of the graph: processes that exchange something in theirs can part only when those are gone."""
        self._passes.close()

    def forget_gradients(self) -> None:
        """Make ready for the next step."""
        self._passes.forget_gradients()
