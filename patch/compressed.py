"""Quantised weights on disk, in the convention of ``compressed-tensors``, which servers and transformers read.

``config.json`` says in its ``quantization_config`` how all ``Linear`` but those it lists are quantised. Per weight:

    8 bits   <name>.weight         float8_e4m3fn or int8 [N, K]
             <name>.weight_scale   float32 [N, 1]
    INT4     <name>.weight_packed  int32 [N, K/8], eight values a word, the first in the lowest bits, each plus 8
             <name>.weight_scale   bfloat16 [N, K/group]
             <name>.weight_shape   int64 [2], N and K
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from patch.errors import UserError
from patch.quantise.precisions import GROUPS, PRECISIONS, Precision
from patch.quantise.values import INT4_RANGE, Quantised

METHOD = "compressed-tensors"
KEY = "quantization_config"
_FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}
# Values of a word.
_WORD = 8


def quantisation_config(precision: Precision, group: int, left: Collection[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model.

    Args:
        group: inputs that share a scale, of INT4.
        left: full names of the ``Linear`` that are not quantised.
    """
    common: dict[str, Any] = {
        "num_bits": precision.bits,
        "type": "float" if precision.name == "fp8" else "int",
        "symmetric": True,
    }
    weights = common | {"strategy": "group" if precision.grouped else "channel", "dynamic": False}
    if precision.grouped:
        weights["group_size"] = group
    activations = None if precision.grouped else common | {"strategy": "token", "dynamic": True}
    return {
        "quant_method": METHOD,
        "format": _FORMATS[precision.name],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
        },
        "ignore": sorted(left),
    }


def precision_of(config: Mapping[str, Any]) -> Precision | None:
    """The precision of a model by its configuration, if its weights are quantised as here; None if they are not."""
    about = config.get(KEY)
    if not isinstance(about, dict) or about.get("quant_method") != METHOD:
        return None
    for precision in PRECISIONS.values():
        for group in GROUPS if precision.grouped else (0,):
            if _said(about) == _said(quantisation_config(precision, group, ())):
                return precision
    return None


def _said(about: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how weights are read; others may say more."""
    groups = about.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return ()
    (scheme,) = groups.values()
    if not isinstance(scheme, dict):
        return ()
    names = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
    parts = (scheme.get(part) for part in ("weights", "input_activations"))
    how = [tuple(part.get(name) for name in names) if isinstance(part, dict) else None for part in parts]
    return about.get("format"), scheme.get("targets"), *how


def tensors_of(name: str, weight: Quantised, precision: Precision) -> dict[str, Tensor]:
    """The tensors that one quantised weight is stored as, by their full names."""
    values, scales = weight.values.cpu().contiguous(), weight.scales.cpu().contiguous()
    if not precision.grouped:
        return {f"{name}.weight": values, f"{name}.weight_scale": scales}
    return {
        f"{name}.weight_packed": _packed(values),
        f"{name}.weight_scale": scales.bfloat16(),
        f"{name}.weight_shape": torch.tensor(values.shape, dtype=torch.int64),
    }


def names_of(name: str, precision: Precision) -> tuple[str, ...]:
    """The names of `tensors_of`."""
    if precision.grouped:
        return f"{name}.weight_packed", f"{name}.weight_scale", f"{name}.weight_shape"
    return f"{name}.weight", f"{name}.weight_scale"


def group_of(config: Mapping[str, Any]) -> int | None:
    """Inputs that share a scale in a model of `precision_of`, by its configuration; None where they are a whole row."""
    (scheme,) = config[KEY]["config_groups"].values()
    group = scheme["weights"].get("group_size")
    return group if isinstance(group, int) else None


def weight_of(
    name: str, shape: tuple[int, int], precision: Precision, group: int | None, read: Callable[[str], Tensor]
) -> Quantised:
    """One quantised weight from its tensors.

    Args:
        group: inputs that share a scale, as the model's configuration says; None for a whole row.
        read: a tensor by its full name.

    Raises:
        UserError: if its tensors are not what they must be.
    """
    parts = [read(each) for each in names_of(name, precision)]
    try:
        groups = (shape[0], 1 if group is None else shape[1] // group)
        if tuple(parts[1].shape) != groups:
            raise UserError(f"scales are {tuple(parts[1].shape)}, the configuration says {groups}")
        if not precision.grouped:
            values, scales = parts
            if values.dtype != getattr(torch, precision.dtype) or values.shape != shape:
                raise UserError(f"values are {values.dtype} {tuple(values.shape)}, need {precision.dtype} {shape}")
            return Quantised(values, scales)
        packed, scales, said = parts
        wanted = (shape[0], shape[1] // _WORD)
        if packed.dtype != torch.int32 or tuple(packed.shape) != wanted or said.tolist() != list(shape):
            raise UserError(f"packed values are {packed.dtype} {tuple(packed.shape)} of {said.tolist()}, need {wanted}")
        return Quantised(_unpacked(packed), scales.float())
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _packed(values: Tensor) -> Tensor:
    places = 4 * torch.arange(_WORD, device=values.device)
    words = (values.long() - INT4_RANGE[0]).unflatten(1, (-1, _WORD)) << places
    whole = words.sum(-1)
    # The top bit of a word is a bit of its last value, not a sign.
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def _unpacked(packed: Tensor) -> Tensor:
    places = 4 * torch.arange(_WORD, device=packed.device)
    values = (packed.long()[..., None] >> places & 15) + INT4_RANGE[0]
    return values.flatten(1).to(torch.int8)
