"""Learned tile statistics projected onto another model's shapes: how much of each kind of layer stays dense, by depth.

Small models gain little from any kernel. What their masks learned about *where* dense tiles go can be timed where speed
matters, on a larger model with random weights: each of its linears takes the share of dense tiles of the checkpoint's
linear of the same kind at the same relative depth, on a random uneven map.
"""

from collections.abc import Mapping

from experiments.data.registry import ModelSpec
from patch.errors import UserError
from patch.mask import HybridMask
from patch.tiles import TileShape

# What tiles are where the checkpoint's own do not fit.
USUAL_TILE: TileShape = (128, 128)


def dense_shares(masks: Mapping[str, HybridMask]) -> dict[str, list[float]]:
    """The share of dense tiles of each kind of linear, such as ``q_proj``, block after block.

    Args:
        masks: by full name of the linear, in model order.

    Raises:
        UserError: if the blocks do not all have the same kinds.
    """
    shares: dict[str, list[float]] = {}
    for name, mask in masks.items():
        shares.setdefault(name.rpartition(".")[2], []).append(mask.dense.double().mean().item())
    if len({len(by_block) for by_block in shares.values()}) > 1:
        counts = ", ".join(f"{kind} {len(by_block)}" for kind, by_block in shares.items())
        raise UserError(f"cannot project tile statistics: blocks do not all have the same masked linears ({counts})")
    return shares


def at_depth(by_block: list[float], blocks: int) -> list[float]:
    """A model's values block after block for one of ``blocks`` blocks: each takes its nearest in relative depth."""
    return [by_block[int((block + 0.5) / blocks * len(by_block))] for block in range(blocks)]


def projected_shares(masks: Mapping[str, HybridMask], spec: ModelSpec) -> dict[tuple[int, str], float]:
    """The share of dense tiles for each linear of a model of the registry, by block and kind.

    Raises:
        UserError: if the checkpoint has no masks for some kind of its linears, or as `dense_shares`.
    """
    shares = dense_shares(masks)
    for kind in spec.linear_shapes():
        if kind not in shares:
            raise UserError(f"cannot project tile statistics onto {spec.name}: the checkpoint has no masks for {kind}")
    return {
        (block, kind): share
        for kind in spec.linear_shapes()
        for block, share in enumerate(at_depth(shares[kind], spec.blocks))
    }


def projected_tile(own: TileShape, spec: ModelSpec) -> TileShape:
    """The checkpoint's own tile shape where it divides every weight of the model, otherwise 128x128."""
    divides = all(n % own[0] == 0 and k % own[1] == 0 for n, k in spec.linear_shapes().values())
    return own if divides else USUAL_TILE
