"""Log-probabilities of answers to prompts: each distinct input is run once, and read only where answers are."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from experiments.eval.perplexity import logit_parts, target_log_probs
from patch.contexts import evaluating
from patch.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Tokens per forward pass with batch="auto": enough to fill the device, far from filling its memory.
_AUTO_TOKENS = {"cuda": 32768, "cpu": 4096}

# Texts handed to the tokenizer at a time, so that its results do not pile up before they are packed.
_TOKENIZER_TEXTS = 10_000


@dataclass(frozen=True, eq=False)
class Encoded:
    """Requests as tokens: distinct model inputs, the longest first, and where in them each request's answer is read.

    Attributes:
        inputs: int32 tokens of each distinct input.
        first: int64 ``[inputs + 1]``, where the answers read from an input begin in the arrays below.
        request: int64 ``[answers]``, which request an answer belongs to.
        begin: int64 ``[answers]``, the position that predicts the answer's first token.
        answers: int32 tokens of each answer.
    """

    inputs: list[np.ndarray]
    first: np.ndarray
    request: np.ndarray
    begin: np.ndarray
    answers: list[np.ndarray]


def encode(requests: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """Tokenise requests as lm-eval's wrapper for causal models does, and merge those that need the same model input."""
    # Trailing spaces of a context belong to the answer, where the tokenizer would put them.
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + answer) for context, answer in requests]
    tokens = _tokenise({context for context, _ in moved} | {context + answer for context, answer in moved}, tokenizer)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    shared: dict[bytes, list[tuple[int, int, np.ndarray]]] = {}
    for number, (context, answer) in enumerate(moved):
        whole = tokens[context + answer]
        begin = len(tokens[context])
        if not context:
            # Nothing to condition on: the answer follows the token that begins a text.
            whole = np.array(tokenizer(answer, add_special_tokens=False)["input_ids"], dtype=np.int32)
            whole = whole if whole[0] == prefix else np.concatenate([np.array([prefix], dtype=np.int32), whole])
            begin = 1
        if begin >= len(whole):
            raise UserError(f"the tokenizer has no token for the answer {answer!r}")
        shared.setdefault(whole[:-1].tobytes(), []).append((number, begin - 1, whole[begin:]))
    ordered = sorted(shared.items(), key=lambda entry: -len(entry[0]))
    answers = [answer for _, of_input in ordered for answer in of_input]
    return Encoded(
        inputs=[np.frombuffer(key, dtype=np.int32) for key, _ in ordered],
        first=np.cumsum([0, *(len(of_input) for _, of_input in ordered)]),
        request=np.array([number for number, _, _ in answers]),
        begin=np.array([begin for _, begin, _ in answers]),
        answers=[answer for _, _, answer in answers],
    )


def score(
    model: nn.Module,
    encoded: Encoded,
    batch: int | str,
    device: torch.device | str,
    on_batch: Callable[[int, int], None] | None,
) -> list[tuple[float, bool]]:
    """Each request's summed log-probability of its answer, and whether greedy decoding would give that answer."""
    from lm_eval.models.utils import resolve_max_length

    longest = resolve_max_length(getattr(model, "config", None))
    too_long = sum(len(tokens) > longest for tokens in encoded.inputs)
    if too_long:
        logger.warning("%d of %d prompts are cut from the left to %d tokens", too_long, len(encoded.inputs), longest)
    per_token = []
    with evaluating(model), torch.inference_mode():
        probe = torch.from_numpy(encoded.inputs[0][:longest].astype(np.int64)).to(device)
        parts = logit_parts(model, probe[None])
        for start, stop in _batches(encoded.inputs, longest, batch, torch.device(device).type):
            inputs = [tokens[-longest:] for tokens in encoded.inputs[start:stop]]
            padded = np.zeros((len(inputs), max(map(len, inputs))), dtype=np.int64)
            for row, tokens in zip(padded, inputs, strict=True):
                row[: len(tokens)] = tokens
            arrays = (padded, *_answer_positions(encoded, start, stop, longest))
            # Stays on the device: waiting for every batch would leave it idle while the next one is put together.
            ids, rows, columns, targets = (torch.from_numpy(array).to(device) for array in arrays)
            per_token.append(target_log_probs(model, ids, rows, columns, targets, parts))
            if on_batch:
                on_batch(stop, len(encoded.inputs))
    log_probs, greedy = (torch.cat(parts).cpu().numpy() for parts in zip(*per_token, strict=True))
    lengths = [len(answer) for answer in encoded.answers]
    begins = np.cumsum([0, *lengths[:-1]])
    sums = np.add.reduceat(log_probs.astype(np.float64), begins).tolist()
    all_greedy = np.logical_and.reduceat(greedy, begins).tolist()
    order = encoded.request.argsort().tolist()
    return [(sums[place], all_greedy[place]) for place in order]


def _batches(inputs: Sequence[np.ndarray], longest: int, batch: int | str, kind: str) -> Iterator[tuple[int, int]]:
    """Ranges of inputs, which come sorted by length, that are run together."""
    start = 0
    while start < len(inputs):
        width = min(len(inputs[start]), longest)
        size = max(1, _AUTO_TOKENS.get(kind, _AUTO_TOKENS["cpu"]) // width) if batch == "auto" else int(batch)
        stop = min(start + size, len(inputs))
        yield start, stop
        start = stop


def _answer_positions(encoded: Encoded, start: int, stop: int, longest: int) -> tuple[np.ndarray, ...]:
    """Rows and columns of a batch that predict answer tokens, and those tokens; int64."""
    first, last = encoded.first[start], encoded.first[stop]
    answers = encoded.answers[first:last]
    lengths = np.array([len(answer) for answer in answers])
    row = np.repeat(np.arange(stop - start), np.diff(encoded.first[start : stop + 1]))
    cut = np.array([max(0, len(encoded.inputs[start + index]) - longest) for index in range(stop - start)])
    begin = encoded.begin[first:last] - cut[row]
    if (begin < 0).any():
        raise UserError(f"an answer is longer than the {longest} tokens that the model can see")
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return (
        np.repeat(row, lengths),
        np.repeat(begin, lengths) + offset,
        np.concatenate(answers).astype(np.int64),
    )


def _tokenise(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> dict[str, np.ndarray]:
    ordered = sorted(texts)
    tokens: dict[str, np.ndarray] = {}
    for start in range(0, len(ordered), _TOKENIZER_TEXTS):
        portion = ordered[start : start + _TOKENIZER_TEXTS]
        encoded = tokenizer(portion, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        for text, ids in zip(portion, encoded["input_ids"], strict=True):
            tokens[text] = np.array(ids, dtype=np.int32)
    return tokens
