"""A causal language model with its weights frozen and masked: what a step of learning runs forward and backward.

Before a decoder block runs, the soft masks of its linears are drawn and laid over their weights; under activation
checkpointing that is part of the recomputed block, so device memory holds the masks of one block, not of the model.
The linears' own parameters are never touched, and nothing is left behind.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patch.contexts import evaluating, full_float32, standing_in
from patch.layers import decoder_blocks
from patch.learn.distributed import Ranks
from patch.learn.recipe import Settings
from patch.learn.soft_mask import Masked, SampledWeight
from patch.mask import tile_sizes
from patch.tiles import TileShape


class MaskedLinear:
    """A prunable ``Linear``, what this rank learns about it, and the sums of the micro-batch under way.

    Args:
        weight: what is masked, ``[N, K]``: the linear's own weight, or what it will be rounded to.
        scale: powers of two ``[K]`` that inputs count by in the size of the kept weights, or None for all alike.

    Attributes:
        here: the rows that this rank holds; ``tiles_here``, their rows of tiles.
        patterns: logits ``[6, rows here, K/4]``, or None where patterns are fixed.
        tiles: logits ``[tile rows here, C]``, or None where all tiles are 2:4.
        fixed: the fixed patterns of the whole weight, uint8 ``[N, K/4]`` on the CPU, or None.
        sizes: elements of each tile of the whole weight, int64 ``[R, C]`` on the CPU; ``sizes_here``, of the tiles
            here, float32 on the device.
        sums: kept elements and squares of the kept weights, by ``scale``, here in this micro-batch; None until
            `draw` has run.
    """

    def __init__(
        self,
        linear: nn.Linear,
        tile: TileShape,
        fixed: Tensor | None,
        sampled_weight: SampledWeight,
        ranks: Ranks,
        weight: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        self.linear = linear
        self.tile = tile
        self.shape = (linear.weight.shape[0], linear.weight.shape[1])
        self.here = ranks.rows(self.shape[0], tile[0])
        self.patterns: Tensor | None = None
        self.tiles: Tensor | None = None
        self.fixed = fixed
        self.sums: tuple[Tensor, Tensor] | None = None
        self.sizes = tile_sizes(self.shape, tile)
        self.tiles_here = ranks.rows(len(self.sizes), 1)
        self.sizes_here = self.sizes[self.tiles_here].to(linear.weight.device, torch.float32)
        self.ranks = ranks
        self._sampled_weight = sampled_weight
        rows = weight.detach()[self.here]
        # A view would keep the rows of other ranks, of what was rounded for this alone.
        self._weight = rows if weight is linear.weight else rows.clone()
        self._scale = None
        if scale is not None:
            self._scale = scale.to(rows.dtype)
            self._weight = rows * self._scale
        self._fixed_here = None if fixed is None else fixed[self.here].to(linear.weight.device)

    def begin(self, settings: Settings, stream: tuple[int, ...], packed: Tensor | None) -> None:
        """Start a micro-batch with noise of the given stream; ``packed`` says the same (`soft_mask_triton.pack`)."""
        self._temperatures = settings.temperatures
        self._stream = stream
        self._packed = packed

    def draw(self) -> Tensor:
        """This rank's rows of the masked weight ``[rows here, K]``; called again in this micro-batch, the same."""
        if len(self._weight):
            part = self._sampled_weight(
                self._weight,
                self._known_patterns(),
                self.tiles,
                self.tile,
                self._temperatures,
                self._stream,
                first_row=self.here.start,
                rows=self.shape[0],
                packed=self._packed,
            )
        else:
            # Other ranks hold all of it. What is gathered must have a gradient on every rank: the exchange is common.
            nothing = torch.zeros((), device=self._weight.device)
            part = Masked(self._weight.clone().requires_grad_(), nothing, nothing)
        # A recomputed block must compute the sums again, since it must save the same tensors. Keeping those would keep
        # the recomputed masks of the whole model.
        if self.sums is None:
            self.sums = part.kept, part.squares
        # Exactly what it is without: the scale is of powers of two.
        return part.weight if self._scale is None else part.weight / self._scale

    def size(self) -> float:
        """The norm of the whole weight, inputs counted by their scale."""
        weight = self.linear.weight.detach().float()
        return float(torch.linalg.vector_norm(weight if self._scale is None else weight * self._scale.float()))

    def _known_patterns(self) -> Tensor:
        known = self._fixed_here if self.patterns is None else self.patterns
        assert known is not None, "patterns are either learned or fixed"
        return known

    def best_patterns(self) -> Tensor:
        """The patterns if hardened now, uint8 ``[rows here, K/4]``."""
        known = self._known_patterns().detach()
        return known.argmax(0).to(torch.uint8) if known.is_floating_point() else known

    def whole_patterns(self, here: Tensor) -> Tensor:
        """Those of the whole weight, uint8 ``[N, K/4]`` on the CPU, on all ranks, from those of the rows here."""
        if self.fixed is not None:
            return self.fixed
        return self.ranks.collect(here, self.shape[0], self.tile[0]).cpu()

    def all_tiles(self) -> Tensor:
        """The tile logits of the whole weight ``[R, C]`` on the CPU, on all ranks; zeros where none are learned."""
        if self.tiles is None:
            return torch.zeros(self.sizes.shape)
        return self.ranks.collect(self.tiles, self.sizes.shape[0], 1).float().cpu()


class Drawn(Protocol):
    """A ``Linear`` whose weight is made anew for every pass, by ranks that hold whole rows of tiles each."""

    linear: nn.Linear
    shape: tuple[int, int]
    tile: TileShape
    ranks: Ranks

    def draw(self) -> Tensor:
        """This rank's rows ``[rows here, K]``; called again in this micro-batch, the same."""


class Objective(Protocol):
    """What of a recipe says how a model's loss is computed (`patch.learn.recipe.Recipe` has the fields)."""

    @property
    def distillation(self) -> float: ...
    @property
    def block_distillation(self) -> float: ...
    @property
    def follows_dense(self) -> bool: ...
    @property
    def activation_checkpointing(self) -> bool: ...


def drawn(linears: Sequence[Drawn]) -> list[Tensor]:
    """The masked weights ``[N, K]`` of a block, from all ranks."""
    if not linears:
        return []
    first = linears[0]
    return first.ranks.gather([m.draw() for m in linears], [m.shape[0] for m in linears], first.tile[0])


class _DrawnAhead:
    """The masked weights of each block, drawn and gathered while the block before runs, on a stream of their own.

    Autograd runs backward on the stream of the forward pass: a block's gradients are exchanged, and followed through
    its masks, while the block before it is still at its own. Blocks must run in their order, each once a micro-batch.
    """

    def __init__(self, blocks: Sequence[Sequence[Drawn]], device: torch.device) -> None:
        self._blocks = blocks
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[int, tuple[list[Tensor], torch.cuda.Event | None]] = {}

    def begin(self) -> None:
        """Start a micro-batch."""
        # What a failed one left there is of other noise.
        self._ahead.clear()
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        self._draw(0)

    def weights(self, block: int) -> list[Tensor]:
        """Those of one block; begins to draw those of the next."""
        self._draw(block + 1)
        weights, ready = self._ahead.pop(block)
        if ready:
            here = torch.cuda.current_stream()
            here.wait_event(ready)
            for weight in weights:
                # Its memory may serve this object's stream again only when the stream here has done with it.
                weight.record_stream(here)
        return weights

    def _draw(self, block: int) -> None:
        if block < len(self._blocks):
            with torch.cuda.stream(self._stream):
                weights = drawn(self._blocks[block])
                self._ahead[block] = weights, self._stream.record_event() if self._stream else None


class MaskedBlock:
    """Stands in for a decoder block's forward, with the weights of its linears masked.

    The masked weights lie over the parameters as attributes of the same name for as long as the block runs. It may run
    twice in a micro-batch, since checkpointed blocks are recomputed, and draws the same noise both times.
    """

    def __init__(
        self, forward: Callable[..., Any], linears: Sequence[Drawn], weights: Callable[[], list[Tensor]]
    ) -> None:
        self._forward = forward
        self._linears = linears
        self._weights = weights

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        weights = self._weights()
        try:
            for masked, weight in zip(self._linears, weights, strict=True):
                vars(masked.linear)["weight"] = weight
            return self._forward(*inputs, **keywords)
        finally:
            for masked in self._linears:
                vars(masked.linear).pop("weight", None)


def with_usual_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder block's forward whose attention mask, while a CUDA graph is captured, is that of the call before.

    Where transformers sees a capture, it writes out masks that it else leaves to the attention kernel, as ``None`` for
    causal; the kernel is slower with them. Masks depend on the shape of the tokens alone.
    """
    usual: list[Any] = [None]

    def run(*inputs: Any, **keywords: Any) -> Any:
        if "attention_mask" in keywords:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                keywords["attention_mask"] = usual[0]
            usual[0] = keywords["attention_mask"]
        return forward(*inputs, **keywords)

    return run


class Losses:
    """The model's loss on a micro-batch, with its weights masked.

    Args:
        compiled: run decoder blocks and losses through ``torch.compile``.
        ahead: draw the masks of a block while the one before it runs. Not under activation checkpointing, which draws
            them again in the backward pass, within the block.
    """

    def __init__(
        self, model: nn.Module, linears: Mapping[str, Drawn], recipe: Objective, compiled: bool, ahead: bool
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._loss: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_loss) if compiled else _loss
        self._distance: Callable[..., Tensor] = torch.compile(distance) if compiled else distance
        self._plain: dict[nn.Module, Callable[..., Any]] = {}
        self._masked: dict[nn.Module, Callable[..., Any]] = {}
        by_module = {m.linear: m for m in linears.values()}
        blocks = decoder_blocks(model)
        linears_of = [[by_module[module] for module in block.modules() if module in by_module] for block in blocks]
        self._ahead: _DrawnAhead | None = None
        if ahead and not recipe.activation_checkpointing:
            self._ahead = _DrawnAhead(linears_of, next(iter(by_module)).weight.device)
        for index, (block, here) in enumerate(zip(blocks, linears_of, strict=True)):
            forward = torch.compile(block.forward, dynamic=False) if compiled else block.forward
            weights = functools.partial(self._ahead.weights, index) if self._ahead else functools.partial(drawn, here)
            masked: Callable[..., Any] = MaskedBlock(forward, here, weights)
            if recipe.activation_checkpointing:
                # Not transformers' own switch, which works only in training mode, where dropout is on.
                masked = functools.partial(checkpoint, masked, use_reentrant=False, preserve_rng_state=False)
            self._plain[block], self._masked[block] = with_usual_mask(forward), with_usual_mask(masked)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of ``tokens`` ``[sequences, length]``, before penalties, and the cross entropy that is in it."""
        share, factor = self._recipe.distillation, self._recipe.block_distillation
        run = functools.partial(self._model, input_ids=tokens, use_cache=False, output_hidden_states=factor > 0)
        dense = None
        if self._recipe.follows_dense:
            with torch.no_grad(), standing_in(self._plain):
                dense = run()
        with standing_in(self._masked):
            if self._ahead:
                self._ahead.begin()
            ours = run()
        # Shifting the targets instead of the logits saves a copy of the largest tensor there is.
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
        wanted = dense.logits.flatten(0, 1) if dense and share else None
        loss, cross_entropy = self._loss(ours.logits.flatten(0, 1), targets, wanted, share)
        if dense and factor:
            # The first are the embeddings.
            pairs = zip(ours.hidden_states[1:], dense.hidden_states[1:], strict=True)
            loss = loss + factor * torch.stack([self._distance(*pair) for pair in pairs]).mean()
        return loss, cross_entropy


def _loss(logits: Tensor, targets: Tensor, dense: Tensor | None, distillation: float) -> tuple[Tensor, Tensor]:
    """The loss per token, and the cross entropy of the text.

    Args:
        logits: ``[tokens, vocabulary]``.
        targets: int64 ``[tokens]``, -100 where there is none.
        dense: logits of the dense model, or None.
        distillation: share of the divergence from it (see `Recipe`).
    """
    cross_entropy = F.cross_entropy(logits.float(), targets, ignore_index=-100)
    if dense is None:
        return cross_entropy, cross_entropy
    wanted = torch.log_softmax(dense.float(), -1)
    divergence = (wanted.exp() * (wanted - torch.log_softmax(logits.float(), -1))).sum(-1)
    divergence = torch.where(targets >= 0, divergence, 0.0).sum() / (targets >= 0).sum()
    return (1 - distillation) * cross_entropy + distillation * divergence, cross_entropy


def distance(ours: Tensor, dense: Tensor) -> Tensor:
    """Squared distance of hidden states ``[sequences, length, features]`` over the dense ones' square, a token's mean.

    Token by token, since a few, such as the first, have states that are larger than all others together.
    """
    off, square = (ours.float() - dense.float()).square().sum(-1), dense.float().square().sum(-1)
    return (off / square.clamp_min(torch.finfo(square.dtype).tiny)).mean()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model without gradients or dropout, in full float32 precision; on leaving, as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model), full_float32():
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
