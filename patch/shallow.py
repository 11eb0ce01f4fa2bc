"""A smaller dense model: decoder blocks dropped, one after the other, each time the one that is missed least.

    >>> dropped = drop_blocks(model, 7, windows, "cuda")
    >>> [each.block for each in dropped]

What is missed is measured on the model's predictions: the Kullback-Leibler divergence of the next token's distribution
from that of the whole model, in the mean over calibration text. Nothing is trained. Up to the block that is tried a
window's states are those of the model with it, so of each window they are computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patch.contexts import evaluating, standing_in
from patch.errors import UserError
from patch.layers import check_shared, decoder_blocks
from patch.positions import check_model_length


@dataclass(frozen=True)
class Dropped:
    """One block that was dropped.

    Attributes:
        block: its index in the whole model.
        divergence: of the model without it and those dropped before it, in nats a token.
    """

    block: int
    divergence: float


@torch.no_grad()
def drop_blocks(
    model: Any,
    count: int,
    windows: Tensor,
    device: torch.device | str,
    on_trial: Callable[[int, int], None] | None = None,
) -> list[Dropped]:
    """Drop ``count`` blocks of a causal language model, in place; its configuration says so too.

    Args:
        windows: calibration token ids, integer ``[n, length]``, one at a time run through what comes after every block
            that is tried.
        device: where the model runs meanwhile; it ends where it was.
        on_trial: called after each window with how many blocks were tried, in whole, and of how many.

    Returns:
        The dropped blocks, in the order in which they went.

    Raises:
        UserError: if no block would be left, windows do not fit, or the model cannot be built with fewer blocks.
    """
    check_shared(model)
    check_model_length(model, windows.shape[1], "calibration windows")
    blocks = list(decoder_blocks(model))
    if not 0 < count < len(blocks):
        raise UserError(
            f"{count} of {len(blocks)} decoder blocks cannot be dropped: give a share that drops 1 to {len(blocks) - 1}"
        )
    home = next(model.parameters()).device
    trials = sum(len(blocks) - step for step in range(count))
    dropped: list[Dropped] = []
    tried = 0
    model.to(device)
    with evaluating(model):
        whole = [_states(model, window.to(device)) for window in windows.split(1)]
        while len(dropped) < count:
            gone = {each.block for each in dropped}
            left = len(blocks) - len(gone)
            totals = dict.fromkeys((index for index in range(len(blocks)) if index not in gone), 0.0)
            for done, (window, states) in enumerate(zip(windows.split(1), whole, strict=True), start=1):
                for index, divergence in _divergences(model, blocks, gone, window.to(device), states).items():
                    totals[index] += divergence
                if on_trial is not None:
                    on_trial(tried + left * done // len(windows), trials)
            tried += left
            costs = {index: total / windows.numel() for index, total in totals.items()}
            least = min(costs, key=lambda index: (costs[index], index))
            dropped.append(Dropped(least, costs[least]))
    remove_blocks(model, {each.block for each in dropped})
    model.to(home)
    return dropped


def remove_blocks(model: Any, indices: set[int]) -> None:
    """Take decoder blocks out of a model, and out of its configuration.

    Raises:
        UserError: if a model of that configuration would not be this one.
    """
    blocks = decoder_blocks(model)
    kept = nn.ModuleList(block for index, block in enumerate(blocks) if index not in indices)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is blocks:
                module.register_module(name, kept)
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        # One entry a block, such as the kinds of attention.
        if "layer" in name and isinstance(value, list) and len(value) == len(blocks):
            setattr(config, name, [each for index, each in enumerate(value) if index not in indices])
    config.num_hidden_layers = len(kept)
    for index, block in enumerate(kept):
        for part in block.modules():
            # Where the cache keeps a block's keys and values.
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = index  # type: ignore[assignment]
    _check_configuration(model)


def _check_configuration(model: Any) -> None:
    with torch.device("meta"):
        built = type(model)(model.config)
    ours, theirs = ({name: part.shape for name, part in each.state_dict().items()} for each in (model, built))
    if ours != theirs:
        name = min(ours.keys() ^ theirs.keys(), default="a shape")
        raise UserError(
            f"{type(model).__name__} cannot be built with fewer blocks: its configuration disagrees on {name}"
        )


def _states(model: Any, tokens: Tensor) -> Tensor:
    """What the head is applied to, ``[1, length, hidden]``."""
    return model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state


def _divergences(
    model: Any, blocks: Sequence[nn.Module], gone: set[int], tokens: Tensor, whole: Tensor
) -> dict[int, float]:
    """Of the model without one more block, for each that is left, the divergence in nats, summed over the tokens.

    Args:
        gone: blocks that are dropped already.
        whole: the states of the whole model.
    """
    head = model.get_output_embeddings()
    wanted = head(whole).float().log_softmax(-1)
    given: dict[nn.Module, Tensor] = {}
    beside: dict[nn.Module, tuple[Any, ...] | None] = {}

    def watched(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Of every block what it is given, and what it returns beside states; one that is gone passes states on."""
        given[module] = args[0] if args else kwargs["hidden_states"]
        beside[module] = output[1:] if isinstance(output, tuple) else None
        return returned(module, given[module]) if module in skipped else output

    def returned(module: nn.Module, states: Tensor) -> Any:
        rest = beside[module]
        return states if rest is None else (states, *rest)

    def passed_on(module: nn.Module, states: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        return returned(module, (args[0] if args else kwargs["hidden_states"]) if states is None else states)

    skipped = {blocks[index] for index in gone}
    handles = [block.register_forward_hook(watched, with_kwargs=True) for block in blocks]
    try:
        _states(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for index in (each for each in range(len(blocks)) if each not in gone):
        # What comes before is not computed again: all give what this one is given.
        before = {block: partial(passed_on, block, given[blocks[index]]) for block in blocks[: index + 1]}
        later = {block: partial(passed_on, block, None) for block in skipped if block not in before}
        with standing_in(before | later):
            ours = head(_states(model, tokens)).float().log_softmax(-1)
        found[index] = float((wanted.exp() * (wanted - ours)).sum())
    return found
