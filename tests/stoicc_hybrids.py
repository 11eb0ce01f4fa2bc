"""Random masked weights for the tests of packing and kernels."""

import torch
from torch import Tensor

from patch.mask import HybridMask
from patch.tiles import TileShape, tile_grid
from stoicc.format import HybridWeight, pack


def random_mask(
    n: int, k: int, tile: TileShape, sparse_share: float, *, uneven: bool = False, seed: int = 0, device: str = "cpu"
) -> HybridMask:
    """A mask of random patterns with ``sparse_share`` of the tiles 2:4, spread over rows of tiles evenly or not."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = tile_grid((n, k), tile)
    scores = torch.rand(rows, cols, generator=generator)
    if uneven:
        scores += torch.randn(rows, 1, generator=generator)
    dense = torch.ones(rows * cols, dtype=torch.bool)
    dense[scores.flatten().argsort()[: round(sparse_share * rows * cols)]] = False
    patterns = torch.randint(0, 6, (n, k // 4), dtype=torch.uint8, generator=generator)
    return HybridMask((n, k), tile, dense.reshape(rows, cols), patterns).to(device)


def random_weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) / k**0.5).to(device, dtype)


def random_hybrid(
    n: int,
    k: int,
    tile: TileShape,
    sparse_share: float,
    dtype: torch.dtype = torch.bfloat16,
    *,
    uneven: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> HybridWeight:
    mask = random_mask(n, k, tile, sparse_share, uneven=uneven, seed=seed, device=device)
    return pack(random_weight(n, k, dtype, seed=seed, device=device), mask)
