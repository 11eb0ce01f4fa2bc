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

import hashlib
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from patch.budget import check_sparsity, cut_globally
from patch.errors import UserError
from patch.layers import prunable_linears
from patch.learn import soft_mask
from patch.learn.cuda_graph import Replayed
from patch.learn.distributed import ALONE, Ranks
from patch.learn.masked_model import Losses, MaskedLinear, frozen
from patch.learn.recipe import Recipe, Settings
from patch.learn.sensitivity import dearest_tiles
from patch.learn.soft_mask import SampledWeight
from patch.mask import GROUP, KEPT_PAIRS, HybridMask, TileShape, best_patterns, check_tile, tile_sizes

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "learner.pt"
FORMAT = 2
# Sequences that tell what a tile costs the model: a mean of 128 squares has a standard error of an eighth.
RANKED_BY = 128

# Of AdamW, a tensor like the logits each.
_MOMENTS = ("exp_avg", "exp_avg_sq")

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Prior:
    """What one-shot pruning knows.

    Attributes:
        patterns: per weight, by its dotted name, the patterns of a 2:4 mask, uint8 ``[N, K/4]``; `Recipe.mode` ``tile``
            keeps them.
        tile_scores: per weight ``[R, C]``, higher = rather dense; compared within a weight.
        dense_tiles: per weight bool ``[R, C]``, the tiles that start as dense, whatever their scores; `learn` finds
            them where the recipe ranks the tiles of the whole model.
    """

    patterns: Mapping[str, Tensor] | None = None
    tile_scores: Mapping[str, Tensor] | None = None
    dense_tiles: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Learned:
    """The outcome.

    Attributes:
        masks: per weight its hybrid mask, on the CPU; together they meet the sparsity budget.
        history: one entry per `Recipe.log_every` steps and one for the last step: ``step`` (completed steps); means
            since the entry before of ``loss``, ``cross_entropy``, ``density`` (of the soft masks) and ``grad_norm``
            (before clipping); ``hard_density`` (if tiles were cut at logit 0); ``tau``, ``pattern_scale``,
            ``tile_scale``, ``lr``; ``pattern_change_rate``, the share of groups whose best pattern is another than at
            the entry before, and ``tile_change_rate``, the share of tiles on the other side of the budget's cut.
            What a mode does not learn is left out.
    """

    masks: dict[str, HybridMask]
    history: list[dict[str, float]]


class LearningDiverged(UserError):
    """The loss or its gradient is not finite.

    Attributes:
        step: the step, counted from 1, that failed.
        checkpoint: the last good checkpoint, which is kept; None if there was none yet.
    """

    def __init__(self, step: int, recipe: Recipe, quantity: str, checkpoint: Path | None) -> None:
        kept = (
            f"the last good checkpoint is kept in {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        )
        super().__init__(
            f"learning diverged: the {quantity} at step {step} of {recipe.steps} is not finite; {kept}. "
            f"Choose a lower lr than {recipe.lr:g}"
        )
        self.step = step
        self.checkpoint = checkpoint


class Stopped(UserError):
    """Learning was told to stop, and did so after writing its checkpoint."""

    def __init__(self, step: int, recipe: Recipe, checkpoint: Path) -> None:
        super().__init__(
            f"stopped after step {step} of {recipe.steps}, as asked: start it again, and it goes on from {checkpoint}"
        )


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

    Raises:
        UserError: if target, tile, prior, model, tokens or the checkpoint in ``work`` do not fit.
        LearningDiverged: if the loss or its gradient is not finite.
        Stopped: if ``stop`` says so.
        OSError: if ``work`` cannot be written.
    """
    device = torch.device(device)
    how = implementation or Implementation.of(device, ranks)
    start, tile = prior, check_tile(tile)
    if _ranks_the_model(recipe, prior) and not ranks.agree((work / CHECKPOINT).exists(), device):
        start = replace(prior, dense_tiles=_first_dense(model, recipe, batches, sparsity, tile, seed, prior, ranks))
    linears = _prepare(model, recipe, sparsity, tile, seed, start, device, how.sampled_weight, ranks)
    run = _Run(linears, recipe, sparsity, seed, work / CHECKPOINT, _digest(prior), ranks)
    run.resume()
    if run.step < recipe.steps:
        if ranks.rank == 0:
            work.mkdir(parents=True, exist_ok=True)
        losses = Losses(model, linears, recipe, how.compiled, how.ahead)
        with (
            torch.enable_grad(),
            frozen(model),
            _tensorboard(work, run.step, ranks) as board,
            closing(_Step(run, losses, how.captured)) as step,
        ):
            while run.step < recipe.steps:
                started = time.perf_counter()
                metrics = run.advance(step, _check_tokens(batches(run.step), recipe, model), stop)
                if metrics is None:
                    run.save()
                    raise Stopped(run.step, recipe, work / CHECKPOINT)
                speed = {"tokens_per_second": recipe.batch * recipe.length / (time.perf_counter() - started)}
                if board and run.history and run.history[-1]["step"] == run.step:
                    for name, value in (run.history[-1] | speed).items():
                        board.add_scalar(name, value, run.step)
                if run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps:
                    if board:
                        board.flush()
                    run.save()
                if on_step:
                    on_step(metrics | speed)
    return Learned(run.harden(), run.history)


def _ranks_the_model(recipe: Recipe, prior: Prior) -> bool:
    return recipe.tile_ranking == "model" and prior.dense_tiles is None


def _first_dense(
    model: nn.Module,
    recipe: Recipe,
    batches: Callable[[int], Tensor],
    sparsity: float,
    tile: TileShape,
    seed: int,
    prior: Prior,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """The tiles that cost the model most, by the first sequences of the text."""
    linears = prunable_linears(model)
    patterns = prior.patterns or {name: best_patterns(linear.weight.abs()) for name, linear in linears.items()}
    steps = range(-(-RANKED_BY // recipe.batch))
    tokens = torch.cat([_check_tokens(batches(step), recipe, model) for step in steps])[:RANKED_BY]
    return dearest_tiles(model, patterns, tile, tokens, seed, sparsity, ranks)


class _Run:
    """The state of learning: all that a checkpoint holds."""

    def __init__(
        self,
        linears: dict[str, MaskedLinear],
        recipe: Recipe,
        sparsity: float,
        seed: int,
        path: Path,
        prior: str,
        ranks: Ranks,
    ) -> None:
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._unlogged: list[list[float]] = []
        self._linears = linears
        self.recipe = recipe
        self._sparsity = sparsity
        self._seed = seed
        self._path = path
        self.ranks = ranks
        self._logits = {f"{name}/patterns": m.patterns for name, m in linears.items() if m.patterns is not None}
        self._logits |= {f"{name}/tiles": m.tiles for name, m in linears.items() if m.tiles is not None}
        self.device = next(iter(self._logits.values())).device
        # The last of many ranks may hold no rows of any weight.
        held = [logits for logits in self._logits.values() if logits.numel()]
        self._optimizer = torch.optim.AdamW(
            held or [torch.zeros((), device=self.device)],
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._elements = sum(m.linear.weight.numel() for m in linears.values())
        self._dense_size = sum(
            float(torch.linalg.vector_norm(m.linear.weight.detach().float())) for m in linears.values()
        )
        self._logged = self._best()
        self._fingerprint: dict[str, Any] = {
            "recipe": recipe.substance(),
            "sparsity": sparsity,
            "tile": next(iter(linears.values())).tile,
            "seed": seed,
            "weights": {name: (m.shape, str(m.linear.weight.dtype)) for name, m in linears.items()},
            "prior": prior,
        }

    def advance(self, step: "_Step", tokens: Tensor, stop: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """Take one optimizer step on ``tokens`` ``[batch, length]``; returns its metrics, or None if told to stop."""
        settings = self.recipe.at(self.step)
        parts = []
        for index, part in enumerate(tokens.split(self.recipe.microbatch)):
            if stop and self.ranks.agree(stop(), self.device):
                return None
            parts.append(step(self.ranks.sequences(part), settings, index))
        sums = torch.stack(parts)
        norm = self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr
        self._optimizer.step()
        step.forget_gradients()
        # The one time in a step that the host waits for the device.
        loss, cross_entropy, density, grad_norm = [*self.ranks.mean(sums.mean(0)).tolist(), float(norm)]
        self._check_finite("loss", loss)
        self._check_finite("gradient", grad_norm)
        self.step += 1
        self._unlogged.append([loss, cross_entropy, density, grad_norm])
        if self.step % self.recipe.log_every == 0 or self.step == self.recipe.steps:
            self._log(settings)
        return self._entry([loss, cross_entropy, density, grad_norm], settings)

    def streams(self, index: int) -> list[tuple[int, ...]]:
        """The noise of each weight in one micro-batch of this step."""
        return [(self._seed, self.step, index, weight) for weight in range(len(self._linears))]

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
        self._optimizer.zero_grad(set_to_none=not keep_memory)

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

    def _clip(self) -> Tensor:
        """Clip all gradients together; returns their norm before that."""
        norm = get_total_norm([logits.grad for logits in self._logits.values() if logits.grad is not None])
        if self.ranks.size > 1:
            norm = self.ranks.total(norm.to(self.device, torch.float32).square()).sqrt()
        if self.recipe.clip is not None:
            clip_grads_with_norm_(self._logits.values(), self.recipe.clip, norm)
        return norm

    def _check_finite(self, quantity: str, value: float) -> None:
        if not math.isfinite(value):
            kept = self._path if self._path.exists() else None
            raise LearningDiverged(self.step + 1, self.recipe, quantity, kept)

    def _entry(self, measured: Sequence[float], settings: Settings) -> dict[str, float]:
        names = ("loss", "cross_entropy", "density", "grad_norm")
        entry = {"step": self.step} | dict(zip(names, measured, strict=True))
        entry |= {"lr": settings.lr, "tau": settings.tau}
        if self.recipe.mode != "tile":
            entry["pattern_scale"] = settings.pattern_scale
        if self.recipe.mode != "maskllm":
            entry["tile_scale"] = settings.tile_scale
        return entry

    def _log(self, settings: Settings) -> None:
        entry = self._entry([sum(values) / len(values) for values in zip(*self._unlogged, strict=True)], settings)
        before, self._logged, self._unlogged = self._logged, self._best(), []
        pairs = [(before[name], self._logged[name]) for name in before]
        if self.recipe.mode != "tile":
            changed = self.ranks.total(torch.stack([(old[1] != new[1]).sum() for old, new in pairs]))
            entry["pattern_change_rate"] = int(changed.sum()) * GROUP / self._elements
        if self.recipe.mode != "maskllm":
            changed = torch.stack([(old[0] != new[0]).sum() for old, new in pairs])
            entry["tile_change_rate"] = int(changed.sum()) / sum(m.sizes.numel() for m in self._linears.values())
            tiles = [(m.all_tiles() > 0, m.sizes) for m in self._linears.values()]
            entry["hard_density"] = sum(float(soft_mask.kept_elements(*pair)) for pair in tiles) / self._elements
        self.history.append(entry)

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

    def save(self) -> None:
        """Write the checkpoint, with the whole of what is divided; it is there in full or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        learned: dict[str, dict[str, Tensor]] = {}
        for name, logits in self._logits.items():
            moments = self._optimizer.state.get(logits, {})
            parts = {"logits": logits.detach()}
            # A rank without rows of this weight has no moments of them.
            parts |= {moment: moments.get(moment, torch.zeros_like(logits)) for moment in _MOMENTS if self.step}
            learned[name] = {kind: self._whole(name, part) for kind, part in parts.items()}
        logged = {
            name: (dense, self._linears[name].whole_patterns(patterns))
            for name, (dense, patterns) in self._logged.items()
        }
        if self.ranks.rank:
            return
        state = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "step": self.step,
            "history": self.history,
            "unlogged": self._unlogged,
            "learned": learned,
            "logged": logged,
        }
        # One name: what a killed process left half-written is overwritten, not piled up.
        temporary = self._path.with_name(f".{self._path.name}.partial")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except RuntimeError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"cannot write the learner's checkpoint {self._path}: {error}") from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def resume(self) -> None:
        """Take up the checkpoint, if there is one.

        Raises:
            UserError: if it is damaged, or belongs to another run.
        """
        if not self._path.exists():
            return
        with _whole(self._path):
            state = torch.load(self._path, map_location="cpu", mmap=True, weights_only=True)
            version, fingerprint = state["format"], state["fingerprint"]
        if version != FORMAT:
            raise UserError(f"{self._path} has format {version}, this version reads {FORMAT}: remove it to start over")
        self._check_fingerprint(fingerprint)
        with _whole(self._path), torch.no_grad():
            self.step, self.history, self._unlogged = state["step"], state["history"], state["unlogged"]
            for name, logits in self._logits.items():
                learned = state["learned"][name]
                logits.copy_(self._part(name, learned["logits"]))
                if self.step and logits.numel():
                    # Laid out as the logits are, whatever the number of ranks that wrote them.
                    moments = {
                        kind: torch.empty_like(logits).copy_(self._part(name, learned[kind])) for kind in _MOMENTS
                    }
                    count = torch.tensor(float(self.step), device=logits.device)
                    self._optimizer.state[logits] = {"step": count} | moments
            for name, (dense, patterns) in state["logged"].items():
                here = patterns[self._linears[name].here]
                self._logged[name] = dense.clone(), here.to(self._logged[name][1].device, copy=True)

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """What all ranks hold of a tensor that is divided as the logits ``name`` are."""
        linear, what = name.rsplit("/", 1)
        m = self._linears[linear]
        if what == "tiles":
            whole = self.ranks.collect(part, m.sizes.shape[0], 1)
        else:
            whole = self.ranks.collect(part, m.shape[0], m.tile[0], dim=1)
        # Not kept on the device: it would hold the whole of what is divided for want of room.
        return whole if self.ranks.size == 1 else whole.cpu()

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `_whole`."""
        linear, what = name.rsplit("/", 1)
        m = self._linears[linear]
        return whole[m.tiles_here] if what == "tiles" else whole[:, m.here]

    def _check_fingerprint(self, found: dict[str, Any]) -> None:
        differing = [name for name, value in self._fingerprint.items() if found.get(name) != value]
        if "recipe" in differing:
            ours, theirs = self._fingerprint["recipe"], found.get("recipe", {})
            differing.remove("recipe")
            differing += [f"recipe.{name}" for name in ours if theirs.get(name) != ours[name]]
        if differing:
            raise UserError(
                f"{self._path} belongs to another run ({', '.join(differing)} differ): "
                "remove it or choose another folder"
            )


class _Step:
    """Forward and backward pass of micro-batches, replayed as a CUDA graph if ``captured``."""

    def __init__(self, run: _Run, losses: Losses, captured: bool) -> None:
        self._run = run
        sequences = run.recipe.microbatch // run.ranks.size
        # What changes from one micro-batch to the next, where a captured graph finds it.
        self._tokens = torch.zeros((sequences, run.recipe.length), dtype=torch.int64, device=run.device)
        self._factors = torch.zeros(2, device=run.device)
        self._packed: Tensor | None = None
        if run.device.type == "cuda":
            self._packed = torch.zeros((len(run.streams(0)), 5), dtype=torch.int32, device=run.device)
        # A graph writes gradients where it wrote them when it was captured. With several micro-batches a step it must
        # add to what is there; with one it had better not read it.
        self._accumulates = run.recipe.batch > run.recipe.microbatch
        self._backward: Callable[[], Tensor] = lambda: run.backward(losses, self._tokens, *self._factors.unbind())
        if captured:
            self._backward = Replayed(self._backward, self._after_failed_capture)

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
        return self._backward()

    def close(self) -> None:
        """Let go of the graph: processes that exchange something in theirs can part only when those are gone."""
        if isinstance(self._backward, Replayed):
            self._backward.close()

    def _after_failed_capture(self) -> None:
        if not self._accumulates:
            self._run.drop_gradients(keep_memory=False)

    def forget_gradients(self) -> None:
        """Make ready for the next step."""
        replayed = isinstance(self._backward, Replayed) and self._backward.captured
        if self._accumulates or not replayed:
            self._run.drop_gradients(keep_memory=self._accumulates and isinstance(self._backward, Replayed))


def _check_tokens(tokens: Tensor, recipe: Recipe, model: Any) -> Tensor:
    if tuple(tokens.shape) != (recipe.batch, recipe.length) or tokens.dtype != torch.int64:
        found = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise UserError(f"tokens of a step are {found}, the recipe needs int64 {(recipe.batch, recipe.length)}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(
            f"token {int(tokens.max())} is not in the model's vocabulary of {vocabulary}: another tokenizer?"
        )
    return tokens


@contextmanager
def _tensorboard(work: Path, step: int, ranks: Ranks) -> Iterator["SummaryWriter | None"]:
    if ranks.rank:
        yield None
        return
    # Takes a second to import.
    from torch.utils.tensorboard import SummaryWriter

    # What an earlier process logged after its last checkpoint happens again.
    with SummaryWriter(work / "tensorboard", purge_step=step + 1 if step else None) as board:
        yield board


def _prepare(
    model: nn.Module,
    recipe: Recipe,
    sparsity: float,
    tile: TileShape,
    seed: int,
    prior: Prior,
    device: torch.device,
    sampled_weight: SampledWeight,
    ranks: Ranks,
) -> dict[str, MaskedLinear]:
    """Check everything and initialise the logits."""
    check_sparsity(sparsity)
    if recipe.mode == "maskllm" and sparsity != 0.5:
        raise UserError(f"mode maskllm prunes every tile: its target sparsity is 0.5, not {sparsity}")
    if recipe.mode == "tile" and prior.patterns is None:
        raise UserError("mode tile keeps the patterns of a prior: give the patterns of a 2:4 mask")
    linears = prunable_linears(model)
    if not linears:
        raise UserError(f"{type(model).__name__} has no prunable weights")
    prepared = {}
    for index, (name, linear) in enumerate(linears.items()):
        try:
            known = _of(prior, name)
            patterns, tiles, fixed = _prepare_linear(linear, recipe, sparsity, tile, (seed, index), known, device)
            masked = MaskedLinear(linear, tile, fixed, sampled_weight, ranks)
            dtype = getattr(torch, recipe.logit_dtype)
            if patterns is not None:
                masked.patterns = patterns[:, masked.here].to(dtype, copy=ranks.size > 1).requires_grad_()
            if tiles is not None:
                masked.tiles = tiles[masked.tiles_here].to(dtype, copy=ranks.size > 1).requires_grad_()
            prepared[name] = masked
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    _check_used(model, linears)
    return prepared


def _check_used(model: Any, linears: Mapping[str, nn.Linear]) -> None:
    """The gradient of a weight that the model does not use would be that of the penalties alone."""
    used: set[nn.Module] = set()
    hooks = [linear.register_forward_hook(lambda module, *_: used.add(module)) for linear in linears.values()]
    try:
        with torch.no_grad():
            device = model.get_input_embeddings().weight.device
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    unused = [name for name, linear in linears.items() if linear not in used]
    if unused:
        raise UserError(f"{unused[0]} takes no part in the model's forward pass: its mask cannot be learned")


def _kinds(prior: Prior) -> dict[str, Mapping[str, Tensor] | None]:
    return {"patterns": prior.patterns, "tile scores": prior.tile_scores, "dense tiles": prior.dense_tiles}


def _of(prior: Prior, name: str) -> dict[str, Tensor]:
    """What the prior knows of one weight, by its kind, on the CPU."""
    found: dict[str, Tensor] = {}
    for kind, known in _kinds(prior).items():
        if known is not None:
            if name not in known:
                raise UserError(f"the prior has no {kind} for it")
            found[kind] = known[name].cpu()
    return found


def _prepare_linear(
    linear: nn.Linear,
    recipe: Recipe,
    sparsity: float,
    tile: TileShape,
    stream: tuple[int, int],
    prior: Mapping[str, Tensor],
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check one weight's part; returns its initial pattern logits and tile logits, and its fixed patterns."""
    weight = linear.weight
    patterns, scores, dense = (prior.get(kind) for kind in ("patterns", "tile scores", "dense tiles"))
    if weight.device.type != device.type or (device.index is not None and weight.device != device):
        raise UserError(f"the weight is on {weight.device}, learning on {device}: move the model there first")
    if not weight.is_floating_point():
        raise UserError(f"the weight is {weight.dtype}: masks are learned over floating weights, load them unquantised")
    grid = tuple(tile_sizes(weight.shape, tile).shape)
    groups = (weight.shape[0], weight.shape[1] // GROUP)
    if patterns is not None:
        if patterns.dtype != torch.uint8 or tuple(patterns.shape) != groups:
            raise UserError(f"the prior's patterns are {patterns.dtype} {tuple(patterns.shape)}, need uint8 {groups}")
        if int(patterns.max()) >= len(KEPT_PAIRS):
            raise UserError(f"the prior's pattern {int(patterns.max())} is out of range 0..{len(KEPT_PAIRS) - 1}")
    if scores is not None:
        if tuple(scores.shape) != grid:
            raise UserError(
                f"the prior's tile scores are {tuple(scores.shape)}, tiles of {tile[0]}x{tile[1]} need {grid}"
            )
        if not torch.isfinite(scores).all():
            raise UserError("a tile score of the prior is not finite")
    if dense is not None and (dense.dtype != torch.bool or tuple(dense.shape) != grid):
        raise UserError(f"the prior's dense tiles are {dense.dtype} {tuple(dense.shape)}, need bool {grid}")
    learned_patterns = learned_tiles = None
    if recipe.mode != "tile":
        lift = None if patterns is None else recipe.pattern_prior * soft_mask.pattern_prior(patterns)
        seed_of_init = soft_mask.stream_seed("initial patterns", *stream)
        learned_patterns = _initial((len(KEPT_PAIRS), *groups), lift, recipe.logit_std, seed_of_init, weight.device)
    if recipe.mode != "maskllm":
        if dense is not None:
            lift = recipe.tile_prior * (2.0 * dense - 1)
        else:
            lift = None if scores is None else recipe.tile_prior * soft_mask.tile_prior(scores, sparsity)
        seed_of_init = soft_mask.stream_seed("initial tiles", *stream)
        learned_tiles = _initial(grid, lift, recipe.logit_std, seed_of_init, weight.device)
    fixed = patterns if recipe.mode == "tile" else None
    return learned_patterns, learned_tiles, fixed


def _initial(shape: Sequence[int], lift: Tensor | None, std: float, seed: int, device: torch.device) -> Tensor:
    """Normal logits, lifted by so many standard deviations."""
    logits = torch.empty(shape, device=device).normal_(0, std, generator=soft_mask.generator(seed, device))
    if lift is not None:
        logits.add_(lift.to(device), alpha=std)
    return logits


def _digest(prior: Prior) -> str:
    """Identifies a prior's content."""
    digest = hashlib.sha256()
    for kind, known in _kinds(prior).items():
        for name in sorted(known or {}):
            tensor = known[name].detach().cpu()  # type: ignore[index]
            values = tensor.double() if kind == "tile scores" else tensor
            digest.update(f"{kind} {name} {tuple(values.shape)}".encode())
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Anything that reading a checkpoint can raise becomes one line that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        # A RuntimeError too, but the file is not to blame for it.
        raise
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint ({reason}): remove it to start over") from error
