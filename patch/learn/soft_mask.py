"""The soft mask of one weight, eager: logits, noise and temperature -> a mask in [0, 1] that gradients flow through.

The soft mask of PATCH (Hourri et al., arXiv:2509.23410) and, with ``t = 0``, of MaskLLM (Fang et al.,
arXiv:2409.17481), by the Gumbel-softmax (Jang et al., arXiv:1611.01144): ``M = t + (1 - t) * m24``, ``t`` per tile
(1 = dense) and ``m24`` per element::

    m24 = softmax((pattern_scale * logits + gumbel) / tau) @ table     table: [6, 4], the six ways to keep two of four
    t   = sigmoid((tile_scale * logit + logistic) / tile_tau)          the two-way Gumbel-softmax over {0, logit}

Pattern logits are stored as six planes, ``[6, N, K/4]``: on a CPU the softmax over planes takes 0.12 ms where the
softmax over a trailing dimension of six takes 2.5 ms (768 x 256 weight, two threads), and a fused kernel reads planes
coalesced. Much of what remains is drawing the uniform numbers: a hand-written backward pass was tried, and gained
nothing in a whole step (masks 70 ms beside the model's 330: 3.1 million weights, 2048 tokens, two threads).

Noise is an argument: this module is the reference that `patch.learn.soft_mask_triton`, which does all of it in one pass
over memory, must equal given the same noise.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from patch.learn.recipe import Temperatures
from patch.mask import KEPT_PAIRS, decode_patterns, expand_tiles, pattern_table, tile_sizes
from patch.tiles import GROUP, TileShape


class Masked(NamedTuple):
    """A weight under a soft mask, and the sums that its penalties are made of; gradients flow through all three.

    Attributes:
        weight: ``W * M`` ``[N, K]``, of the dtype of ``W``.
        kept: sum of ``M``, a scalar of the dtype that masks are computed in.
        squares: sum of ``(W * M)^2`` before it is rounded to the dtype of ``W``, a scalar.
    """

    weight: Tensor
    kept: Tensor
    squares: Tensor


class SampledWeight(Protocol):
    """Multiplies a frozen weight by a soft mask drawn for it, as `sampled_weight` does."""

    def __call__(
        self,
        weight: Tensor,
        patterns: Tensor,
        tiles: Tensor | None,
        tile: TileShape,
        temperatures: Temperatures,
        stream: Sequence[int],
        *,
        first_row: int = 0,
        rows: int | None = None,
        packed: Tensor | None = None,
    ) -> Masked: ...


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


def masked_weight(
    weight: Tensor,
    patterns: Tensor,
    tiles: Tensor | None,
    tile: TileShape,
    temperatures: Temperatures,
    pattern_noise: Tensor | None,
    tile_noise: Tensor | None,
) -> Masked:
    """``weight`` under the soft mask that the given noise makes of the logits, computed in the dtype of the noise.

    Args:
        weight: ``[N, K]``, floating; gets no gradient.
        patterns: logits ``[6, N, K/4]``, or fixed patterns, uint8 ``[N, K/4]``.
        tiles: logits ``[R, C]``; None for ``t = 0``.
        tile: ``(rows, cols)``.
        temperatures: temperature and scales.
        pattern_noise: like the pattern logits, from `gumbel`; None for fixed patterns.
        tile_noise: like ``tiles``, from `logistic`; None without tiles.
    """
    if pattern_noise is None:
        two_four = decode_patterns(patterns)
    else:
        logits = patterns.to(pattern_noise.dtype)
        two_four = soft_patterns(logits, pattern_noise, temperatures.tau, temperatures.pattern_scale)
    if tiles is None or tile_noise is None:
        soft = None
        kept = torch.full((), weight.numel() / 2, device=weight.device)
    else:
        soft = soft_tiles(tiles.to(tile_noise.dtype), tile_noise, temperatures.of_tiles, temperatures.tile_scale)
        kept = kept_elements(soft, tile_sizes(weight.shape, tile, weight.device).to(soft.dtype))
    product = weight.detach() * soft_mask(soft, two_four, tile)
    # By way of the norm, which unlike the squares needs no other tensor of the weight's size.
    return Masked(product.to(weight.dtype), kept, torch.linalg.vector_norm(product).square())


def sampled_weight(
    weight: Tensor,
    patterns: Tensor,
    tiles: Tensor | None,
    tile: TileShape,
    temperatures: Temperatures,
    stream: Sequence[int],
    *,
    first_row: int = 0,
    rows: int | None = None,
    packed: Tensor | None = None,
) -> Masked:
    """`masked_weight` with float32 noise drawn by PyTorch's generators on the device of ``weight``.

    Args:
        weight, patterns, tiles, tile, temperatures: see `masked_weight`; of a whole weight, or of some whole
            rows of tiles.
        stream: names the noise: the same numbers, the same mask.
        first_row: where in the whole weight these rows begin; they get the noise that they get there.
        rows: of the whole weight; None if this is all of it.
        packed: of no use here, see `patch.learn.soft_mask_triton.sampled_weight`.
    """
    n = weight.shape[0]
    rows = n if rows is None else rows
    pattern_noise = tile_noise = None
    if patterns.is_floating_point():
        source = generator(stream_seed("patterns", *stream), weight.device)
        pattern_noise = gumbel((len(KEPT_PAIRS), rows, patterns.shape[2]), source)[:, first_row : first_row + n]
    if tiles is not None:
        source = generator(stream_seed("tiles", *stream), weight.device)
        first = first_row // tile[0]
        tile_noise = logistic((-(-rows // tile[0]), tiles.shape[1]), source)[first : first + tiles.shape[0]]
    # The last rows of a weight may be fewer than a tile has.
    tile = min(tile[0], n), tile[1]
    return masked_weight(weight, patterns, tiles, tile, temperatures, pattern_noise, tile_noise)


def pattern_prior(patterns: Tensor) -> Tensor:
    """How many elements each pattern shares with a one-shot mask's, less one: -1, 0 or 1; int8 ``[6, N, K/4]``.

    MaskLLM's mask prior, which lifts the initial logits.

    Args:
        patterns: uint8 ``[N, K/4]``.
    """
    table = pattern_table(patterns.device, torch.int8)
    # Summed, not multiplied: there are no integer matrix products on CUDA.
    shared = (table[:, None] * table[None]).sum(-1, dtype=torch.int8) - 1
    return torch.stack([shared[pattern][patterns.long()] for pattern in range(len(KEPT_PAIRS))])


def tile_prior(scores: Tensor, sparsity: float) -> Tensor:
    """+1 for the best ``round(2 * tiles * (density - 0.5))`` tiles of one weight, -1 for the rest; int8 ``[R, C]``.

    PATCH's prior of the tile logits: every weight starts at the same density. Ties go to the earlier tile.

    Args:
        scores: ``[R, C]``, higher = rather dense.
        sparsity: target of the whole model, 0 to 0.5.
    """
    dense = round(2 * scores.numel() * (0.5 - sparsity))
    best = scores.flatten().argsort(descending=True, stable=True)[:dense]
    prior = torch.full((scores.numel(),), -1, dtype=torch.int8, device=scores.device)
    prior[best] = 1
    return prior.view(scores.shape)
