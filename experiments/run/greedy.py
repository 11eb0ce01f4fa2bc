"""Whether a packed model writes what its weights write unpacked: greedy text, token by token.

The packed model continues prompts, and the unpacked one is asked for its next token after every prefix of what came
out, so that one different token does not make all that follow incomparable. A token is *decided* if the unpacked
model's best logit leads the second by more than rounding explains: decided tokens must be the same. What rounding does
is measured at every place: the standard deviation, over the vocabulary, of the difference between the unpacked model's
logits and those of its weights in float32. With 8 bits that is much, since an activation near the middle of two values
may become either.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patch.contexts import evaluating

# How many prompts are continued at once, of how many tokens, and by how many; on a CPU, where every step unpacks all
# weights, by fewer.
PROMPTS, PROMPT, TOKENS, TOKENS_ON_CPU = 16, 32, 64, 4
# Standard errors of the difference of two logits that decide a token.
ERRORS = 3


@dataclass(frozen=True)
class Agreement:
    """What became of greedy tokens.

    Attributes:
        tokens: that were written.
        same: of them, those that the unpacked model would write.
        decided: those whose lead exceeds rounding.
        decided_same: of those, those that the unpacked model would write.
    """

    tokens: int
    same: int
    decided: int
    decided_same: int

    def shares(self) -> dict[str, float]:
        """As rows have them: of decided tokens, if any are, those that are the same; of all, these and the decided."""
        agreed = {"greedy_agreement": self.decided_same / self.decided} if self.decided else {}
        return agreed | {"greedy_same": self.same / self.tokens, "greedy_decided": self.decided / self.tokens}


@torch.inference_mode()
def continued(model: nn.Module, prompts: Tensor, count: int) -> Tensor:
    """Prompts ``[batch, length]`` and the ``count`` most probable tokens after them, whatever they are."""
    found, ids, cache = prompts, prompts, None
    with evaluating(model):
        for _ in range(count):
            out: Any = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1].float().argmax(-1, keepdim=True)
            found = torch.cat([found, ids], 1)
    return found


@torch.inference_mode()
def agreement(
    packed: nn.Module, unpacked: nn.Module, exact: nn.Module, prompts: Tensor, count: int, bound: float
) -> Agreement:
    """How greedy tokens of a packed model are those of its weights unpacked.

    Args:
        exact: the unpacked model in float32.
        prompts: token ids, integer ``[batch, length]``.
        count: tokens that are written after each.
        bound: how many times as far from the unpacked model's logits as those in float32 are the packed ones may be.
    """
    text = continued(packed, prompts, count)

    def after_prefixes(model: nn.Module) -> Tensor:
        with evaluating(model):
            logits: Tensor = model(input_ids=text[:, :-1], use_cache=False).logits[:, -count:]
        return logits.float()

    logits = after_prefixes(unpacked)
    rounding = (after_prefixes(exact) - logits).std(-1)
    best, second = logits.topk(2).values.unbind(-1)
    decided = best - second > ERRORS * math.sqrt(2) * bound * rounding
    same = logits.argmax(-1) == text[:, -count:]
    return Agreement(same.numel(), int(same.sum()), int(decided.sum()), int((same & decided).sum()))
