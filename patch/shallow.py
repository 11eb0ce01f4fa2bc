"""A smaller dense model: decoder blocks dropped, one after the other, each time the one that is missed least.

    >>> dropped = drop_blocks(model, 7, windows, "cuda")
    >>> [each.block for each in dropped]

What is missed is measured on the model's predictions: the Kullback-Leibler divergence of the next token's distribution
from that of the whole model, in the mean over calibration text. Nothing is trained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patch.contexts import evaluating
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
        windows: calibration token ids, integer ``[n, length]``, run through the whole model for every block that is
            tried, one at a time.
        device: where the model runs meanwhile; it ends where it was.
        on_trial: called after each block tried with how many were, and of how many.

    Returns:
        The dropped blocks, in the order in which they went.

    Raises:
        UserError: if no block would be left, windows do not fit, or the model cannot be built with fewer blocks.
    """
    check_shared(model)
    check_model_length(model, windows.shape[1], "calibration windows")
    blocks = list(decoder_blocks(model))
    if not 0 < count < len(blocks):
        raise UserError(f"{count} of {len(blocks)} decoder blocks cannot be dropped: give 1 to {len(blocks) - 1}")
    home = next(model.parameters()).device
    trials = sum(len(blocks) - step for step in range(count))
    dropped: list[Dropped] = []
    tried = 0
    model.to(device)
    with evaluating(model):
        whole = [_states(model, window.to(device)) for window in windows.split(1)]
        while len(dropped) < count:
            gone = {each.block for each in dropped}
            costs: dict[int, float] = {}
            for index in range(len(blocks)):
                if index in gone:
                    continue
                with _without([blocks[each] for each in (*gone, index)]):
                    costs[index] = _divergence(model, windows.split(1), whole, device)
                tried += 1
                if on_trial is not None:
                    on_trial(tried, trials)
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


def _divergence(model: Any, windows: tuple[Tensor, ...], whole: list[Tensor], device: torch.device | str) -> float:
    total, tokens = 0.0, 0
    head = model.get_output_embeddings()
    for window, states in zip(windows, whole, strict=True):
        wanted = head(states).float().log_softmax(-1)
        found = head(_states(model, window.to(device))).float().log_softmax(-1)
        total += float((wanted.exp() * (wanted - found)).sum())
        tokens += window.numel()
    return total / tokens


@contextmanager
def _without(blocks: list[nn.Module]) -> Iterator[None]:
    """While this lasts, blocks pass on what they are given."""

    def passed_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handles = [block.register_forward_hook(passed_on, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
