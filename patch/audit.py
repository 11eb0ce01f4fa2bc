"""What the zeros of a model directory look like, compared with its masks or, without any, with what 2:4 tiles are."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from patch.checkpoint import INFO_FILE, load_info, load_masks
from patch.errors import UserError
from patch.mask import HybridMask, infer, tile_sums
from patch.quantise.precisions import Precision
from patch.quantise.values import Quantised
from patch.tiles import TileShape
from patch.weights import check_no_codes, prunable_weights, quantised_weights, stored_precision


@dataclass(frozen=True)
class AuditRow:
    """What the zeros of one weight look like.

    Attributes:
        layer: dotted name of the matrix (`patch.layers.Matrix`).
        shape: ``(N, K)``.
        tiles: how many; the three below add up to it. All are 0 where no tile shape applies (unstructured pruning).
        dense: tiles that keep everything.
        two_four: tiles that keep at most two of every four.
        violating: tiles that are not what the mask says or, without a mask, neither dense nor 2:4.
        sparsity: zeros over elements, counted in the weight itself; of a quantised one, what was dropped.
        bits: of a quantised weight's values; None of others.
        scales: of a quantised weight how many inputs share one, the smallest and the largest.
    """

    layer: str
    shape: tuple[int, int]
    tiles: int
    dense: int
    two_four: int
    violating: int
    sparsity: float
    bits: int | None = None
    scales: tuple[int, float, float] | None = None


def audit(path: str | Path, tile: TileShape | None = None) -> list[AuditRow]:
    """Compare the weights of a checkpoint with its masks, weight by weight (`patch.weights.prunable_weights`).

    In a hybrid checkpoint a tile violates if a weight that its mask drops is not zero. In a foreign one the masks are
    inferred from the zeros (`patch.mask.infer`), for which ``tile`` is needed. An unstructured checkpoint is inferred
    the same way if ``tile`` is given, and otherwise only its sparsity is counted.

    Returns:
        One row per prunable weight, in model order.

    Raises:
        UserError: if a file is missing or damaged; if ``tile`` is missing, does not fit, or is not the checkpoint's
            own; or if no tile violates and yet the weights are not the ones that were saved.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    own = (folder / INFO_FILE).exists()
    masks: dict[str, HybridMask] = {}
    info = load_info(folder) if own else {}
    if own:
        masks = load_masks(folder)
        if tile and info["tile"] and tuple(tile) != info["tile"]:
            found = "{}x{}".format(*info["tile"])
            raise UserError(f"{folder}: its tiles are {found}, not {tile[0]}x{tile[1]}: leave the tile shape out")
        tile = tile or info["tile"]
    elif tile is None:
        # To be told a tile shape would not help.
        if stored_precision(folder) is None:
            check_no_codes(folder)
        raise UserError(f"{folder}: has no {INFO_FILE} that names its tile shape: give one, such as `--tile 128x128`")
    precision = stored_precision(folder)
    if precision is None:
        rows = [_audit_weight(name, weight, masks.get(name), tile) for name, weight in prunable_weights(folder)]
    else:
        dropped = info.get("zeros", {}) if own else {}
        rows = [
            _with_scales(
                _audit_weight(name, weight.dequantised(), masks.get(name), tile), precision, weight, dropped.get(name)
            )
            for name, weight in quantised_weights(folder, precision)
        ]
    # Last, so that changed weights show where they violate, which says more than that a hash differs.
    if own and not any(row.violating for row in rows):
        load_info(folder, verify=True)
    return rows


def dropped_blocks(path: str | Path) -> tuple[int, float]:
    """How many decoder blocks a checkpoint lacks that its model had, and their share, as it says itself."""
    folder = Path(path)
    info = load_info(folder) if (folder / INFO_FILE).exists() else {}
    if info.get("structure") != "shallow":
        return 0, 0.0
    return sum(fact["metric"] == "block_divergence" for fact in info["facts"]), info["sparsity"]


def _with_scales(row: AuditRow, precision: Precision, weight: Quantised, dropped: int | None) -> AuditRow:
    scales = (weight.group, float(weight.scales.min()), float(weight.scales.max()))
    # Not all zeros were dropped: small weights are rounded to them.
    sparsity = row.sparsity if dropped is None else dropped / weight.values.numel()
    return replace(row, bits=precision.bits, scales=scales, sparsity=sparsity)


def _audit_weight(name: str, weight: Tensor, mask: HybridMask | None, tile: TileShape | None) -> AuditRow:
    shape = (weight.shape[0], weight.shape[1])
    sparsity = int((weight == 0).sum()) / weight.numel()
    if mask is None and tile is None:
        return AuditRow(name, shape, 0, 0, 0, 0, sparsity)
    if mask is not None:
        if mask.shape != shape:
            raise UserError(f"{name}: the mask is for {mask.shape}, the weight is {shape}")
        left = (weight != 0) & ~mask.keep()
        violating = tile_sums(left.int(), mask.tile) > 0
        dense = mask.dense
    else:
        assert tile is not None
        try:
            inferred = infer(weight, tile)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        violating = inferred.violating
        dense = inferred.mask.dense & ~violating
    tiles, bad, kept = dense.numel(), int(violating.sum()), int(dense.sum())
    return AuditRow(name, shape, tiles, kept, tiles - kept - bad, bad, sparsity)
