"""The weights of a model directory, read one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patch.errors import UserError, one_line
from patch.files import existing, read_json
from patch.layers import prunable_linears
from patch.mask import TileShape, tile_sizes, tile_sums

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a model directory holds each tensor."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f"{folder / INDEX}: 'weight_map' is missing")
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


def prunable_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Name and shape of every prunable weight, from the configuration alone: the model is built without memory.

    Raises:
        UserError: if the configuration is missing or is not that of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    existing(folder, "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: not a causal language model: {one_line(error)}") from error
    return {name: (linear.out_features, linear.in_features) for name, linear in prunable_linears(model).items()}


def read_weight(folder: Path, files: Mapping[str, Path], name: str, shape: tuple[int, int]) -> Tensor:
    if name not in files:
        raise UserError(f"{folder}: tensor {name} is missing from its weights")
    try:
        with safe_open(files[name], framework="pt") as tensors:
            weight: Tensor = tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{files[name]}: {name}: {one_line(error)}") from error
    if tuple(weight.shape) != shape:
        raise UserError(f"{files[name]}: {name} is {tuple(weight.shape)}, the configuration says {shape}")
    return weight


def kept_shares(path: str | Path, tile: TileShape) -> dict[str, Tensor]:
    """Per prunable weight, the share of each tile's elements that are not zero, float32 ``[R, C]`` on the CPU.

    Args:
        path: a model directory, mostly an unstructured checkpoint; elements that are kept and zero count as dropped.
        tile: ``(rows, cols)``.

    Raises:
        UserError: if a file is missing or damaged, or the tile is larger than a weight.
    """
    folder = Path(path)
    files = weight_files(folder)
    shares = {}
    for name, shape in prunable_shapes(folder).items():
        kept = read_weight(folder, files, f"{name}.weight", shape) != 0
        shares[name] = tile_sums(kept.float(), tile) / tile_sizes(shape, tile)
    return shares
