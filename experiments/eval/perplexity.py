"""Perplexity of a language model, as the pruning literature reports it.

`target_log_probs` is also what `experiments.eval.scoring` scores answers with: float32 log-probabilities at chosen
positions, some at a time, so that the logits of whole sequences never exist (4 GiB for four windows of 2048 tokens over
128k words).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patch.contexts import evaluating
from patch.layers import check_present
from patch.positions import check_model_length

# Positions whose float32 logits exist at a time: 0.5 GiB at a vocabulary of 128k.
_CHUNK = 1024

# Tokens on which a model's parts are compared with the model.
_PROBE = 16

Parts = tuple[nn.Module, nn.Module]
"""A decoder and an output embedding that together are the model."""


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how sure it is.

    Attributes:
        value: exp of ``mean_loss``; inf or nan if the model's output is.
        mean_loss: natural-log loss per predicted token.
        stderr: standard error of ``value`` over windows, by the delta method; None for a single window.
        tokens: predictions made, ``windows * (length - 1)``.
        windows: windows evaluated.
        window_losses: mean loss of each window, in order: what two models are compared by, window by window.
    """

    value: float
    mean_loss: float
    stderr: float | None
    tokens: int
    windows: int
    window_losses: tuple[float, ...] = ()


@torch.no_grad()
def logit_parts(model: nn.Module, tokens: Tensor) -> Parts | None:
    """Decoder and output embedding, if applied one after the other they give the very logits of the model.

    Many architectures do more than that (soft caps, multipliers, scales, biases), under names that change: so the two
    are compared, on the first few of ``tokens``. The same operations on the same numbers give the same bits.

    Args:
        tokens: int64 ``[batch, length]``, on the model's device.

    Returns:
        The parts, or None where only the whole model gives its logits.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if head is None or decoder is None or decoder is model:
        return None
    probe = tokens[:1, :_PROBE]
    logits = head(decoder(input_ids=probe, use_cache=False).last_hidden_state)
    whole = model(input_ids=probe, use_cache=False).logits
    return (decoder, head) if logits.dtype == whole.dtype and torch.equal(logits, whole) else None


def target_log_probs(
    model: nn.Module, tokens: Tensor, rows: Tensor, columns: Tensor, targets: Tensor, parts: Parts | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens at chosen positions; to be called on a model in evaluation mode.

    Args:
        tokens: int64 ``[batch, length]``, causal: a position sees itself and what is left of it, so padding goes right.
        rows: int64 ``[P]``, which sequence.
        columns: int64 ``[P]``, the position whose next token is predicted.
        targets: int64 ``[P]``, that next token.
        parts: as from `logit_parts`, which spare the logits of all positions; None takes those of the whole model.

    Returns:
        float32 ``[P]`` natural-log probabilities, and bool ``[P]``: the target is the most probable token.
    """
    if parts is not None:
        decoder, head = parts
        states = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    else:
        head = nn.Identity()
        states = model(input_ids=tokens, use_cache=False).logits
    log_probs, greedy = [], []
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        logits = head(states[rows[part], columns[part]]).float()
        chosen = logits.gather(1, targets[part, None])[:, 0]
        log_probs.append(chosen - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == targets[part])
    return torch.cat(log_probs), torch.cat(greedy)


def perplexity(
    model: nn.Module,
    windows: Tensor,
    device: torch.device | str,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity over windows: exp of the mean loss over the ``length - 1`` predictions of every window.

    Args:
        windows: int64 ``[windows, length]`` from `experiments.data.text.perplexity_windows`.
        device: where the model is moved and run.
        batch: windows per forward pass; changes nothing but speed and memory.
        on_batch: called with (windows done, windows in all).

    Raises:
        UserError: if the windows are longer than the model has positions for, or a weight is not in memory.
    """
    count, length = windows.shape
    check_model_length(model, length, "perplexity windows")
    check_present(model)
    model.to(device)
    losses = []
    with evaluating(model), torch.inference_mode():
        parts = logit_parts(model, windows.to(device))
        for start in range(0, count, batch):
            tokens = windows[start : start + batch].to(device)
            size = len(tokens)
            rows = torch.arange(size, device=device).repeat_interleave(length - 1)
            columns = torch.arange(length - 1, device=device).repeat(size)
            log_probs, _ = target_log_probs(model, tokens, rows, columns, tokens[:, 1:].flatten(), parts)
            losses.append(-log_probs.double().reshape(size, length - 1).mean(1).cpu())
            if on_batch:
                on_batch(start + size, count)
    per_window = torch.cat(losses)
    mean_loss = per_window.mean()
    value = mean_loss.exp()
    stderr = (value * per_window.std() / math.sqrt(count)).item() if count > 1 else None
    each = tuple(per_window.tolist())
    return PerplexityResult(value.item(), mean_loss.item(), stderr, count * (length - 1), count, each)
