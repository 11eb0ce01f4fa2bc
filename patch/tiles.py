"""Tiles as numbers: what shapes and sparsities there are. Definitions of experiments check theirs without torch.

What tiles, groups and masks are is said in `patch.mask`.
"""

from collections.abc import Sequence

from patch.errors import UserError

GROUP = 4
TileShape = tuple[int, int]


def check_sparsity(sparsity: float) -> float:
    """Raises UserError unless ``sparsity`` is in [0, 0.5], all that hybrid tiles can express."""
    if not 0 <= sparsity <= 0.5:
        raise UserError(f"target sparsity {sparsity}: hybrid tiles reach 0 to 0.5 (2:4 everywhere is 0.5)")
    return sparsity


def check_tile(tile: Sequence[int]) -> TileShape:
    """``tile`` as ``(rows, cols)``.

    Raises:
        UserError: if a side is not positive or the columns are not a multiple of four.
    """
    if len(tile) != 2 or min(tile) < 1:
        raise UserError(f"tile {tuple(tile)}: give two positive sizes, rows x columns, such as 64x64")
    if tile[1] % GROUP:
        raise UserError(f"tile {tile[0]}x{tile[1]}: columns must be a multiple of {GROUP}, so that no group is cut")
    return tile[0], tile[1]


def tile_grid(shape: Sequence[int], tile: Sequence[int]) -> tuple[int, int]:
    """How many rows and columns of tiles cover a weight of ``shape``; the last of each may be ragged.

    Raises:
        UserError: if the tile is malformed or larger than the weight, or ``K`` is not a multiple of four.
    """
    rows, cols = check_tile(tile)
    n, k = shape
    if k % GROUP:
        raise UserError(f"weight {n}x{k}: in_features must be a multiple of {GROUP} for 2:4 sparsity")
    if rows > n or cols > k:
        raise UserError(f"tile {rows}x{cols} is larger than the weight {n}x{k}: choose a smaller tile")
    return -(-n // rows), -(-k // cols)
