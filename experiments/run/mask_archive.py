"""Masks to share: a hybrid checkpoint without its weights, a few per cent of its size, made whole again.

Only of methods that leave the surviving weights as they were: SparseGPT and refitting change them.

An archive holds a checkpoint's ``hybrid.json``, ``hybrid.masks`` and ``config.json``. It says what defines the
pruning, so that the studies that need this checkpoint find it restored instead of learning it anew.
"""

import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from analysis.rows import layout
from experiments.data import models
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies.trial import key
from patch.checkpoint import (
    FORMER_MASKS_FILE,
    INFO_FILE,
    MASKS_FILE,
    load_info,
    load_masks,
    masks_file,
    restore_checkpoint,
)
from patch.errors import UserError, one_line
from patch.files import existing, from_json, read_json, replacing
from patch.layers import prunable_matrices
from patch.mask import HybridMask
from patch.methods import METHODS

CONFIG_FILE = "config.json"
FILES = (INFO_FILE, MASKS_FILE, FORMER_MASKS_FILE, CONFIG_FILE)
# Bytes of a JSON file: what a thousand weights and the history of their learning take, several times over.
MOST_JSON = 64 * 2**20
# Bytes of masks over those of their archive: patterns hardly compress.
MOST_RATIO = 100
# Folders, and the files in one of them.
MOST_MEMBERS = 16
# Bytes of a name or of other attributes in a header of their own, which is read as a whole.
MOST_ATTRIBUTES = 64 * 2**10


def export(checkpoint: Path, archive: Path) -> None:
    """Write the masks of a hybrid checkpoint as ``archive`` (``.tar.xz``), in full or not at all.

    Raises:
        UserError: if the checkpoint is damaged, is more than its masks, has none or was not made by a study, or
            ``archive`` is there, or is called something else.
    """
    if not archive.name.endswith((".tar.xz", ".txz")):
        raise UserError(f"{archive}: masks are written as .tar.xz: name it {archive.name.partition('.')[0]}.tar.xz")
    info = load_info(checkpoint)
    method = METHODS.get(info.get("method", ""))
    defined = info.get("definition", {})
    changed = next((what for what in ("quantisation", "recovery", "refit") if defined.get(what)), None)
    if changed or (method and method.changes_weights):
        what = changed or info["method"]
        raise UserError(f"{checkpoint}: {what} changes the weights that survive: share the whole checkpoint")
    if not load_masks(checkpoint):
        raise UserError(f"{checkpoint} has no masks to share: its structure is {info['structure']}")
    if "definition" not in info:
        raise UserError(f"{checkpoint} does not say what defines it: only what hts made can be restored by name")
    if archive.exists():
        raise UserError(f"{archive} is already there: choose another place, or remove it first")
    with replacing(archive) as temporary, tarfile.open(temporary, "w:xz") as packed:
        # The masks come last, for what is read first says whether they are worth to be unpacked.
        for name in (INFO_FILE, CONFIG_FILE, masks_file(checkpoint).name):
            packed.add(checkpoint / name, f"{key(info['definition'])}/{name}")


def restore(archive: Path, store: Store, machine: Machine) -> Path:
    """Make the checkpoint of an archive again in a results directory, where studies find it; returns where it is.

    The dense model is loaded by the name in the archive. What comes out is the checkpoint bit for bit, or an error.

    Raises:
        UserError: if this is no such archive, it is damaged, or the model here is not the one that was pruned.
    """
    if not archive.is_file():
        raise UserError(f"{archive}: no such file")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # The masks come last: how large they may be, the model says.
        _unpack(archive, folder, (INFO_FILE, CONFIG_FILE))
        definition = read_json(existing(folder, INFO_FILE)).get("definition")
        if not isinstance(definition, dict) or not isinstance(definition.get("model"), str):
            raise UserError(f"{archive}: {INFO_FILE} does not say what defines the checkpoint")
        path = store.root / layout.CHECKPOINTS / key(definition)
        with store.lease(f"pruning-{path.name}"):
            if path.exists():
                _unpack(archive, folder, (MASKS_FILE, FORMER_MASKS_FILE))
                _check_same_masks(archive, folder, path)
            else:
                dtype = _dtype(existing(folder, CONFIG_FILE))
                name, data = definition["model"], machine.data
                commit = machine.sources.commit(name)
                model, tokenizer = models.load_model(name, device="cpu", dtype=dtype, data=data, commit=commit)
                most = sum(most_mask_bytes(*matrix.weight.shape) for matrix in prunable_matrices(model).values())
                _unpack(archive, folder, (MASKS_FILE, FORMER_MASKS_FILE), most)
                _check_definition(archive, definition, load_masks(folder, alone=True))
                beside = models.processor_files(name, data, commit)
                restore_checkpoint(folder, model, tokenizer, path, beside)
    return path


def _check_same_masks(archive: Path, folder: Path, path: Path) -> None:
    """Raise if the checkpoint that is there has other masks than the archive, unpacked in ``folder``."""
    theirs, ours = (
        {name: about["sha256"] for name, about in files.items() if name in (MASKS_FILE, FORMER_MASKS_FILE)}
        for files in (load_info(folder, masks_alone=True)["files"], load_info(path)["files"])
    )
    if sorted(theirs.values()) != sorted(ours.values()):
        raise UserError(
            f"{path} is there with other masks than {archive}: restore into another results directory, or remove it"
        )


def most_mask_bytes(n: int, k: int) -> int:
    """Most bytes that the mask of one weight takes: patterns, and at worst a tile map and scores of 1x4 tiles."""
    return n * (k // 8 + 1) + n * (k // 4) * 5 + 4096


def _check_definition(archive: Path, definition: Mapping[str, Any], masks: Mapping[str, HybridMask]) -> None:
    """The masks are what the definition asks for, under whose name studies will find them."""
    elements = sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    found = sum(mask.zeros for mask in masks.values()) / max(1, elements)
    tile = max((mask.tile for mask in masks.values()), default=(0, 0))
    target = definition.get("sparsity")
    # A budget is met to within a tile of the whole model.
    slack = (tile[0] * tile[1] + 1) / max(1, elements)
    if not isinstance(target, int | float) or not abs(target - found) <= slack:
        raise UserError(
            f"{archive}: is said to have sparsity {target}, its masks have {found:.4f}: not what it says it is"
        )
    if list(definition.get("tile") or ()) != list(tile):
        raise UserError(f"{archive}: is said to have tiles {definition.get('tile')}, its masks have {list(tile)}")


class _Header(tarfile.TarInfo):
    """A header whose own size is checked before what follows it is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        attributes = not (header.isreg() or header.isdir() or header.islnk() or header.issym())
        if header.size < 0 or (attributes and header.size > MOST_ATTRIBUTES):
            raise UserError(f"not an archive of masks: a header of type {header.type!r} with {header.size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            cls._proc_gnusparse_10()
        return header

    @staticmethod
    def _proc_gnusparse_10(*_: Any) -> None:
        """Maps of files with holes, which have no end: masks are never written so."""
        raise UserError("not an archive of masks: a file with holes in it")


def _unpack(archive: Path, target: Path, wanted: Collection[str], most_masks: int | None = None) -> None:
    """Write the ``wanted`` files of an archive's only folder to ``target``.

    Every size is checked before what it is the size of is decompressed, and nothing is read beyond what is wanted.

    Args:
        most_masks: bytes that the masks may have; by default what an archive of its size may hold.
    """
    try:
        if most_masks is None:
            most_masks = max(MOST_JSON, MOST_RATIO * archive.stat().st_size)
        most = dict.fromkeys(FILES, MOST_JSON) | {MASKS_FILE: most_masks, FORMER_MASKS_FILE: most_masks}
        with tarfile.open(archive, tarinfo=_Header) as packed:
            found: dict[str, PurePosixPath] = {}
            for number, member in enumerate(packed):
                path = PurePosixPath(member.name)
                if number == MOST_MEMBERS:
                    raise UserError(f"not an archive of masks: more than {MOST_MEMBERS} files and folders in it")
                if member.isdir() and not member.size:
                    continue
                if path.name not in FILES or not member.isfile():
                    raise UserError(f"not an archive of masks: {path} in it is no part of one")
                if path.name in found:
                    raise UserError(f"not an archive of masks: {path.name} is in it twice")
                found[path.name] = path
                if len(folders := {each.parent for each in found.values()}) != 1:
                    raise UserError(f"not an archive of masks: {len(folders)} folders in it instead of one")
                if member.size > most[path.name]:
                    raise UserError(f"{path.name} in it has {member.size} bytes, of at most {most[path.name]}: damaged")
                if path.name in wanted:
                    content = packed.extractfile(member)
                    assert content is not None
                    with open(target / path.name, "wb") as file:
                        shutil.copyfileobj(content, file)
                if found.keys() >= set(wanted):
                    break
    except UserError as error:
        raise UserError(f"{archive}: {error}") from error
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise UserError(f"{archive}: not an archive of masks: {one_line(error)}") from error


def _dtype(config: Path) -> torch.dtype:
    """The dtype of a checkpoint's weights, as its configuration says it."""
    try:
        dtype = getattr(torch, from_json(config.read_text(encoding="utf-8"))["dtype"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{config}: does not say which dtype was pruned: {error}") from error
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{config}: does not say which dtype was pruned: {dtype} is none")
    return dtype
