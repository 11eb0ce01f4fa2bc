"""What the masks of a checkpoint are, as facts of its rows."""

from collections.abc import Mapping

from torch import nn

from analysis.rows.format import Fact
from patch.layers import Coverage, prunable_matrices
from patch.mask import HybridMask


def mask_facts(
    model: nn.Module,
    covered: Coverage,
    masks: Mapping[str, HybridMask],
    zeros: Mapping[str, int],
    sparsity: float | None = None,
) -> list[Fact]:
    """Sparsity of the whole model, over what can be pruned and over all its blocks, and of each weight.

    Args:
        sparsity: achieved, where that is not the share of ``zeros``.
    """
    return [
        Fact("sparsity", sum(zeros.values()) / covered.prunable if sparsity is None else sparsity, "1", {}),
        Fact("prunable_share", covered.share, "1", {}),
        Fact("block_sparsity", sum(zeros.values()) / covered.matrices, "1", {}),
        *_layer_facts(model, masks, zeros),
    ]


def _layer_facts(model: nn.Module, masks: Mapping[str, HybridMask], zeros: Mapping[str, int]) -> list[Fact]:
    facts = []
    for name, matrix in prunable_matrices(model).items():
        n, k = matrix.weight.shape
        labels = {"layer": name, "rows": n, "cols": k}
        facts.append(Fact("layer_sparsity", zeros[name] / (n * k), "1", labels))
        if name in masks:
            dense = masks[name].dense
            facts.append(Fact("dense_tiles", dense.double().mean().item(), "1", labels))
            rows = ["".join("01"[int(tile)] for tile in row) for row in dense.tolist()]
            facts.append(Fact("tile_map", None, "1", labels | {"tile_map": rows}))
    return facts
