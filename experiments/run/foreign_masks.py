"""Masks that others released, such as PATCH's authors: made a hybrid checkpoint of, then audited and evaluated as ours.

An archive is a ``.npz`` file, as PATCH's authors release their masks: per weight, under the name of the parameter, the
kept elements of the whole weight row by row, one bit each, the first in the highest bit of a byte; under
``<name>.__shape__`` its shape; and under ``__meta__`` JSON that says what it is.
"""

import io
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.data import models
from experiments.run.runtime import Machine
from patch.checkpoint import save_checkpoint
from patch.errors import UserError, one_line
from patch.files import from_json
from patch.layers import coverage, require_linears
from patch.mask import HybridMask, infer
from patch.tiles import TileShape

_META, _SHAPE = "__meta__", ".__shape__"
# Bytes of what an archive says of itself, of a shape, and of what stands before the elements of an array.
_MOST_META, _MOST_SHAPE, _MOST_HEADER = 2**24, 64, 2**16
# Of them RuntimeError is what zipfile raises for a password or a compression that it does not know.
_DAMAGES = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def import_masks(archive: Path, base: str, tile: TileShape, out: Path, machine: Machine) -> tuple[Path, float]:
    """Mask the dense model ``base`` by an archive; returns the hybrid checkpoint ``out`` and its sparsity.

    Args:
        tile: the shape that the masks were learned with; every tile must be dense or 2:4.

    Raises:
        UserError: if the archive is damaged, its masks are of another model, or one is not made of such tiles.
    """
    meta, in_archive = _contents(archive)
    commit = machine.sources.commit(base)
    model, tokenizer = models.load_model(base, device="cpu", data=machine.data, commit=commit)
    linears = require_linears(model, "importing masks")
    if (covered := coverage(model)).left:
        raise UserError(f"{base}: masks would cover {covered.share:.1%} of its matrix elements, not {covered.left[0]}")
    named = {name: name if name in in_archive else f"{name}.weight" for name in linears}
    if strange := sorted(in_archive - set(named.values())):
        raise UserError(f"{archive}: a mask is for {strange[0]}, which is no prunable weight of {base}")
    masks: dict[str, HybridMask] = {}
    for name, linear in linears.items():
        if named[name] not in in_archive:
            raise UserError(f"{archive}: there is no mask for {name}: it is of another model than {base}")
        masks[name] = _mask(archive, name, _kept(archive, named[name], tuple(linear.weight.shape)), tile)
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
    save_checkpoint(out, model, tokenizer, masks, info, beside=models.processor_files(base, machine.data, commit))
    return out, sparsity


def _mask(archive: Path, name: str, keep: torch.Tensor, tile: TileShape) -> HybridMask:
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


def _contents(archive: Path) -> tuple[Any, set[str]]:
    """What the archive says of itself, and the names of the weights that it has masks for."""
    with _opened(archive) as packed:
        names = {name.removesuffix(".npy") for name in packed.namelist()}
        meta = from_json(str(_array(packed, _META, _MOST_META))) if _META in names else None
        return meta, {name for name in names if name != _META and not name.endswith(_SHAPE)}


def _kept(archive: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What is kept of a weight of ``shape``, by the name in the archive."""
    elements = math.prod(shape)
    with _opened(archive) as packed:
        found = tuple(int(side) for side in _array(packed, name + _SHAPE, _MOST_SHAPE))
        if found != shape:
            raise UserError(f"the mask of {name} is {found}, the weight is {shape}")
        bits = _array(packed, name, -(-elements // 8))
        if bits.dtype != np.uint8 or bits.ndim != 1 or bits.size != -(-elements // 8):
            raise ValueError(f"{name} has {bits.size} bytes of {bits.dtype} for a weight of {shape}")
        return torch.from_numpy(np.unpackbits(bits, count=elements).astype(bool)).view(shape)


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever is wrong with what is read from it is an error of the user's."""
    if not archive.is_file():
        raise UserError(f"{archive}: no such file")
    try:
        with zipfile.ZipFile(archive) as packed:
            yield packed
    except UserError as error:
        raise UserError(f"{archive}: {error}") from error
    except _DAMAGES as error:
        raise UserError(f"{archive}: not an archive of masks: {one_line(error)}") from error


def _array(packed: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """An array of at most ``most`` bytes: sizes are compared before anything is inflated or allocated."""
    member = packed.getinfo(f"{name}.npy")
    if member.file_size > most + _MOST_HEADER:
        raise ValueError(f"{name} has {member.file_size} bytes, of at most {most + _MOST_HEADER}")
    content = io.BytesIO(packed.read(member))
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError(f"{name} is an array of another format than 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    data = content.read()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} has {len(data)} bytes for {shape} of {dtype}")
    return np.frombuffer(data, dtype).reshape(shape)
