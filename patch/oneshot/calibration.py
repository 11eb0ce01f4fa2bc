"""Streams calibration text through a transformers causal language model, one decoder block at a time.

The model stays where it is, usually on the CPU. Each block in turn moves to the device, runs over all windows while a
statistic of every input of a prunable matrix is accumulated, is handed to the caller, who prunes it in place, and
runs again, so that the next block is calibrated on what the pruned model will feed it. Then it moves back. The device
holds one block, the hidden states of the windows and the statistics of that block, whatever the depth of the model.

    >>> for block in calibrate(model, windows, "cuda", 8, InputNorm):
    ...     for name, weight in block.weights.items():
    ...         weight.mul_(keep(weight, block.statistics[name]))
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patch.contexts import evaluating, unwritten
from patch.errors import UserError
from patch.layers import decoder_blocks, prunable_matrices
from patch.positions import check_model_length

Device = torch.device | str

# Tokens that tell what blocks return.
_FEW = 4


class Statistic(Protocol):
    """What is accumulated over the inputs of a matrix."""

    def add(self, inputs: Tensor, windows: int) -> None:
        """Take in ``inputs``, float32 ``[tokens, K]``, which come from ``windows`` windows."""

    def finite(self) -> bool:
        """Whether every input so far was finite."""


S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Block(Generic[S]):
    """One decoder block, on the device, ready to be pruned in place.

    Attributes:
        index: its position among the decoder blocks.
        weights: its prunable matrices ``[N, K]`` by full dotted name, in model order; views of its parameters.
        statistics: by the same names; one object for matrices that read the same tensor (queries, keys and values).
            Emptied when the next block is asked for.
    """

    index: int
    weights: dict[str, Tensor]
    statistics: dict[str, S]


@dataclass(frozen=True)
class _Call:
    """What one block is called with besides the hidden states: its mask, its position embeddings, flags."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


def blocks_on(model: nn.Module, device: Device) -> Generator[Block[Any], None, None]:
    """Each decoder block without statistics, on ``device`` while it is handed out, then back where it was."""
    for index, block in enumerate(decoder_blocks(model)):
        with _placed(block, device):
            yield Block(index, _weights(model, block), {})


def calibrate(
    model: nn.Module,
    windows: Tensor,
    device: Device,
    batch: int,
    statistic: Callable[[int, torch.device], S],
) -> Generator[Block[S], None, None]:
    """Each decoder block with the statistics of its inputs; prune it before asking for the next one.

    While the iterator lives the model is in evaluation mode without a key-value cache; both are put back when it is
    exhausted, closed, or fails.

    Args:
        model: a transformers causal language model; ends where it was, whatever happens.
        windows: token ids, integer ``[n, length]``; every window is read in full.
        device: where blocks run, and where hidden states ``[n, length, hidden]`` and statistics live.
        batch: windows per forward pass.
        statistic: makes an empty statistic from ``in_features`` and a device.

    Raises:
        UserError: if the windows do not fit the model, a matrix reads something that is not finite or is never
            run, or a block needs more than positions and hidden states (inputs per token, caches shared by layers).
    """
    _check_windows(model, windows)
    if batch < 1:
        raise UserError(f"calibration batch {batch}: must be at least one window")
    return _stream(model, windows, torch.device(device), batch, statistic)


def _stream(
    model: nn.Module,
    windows: Tensor,
    device: torch.device,
    batch: int,
    statistic: Callable[[int, torch.device], S],
) -> Generator[Block[S], None, None]:
    last = len(decoder_blocks(model)) - 1
    with in_turn(model, windows, device, batch) as (states, turns):
        for turn in turns:
            weights = _weights(model, turn.block)
            statistics = _observe(turn, weights, states, lambda k: statistic(k, device))
            yield Block(turn.index, weights, statistics)
            # The caller's loop variable still holds the block while the next one is calibrated; its statistics,
            # the largest thing on the device, must not stay.
            statistics.clear()
            if turn.index < last:
                _advance(turn, states)


@dataclass(frozen=True, eq=False)
class Turn:
    """A decoder block that is on the device now, and runs as the model runs it.

    Attributes:
        index: its position among the decoder blocks.
        block: itself.
        calls: what it is called with beside hidden states, by the size of the batch.
    """

    index: int
    block: nn.Module
    calls: Mapping[int, _Call]

    def run(self, state: Tensor) -> Tensor:
        """The hidden states after the block, of those before it ``[batch, length, hidden]``."""
        own = self.calls[len(state)]
        output = self.block(state, *own.positional, **own.keywords)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def in_turn(
    model: nn.Module, windows: Tensor, device: Device, batch: int
) -> Iterator[tuple[list[Tensor], Iterator[Turn]]]:
    """The hidden states before the first block, one batch of ``windows`` after the other, and each block in turn.

    The model stays where it is; a block is on ``device``, where the states are, until the next one is asked for. While
    this lasts the model is in evaluation mode, without a cache.

    Raises:
        UserError: as `calibrate`.
    """
    device = torch.device(device)
    _check_windows(model, windows)
    blocks = decoder_blocks(model)
    with evaluating(model), _without_cache(model), _one_expert_at_a_time(model):
        states, calls = _record(model, blocks, windows.long().split(batch), device)

        def turns() -> Generator[Turn, None, None]:
            for index, block in enumerate(blocks):
                with _placed(block, device):
                    yield Turn(index, block, {size: _moved(made[index], device) for size, made in calls.items()})

        with closing(turns()) as each:
            yield states, each


def _check_windows(model: nn.Module, windows: Tensor) -> None:
    if windows.ndim != 2 or not windows.numel() or windows.is_floating_point():
        found = f"{windows.dtype} {tuple(windows.shape)}"
        raise UserError(f"calibration windows are {found}: need token ids, integer [windows, length]")
    check_model_length(model, windows.shape[1], "calibration windows")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Embedding):
        low, high = int(windows.min()), int(windows.max())
        if low < 0 or high >= embeddings.num_embeddings:
            raise UserError(
                f"calibration windows hold token ids {low}..{high}, the model has {embeddings.num_embeddings}: "
                "tokenize with the model's own tokenizer"
            )


def _weights(model: nn.Module, block: nn.Module) -> dict[str, Tensor]:
    """The block's prunable matrices, where the block is now: moving it makes views of its parameters stale."""
    here = {id(parameter) for parameter in block.parameters()}
    inside = {name for name, parameter in model.named_parameters() if id(parameter) in here}
    return {name: matrix.weight for name, matrix in prunable_matrices(model).items() if matrix.parameter in inside}


def _decoder(model: nn.Module) -> nn.Module:
    return getattr(model, "get_decoder", lambda: model)()


@contextmanager
def _placed(block: nn.Module, device: Device) -> Iterator[None]:
    home = next(block.parameters()).device
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    configs: list[Any] = [getattr(module, "config", None) for module in (model, _decoder(model))]
    caches = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    for config, _ in caches:
        config.use_cache = False
    try:
        yield
    finally:
        # Backwards: the decoder's configuration may be the model's own, noted twice.
        for config, use_cache in reversed(caches):
            config.use_cache = use_cache


@contextmanager
def _one_expert_at_a_time(model: nn.Module) -> Iterator[None]:
    """Products of one expert each, not of all in one kernel, so that each expert's own inputs are seen."""
    chosen: Any = model
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        yield
        return
    own = chosen.get_experts_implementation()
    chosen.set_experts_implementation("eager")
    try:
        yield
    finally:
        chosen.set_experts_implementation(own)


@torch.no_grad()
def _record(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor], device: torch.device
) -> tuple[list[Tensor], dict[int, list[_Call]]]:
    """The first block's input for every batch, on ``device``, and what each block is called with, by batch size.

    The model's own code embeds, scales, and makes masks and positions; only its blocks are passed over.
    """
    decoder = _decoder(model)
    home = next(decoder.parameters()).device
    states: list[Tensor] = []
    calls: dict[int, list[_Call]] = {}
    beside: list[tuple[Any, ...] | None] = [None] * len(blocks)
    for ids in batches:
        made: list[_Call] = []
        with unwritten(model):
            try:
                entered = _enter(decoder, blocks, beside, made, ids.to(home))
            except (ValueError, TypeError, LookupError):
                # What it does with what its blocks return is more than to take their first element.
                made.clear()
                beside = _beside(decoder, blocks, ids[:1, :_FEW].to(home))
                entered = _enter(decoder, blocks, beside, made, ids.to(home))
        if len(made) != len(blocks):
            raise UserError(f"{type(model).__name__} runs {len(made)} of its {len(blocks)} blocks: cannot calibrate it")
        known = calls.setdefault(len(ids), made)
        if difference := _difference(known, made):
            raise UserError(
                f"{type(model).__name__} gives its blocks inputs that depend on the text: cannot calibrate it "
                f"({difference}, between the first batch of {len(ids)} windows and batch {len(states) + 1})"
            )
        if len(entered) != len(ids):
            raise UserError(
                f"{type(model).__name__} hands its blocks hidden states {tuple(entered.shape)} for {len(ids)} windows: "
                "cannot calibrate it"
            )
        states.append(entered.to(device))
    return states, calls


def _enter(
    decoder: nn.Module,
    blocks: nn.ModuleList,
    beside: Sequence[tuple[Any, ...] | None],
    made: list[_Call],
    ids: Tensor,
) -> Tensor:
    """The first block's input; what each block is called with is appended to ``made``."""
    with _passed_over(blocks, beside, made) as entered:
        decoder(input_ids=ids, use_cache=False)
    return entered[0]


def _beside(decoder: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> list[tuple[Any, ...] | None]:
    """What each block returns beside the hidden states on a few tokens; None where it returns these alone."""
    found: dict[int, tuple[Any, ...] | None] = {}

    def note(index: int, returned: Any) -> None:
        found[index] = tuple(returned[1:]) if isinstance(returned, tuple) else None

    hooks = [
        block.register_forward_hook(lambda _, __, returned, index=index: note(index, returned))
        for index, block in enumerate(blocks)
    ]
    try:
        decoder(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [found.get(index) for index in range(len(blocks))]


@contextmanager
def _passed_over(
    blocks: Iterable[nn.Module], beside: Sequence[tuple[Any, ...] | None], made: list[_Call]
) -> Iterator[list[Tensor]]:
    """While this lasts, blocks append what they are called with to ``made`` and pass on the first one's input.

    Args:
        beside: what each returns beside it.

    Yields a list whose first element will be that input.
    """
    entered: list[Tensor] = []

    def forward(
        hidden_states: Tensor, *positional: Any, _beside: tuple[Any, ...] | None, **keywords: Any
    ) -> Tensor | tuple[Any, ...]:
        made.append(_Call(positional, keywords))
        entered.append(hidden_states)
        # Always the first: some models take element 0 of what a block returns, expecting a tuple.
        return entered[0] if _beside is None else (entered[0], *_beside)

    own = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for (block, _), rest in zip(own, beside, strict=True):
            block.forward = partial(forward, _beside=rest)
        yield entered
    finally:
        for block, before in own:
            if before is not None:
                block.forward = before
            else:
                block.__dict__.pop("forward", None)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in a value, each by the path that leads to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _tensors(part, f"{name}[{place}]")


def _difference(before: list[_Call], now: list[_Call]) -> str | None:
    """What blocks are called with in one batch and not in another, beyond rounding; None if there is nothing."""
    compared: set[tuple[int, int]] = set()
    for index, calls in enumerate(zip(before, now, strict=True)):
        one, other = (dict(_all(call)) for call in calls)
        if one.keys() != other.keys():
            return f"block {index}: {min(one.keys() ^ other.keys())} is there in one of them alone"
        for name, tensor in one.items():
            # Blocks mostly share the same mask objects, which are large: each is compared once.
            pair = id(tensor), id(other[name])
            if pair not in compared and (found := _apart(tensor, other[name])):
                return f"block {index}: {name} {found}"
            compared.add(pair)
    return None


def _all(call: _Call) -> Iterator[tuple[str, Tensor]]:
    yield from _tensors(call.positional, "argument")
    yield from _tensors(call.keywords, "")


def _apart(before: Tensor, now: Tensor) -> str | None:
    """How two tensors differ; None if in nothing but the last digit, which a kernel's division of work decides."""
    if before.shape != now.shape or before.dtype != now.dtype:
        return f"is {before.dtype} {tuple(before.shape)} and {now.dtype} {tuple(now.shape)}"
    if not before.is_floating_point():
        changed = int((before != now).sum())
        return f"differs in {changed} of {before.numel()} elements" if changed else None
    rounding = 2 * torch.finfo(before.dtype).eps
    close = torch.isclose(before, now, rtol=rounding, atol=max(rounding * 1e-2, 1e-5))
    if close.all():
        return None
    largest = float((before.double() - now.double()).abs()[~close].max())
    return f"differs in {int((~close).sum())} of {before.numel()} elements, by up to {largest:.3g}"


def _moved(call: _Call, device: torch.device) -> _Call:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {key: move(part) for key, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(move(part) for part in value)
        return value

    return _Call(move(call.positional), move(call.keywords))


@torch.no_grad()
def _advance(turn: Turn, states: list[Tensor]) -> None:
    """Replace every hidden state by the block's output, one batch at a time so that both never lie there in full."""
    for position, state in enumerate(states):
        states[position] = turn.run(state)


class _Taps(TorchFunctionMode):
    """Hands over what every watched weight is multiplied with, whether a ``Linear`` or one expert of many does it.

    A weight is told by where it begins in memory, as experts are slices of one parameter.
    """

    def __init__(self, weights: dict[str, Tensor], tap: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}
        self._tap = tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if place := _PRODUCTS.get(func):
            operands = [*args, *(kwargs or {}).values()]
            inputs, weight = operands[place[0]], operands[place[1]]
            if name := self._name(weight):
                self._tap(name, inputs)
            elif place == (0, 1) and func is not nn.functional.linear and (name := self._name(inputs)):
                # Mamba multiplies its time steps from the left.
                self._tap(name, weight.transpose(-2, -1))
        return func(*args, **(kwargs or {}))

    def _name(self, operand: Any) -> str | None:
        """The watched weight that an operand is, whichever way it is turned."""
        return self._names.get(operand.data_ptr()) if isinstance(operand, Tensor) and operand.ndim == 2 else None


# Where a product has its inputs and its weight. Conv1D of transformers adds a bias first.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    nn.functional.linear: (0, 1),
    torch.addmm: (1, 2),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), (0, 1)),
}


def _observe(
    turn: Turn,
    weights: dict[str, Tensor],
    states: list[Tensor],
    statistic: Callable[[int], S],
) -> dict[str, S]:
    """Statistics of what each matrix is multiplied with over all batches.

    Matrices that read the very same tensor, one after the other, share their statistic (queries, keys and values),
    unless a batch comes in which they do not.
    """
    statistics: dict[str, S] = {}
    for sharing in (True, False):
        statistics.clear()
        if _gather(turn, weights, states, statistic, statistics, sharing):
            break
    if unseen := [name for name in weights if name not in statistics]:
        raise UserError(
            f"{unseen[0]}: no calibration window reaches this weight, so it cannot be pruned by its inputs "
            f"({len(unseen)} of {len(weights)} in its block): more or other text reaches more experts"
        )
    for name in weights:
        if not statistics[name].finite():
            raise UserError(f"{name}: its calibration inputs are not finite (NaN or overflow): try float32 or bfloat16")
    return statistics


def _gather(
    turn: Turn,
    weights: dict[str, Tensor],
    states: list[Tensor],
    statistic: Callable[[int], S],
    statistics: dict[str, S],
    sharing: bool,
) -> bool:
    """Fill ``statistics``; false, and they are of no use, if matrices that shared their inputs stop doing so."""
    leaders: dict[str, str] = {}
    calls: Counter[str] = Counter()
    last: tuple[str, Tensor] | None = None
    windows = 0
    agree = True

    def tap(name: str, inputs: Tensor) -> None:
        nonlocal last, agree
        leader = last[0] if sharing and last is not None and last[1] is inputs else name
        if name not in leaders:
            leaders[name] = leader
            statistics[name] = statistics[leader] if leader != name else statistic(inputs.shape[-1])
        calls[name] += 1
        # A weight that is run less or more often than the one it shares with has other inputs than that one.
        agree = agree and leaders[name] == leader and calls[name] == calls[leader]
        if leaders[name] == name:
            statistics[name].add(inputs.reshape(-1, inputs.shape[-1]).float(), windows)
        last = leader, inputs

    with _Taps(weights, tap), torch.no_grad():
        for state in states:
            windows, last = len(state), None
            turn.run(state)
            if not agree:
                return False
    return all(calls[name] == calls[leader] for name, leader in leaders.items())
