"""Masks that others released, such as PATCH's authors: made a hybrid checkpoint of, then audited and evaluated as ours.

An archive is a ``.npz`` file, as PATCH's authors release their masks: per weight, under the name of the parameter, the
kept elements of the whole weight row by row, one bit each, the first in the highest bit of a byte; under
``<name>.__shape__`` its shape; and under ``__meta__`` JSON that says what it is.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.data import models
from experiments.run.runtime import Machine
from patch.checkpoint import save_checkpoint
from patch.errors import UserError, one_line
from patch.layers import prunable_linears
from patch.mask import HybridMask, TileShape, infer

_META, _SHAPE = "__meta__", ".__shape__"


def import_masks(archive: Path, base: str, tile: TileShape, out: Path, machine: Machine) -> tuple[Path, float]:
    """Mask the dense model ``base`` by an archive; returns the hybrid checkpoint ``out`` and its sparsity.

    Args:
        tile: the shape that the masks were learned with; every tile must be dense or 2:4.

    Raises:
        UserError: if the archive is damaged, its masks are of another model, or one is not made of such tiles.
    """
    kept, meta = _read(archive)
    model, tokenizer = models.load_model(base, device="cpu", data=machine.data)
    linears = prunable_linears(model)
    named = {name: name if name in kept else f"{name}.weight" for name in linears}
    if strange := sorted(kept.keys() - named.values()):
        raise UserError(f"{archive}: a mask is for {strange[0]}, which is no prunable weight of {base}")
    masks: dict[str, HybridMask] = {}
    for name, linear in linears.items():
        if named[name] not in kept:
            raise UserError(f"{archive}: there is no mask for {name}: it is of another model than {base}")
        masks[name] = _mask(archive, name, kept[named[name]], tuple(linear.weight.shape), tile)
        with torch.no_grad():
            linear.weight.copy_(masks[name].apply(linear.weight))
    zeros = {name: mask.zeros for name, mask in masks.items()}
    sparsity = sum(zeros.values()) / sum(linear.weight.numel() for linear in linears.values())
    dense = any(bool(mask.dense.any()) for mask in masks.values())
    info = {
        "method": "imported",
        "structure": "hybrid" if dense else "2:4",
        "target": round(sparsity, 4),
        "sparsity": sparsity,
        "zeros": zeros,
        "imported": {"archive": archive.name, "base": base, "meta": meta},
    }
    save_checkpoint(out, model, tokenizer, masks, info)
    return out, sparsity


def _mask(archive: Path, name: str, keep: torch.Tensor, shape: tuple[int, ...], tile: TileShape) -> HybridMask:
    if tuple(keep.shape) != shape:
        raise UserError(f"{archive}: the mask of {name} is {tuple(keep.shape)}, the weight is {shape}")
    try:
        mask = infer(keep.float(), tile).mask
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if not torch.equal(mask.keep(), keep):
        rows, cols = tile
        raise UserError(
            f"{archive}: the mask of {name} is not made of dense and 2:4 tiles of {rows}x{cols}: give the tile shape "
            "that it was learned with"
        )
    return mask


def _read(archive: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """What is kept of each weight, by the name in the archive, and what the archive says of itself."""
    if not archive.is_file():
        raise UserError(f"{archive}: no such file")
    try:
        with np.load(archive, allow_pickle=False) as data:
            meta = json.loads(str(data[_META])) if _META in data.files else None
            return dict(_weights(data)), meta
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive}: not an archive of masks: {one_line(error)}") from error


def _weights(data: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name in data.files:
        if name == _META or name.endswith(_SHAPE):
            continue
        shape = tuple(int(side) for side in data[name + _SHAPE])
        packed, elements = data[name], int(np.prod(shape))
        if len(shape) != 2 or packed.dtype != np.uint8 or packed.ndim != 1 or packed.size != -(-elements // 8):
            raise ValueError(f"{name} has {packed.size} bytes of {packed.dtype} for a weight of {shape}")
        yield name, torch.from_numpy(np.unpackbits(packed, count=elements).astype(bool)).view(shape)
