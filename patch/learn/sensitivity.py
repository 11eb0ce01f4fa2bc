"""What making a tile 2:4 costs the whole model, to second order: the tiles of all weights on one scale.

One-shot scores compare tiles within a weight; how much an error of its outputs matters they do not say. Against the
dense model's own predictions ``p``, a small change ``d`` of the weights raises the divergence ``KL(p || changed)`` of a
token by ``d^T F d / 2``, with the Fisher information ``F``, the mean of ``g g^T`` over gradients ``g`` of ``log p(y)``
for ``y`` drawn from ``p`` (Theis et al., arXiv:1801.05787, prune whole channels by its diagonal). Here ``d`` is all
that a tile drops at once, so weights that make up for each other are seen to: a tile costs the mean of ``(g d)^2 / 2``.
One draw a token is independent of the others given what came before, so the square over a whole sequence is, in the
mean, the sum over its tokens: one backward pass a sequence serves all tiles.

    >>> cost = tile_sensitivity(model, patterns, (64, 64), tokens, seed=0)   # nats a token
    >>> dense = most_sensitive_tiles(model, patterns, (64, 64), tokens, 0, 0.35)   # tile maps at 35% sparsity
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from patch.budget import cut_globally
from patch.contexts import evaluating, full_float32, unwritten
from patch.errors import UserError
from patch.layers import check_present, prunable_linears, require_linears
from patch.learn.distributed import ALONE, Ranks
from patch.learn.soft_mask import generator, stream_seed
from patch.mask import decode_patterns, tile_sizes, tile_sums
from patch.tiles import GROUP, TileShape, check_sparsity, tile_grid


def tile_sensitivity(
    model: Any,
    patterns: Mapping[str, Tensor],
    tile: TileShape,
    sequences: Tensor,
    seed: int,
    ranks: Ranks = ALONE,
    on_sequence: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Expected rise of the divergence from the dense model if one tile alone becomes 2:4.

    Args:
        model: a dense transformers causal language model; stays as it is.
        patterns: per prunable weight, by its dotted name, uint8 ``[N, K/4]``: what each group would keep.
        tile: ``(rows, cols)``.
        sequences: token ids, int64 ``[sequences, length]``; a forward and backward pass each, with the gradients of all
            prunable weights in memory at once.
        seed: of the tokens that are drawn from the model's predictions.
        ranks: each takes its share of the sequences; all get the same numbers.
        on_sequence: called after each sequence with the number of sequences done, by all ranks, and of all.

    Returns:
        Per weight, in model order, float32 ``[R, C]`` on the CPU, nats a token.

    Raises:
        UserError: if a weight has no patterns or other ones, or a gradient is not finite.
    """
    check_present(model)
    linears = require_linears(model, "ranking tiles over the model")
    for name, linear in linears.items():
        n, k = linear.weight.shape
        if name not in patterns:
            raise UserError(f"{name}: there are no patterns to say what its tiles would drop")
        if tuple(patterns[name].shape) != (n, k // GROUP):
            raise UserError(f"{name}: patterns are {tuple(patterns[name].shape)}, need {(n, k // GROUP)}")
    weights = [linear.weight for linear in linears.values()]
    device = weights[0].device
    kept = [decode_patterns(patterns[name].to(device)) for name in linears]
    squares = [torch.zeros(tile_grid(weight.shape, tile), device=device) for weight in weights]
    with evaluating(model), unwritten(model), full_float32(), torch.enable_grad(), _differentiable(weights):
        for index in range(ranks.rank, len(sequences), ranks.size):
            logits = model(input_ids=sequences[index : index + 1].to(device), use_cache=False).logits[0].float()
            source = generator(stream_seed("sensitivity", seed, index), device)
            drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=source)
            likelihood = torch.log_softmax(logits, -1).gather(1, drawn).sum()
            grads = torch.autograd.grad(likelihood, weights)
            for weight, grad, keep, square in zip(weights, grads, kept, squares, strict=True):
                lost = (weight.detach().float() * grad.float()).masked_fill_(keep, 0)
                square += tile_sums(lost, tile).square_()
            if on_sequence:
                on_sequence(min(index - ranks.rank + ranks.size, len(sequences)), len(sequences))
    cost = {
        name: ranks.total(square).cpu() / (2 * sequences.numel()) for name, square in zip(linears, squares, strict=True)
    }
    if bad := next((name for name, tiles in cost.items() if not tiles.isfinite().all()), None):
        raise UserError(f"{bad}: its gradient is not finite: try the model in bfloat16 or float32")
    return cost


def most_sensitive_tiles(
    model: Any,
    patterns: Mapping[str, Tensor],
    tile: TileShape,
    sequences: Tensor,
    seed: int,
    sparsity: float,
    ranks: Ranks = ALONE,
    on_sequence: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The tiles that cost the model most, as many as stay dense at ``sparsity``; see `tile_sensitivity`.

    Returns:
        Per weight a bool tile map ``[R, C]`` on the CPU.

    Raises:
        UserError: if the sparsity is out of range, or as `tile_sensitivity` does.
    """
    check_sparsity(sparsity)
    cost = tile_sensitivity(model, patterns, tile, sequences, seed, ranks, on_sequence)
    sizes = {name: tile_sizes(linear.weight.shape, tile) for name, linear in prunable_linears(model).items()}
    return cut_globally(cost, sizes, sparsity)


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Weights with gradients; on leaving, as they were."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
