"""The soft mask of one weight, eager: logits, noise and temperature -> a mask in [0, 1] that gradients flow through.

PATCH (and, with ``t = 0``, MaskLLM): ``M = t + (1 - t) * m24``, ``t`` per tile (1 = dense) and ``m24`` per element::

    m24 = softmax((pattern_scale * logits + gumbel) / tau) @ table     table: [6, 4], the six ways to keep two of four
    t   = sigmoid((tile_scale * logit + logistic) / tau)               the two-way Gumbel-softmax over {0, logit}

Pattern logits are stored as six planes, ``[6, N, K/4]``: on a CPU the softmax over planes takes 0.12 ms where the
softmax over a trailing dimension of six takes 2.5 ms (768 x 256 weight, two threads), and a fused kernel reads planes
coalesced. Much of what remains is drawing the uniform numbers: a hand-written backward pass was tried, and gained
nothing in a whole step (masks 70 ms beside the model's 330: 3.1 million weights, 2048 tokens, two threads).

Noise is an argument: this module is the reference that a fused kernel must equal given the same noise.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patch.mask import GROUP, KEPT_PAIRS, TileShape, expand_tiles, pattern_table


def stream_seed(*parts: int | str) -> int:
    """The seed of one random stream: the first 63 bits of SHA-256 over the parts, joined by slashes.

    Whoever knows the parts, such as (seed, kind, step, microbatch, weight), draws the same numbers again: in the
    recomputation of a checkpointed block, after a resume, or on another rank.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, device: torch.device | str) -> torch.Generator:
    """A generator on ``device``. CPU and CUDA draw different numbers from one seed."""
    return torch.Generator(device).manual_seed(seed)


def _uniform(shape: Sequence[int], source: torch.Generator, dtype: torch.dtype) -> Tensor:
    # The least value keeps logarithms finite; it stands for the half step below the lattice that is drawn from.
    lattice = 2.0 ** (-24 if dtype == torch.float32 else -53)
    return torch.empty(shape, dtype=dtype, device=source.device).uniform_(generator=source).clamp_min_(lattice / 2)


def gumbel(shape: Sequence[int], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise: ``-log(-log(uniform))``; finite; float32 or float64."""
    return _uniform(shape, source, dtype).log_().neg_().log_().neg_()


def logistic(shape: Sequence[int], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard logistic noise, the difference of two Gumbel variables: ``log(u) - log(1 - u)``; finite."""
    return torch.logit(_uniform(shape, source, dtype))


def soft_patterns(logits: Tensor, noise: Tensor, tau: float, scale: float) -> Tensor:
    """A relaxed 2:4 mask; each group sums to two, and ``tau -> 0`` leaves one pattern.

    Args:
        logits: ``[6, N, K/4]``, one plane a pattern.
        noise: like ``logits``, from `gumbel`.
        tau: temperature, positive.
        scale: factor of the logits.

    Returns:
        ``[N, K]`` in [0, 1], of the dtype of ``logits``.
    """
    _, rows, groups = logits.shape
    exponents = torch.add(noise, logits, alpha=scale).div_(tau)
    # Shares too small to count beside one are held at a floor and get no gradient. Left alone they become denormal
    # numbers, on which the matrix products of a CPU run four times slower once tau is small.
    floor = math.log(torch.finfo(logits.dtype).eps / 64)
    exponents = exponents.sub_(exponents.detach().amax(0)).clamp_min(floor)
    shares = torch.softmax(exponents, 0).flatten(1)
    return (shares.t() @ pattern_table(logits.device, logits.dtype)).view(rows, groups * GROUP)


def soft_tiles(logits: Tensor, noise: Tensor, tau: float, scale: float) -> Tensor:
    """Relaxed tile map ``t``, 1 = dense, of the shape of ``logits`` ``[R, C]``; ``tau -> 0`` leaves zeros and ones.

    Args:
        logits: ``[R, C]``.
        noise: like ``logits``, from `logistic`.
        tau: temperature, positive.
        scale: factor of the logits.
    """
    return torch.sigmoid(torch.add(noise, logits, alpha=scale).div_(tau))


def soft_mask(tiles: Tensor | None, two_four: Tensor, tile: TileShape) -> Tensor:
    """``t + (1 - t) * m24``, ``[N, K]``.

    Args:
        tiles: ``t`` ``[R, C]``; None for ``t = 0``.
        two_four: ``m24`` ``[N, K]``, relaxed, or boolean where patterns are fixed.
        tile: ``(rows, cols)``.
    """
    if tiles is None:
        return two_four
    dense = expand_tiles(tiles, two_four.shape, tile)
    return dense + (1 - dense) * two_four


def kept_elements(tiles: Tensor, sizes: Tensor) -> Tensor:
    """Kept elements of one weight, a scalar: a tile keeps half of its elements plus a share ``t`` of the other half.

    Args:
        tiles: ``t`` ``[R, C]``.
        sizes: elements of each tile ``[R, C]``, floating.
    """
    return (sizes * (0.5 + 0.5 * tiles)).sum()


def pattern_prior(patterns: Tensor) -> Tensor:
    """How many elements each pattern shares with a one-shot mask's, less one: -1, 0 or 1; int8 ``[6, N, K/4]``.

    Args:
        patterns: uint8 ``[N, K/4]``.
    """
    table = pattern_table(patterns.device, torch.int8)
    # Summed, not multiplied: there are no integer matrix products on CUDA.
    shared = (table[:, None] * table[None]).sum(-1, dtype=torch.int8) - 1
    return torch.stack([shared[pattern][patterns.long()] for pattern in range(len(KEPT_PAIRS))])


def tile_prior(scores: Tensor, sparsity: float) -> Tensor:
    """+1 for the best ``round(2 * tiles * (density - 0.5))`` tiles of one weight, -1 for the rest; int8 ``[R, C]``.

    Every weight starts at the same density. Ties go to the earlier tile.

    Args:
        scores: ``[R, C]``, higher = rather dense.
        sparsity: target of the whole model, 0 to 0.5.
    """
    dense = round(2 * scores.numel() * (0.5 - sparsity))
    best = scores.flatten().argsort(descending=True, stable=True)[:dense]
    prior = torch.full((scores.numel(),), -1, dtype=torch.int8, device=scores.device)
    prior[best] = 1
    return prior.view(scores.shape)
