"""Masks to share: a hybrid checkpoint without its weights, a few per cent of its size, made whole again.

Only of methods that leave the surviving weights as they were: SparseGPT and refitting change them.

An archive holds a checkpoint's ``hybrid.json``, ``hybrid.safetensors`` and ``config.json``. It says what defines the
pruning, so that the studies that need this checkpoint find it restored instead of learning it anew.
"""

import json
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import torch

from experiments.data import models
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies.trial import key
from patch import oneshot
from patch.checkpoint import INFO_FILE, MASKS_FILE, load_info, load_masks, restore_checkpoint
from patch.errors import UserError
from patch.files import replacing

CONFIG_FILE = "config.json"
FILES = (INFO_FILE, MASKS_FILE, CONFIG_FILE)


def export(checkpoint: Path, archive: Path) -> None:
    """Write the masks of a hybrid checkpoint as ``archive`` (``.tar.xz``), in full or not at all.

    Raises:
        UserError: if the checkpoint is damaged, is more than its masks, has none or was not made by a study, or
            ``archive`` is there.
    """
    info = load_info(checkpoint)
    method = oneshot.METHODS.get(info.get("method", ""))
    refitted = bool(info.get("definition", {}).get("refit"))
    if refitted or (method and method.changes_weights):
        what = "refit" if refitted else info["method"]
        raise UserError(f"{checkpoint}: {what} changes the weights that survive: share the whole checkpoint")
    if not load_masks(checkpoint):
        raise UserError(f"{checkpoint} has no masks to share: its structure is {info['structure']}")
    if "definition" not in info:
        raise UserError(f"{checkpoint} does not say what defines it: only what hts made can be restored by name")
    if archive.exists():
        raise UserError(f"{archive} is already there: choose another place, or remove it first")
    with replacing(archive) as temporary, tarfile.open(temporary, "w:xz") as packed:
        for name in FILES:
            packed.add(checkpoint / name, f"{key(info['definition'])}/{name}")


def restore(archive: Path, store: Store, machine: Machine) -> Path:
    """Make the checkpoint of an archive again in a results directory, where studies find it; returns where it is.

    The dense model is loaded by the name in the archive. What comes out is the checkpoint bit for bit, or an error.

    Raises:
        UserError: if this is no such archive, it is damaged, or the model here is not the one that was pruned.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = _unpack(archive, Path(temporary))
        info = load_info(folder, masks_alone=True)
        if "definition" not in info:
            raise UserError(f"{archive}: {INFO_FILE} does not say what defines the checkpoint")
        path = store.root / "checkpoints" / key(info["definition"])
        with store.lease(f"pruning-{path.name}"):
            if not path.exists():
                dtype = _dtype(folder / CONFIG_FILE)
                name = info["definition"]["model"]
                model, tokenizer = models.load_model(name, device="cpu", dtype=dtype, data=machine.data)
                restore_checkpoint(folder, model, tokenizer, path)
    return path


def _unpack(archive: Path, target: Path) -> Path:
    """``target``, with the files of an archive's only folder in it; of anything else nothing is written."""
    try:
        with tarfile.open(archive) as packed:
            files = {PurePosixPath(member.name): member for member in packed if not member.isdir()}
            if strange := [path for path, member in files.items() if path.name not in FILES or not member.isfile()]:
                raise UserError(f"{archive}: not an archive of masks: {strange[0]} in it is no part of one")
            if len(folders := {path.parent for path in files}) != 1:
                raise UserError(f"{archive}: not an archive of masks: {len(folders)} folders in it instead of one")
            for path, member in files.items():
                content = packed.extractfile(member)
                assert content is not None
                with open(target / path.name, "wb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{archive}: not an archive of masks: {error}") from error
    return target


def _dtype(config: Path) -> torch.dtype:
    """The dtype of a checkpoint's weights, as its configuration says it."""
    try:
        dtype = getattr(torch, json.loads(config.read_text())["dtype"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{config}: does not say which dtype was pruned: {error}") from error
    assert isinstance(dtype, torch.dtype)
    return dtype
