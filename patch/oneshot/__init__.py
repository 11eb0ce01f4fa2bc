"""One-shot pruning of a whole model: magnitude, Wanda, SparseGPT, each as 2:4, unstructured, or hybrid tiles.

    >>> layers = prune_model(model, "wanda", "hybrid", 0.35, (64, 64), windows, "cuda")
    >>> sum(layer.zeros for layer in layers.values()) / sum(layer.elements for layer in layers.values())

A method is one module here that ends in a `patch.oneshot.method.Method`, and one line in `METHODS`.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patch.budget import UniformBudget
from patch.errors import UserError, check_name
from patch.layers import Matrix, check_present, check_shared, decoder_blocks, prunable_matrices
from patch.mask import HybridMask, tile_sizes
from patch.oneshot import magnitude, sparsegpt, wanda
from patch.oneshot.calibration import Block, blocks_on, calibrate
from patch.oneshot.method import Method
from patch.oneshot.select import check_unstructured, tile_losses
from patch.quantise.precisions import group_size
from patch.quantise.values import Quantised
from patch.structures import TILED
from patch.tiles import TileShape, check_tile, tile_grid

METHODS: dict[str, Method] = {
    "magnitude": magnitude.METHOD,
    "wanda": wanda.METHOD,
    "sparsegpt": sparsegpt.METHOD,
}
STRUCTURES = ("unstructured", *TILED)


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one weight; tensors are on the CPU.

    Attributes:
        mask: which tiles and which elements; None for unstructured pruning.
        zeros: elements dropped. A kept weight may be zero too (SparseGPT clears those of inputs that are always zero).
        elements: elements of the weight.
        tile_scores: float32 ``[R, C]``, what making each tile 2:4 loses by the method's measure, from the weights as
            they were; comparable within this weight only. None for unstructured pruning.
        quantised: what is kept in INT4, where that was asked for.
    """

    mask: HybridMask | None
    zeros: int
    elements: int
    tile_scores: Tensor | None
    quantised: Quantised | None = None


def prune_model(
    model: nn.Module,
    method: str,
    structure: str,
    sparsity: float,
    tile: TileShape | None,
    windows: Tensor | None,
    device: torch.device | str,
    *,
    dense: Mapping[str, Tensor] | None = None,
    weight_update: bool = True,
    int4: bool = False,
    batch: int = 8,
    on_block: Callable[[int, int], None] | None = None,
) -> dict[str, PrunedLayer]:
    """Prune every prunable weight of ``model`` in place, block by block; the model stays on its own device.

    Hybrid pruning at a budget gives each weight the same sparsity, in whole tiles, and carries the rounding from one
    weight to the next, so the model's total is off by less than one tile's zeros; with ``dense`` tiles it is theirs. If
    pruning fails half-way, blocks already done stay pruned: load the model again.

    Args:
        method: one of `METHODS`.
        structure: one of `STRUCTURES`.
        sparsity: zeros over elements: 0.5 for 2:4, in [0, 1) for unstructured, in [0, 0.5] for hybrid.
        tile: rows x columns; not used for unstructured pruning.
        windows: calibration token ids, integer ``[n, length]``; not used by magnitude.
        device: where blocks are run and pruned, one at a time.
        dense: for hybrid pruning, per weight the tiles that stay dense, bool ``[R, C]``; then ``sparsity`` is not used.
        weight_update: let a method that changes the weights it keeps (SparseGPT) do so; else only its mask counts.
        int4: round what is kept to INT4 in the same sweep; of SparseGPT, in tiles.
        batch: calibration windows per forward pass.
        on_block: called after each block with the number of blocks done and of all blocks.

    Returns:
        Per full weight name (``model.layers.0.mlp.up_proj``), in model order, what became of it.

    Raises:
        UserError: if an argument does not fit (before any weight changes), or weights or activations are not finite.
    """
    rule = METHODS[check_name("one-shot method", method, METHODS)]
    if not weight_update and rule.frozen is not None:
        rule = rule.frozen
    check_name("one-shot structure", structure, STRUCTURES)
    check_present(model)
    check_shared(model)
    matrices = prunable_matrices(model)
    tile = _check_structure(structure, sparsity, tile, matrices)
    if dense is not None:
        _check_dense(dense, structure, tile, matrices)
    if int4 and (rule.quantised is None or tile is None):
        raise UserError(f"{method} {structure} does not prune and round in one sweep: quantise it afterwards")
    group = group_size({name: matrix.weight.shape[1] for name, matrix in matrices.items()}) if int4 else None
    budget = UniformBudget(sparsity) if structure == "hybrid" else None

    def tile_map(name: str, losses: Tensor) -> Tensor:
        if dense is not None:
            return dense[name]
        if budget is not None:
            assert tile is not None
            return budget.cut(losses, tile_sizes(matrices[name].weight.shape, tile))
        return torch.zeros(losses.shape, dtype=torch.bool)

    layers: dict[str, PrunedLayer] = {}
    blocks = len(decoder_blocks(model))
    # Closed at once if something fails, so that the model is put back even while the error is on its way.
    with closing(_blocks(model, rule, method, windows, device, batch)) as stream:
        for block in stream:
            layers |= _prune_block(block, rule, sparsity, tile, tile_map, group)
            if on_block is not None:
                on_block(block.index + 1, blocks)
    return layers


@torch.no_grad()
def _prune_block(
    block: Block[Any],
    rule: Method,
    sparsity: float,
    tile: TileShape | None,
    tile_map: Callable[[str, Tensor], Tensor],
    group: int | None,
) -> dict[str, PrunedLayer]:
    layers: dict[str, PrunedLayer] = {}
    # Weights that read the same tensor share what is prepared from its statistic.
    prepared: dict[int, Any] = {}
    for name, weight in block.weights.items():
        statistic = block.statistics.get(name)
        if id(statistic) not in prepared:
            prepared[id(statistic)] = rule.prepare(name, statistic)
        layers[name] = _prune_matrix(name, weight, rule, prepared[id(statistic)], sparsity, tile, tile_map, group)
    return layers


def _prune_matrix(
    name: str,
    weight: Tensor,
    rule: Method,
    prepared: Any,
    sparsity: float,
    tile: TileShape | None,
    tile_map: Callable[[str, Tensor], Tensor],
    group: int | None,
) -> PrunedLayer:
    if not weight.isfinite().all():
        raise UserError(f"{name}: the weight holds values that are not finite: the checkpoint is damaged")
    if tile is None:
        updated, keep = rule.unstructured(weight, prepared, sparsity)
        weight.copy_(updated)
        return PrunedLayer(None, int((~keep).sum()), weight.numel(), None)
    losses = tile_losses(rule.scores(weight, prepared), tile).cpu()
    dense = tile_map(name, losses).to(weight.device)
    quantised = None
    if group is not None and rule.quantised is not None:
        quantised, mask = rule.quantised(weight, prepared, tile, dense, group)
        updated, quantised = quantised.dequantised(), quantised.to("cpu")
    else:
        updated, mask = rule.hybrid(weight, prepared, tile, dense)
    weight.copy_(updated)
    return PrunedLayer(mask.to("cpu"), mask.zeros, weight.numel(), losses, quantised)


def _blocks(
    model: nn.Module, rule: Method, method: str, windows: Tensor | None, device: torch.device | str, batch: int
) -> Generator[Block[Any], None, None]:
    if rule.statistic is None:
        return blocks_on(model, device)
    if windows is None:
        raise UserError(f"{method} needs calibration windows: token ids [windows, length]")
    return calibrate(model, windows, device, batch, rule.statistic)


def _check_structure(
    structure: str, sparsity: float, tile: TileShape | None, matrices: Mapping[str, Matrix]
) -> TileShape | None:
    """The tile shape to use, None for unstructured; raises UserError for whatever does not fit together."""
    if structure == "unstructured":
        check_unstructured(sparsity)
        return None
    if structure == "2:4" and sparsity != 0.5:
        raise UserError(f"sparsity {sparsity}: structure 2:4 is 0.5; use 'hybrid' for less")
    if tile is None:
        raise UserError(f"structure {structure} needs a tile shape, such as 64x64")
    for name, matrix in matrices.items():
        try:
            tile_grid(matrix.weight.shape, tile)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return check_tile(tile)


def _check_dense(
    dense: Mapping[str, Tensor], structure: str, tile: TileShape | None, matrices: Mapping[str, Matrix]
) -> None:
    if structure != "hybrid" or tile is None:
        raise UserError(f"dense tiles are chosen for structure hybrid, not {structure}")
    for name, matrix in matrices.items():
        if name not in dense:
            raise UserError(f"{name}: nothing says which of its tiles stay dense")
        grid = tile_grid(matrix.weight.shape, tile)
        if dense[name].dtype != torch.bool or tuple(dense[name].shape) != grid:
            found = f"{dense[name].dtype} {tuple(dense[name].shape)}"
            raise UserError(f"{name}: its dense tiles are {found}, need bool {grid}")
