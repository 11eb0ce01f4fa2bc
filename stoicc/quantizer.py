"""Packed checkpoints: a model directory whose weights are packed, which ``from_pretrained`` loads as they are.

    >>> import stoicc                                   # registers the quantizer
    >>> save_packed("packed", model, tokenizer)         # a model that compile_model has converted
    >>> model = AutoModelForCausalLM.from_pretrained("packed", device_map="cuda")

The dense weights are never made. What is loaded is checked in full before it can reach a kernel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from patch.errors import UserError
from patch.files import new_directory
from stoicc.format import DTYPES
from stoicc.linear import HybridLinear, Spec, install, packed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD = "stoicc"
# Written by what it needs: 2 knows weights of 8 bits, 1 does not.
FORMAT = 2


@register_quantization_config(METHOD)
class StoiccConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint: format version, and one spec for each packed module."""

    def __init__(self, format: int = FORMAT, modules: Sequence[Mapping[str, Any]] = (), **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # the mixin names its own methods only
        self.format = format
        self.modules = [dict(module) for module in modules]

    def specs(self) -> list[Spec]:
        """What must be known of each packed module.

        Raises:
            UserError: if the format is newer than this code or a spec is not one.
        """
        if self.format not in range(1, FORMAT + 1):
            raise UserError(f"packed checkpoint has format {self.format}, this version reads up to {FORMAT}: update it")
        try:
            return [_spec(**module) for module in self.modules]
        except (TypeError, ValueError) as error:
            raise UserError(f"packed checkpoint: quantization_config is damaged ({error})") from None


def _spec(parts: Any, in_features: int, tile: Any, band: int, units: int, bias: bool, dtype: str) -> Spec:
    named = tuple((str(name), int(rows)) for name, rows in parts)
    return Spec(named, int(in_features), (int(tile[0]), int(tile[1])), int(band), int(units), bool(bias), str(dtype))


@register_quantizer(METHOD)
class StoiccQuantizer(HfQuantizer):
    """Puts empty packed modules in place before the tensors are loaded, and checks them after."""

    quantization_config: StoiccConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UserError("only packed checkpoints can be loaded so: prune the model, then stoicc.compile_model")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in DTYPES:
            raise UserError(f"packed weights run in bfloat16 or float16, not {dtype}")
        return dtype

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        for spec in self.quantization_config.specs():
            if not spec.eight_bits and str(model.dtype) != f"torch.{spec.dtype}":
                raise UserError(
                    f"packed weights are {spec.dtype}, the model is loaded as {model.dtype}: load it as they are"
                )
            install(model, HybridLinear.empty(spec, model.dtype))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        for module in packed_modules(model):
            module.orders = module.checked().orders
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def save_packed(path: str | Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None) -> Path:
    """Write a model that ``compile_model`` has converted as a packed checkpoint, atomically.

    Raises:
        UserError: if the model has no packed modules, or ``path`` exists.
    """
    modules = packed_modules(model)
    if not modules:
        raise UserError("the model has no packed weights: call stoicc.compile_model first")
    written = FORMAT if any(module.spec.eight_bits for module in modules) else 1
    model.config.quantization_config = StoiccConfig(written, [asdict(module.spec) for module in modules])
    with new_directory(path) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(path)
