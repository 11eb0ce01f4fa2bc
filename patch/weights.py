"""The weights of a model directory, read one tensor at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patch.compressed import group_of, names_of, precision_of, weight_of
from patch.errors import UserError, one_line
from patch.files import existing, read_json
from patch.layers import prunable_linears, prunable_matrices
from patch.mask import tile_sizes, tile_sums
from patch.quantise.precisions import Precision
from patch.quantise.values import Quantised
from patch.tiles import TileShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a model directory holds each tensor."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f"{folder / INDEX}: 'weight_map' is missing")
        for name, shard in index.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise UserError(f"{folder / INDEX}: says that {name} is in {shard!r}, which is no file beside it")
        files = {shard: existing(folder, shard) for shard in sorted(set(index.values()))}
        return {name: files[shard] for name, shard in index.items()}
    file = existing(folder, "model.safetensors")
    return dict.fromkeys(tensor_names(file), file)


def tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged: {one_line(error)}") from error


def without_weights(folder: Path) -> "PreTrainedModel":
    """The model of a directory from its configuration alone, on the meta device: it takes no memory.

    Raises:
        UserError: if the configuration is missing or is not that of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    existing(folder, "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    # What transformers makes of a damaged configuration may be any error.
    except Exception as error:
        raise UserError(f"{folder / 'config.json'}: not a causal language model: {one_line(error)}") from error


def quantisation(config: Mapping[str, Any]) -> str | None:
    """How a model's weights are quantised, as its configuration says; None if they are not.

    Without their scales codes are other weights, and no zeros can be told in them.
    """
    # Of several parts each may say it: a vision language model's text, say.
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    said = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if said is None:
        return None
    return str(said.get("quant_method", "unknown")) if isinstance(said, dict) else "unknown"


def prunable_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Name and ``(N, K)`` of every prunable matrix, without loading a weight.

    Raises:
        UserError: as `without_weights`.
    """
    matrices = prunable_matrices(without_weights(folder))
    return {name: (matrix.weight.shape[0], matrix.weight.shape[1]) for name, matrix in matrices.items()}


def check_no_codes(folder: Path) -> None:
    """Raise if weights are quantised or packed.

    Raises:
        UserError: saying what to look at instead.
    """
    if kind := quantisation(read_json(existing(folder, "config.json"))):
        raise UserError(
            f"{folder}: its weights are packed or quantised (quantization_config: {kind}), where no zeros can be told: "
            "take the checkpoint that it was made of"
        )


def prunable_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every prunable matrix ``[N, K]`` by name, in model order, one in memory at a time where files allow it.

    They do where each is a tensor of its own under the name that it has in the model. Experts that are split on disk,
    and models that are wrapped in another, are loaded whole by transformers, which knows how the names translate.
    Quantised weights are what their values and scales stand for, float32.

    Raises:
        UserError: as `without_weights`; or if weights are quantised, or a tensor is missing, damaged, or of another
            shape.
    """
    if precision := stored_precision(folder):
        for name, weight in quantised_weights(folder, precision):
            yield name, weight.dequantised()
        return
    files = weight_files(folder)
    skeleton = without_weights(folder)
    check_no_codes(folder)
    linears, matrices = prunable_linears(skeleton), prunable_matrices(skeleton)
    if linears.keys() == matrices.keys() and any(f"{name}.weight" in files for name in linears):
        for name, linear in linears.items():
            yield name, read_weight(folder, files, f"{name}.weight", (linear.out_features, linear.in_features))
        return
    for name, matrix in prunable_matrices(_whole(folder, [matrix.parameter for matrix in matrices.values()])).items():
        yield name, matrix.weight.detach()


def stored_precision(folder: Path) -> Precision | None:
    """The precision of a directory's weights, if they are quantised; those who need a damaged one say so."""
    try:
        return precision_of(read_json(existing(folder, "config.json")))
    except UserError:
        return None


def quantised_weights(folder: Path, precision: Precision) -> Iterator[tuple[str, Quantised]]:
    """Every quantised weight by name, in model order, one in memory at a time.

    Raises:
        UserError: as `prunable_weights`; or if values or scales are not what they must be.
    """
    files = weight_files(folder)
    group = group_of(read_json(existing(folder, "config.json")))
    for name, linear in prunable_linears(without_weights(folder)).items():
        if lost := [part for part in names_of(name, precision) if part not in files]:
            raise UserError(f"{folder}: tensor {lost[0]} is missing from its weights")
        shape = (linear.out_features, linear.in_features)
        yield name, weight_of(name, shape, precision, group, lambda part: read_tensor(files, part))


def _whole(folder: Path, needed: Sequence[str]) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        model, report = auto.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(f"{folder}: its weights cannot be loaded: {one_line(error)}") from error
    if lost := set(report["missing_keys"]):
        # One that was asked for says more than one that was not.
        name = next((name for name in needed if name in lost), min(lost))
        raise UserError(f"{folder}: tensor {name} is missing from its weights")
    return model


def read_weight(folder: Path, files: Mapping[str, Path], name: str, shape: tuple[int, int]) -> Tensor:
    if name not in files:
        raise UserError(f"{folder}: tensor {name} is missing from its weights")
    weight = read_tensor(files, name)
    if tuple(weight.shape) != shape:
        raise UserError(f"{files[name]}: {name} is {tuple(weight.shape)}, the configuration says {shape}")
    return weight


def read_tensor(files: Mapping[str, Path], name: str) -> Tensor:
    """A tensor of `weight_files`.

    Raises:
        UserError: if its file is damaged.
    """
    try:
        with safe_open(files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{files[name]}: {name}: {one_line(error)}") from error
    return tensor


def kept_shares(path: str | Path, tile: TileShape) -> dict[str, Tensor]:
    """Per prunable weight, the share of each tile's elements that are not zero, float32 ``[R, C]`` on the CPU.

    Args:
        path: a model directory, mostly an unstructured checkpoint; elements that are kept and zero count as dropped.
        tile: ``(rows, cols)``.

    Raises:
        UserError: if a file is missing or damaged, or the tile is larger than a weight.
    """
    return {
        name: tile_sums((weight != 0).float(), tile) / tile_sizes(weight.shape, tile)
        for name, weight in prunable_weights(Path(path))
    }
