"""Learning hybrid masks with the weights frozen: PATCH joint, PATCH tile, and MaskLLM.

The loss of one step, averaged over its micro-batches, each with noise of its own::

    cross entropy + lambda_s * |density - target| - lambda_w(step) * size of the kept weights

Density is over all prunable weights, so tiles compete across layers. In the end the patterns are those of the highest
logits, and the tiles of the whole model are ranked by logit and cut exactly at the budget.

While it learns, each prunable ``Linear`` multiplies its frozen weight by the soft mask in its own forward; under
activation checkpointing that happens inside the recomputed block, so device memory holds the masks of one block, not
of the model. Whatever was changed about the model is put back, also when learning fails.

A run that is killed continues from ``learner.pt``, written every few steps. All noise is derived from the seed and the
step, so on a CPU with the same number of threads the resumed run ends with the same bits as an undisturbed one; CUDA
kernels that add in any order may differ in the last bits.
"""

import dataclasses
import functools
import hashlib
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from patch import relax
from patch.budget import check_sparsity, cut_globally
from patch.errors import UserError
from patch.mask import GROUP, KEPT_PAIRS, HybridMask, TileShape, check_tile, tile_sizes
from patch.prunable import decoder_blocks, prunable_linears
from patch.recipe import Recipe, Settings
from patch.relax import SampledWeight, Softness

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "learner.pt"
FORMAT = 1

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Prior:
    """What one-shot pruning knows.

    Attributes:
        patterns: per weight, by its dotted name, the patterns of a 2:4 mask, uint8 ``[N, K/4]``; `Recipe.mode` ``tile``
            keeps them.
        tile_scores: per weight ``[R, C]``, higher = rather dense; compared within a weight.
    """

    patterns: Mapping[str, Tensor] | None = None
    tile_scores: Mapping[str, Tensor] | None = None


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
    sampled_weight: SampledWeight = relax.sampled_weight,
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
        sampled_weight: draws the soft masks: `patch.relax.sampled_weight`, the eager one, or on an NVIDIA GPU
            `patch.relax_triton.sampled_weight`, which is fused. Each has noise of its own, so a run that is continued
            with another ends right, but not with the same bits.

    Raises:
        UserError: if target, tile, prior, model, tokens or the checkpoint in ``work`` do not fit.
        LearningDiverged: if the loss or its gradient is not finite.
        OSError: if ``work`` cannot be written.
    """
    device = torch.device(device)
    linears = _prepare(model, recipe, sparsity, check_tile(tile), seed, prior, device, sampled_weight)
    run = _Run(linears, recipe, sparsity, seed, work / CHECKPOINT, _digest(prior))
    run.resume()
    if run.step < recipe.steps:
        work.mkdir(parents=True, exist_ok=True)
        with torch.enable_grad(), _masked_forward(model, linears, recipe), _tensorboard(work, run.step) as board:
            while run.step < recipe.steps:
                started = time.perf_counter()
                metrics = run.advance(model, _check_tokens(batches(run.step), recipe, model))
                speed = {"tokens_per_second": recipe.batch * recipe.length / (time.perf_counter() - started)}
                if run.history and run.history[-1]["step"] == run.step:
                    for name, value in (run.history[-1] | speed).items():
                        board.add_scalar(name, value, run.step)
                if run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps:
                    board.flush()
                    run.save()
                if on_step:
                    on_step(metrics | speed)
    return Learned(run.harden(), run.history)


class _MaskedLinear:
    """A prunable ``Linear``, what is learned about it, and the samples of the micro-batch under way.

    `forward` stands in for the ``Linear``'s own. It may run twice in a micro-batch, since checkpointed blocks are
    recomputed, and draws the same noise both times.

    Attributes:
        patterns: logits ``[6, N, K/4]``, or None where patterns are fixed.
        tiles: logits ``[R, C]``, or None where all tiles are 2:4.
        fixed: the fixed patterns, uint8 ``[N, K/4]`` on the CPU, or None.
        sizes: elements of each tile, int64 ``[R, C]`` on the CPU.
        sums: kept elements and squares of the kept weights in this micro-batch; None until `forward` has run.
    """

    def __init__(
        self,
        linear: nn.Linear,
        tile: TileShape,
        patterns: Tensor | None,
        tiles: Tensor | None,
        fixed: Tensor | None,
        sampled_weight: SampledWeight,
    ) -> None:
        self.linear = linear
        self.tile = tile
        self.patterns = patterns
        self.tiles = tiles
        self.fixed = fixed
        self.sums: tuple[Tensor, Tensor] | None = None
        self.shape = (linear.weight.shape[0], linear.weight.shape[1])
        self.sizes = tile_sizes(self.shape, tile)
        self._sampled_weight = sampled_weight
        on_device = fixed.to(linear.weight.device) if patterns is None and fixed is not None else patterns
        assert on_device is not None, "patterns are either learned or fixed"
        self._patterns = on_device

    def begin(self, settings: Settings, *stream: int) -> None:
        """Start a micro-batch with noise of the given stream."""
        self._softness = Softness(settings.tau, settings.pattern_scale, settings.tile_scale)
        self._stream = stream
        self.sums = None

    def forward(self, inputs: Tensor) -> Tensor:
        masked = self._sampled_weight(
            self.linear.weight, self._patterns, self.tiles, self.tile, self._softness, self._stream
        )
        # A recomputed block must compute the sums again, since it must save the same tensors. Keeping those would keep
        # the recomputed masks of the whole model.
        if self.sums is None:
            self.sums = masked.kept, masked.squares
        return F.linear(inputs, masked.weight, self.linear.bias)

    def best_patterns(self) -> Tensor:
        """The patterns if hardened now, uint8 ``[N, K/4]`` on the CPU."""
        if self.fixed is not None:
            return self.fixed
        assert self.patterns is not None
        return self.patterns.detach().argmax(0).to("cpu", torch.uint8)


class _Run:
    """The state of learning: all that a checkpoint holds."""

    def __init__(
        self, linears: dict[str, _MaskedLinear], recipe: Recipe, sparsity: float, seed: int, path: Path, prior: str
    ) -> None:
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._unlogged: list[list[float]] = []
        self._linears = linears
        self._recipe = recipe
        self._sparsity = sparsity
        self._seed = seed
        self._path = path
        self._logits = {f"{name}/patterns": m.patterns for name, m in linears.items() if m.patterns is not None}
        self._logits |= {f"{name}/tiles": m.tiles for name, m in linears.items() if m.tiles is not None}
        self._optimizer = torch.optim.AdamW(
            self._logits.values(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._device = next(iter(self._logits.values())).device
        self._elements = sum(m.linear.weight.numel() for m in linears.values())
        self._dense_size = sum(
            float(torch.linalg.vector_norm(m.linear.weight.detach().float())) for m in linears.values()
        )
        self._logged = self.harden()
        self._fingerprint: dict[str, Any] = {
            "recipe": dataclasses.asdict(recipe),
            "sparsity": sparsity,
            "tile": next(iter(linears.values())).tile,
            "seed": seed,
            "weights": {name: (m.shape, str(m.linear.weight.dtype)) for name, m in linears.items()},
            "prior": prior,
        }

    def advance(self, model: nn.Module, tokens: Tensor) -> dict[str, float]:
        """Take one optimizer step on ``tokens`` ``[batch, length]``; returns its metrics."""
        settings = self._recipe.at(self.step)
        parts = tokens.split(self._recipe.microbatch)
        sums = torch.stack([self._backward(model, part, settings, i, len(parts)) for i, part in enumerate(parts)])
        loss, cross_entropy, density = sums.mean(0).tolist()
        self._check_finite("loss", loss)
        grad_norm = self._clip()
        self._check_finite("gradient", grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        self._unlogged.append([loss, cross_entropy, density, grad_norm])
        if self.step % self._recipe.log_every == 0 or self.step == self._recipe.steps:
            self._log(settings)
        return self._entry([loss, cross_entropy, density, grad_norm], settings)

    def _backward(self, model: nn.Module, tokens: Tensor, settings: Settings, index: int, microbatches: int) -> Tensor:
        """Add a micro-batch's share of the gradient; returns its loss, cross entropy and density."""
        for weight, masked in enumerate(self._linears.values()):
            masked.begin(settings, self._seed, self.step, index, weight)
        cross_entropy = _next_token_loss(model, tokens.to(self._device))
        kept, squares = self._sums()
        density = kept.sum() / self._elements
        loss = cross_entropy
        if self._recipe.mode != "maskllm":
            loss = loss + self._recipe.sparsity_penalty * (density - (1 - self._sparsity)).abs()
        loss = loss - settings.weight_penalty * self._kept_size(squares)
        # Divided, so that neither gradient nor penalties depend on the size of a micro-batch.
        (loss / microbatches).backward()
        return torch.stack([loss.detach(), cross_entropy.detach(), density.detach()])

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Kept elements and squares of the kept weights, one entry a weight."""
        unused = [name for name, m in self._linears.items() if m.sums is None]
        if unused:
            raise UserError(f"{unused[0]} takes no part in the model's forward pass: its mask cannot be learned")
        kept, squares = zip(*(m.sums for m in self._linears.values() if m.sums is not None), strict=True)
        return torch.stack(kept), torch.stack(squares)

    def _kept_size(self, squares: Tensor) -> Tensor:
        if self._recipe.weight_penalty_kind == "square":
            return squares.sum()
        # A weight of zeros has no gradient, where the root would have an infinite one.
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt().sum() / self._dense_size

    def _clip(self) -> float:
        """Clip all gradients together; returns their norm before that."""
        norm = get_total_norm([logits.grad for logits in self._logits.values() if logits.grad is not None])
        if self._recipe.clip is not None and norm > self._recipe.clip:
            clip_grads_with_norm_(self._logits.values(), self._recipe.clip, norm)
        return float(norm)

    def _check_finite(self, quantity: str, value: float) -> None:
        if not math.isfinite(value):
            kept = self._path if self._path.exists() else None
            raise LearningDiverged(self.step + 1, self._recipe, quantity, kept)

    def _entry(self, measured: Sequence[float], settings: Settings) -> dict[str, float]:
        names = ("loss", "cross_entropy", "density", "grad_norm")
        entry = {"step": self.step} | dict(zip(names, measured, strict=True))
        entry |= {"lr": settings.lr, "tau": settings.tau}
        if self._recipe.mode != "tile":
            entry["pattern_scale"] = settings.pattern_scale
        if self._recipe.mode != "maskllm":
            entry["tile_scale"] = settings.tile_scale
        return entry

    def _log(self, settings: Settings) -> None:
        entry = self._entry([sum(values) / len(values) for values in zip(*self._unlogged, strict=True)], settings)
        before, self._logged, self._unlogged = self._logged, self.harden(), []
        pairs = [(before[name], self._logged[name]) for name in before]
        if self._recipe.mode != "tile":
            changed = sum(int((old.patterns != new.patterns).sum()) for old, new in pairs)
            entry["pattern_change_rate"] = changed * GROUP / self._elements
        if self._recipe.mode != "maskllm":
            changed = sum(int((old.dense != new.dense).sum()) for old, new in pairs)
            entry["tile_change_rate"] = changed / sum(m.sizes.numel() for m in self._linears.values())
            tiles = [(m.tiles.cpu() > 0, m.sizes) for m in self._linears.values() if m.tiles is not None]
            entry["hard_density"] = sum(float(relax.kept_elements(*pair)) for pair in tiles) / self._elements
        self.history.append(entry)

    def harden(self) -> dict[str, HybridMask]:
        """The hybrid masks if learning stopped now: best patterns, and the model's tiles cut exactly at the budget."""
        sizes = {name: m.sizes for name, m in self._linears.items()}
        scores = {name: torch.zeros(m.sizes.shape) if m.tiles is None else m.tiles for name, m in self._linears.items()}
        dense = cut_globally(scores, sizes, self._sparsity)
        return {name: HybridMask(m.shape, m.tile, dense[name], m.best_patterns()) for name, m in self._linears.items()}

    def save(self) -> None:
        """Write the checkpoint; it is there in full or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        state = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "step": self.step,
            "history": self.history,
            "unlogged": self._unlogged,
            "logits": {name: logits.detach() for name, logits in self._logits.items()},
            "optimizer": self._optimizer.state_dict(),
            "logged": {name: (mask.dense, mask.patterns) for name, mask in self._logged.items()},
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
            state = torch.load(self._path, map_location=self._device, weights_only=True)
            version, fingerprint = state["format"], state["fingerprint"]
        if version != FORMAT:
            raise UserError(f"{self._path} has format {version}, this version reads {FORMAT}: remove it to start over")
        self._check_fingerprint(fingerprint)
        with _whole(self._path), torch.no_grad():
            for name, logits in self._logits.items():
                logits.copy_(state["logits"][name])
            self._optimizer.load_state_dict(state["optimizer"])
            self._logged = {
                name: HybridMask(mask.shape, mask.tile, *(part.cpu() for part in state["logged"][name]))
                for name, mask in self._logged.items()
            }
            self.step, self.history, self._unlogged = state["step"], state["history"], state["unlogged"]

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


def _next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy of each token but the first given those before it."""
    logits = model(input_ids=tokens, use_cache=False).logits
    # Shifting the targets instead of the logits saves a copy of the largest tensor there is.
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


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
def _masked_forward(model: nn.Module, linears: Mapping[str, _MaskedLinear], recipe: Recipe) -> Iterator[None]:
    """The model with masked weights: frozen, without dropout, in full float32 precision; on leaving, as it was."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    precision = torch.get_float32_matmul_precision()
    stand_ins: dict[nn.Module, Callable[..., Any]] = {m.linear: m.forward for m in linears.values()}
    if recipe.activation_checkpointing:
        # Not transformers' own switch, which works only in training mode, where dropout is on.
        for block in decoder_blocks(model):
            stand_ins[block] = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
    own = {module: vars(module).get("forward") for module in stand_ins}
    try:
        model.eval()
        model.requires_grad_(False)
        torch.set_float32_matmul_precision("highest")
        for module, forward in stand_ins.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            vars(module).pop("forward", None)
            if before is not None:
                vars(module)["forward"] = before
        torch.set_float32_matmul_precision(precision)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def _tensorboard(work: Path, step: int) -> Iterator["SummaryWriter"]:
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
) -> dict[str, _MaskedLinear]:
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
            learned = _prepare_linear(linear, recipe, sparsity, tile, (seed, index), known, device)
            prepared[name] = _MaskedLinear(linear, tile, *learned, sampled_weight)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return prepared


def _of(prior: Prior, name: str) -> tuple[Tensor | None, Tensor | None]:
    """The prior's patterns and tile scores of one weight."""
    for kind, known in (("patterns", prior.patterns), ("tile scores", prior.tile_scores)):
        if known is not None and name not in known:
            raise UserError(f"the prior has no {kind} for it")
    patterns = None if prior.patterns is None else prior.patterns[name].cpu()
    return patterns, None if prior.tile_scores is None else prior.tile_scores[name].cpu()


def _prepare_linear(
    linear: nn.Linear,
    recipe: Recipe,
    sparsity: float,
    tile: TileShape,
    stream: tuple[int, int],
    prior: tuple[Tensor | None, Tensor | None],
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check one weight's part; returns its initial pattern logits and tile logits, and its fixed patterns."""
    weight = linear.weight
    patterns, scores = prior
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
    learned_patterns = learned_tiles = None
    if recipe.mode != "tile":
        lift = None if patterns is None else recipe.pattern_prior * relax.pattern_prior(patterns)
        seed_of_init = relax.stream_seed("initial patterns", *stream)
        learned_patterns = _initial((len(KEPT_PAIRS), *groups), lift, recipe.logit_std, seed_of_init, weight.device)
    if recipe.mode != "maskllm":
        lift = None if scores is None else recipe.tile_prior * relax.tile_prior(scores, sparsity)
        seed_of_init = relax.stream_seed("initial tiles", *stream)
        learned_tiles = _initial(grid, lift, recipe.logit_std, seed_of_init, weight.device)
    fixed = patterns if recipe.mode == "tile" else None
    return learned_patterns, learned_tiles, fixed


def _initial(shape: Sequence[int], lift: Tensor | None, std: float, seed: int, device: torch.device) -> Tensor:
    """Normal logits, lifted by so many standard deviations."""
    logits = torch.empty(shape, device=device).normal_(0, std, generator=relax.generator(seed, device))
    if lift is not None:
        logits.add_(lift.to(device), alpha=std)
    return logits.requires_grad_()


def _digest(prior: Prior) -> str:
    """Identifies a prior's content."""
    digest = hashlib.sha256()
    for kind, known in (("patterns", prior.patterns), ("tile scores", prior.tile_scores)):
        for name in sorted(known or {}):
            tensor = known[name].detach().cpu()  # type: ignore[index]
            values = tensor if kind == "patterns" else tensor.double()
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
