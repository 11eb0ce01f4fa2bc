"""Hybrid checkpoints: save, load, restore.

A hybrid checkpoint is a normal Hugging Face model directory whose weights are already masked, so that plain
``AutoModelForCausalLM.from_pretrained`` loads it, and beside them::

    hybrid.masks         in the format of safetensors, per pruned weight:
        <name>.dense         bool [R, C], the tile map, True = dense
        <name>.patterns      uint8 [N, ceil(K/4 / 2)], two patterns a byte, the first in the low half
        <name>.tile_scores   float32 [R, C], where the method scored tiles
    hybrid.json          format version; tile shape; shape and zeros of each pruned weight; size and SHA-256 of
                         all other files; method, structure, target, sparsity, seed, provenance; and
                         the SHA-256 of all that

Weights of few bits are stored as `patch.compressed` says, and ``hybrid.json`` has their ``precision``.

An unstructured checkpoint has no tiles: it has ``hybrid.json`` and no ``hybrid.masks``. Checkpoints of before call that
file ``hybrid.safetensors``, which servers that read all files of that kind took for weights; they still load.

    >>> save_checkpoint("out", model, tokenizer, masks, {"method": "wanda", "structure": "hybrid", "target": 0.45})
    >>> load_masks("out")["model.layers.0.mlp.up_proj"].sparsity
    0.45
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from patch.compressed import KEY, quantisation_config, tensors_of
from patch.errors import UserError, check_name, one_line
from patch.files import existing, new_directory, read_json, sha256
from patch.layers import prunable_matrices
from patch.mask import HybridMask
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import Quantised
from patch.structures import TILED
from patch.tiles import GROUP, TileShape, check_tile, tile_grid
from patch.weights import INDEX, tensor_names, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# 1: masks lie in hybrid.safetensors. 2: in hybrid.masks. 3: weights are quantised; written only then.
FORMAT = 3
# Named so that no server takes it for weights: some read every *.safetensors of a directory.
MASKS_FILE = "hybrid.masks"
FORMER_MASKS_FILE = "hybrid.safetensors"
INFO_FILE = "hybrid.json"
_OWN_KEYS = ("format", "tile", "weights", "files", "digest")


@torch.no_grad()
def save_checkpoint(
    path: str | Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    masks: Mapping[str, HybridMask],
    info: Mapping[str, Any],
    tile_scores: Mapping[str, Tensor] | None = None,
    quantised: Mapping[str, Quantised] | None = None,
    beside: Iterable[Path] = (),
) -> None:
    """Write a hybrid checkpoint: in full under ``path``, or not at all.

    Args:
        model: its prunable weights are masked already.
        tokenizer: saved with the model where there is one.
        masks: per prunable weight by its dotted name, all with one tile shape; empty for unstructured pruning.
        info: JSON data for ``hybrid.json``: ``structure`` (2:4, hybrid or unstructured) at least; ``zeros``, elements
            dropped per weight, is checked against the weights.
        tile_scores: per weight of ``masks`` float32 ``[R, C]``; not every weight needs them.
        quantised: every prunable weight in the ``precision`` that ``info`` names; the model holds what they stand for.
        beside: files of the dense model that are copied as they are, such as those of its processor.

    Raises:
        UserError: if ``path`` is already there or cannot be written, or masks, info and weights do not agree.
    """
    scores = tile_scores or {}
    record = _record(model, masks, info, scores)
    _check_quantised(model, info, quantised or {})
    with new_directory(path) as folder:
        _write(folder, model, tokenizer, _mask_tensors(masks, scores), record, beside, quantised)


def _record(
    model: "PreTrainedModel", masks: Mapping[str, HybridMask], info: Mapping[str, Any], scores: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The content of ``hybrid.json``, but for the files, of parts that agree."""
    record = _content(masks, info, scores, _check_parts(model, masks, info, scores))
    json.dumps(record)  # whatever cannot be written as JSON fails before the weights are
    return record


def _content(
    masks: Mapping[str, HybridMask], info: Mapping[str, Any], scores: Mapping[str, Tensor], tile: TileShape | None
) -> dict[str, Any]:
    return {
        "format": FORMAT if "precision" in info else FORMAT - 1,
        **info,
        "tile": tile,
        "weights": {
            name: {"shape": mask.shape, "zeros": mask.zeros, "tile_scores": name in scores}
            for name, mask in masks.items()
        },
    }


def _write(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    masks: dict[str, Tensor],
    record: dict[str, Any],
    beside: Iterable[Path],
    quantised: Mapping[str, Quantised] | None = None,
) -> None:
    """All files of a hybrid checkpoint; adds them to its ``record``."""
    if quantised:
        _save_quantised(folder, model, record["precision"], quantised)
    else:
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in beside:
        shutil.copyfile(file, folder / file.name)
    _write_masks(folder, masks, record)


def _write_masks(folder: Path, masks: dict[str, Tensor], record: dict[str, Any]) -> None:
    """The masks, and the ``hybrid.json`` of all files of a folder."""
    if masks:
        save_file(masks, folder / MASKS_FILE, metadata={"format": "pt"})
    files = sorted(file for file in folder.iterdir() if file.is_file())
    record["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    record["digest"] = _digest(record)
    (folder / INFO_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _save_quantised(folder: Path, model: "PreTrainedModel", precision: str, quantised: Mapping[str, Quantised]) -> None:
    about = PRECISIONS[precision]
    state = model.state_dict()
    for name, weight in quantised.items():
        del state[f"{name}.weight"]
        state |= tensors_of(name, weight, about)
    linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    group = next(iter(quantised.values())).group
    config: Any = model.config
    setattr(config, KEY, quantisation_config(about, group, [name for name in linears if name not in quantised]))
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        delattr(config, KEY)


def _check_quantised(model: "PreTrainedModel", info: Mapping[str, Any], quantised: Mapping[str, Quantised]) -> None:
    """Whether quantised weights are all, and are what the model holds."""
    if bool(quantised) != ("precision" in info):
        raise UserError(
            f"checkpoint info has precision {info.get('precision')}, but {len(quantised)} quantised weights"
        )
    if not quantised:
        return
    check_name("precision", info["precision"], PRECISIONS)
    for name, matrix in prunable_matrices(model).items():
        if name not in quantised:
            raise UserError(f"{name} is not quantised: all prunable weights are, or none")
        stands_for = quantised[name].dequantised().to(matrix.weight)
        if not torch.equal(stands_for, matrix.weight):
            raise UserError(f"{name}: the model's weight is not what the quantised one stands for")


def _holds_tensors(name: str) -> bool:
    return name.endswith(".safetensors") or name in (MASKS_FILE, INDEX)


def _digest(info: Mapping[str, Any]) -> str:
    """SHA-256 of all that ``hybrid.json`` says but this."""
    said = json.dumps({name: value for name, value in info.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def save_weightless(path: str | Path, config: Any, masks: Mapping[str, HybridMask], info: Mapping[str, Any]) -> None:
    """Write a checkpoint whose weights whoever loads it makes up, as servers do to be timed.

    Args:
        config: of the model, as transformers has it.
        masks, info: as `save_checkpoint`.
    """
    with new_directory(path) as folder:
        config.save_pretrained(folder)
        tile = next((mask.tile for mask in masks.values()), None)
        _write_masks(folder, _mask_tensors(masks, {}), _content(masks, info, {}, tile))


@torch.no_grad()
def restore_checkpoint(
    masks: str | Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    path: str | Path,
    beside: Iterable[Path] = (),
) -> None:
    """Make a hybrid checkpoint again from its masks, kept without the weights, and the dense model.

    Args:
        masks: a folder with ``hybrid.json`` and ``hybrid.masks``.
        model: the dense model that they were found on, in the dtype of the checkpoint; its weights are masked in place.
        tokenizer: saved with the model where there is one.
        beside: as `save_checkpoint`.

    Raises:
        UserError: if the masks are damaged or of another model, if the weights that come out are not those of the
            checkpoint bit for bit, or ``path`` is already there or cannot be written.
    """
    info = load_info(masks, masks_alone=True)
    found, scores = load_masks(masks, alone=True), load_tile_scores(masks, alone=True)
    matrices = prunable_matrices(model)
    for name, mask in found.items():
        if name not in matrices or tuple(matrices[name].weight.shape) != mask.shape:
            raise UserError(f"{masks}: a mask is for {name} {mask.shape}, which this {type(model).__name__} has not")
        weight = matrices[name].weight
        weight.copy_(mask.to(weight.device).apply(weight))
    kept = {key: value for key, value in info.items() if key not in _OWN_KEYS}
    record = _record(model, found, kept, scores)
    with new_directory(path) as folder:
        _write(folder, model, tokenizer, _mask_tensors(found, scores), record, beside)
        for name, expected in info["files"].items():
            # Configurations and tokenizers may be written otherwise by another version of transformers.
            if not _holds_tensors(name):
                continue
            made = record["files"].get(MASKS_FILE if name == FORMER_MASKS_FILE else name)
            if made != expected:
                raise UserError(
                    f"{masks}: with these weights {name} is another file than it was: "
                    f"{made} instead of {expected}; take the model, in the dtype, that was pruned"
                )


def copy_checkpoint(source: str | Path, path: str | Path) -> Path:
    """Copy a hybrid checkpoint to ``path``, in full or not at all; returns where it is.

    Raises:
        UserError: if ``source`` is damaged, or ``path`` is already there or cannot be written.
    """
    load_info(source)
    with new_directory(path) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return Path(path)


def load_info(path: str | Path, verify: bool = False, masks_alone: bool = False) -> dict[str, Any]:
    """The content of ``hybrid.json``: the info it was saved with, and ``format``, ``tile``, ``weights`` and ``files``.

    Args:
        verify: also hash all files (about a second per GiB); the sizes of those with tensors are compared in any case.
        masks_alone: the folder holds the masks without the model's weights, which are not missed.

    Raises:
        UserError: if this is no hybrid checkpoint, a newer one, or a file is missing, truncated or changed.
    """
    folder = Path(path)
    info = read_json(existing(folder, INFO_FILE))
    version = info.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UserError(f"{folder / INFO_FILE}: format {version} is newer than {FORMAT}, the newest known here: update")
    # Of a checkpoint of before there is none.
    if info.get("digest", _digest(info)) != _digest(info):
        raise UserError(f"{folder / INFO_FILE}: its digest is not that of what it says: changed or damaged")
    try:
        _check_info(info)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / INFO_FILE}: damaged: {one_line(error)}") from error
    for name, expected in info["files"].items():
        if masks_alone and name not in (MASKS_FILE, FORMER_MASKS_FILE):
            continue
        if not verify and not _holds_tensors(name):
            continue
        file = existing(folder, name)
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise UserError(f"{file}: {size} bytes instead of {expected['bytes']}: truncated or changed, copy it again")
        if verify:
            _check_hash(file, info)
    return info


def fetch_whole(fetch: Callable[[Sequence[str]], Path]) -> Path:
    """The folder of a checkpoint that lies elsewhere, all of whose files are what was saved; of another model nothing.

    Args:
        fetch: brings files by their names, in which ``*`` stands for anything, and tells the folder.

    Raises:
        UserError: as `load_info`.
    """
    folder = fetch([f"{Path(INFO_FILE).stem}.*"])
    if (folder / INFO_FILE).is_file():
        folder = fetch([INFO_FILE, *load_info(folder, masks_alone=True)["files"]])
        load_info(folder, verify=True)
    return folder


def content_hash(path: str | Path) -> str:
    """What tells the weights and masks of one model directory from another's, however they are split into files.

    Tensors are read one at a time, about a second per GiB.

    Returns:
        SHA-256 over name, dtype, shape and bytes of every tensor, by name: of the weights, and of the masks where
        there are some.

    Raises:
        UserError: if a file is missing, truncated or damaged.
    """
    folder = Path(path)
    files = weight_files(folder)
    if (masks := masks_file(folder)).exists():
        # Their names end otherwise than those of weights, so none hides another.
        files |= dict.fromkeys(tensor_names(masks), masks)
    digest = hashlib.sha256()
    with ExitStack() as opened:
        readers: dict[Path, Any] = {}
        for name, file in sorted(files.items()):
            try:
                if file not in readers:
                    readers[file] = opened.enter_context(safe_open(file, framework="pt"))
                tensor: Tensor = readers[file].get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: {name}: {one_line(error)}") from error
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
    return digest.hexdigest()


def masks_file(folder: Path) -> Path:
    """Where the masks of a checkpoint lie: in those of before, under a name that ends as weights' do."""
    former = folder / FORMER_MASKS_FILE
    return former if former.exists() and not (folder / MASKS_FILE).exists() else folder / MASKS_FILE


def load_masks(path: str | Path, alone: bool = False) -> dict[str, HybridMask]:
    """The hybrid masks of a checkpoint by weight name, on the CPU; none if it is unstructured.

    Args:
        alone: the folder holds the masks without the model's weights, which they are meant to be applied to.

    Raises:
        UserError: as `load_info`; or if the file of masks is damaged, a mask in it is missing or does not fit, or
            ``hybrid.json`` says other than what they are.
    """
    file = masks_file(Path(path))
    info, tensors = _load_tensors(path, alone)
    masks = {}
    for name, about in info["weights"].items():
        n, k = about["shape"]
        groups = k // GROUP
        dense = _fitting(file, tensors, f"{name}.dense", torch.bool, tile_grid((n, k), info["tile"]))
        packed = _fitting(file, tensors, f"{name}.patterns", torch.uint8, (n, -(-groups // 2)))
        try:
            masks[name] = HybridMask((n, k), info["tile"], dense, _unpack_nibbles(packed, groups))
        except UserError as error:
            raise UserError(f"{file}: {name}.patterns: {error}") from error
    if masks:
        _check_facts(Path(path) / INFO_FILE, info, masks)
    return masks


def _check_facts(file: Path, info: Mapping[str, Any], masks: Mapping[str, HybridMask]) -> None:
    """What ``hybrid.json`` says of the masks is what they are."""
    for name, mask in masks.items():
        if (said := info["weights"][name].get("zeros")) != mask.zeros:
            raise UserError(f"{file}: says that {name} has {said} zeros, its mask has {mask.zeros}: changed or damaged")
    elements = sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    sparsity = sum(mask.zeros for mask in masks.values()) / elements
    said = info.get("sparsity", sparsity)
    if not isinstance(said, int | float) or not abs(said - sparsity) < 1e-6:
        raise UserError(f"{file}: says sparsity {said}, its masks have {sparsity:.6f}: changed or damaged")


def load_tile_scores(path: str | Path, alone: bool = False) -> dict[str, Tensor]:
    """The tile scores of a checkpoint by weight name, float32 ``[R, C]`` on the CPU, for the weights that have them.

    Args:
        alone: as `load_masks`.

    Raises:
        UserError: as `load_masks`.
    """
    file = masks_file(Path(path))
    info, tensors = _load_tensors(path, alone)
    return {
        name: _fitting(file, tensors, f"{name}.tile_scores", torch.float32, tile_grid(about["shape"], info["tile"]))
        for name, about in info["weights"].items()
        if about["tile_scores"]
    }


def _check_parts(
    model: "PreTrainedModel", masks: Mapping[str, HybridMask], info: Mapping[str, Any], scores: Mapping[str, Tensor]
) -> TileShape | None:
    """Whether masks, info and the model's weights agree; the tile shape of the masks."""
    matrices = prunable_matrices(model)
    for key in _OWN_KEYS:
        if key in info:
            raise UserError(f"checkpoint info must not have '{key}': it is written from the masks")
    structure = info.get("structure")
    if (structure in TILED) != bool(masks):
        raise UserError(f"checkpoint info has structure {structure!r}, but there are {len(masks)} masks")
    for name in [*masks, *scores, *info.get("zeros", {})]:
        if name not in matrices:
            raise UserError(f"{name} is not a prunable weight of {type(model).__name__}")
    for name, mask in masks.items():
        weight = matrices[name].weight
        if tuple(weight.shape) != mask.shape:
            raise UserError(f"{name}: the mask is for {mask.shape}, the weight is {tuple(weight.shape)}")
        left = int(torch.count_nonzero(weight.masked_fill(mask.to(weight.device).keep(), 0)))
        if left:
            raise UserError(f"{name}: {left} weights are not zero though the mask drops them: apply the mask first")
    for name, zeros in info.get("zeros", {}).items():
        found = int((matrices[name].weight == 0).sum())
        if found < zeros:
            raise UserError(f"{name}: {found} zeros in the weight, but {zeros} elements are said to be dropped")
    for name, values in scores.items():
        if name not in masks:
            raise UserError(f"{name} has tile scores but no mask")
        if values.dtype != torch.float32 or values.shape != masks[name].dense.shape:
            found_grid = f"{values.dtype} {tuple(values.shape)}"
            raise UserError(f"{name}: tile scores are {found_grid}, need float32 {tuple(masks[name].dense.shape)}")
    tiles = {mask.tile for mask in masks.values()}
    if len(tiles) > 1:
        raise UserError(f"masks have different tile shapes: {sorted(tiles)}")
    return next(iter(tiles), None)


def _mask_tensors(masks: Mapping[str, HybridMask], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, mask in masks.items():
        tensors[f"{name}.dense"] = mask.dense.cpu().contiguous()
        tensors[f"{name}.patterns"] = _pack_nibbles(mask.patterns.cpu())
        if name in scores:
            tensors[f"{name}.tile_scores"] = scores[name].detach().cpu().contiguous()
    return tensors


def _pack_nibbles(patterns: Tensor) -> Tensor:
    """Two patterns a byte, the first in the low half: uint8 ``[N, G] -> [N, ceil(G/2)]``."""
    even = torch.nn.functional.pad(patterns, (0, patterns.shape[1] % 2))
    return even[:, ::2] | (even[:, 1::2] << 4)


def _unpack_nibbles(packed: Tensor, groups: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[:, :groups].contiguous()


def _check_info(info: dict[str, Any]) -> None:
    """Whether ``hybrid.json`` has all that loading relies on; its tile shape becomes a tuple."""
    for key in (*_OWN_KEYS, "structure"):
        if key not in info and key != "digest":
            raise UserError(f"'{key}' is missing")
    if info["tile"] is None and info["weights"]:
        raise UserError("there are masks but no tile shape")
    if info["tile"] is not None:
        info["tile"] = check_tile(info["tile"])
    for name, about in info["weights"].items():
        try:
            tile_grid(about["shape"], info["tile"])
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if not isinstance(about["tile_scores"], bool):
            raise UserError(f"{name}: 'tile_scores' must be true or false")
    for name, about in info["files"].items():
        if Path(name).name != name or not isinstance(about["bytes"], int) or not isinstance(about["sha256"], str):
            raise UserError(f"'files' has a malformed entry {name!r}")


def _load_tensors(path: str | Path, masks_alone: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``hybrid.json`` and the tensors of the masks' file, which must have the hash it was saved with."""
    info = load_info(path, masks_alone=masks_alone)
    if not info["weights"]:
        return info, {}
    file = existing(Path(path), masks_file(Path(path)).name)
    _check_hash(file, info)
    try:
        return info, load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {one_line(error)}") from error


def _fitting(
    file: Path, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> Tensor:
    if name not in tensors:
        raise UserError(f"{file}: tensor {name} is missing")
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise UserError(f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, needs {dtype} {shape}")
    return tensor


def _check_hash(file: Path, info: Mapping[str, Any]) -> None:
    expected = info["files"].get(file.name)
    if expected is None:
        raise UserError(f"{file}: {INFO_FILE} does not know this file")
    if sha256(file) != expected["sha256"]:
        raise UserError(f"{file}: its SHA-256 is not the one in {INFO_FILE}: changed or damaged, copy it again")
