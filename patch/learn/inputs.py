"""How large each input of a linear is beside its others, which Wanda multiplies magnitudes by (arXiv:2306.11695).

Every token counts alike, by the shares that its inputs have in its square: a few, such as the first of a sequence, have
inputs that are larger than those of all others together.

    >>> scales = input_scales(model, tokens)   # per weight [K], powers of two
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from patch.contexts import evaluating, unwritten
from patch.layers import require_linears
from patch.learn.distributed import ALONE, Ranks

# Of the powers of two, either way: float16 has few below its normal numbers.
_MOST = 4


def input_scales(model: Any, sequences: Tensor, ranks: Ranks = ALONE, at_once: int = 1) -> dict[str, Tensor]:
    """The size of each input of every prunable weight, by the dense model.

    Powers of two, so that weights that are multiplied by them, and divided again, are what they were. Multiplied, a
    weight is about as large as before (Frobenius), so that weights stand to each other as they did.

    Args:
        model: a dense transformers causal language model on its device; stays as it is.
        sequences: token ids, int64 ``[sequences, length]``.
        ranks: each takes its share of the sequences; all get the same numbers.
        at_once: sequences of a forward pass.

    Returns:
        Per weight float32 ``[K]`` on its device, from 1/16 to 16.
    """
    linears = require_linears(model, "measuring inputs")
    shares = {name: torch.zeros(linear.in_features, device=linear.weight.device) for name, linear in linears.items()}

    def counting(share: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().float().square().flatten(0, -2)
            total = squares.sum(-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)
            share.add_((squares / total).sum(0))

        return count

    device = next(iter(shares.values())).device
    with torch.no_grad(), evaluating(model), unwritten(model), ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_pre_hook(counting(shares[name])).remove)
        for part in sequences[ranks.rank :: ranks.size].split(at_once):
            model(input_ids=part.to(device), use_cache=False)
    return {name: _powers(linear.weight, ranks.total(shares[name])) for name, linear in linears.items()}


def _powers(weight: Tensor, share: Tensor) -> Tensor:
    """Powers of two nearest to the roots of ``share`` that leave the norm of ``weight`` about as it is."""
    sizes, weight = share.sqrt(), weight.detach().float()
    tiny, most = torch.finfo(sizes.dtype).tiny, torch.finfo(sizes.dtype).max
    # Of a linear that was given nothing but zeros all inputs count alike.
    scaled = torch.linalg.vector_norm(weight * sizes).clamp_min(tiny)
    factor = (torch.linalg.vector_norm(weight) / scaled).clamp_max(most)
    return (sizes * factor).clamp_min(tiny).log2().round().clamp(-_MOST, _MOST).exp2()
