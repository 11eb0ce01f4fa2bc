"""Counter-based noise: a function of a key and of a place in the weight, the same on every device, in any order.

This is the definition of what `patch.learn.soft_mask_triton` draws, in integers and float64, and too slow to learn
with. The words of one pattern group are Philox4x32-7 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011;
seven rounds are the fewest that pass BigCrush) of the counter ``(row * K/4 + group, 0, 0, 0)`` under the key; those of
a tile of the counter ``(tile_row * C + tile_col, 1, 0, 0)``. A group needs six uniform numbers and gets 128 bits, so
each has 21: planes 0 to 3 the high bits of one word each; plane 4 the low bits of ``word0 << 10 ^ word1``, which are as
random as the low 11 bits of word 0 and the low 10 of word 1, that nothing else uses; plane 5 those of words 2 and 3. A
uniform number is an odd multiple of 2**-22 in (0, 1), exact in float32, as is one less it: noise is finite, Gumbel
noise in (-2.73, 15.25), logistic noise within 15.25 of zero.
"""

import torch
from torch import Tensor

from patch.mask import KEPT_PAIRS

ROUNDS = 7
_LOW = 0xFFFFFFFF


def words(key: int, counters: tuple[Tensor, Tensor, Tensor, Tensor], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox4x32 (Salmon et al. 2011): four words of 32 bits for each counter, int64 like the counters.

    Args:
        key: 64 bits.
        counters: four words, int64 tensors of one shape with values below 2**32, least significant first.
        rounds: 10 is the usual choice.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(rounds):
        # A product of two words overflows int64, which keeps its bits; the shift of its sign is masked away.
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (right >> 32 & _LOW) ^ c1 ^ k0, right & _LOW
        c2, c3 = (left >> 32 & _LOW) ^ c3 ^ k1, left & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def _words_of(key: int, count: int, stream: int, device: torch.device | str) -> tuple[Tensor, ...]:
    places = torch.arange(count, device=device)
    zeros = torch.zeros_like(places)
    return words(key, (places, zeros + stream, zeros, zeros))


def _uniform(bits: Tensor) -> Tensor:
    """21 bits to the middle of their step, float64 in (0, 1)."""
    return (bits.double() + 0.5) * 2.0**-21


def pattern_noise(key: int, rows: int, groups: int, device: torch.device | str = "cpu") -> Tensor:
    """Gumbel noise of a weight's pattern logits, ``-log(-log(1 - uniform))``, float64 ``[6, rows, groups]``."""
    r0, r1, r2, r3 = _words_of(key, rows * groups, 0, device)
    mixed = [(r0 << 10 ^ r1) & 0x1FFFFF, (r2 << 10 ^ r3) & 0x1FFFFF]
    bits = torch.stack([word >> 11 for word in (r0, r1, r2, r3)] + mixed)
    return -torch.log(-torch.log1p(-_uniform(bits))).view(len(KEPT_PAIRS), rows, groups)


def tile_noise(key: int, rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
    """Logistic noise of a weight's tile logits, ``logit(uniform)``, float64 ``[rows, cols]``."""
    word, *_ = _words_of(key, rows * cols, 1, device)
    return torch.logit(_uniform(word >> 11)).view(rows, cols)
