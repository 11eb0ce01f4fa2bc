"""Models of few bits that compute what kernels of their precision compute, on any device.

>>> install(model, weights, PRECISIONS["fp8"])              # of a model in memory
>>> model, missing = load_quantised(Path("checkpoint"), torch.float32)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patch.compressed import KEY, names_of
from patch.errors import UserError
from patch.quantise.linear import QuantisedLinear
from patch.quantise.precisions import Precision
from patch.quantise.values import Quantised
from patch.weights import quantised_weights, read_tensor, stored_precision, weight_files, without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install(model: nn.Module, weights: Mapping[str, Quantised], precision: Precision) -> None:
    """Put a `QuantisedLinear` in the place of each linear that has a quantised weight, by full names."""
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, child = name.rpartition(".")
        simulated = QuantisedLinear(precision, weight.to(linear.weight.device), linear.bias, linear.weight.dtype)
        model.get_submodule(parent).register_module(child, simulated)


def load_quantised(folder: Path, dtype: torch.dtype | None) -> "tuple[PreTrainedModel, list[str]]":
    """The model of a directory of quantised weights, and the tensors that its files lack.

    Args:
        dtype: of activations and of what is not quantised; None takes it as it is stored.

    Raises:
        UserError: if this is no such directory, or something in it is damaged.
    """
    precision = stored_precision(folder)
    if precision is None:
        raise UserError(f"{folder}: its weights are not quantised as here")
    files = weight_files(folder)
    skeleton = without_weights(folder)
    weights = dict(quantised_weights(folder, precision))
    parts = {part for name in weights for part in names_of(name, precision)}
    state = {name: read_tensor(files, name) for name in files if name not in parts}
    state |= {f"{name}.weight": weight.dequantised() for name, weight in weights.items()}
    config: Any = skeleton.config
    delattr(config, KEY)
    loading: Any = type(skeleton)
    model, report = loading.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype or config.dtype,
        output_loading_info=True,
    )
    install(model, weights, precision)
    return model, sorted(report["missing_keys"])
