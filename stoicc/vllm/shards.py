"""What one process of a server holds of a masked weight: slices of masks, masks of fused layers, and their packing.

A layer of a server is one product that does the work of several linears of the model, of each of which a process holds
some rows (column-parallel layers) or some columns (row-parallel ones). Tiles that a slice cuts are cut with it: a mask
is written with smaller tiles, so that no tile has to become dense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from patch.errors import UserError
from patch.mask import HybridMask
from patch.quantise.values import quantise_groups, quantise_weight
from patch.tiles import GROUP, TileShape
from stoicc.format import GROUPED, SCALE_GROUP, HybridWeight, mask_of, pack, scales_of, unpack
from stoicc.spec import Spec


@dataclass(frozen=True)
class Slice:
    """The part of a linear that one process holds, as part of a layer.

    Attributes:
        name: of the linear, as the checkpoint calls it.
        rows, columns: of its weight ``[N, K]``.
    """

    name: str
    rows: range
    columns: range


@dataclass(frozen=True)
class Part:
    """A masked weight: values ``[n, K]``, its mask or None where all is kept, and its scales as `pack` takes them."""

    values: Tensor
    mask: HybridMask | None
    scales: Tensor | None = None


def slices(
    names: Sequence[str],
    sizes: Sequence[int],
    output_size: int,
    inputs: int,
    input_size: int,
    rank: int,
    copies: Sequence[int] = (),
) -> list[Slice]:
    """What a process holds of each part of a layer.

    Args:
        names: of the linears, one a part; or one alone, whose parts lie one after the other in one weight.
        sizes: rows of each part that the process holds.
        output_size: rows that all processes hold together; those of ``sizes`` if each holds all.
        inputs, input_size: columns that the process holds, and all.
        rank: of the process among those that share the layer.
        copies: how many processes in a row hold the same rows, of each part; key and value heads fewer than processes.
    """
    columns = range(rank * inputs, (rank + 1) * inputs) if inputs != input_size else range(inputs)
    divided = output_size != sum(sizes)
    held, start = [], 0
    for index, size in enumerate(sizes):
        place = rank // (copies[index] if copies else 1) if divided else 0
        name = names[index] if len(names) > 1 else names[0]
        first = start + place * size
        held.append(Slice(name, range(first, first + size), columns))
        if len(names) == 1 and len(sizes) > 1:
            processes = output_size // sum(sizes)
            start += size * processes // (copies[index] if copies else 1)
    return held


def whole_rows(
    names: Sequence[str], sizes: Sequence[int], output_size: int, copies: Sequence[int] = ()
) -> dict[str, int]:
    """The rows of each linear of a layer, in all processes together; arguments as `slices` takes them."""
    processes = output_size // sum(sizes)
    rows = [size * processes // (copies[index] if copies else 1) for index, size in enumerate(sizes)]
    return dict(zip(names, rows, strict=True)) if len(names) > 1 else {names[0]: sum(rows)}


def inputs_step(dtype: torch.dtype | None) -> int:
    """Of how many inputs a process has to hold a multiple: rows of 16 bytes, and of INT4 whole groups."""
    return SCALE_GROUP if dtype == GROUPED else 8


def packable(held: Sequence[Slice], dtype: torch.dtype | None) -> bool:
    """Whether the columns that a process holds can be packed: whole groups of four, and `inputs_step`."""
    step = inputs_step(dtype)
    return all(each.columns.start % GROUP == 0 and len(each.columns) % step == 0 for each in held)


def sliced(mask: HybridMask, rows: range, columns: range) -> HybridMask:
    """The mask of a slice of a weight, whose tiles end where the slice does; columns are whole groups."""
    tile = (_side(mask.tile[0], rows), _side(mask.tile[1], columns))
    patterns = mask.patterns[rows.start : rows.stop, columns.start // GROUP : columns.stop // GROUP]
    return HybridMask((len(rows), len(columns)), tile, _tiles(mask, rows, columns, tile), patterns.contiguous())


def stacked(masks: Sequence[HybridMask]) -> HybridMask:
    """The mask of weights of as many columns one below the other."""
    if len(masks) == 1:
        return masks[0]
    rows = gcd(*(mask.tile[0] for mask in masks), *(mask.shape[0] for mask in masks[:-1]))
    tile = (rows, gcd(*(mask.tile[1] for mask in masks)))
    shape = (sum(mask.shape[0] for mask in masks), masks[0].shape[1])
    dense = torch.cat([_tiles(mask, range(mask.shape[0]), range(mask.shape[1]), tile) for mask in masks])
    return HybridMask(shape, tile, dense, torch.cat([mask.patterns for mask in masks]))


def all_dense(shape: tuple[int, int], tile: TileShape, device: torch.device | str = "cpu") -> HybridMask:
    """A mask that keeps everything."""
    tile = (min(tile[0], shape[0]), min(tile[1], shape[1]))
    grid = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    patterns = torch.zeros(shape[0], shape[1] // GROUP, dtype=torch.uint8, device=device)
    return HybridMask(shape, tile, torch.ones(grid, dtype=torch.bool, device=device), patterns)


def layer_mask(held: Sequence[Slice], masks: Mapping[str, HybridMask]) -> HybridMask:
    """The mask of what a process holds of a layer, of masks of whole linears; those without one are dense."""
    tile = next(masks[each.name].tile for each in held if each.name in masks)
    return stacked(
        [
            sliced(masks[each.name], each.rows, each.columns)
            if each.name in masks
            else all_dense((len(each.rows), len(each.columns)), tile)
            for each in held
        ]
    )


def pack_layer(weight: Tensor, mask: HybridMask, dtype: torch.dtype | None) -> HybridWeight:
    """Pack what a process holds of a masked layer, quantised to ``dtype`` if there is one.

    Raises:
        UserError: if the weight is not the one that the mask was found on, or cannot be packed.
    """
    mask = mask.to(weight.device)
    stray = int(torch.count_nonzero(weight.masked_fill(mask.keep(), 0)))
    if stray:
        raise UserError(f"{stray} weights are not zero though the mask drops them: masks and weights are of two models")
    if dtype is None:
        return pack(weight, mask)
    if dtype == GROUPED:
        few = quantise_groups(weight, SCALE_GROUP)
        return pack(few.values, mask, few.scales)
    values, scales = quantise_weight(weight, dtype)
    return pack(values, mask, scales)


def repacked(held: Sequence[Slice], parts: Mapping[str, Part]) -> HybridWeight:
    """Pack what a process holds of a layer, of whole linears that were unpacked.

    Raises:
        UserError: if some of them have 8 bits and others have not.
    """
    tile = next(part.mask.tile for part in parts.values() if part.mask is not None)
    values, masks, scales = [], [], []
    for each in held:
        part = parts[each.name]
        rows = slice(each.rows.start, each.rows.stop)
        values.append(part.values[rows, each.columns.start : each.columns.stop])
        shape = (len(each.rows), len(each.columns))
        device = part.values.device
        masks.append(sliced(part.mask, each.rows, each.columns) if part.mask else all_dense(shape, tile, device))
        if part.scales is not None:
            groups = slice(each.columns.start // SCALE_GROUP, each.columns.stop // SCALE_GROUP)
            scales.append(part.scales[rows, groups] if part.scales.dim() == 2 else part.scales[rows])
    dtypes = {_dtype(parts[each.name]) for each in held}
    if len(dtypes) > 1:
        named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"{', '.join(each.name for each in held)} are of {named}: one product computes them all")
    # As bytes: torch may change the bits of a NaN, and does not join all kinds of 8 bits on all devices.
    whole = torch.cat([value.view(torch.uint8) for value in values]).view(values[0].dtype)
    return pack(whole, stacked(masks), torch.cat(scales) if scales else None)


def parts_of(spec: Spec, hybrid: HybridWeight) -> dict[str, Part]:
    """The linears that a packed weight stands for."""
    values, mask = unpack(hybrid), mask_of(hybrid)
    whole = scales_of(hybrid) if hybrid.dtype == GROUPED else hybrid.scales
    found, start = {}, 0
    for name, size in spec.parts:
        rows = range(start, start + size)
        scales = None if whole is None else whole[start : start + size]
        found[name] = Part(values[start : start + size], sliced(mask, rows, range(mask.shape[1])), scales)
        start += size
    return found


def _dtype(part: Part) -> torch.dtype:
    grouped = part.scales is not None and part.scales.dim() == 2
    return GROUPED if grouped else part.values.dtype


def _side(side: int, span: range) -> int:
    """The largest side of tiles that has a border where a span starts, and is no longer than it."""
    return min(gcd(side, span.start), len(span))


def _tiles(mask: HybridMask, rows: range, columns: range, tile: TileShape) -> Tensor:
    """bool: whether each tile of a grid over a slice of a weight lies in a dense tile of its mask."""
    device = mask.dense.device
    across = torch.arange(rows.start, rows.stop, tile[0], device=device) // mask.tile[0]
    along = torch.arange(columns.start, columns.stop, tile[1], device=device) // mask.tile[1]
    return mask.dense[across][:, along]
