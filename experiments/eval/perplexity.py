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
from transformers import PreTrainedModel

from patch.contexts import evaluating

# Positions whose float32 logits exist at a time: 0.5 GiB at a vocabulary of 128k.
_CHUNK = 1024

# What some architectures do to the logits after the output embedding (Gemma 2 and 3, Cohere, Granite).
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


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


def _decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The parts that make the logits, where ``head(decoder(tokens).last_hidden_state)`` is all that the model does."""
    if not isinstance(model, PreTrainedModel):
        return None
    if any(getattr(model.config, name, None) not in (None, 1) for name in _LOGIT_TRANSFORMS):
        return None
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    return None if head is None or decoder is model else (decoder, head)


def target_log_probs(
    model: nn.Module, tokens: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens at chosen positions; to be called on a model in evaluation mode.

    Args:
        tokens: int64 ``[batch, length]``, causal: a position sees itself and what is left of it, so padding goes right.
        rows: int64 ``[P]``, which sequence.
        columns: int64 ``[P]``, the position whose next token is predicted.
        targets: int64 ``[P]``, that next token.

    Returns:
        float32 ``[P]`` natural-log probabilities, and bool ``[P]``: the target is the most probable token.
    """
    if parts := _decoder_and_head(model):
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
    """
    model.to(device)
    count, length = windows.shape
    losses = []
    with evaluating(model), torch.inference_mode():
        for start in range(0, count, batch):
            tokens = windows[start : start + batch].to(device)
            size = len(tokens)
            rows = torch.arange(size, device=device).repeat_interleave(length - 1)
            columns = torch.arange(length - 1, device=device).repeat(size)
            log_probs, _ = target_log_probs(model, tokens, rows, columns, tokens[:, 1:].flatten())
            losses.append(-log_probs.double().reshape(size, length - 1).mean(1).cpu())
            if on_batch:
                on_batch(start + size, count)
    per_window = torch.cat(losses)
    mean_loss = per_window.mean()
    value = mean_loss.exp()
    stderr = (value * per_window.std() / math.sqrt(count)).item() if count > 1 else None
    each = tuple(per_window.tolist())
    return PerplexityResult(value.item(), mean_loss.item(), stderr, count * (length - 1), count, each)
