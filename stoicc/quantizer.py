"""Packed checkpoints: a model directory whose weights are packed, which ``from_pretrained`` loads as they are.

    >>> import stoicc                                   # registers the quantizer; or pass trust_remote_code=True
    >>> save_packed("packed", model, tokenizer)         # a model that compile_model has converted
    >>> model = AutoModelForCausalLM.from_pretrained("packed", device_map="cuda")

The dense weights are never made. What is loaded is checked in full before it can reach a kernel.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from patch.errors import UserError
from patch.files import existing, new_directory, read_json, sha256
from stoicc.format import DTYPES
from stoicc.linear import DenseLinear8, HybridLinear, install, packed_modules
from stoicc.spec import AUTO_MAP, CODE, CODE_FILE, FORMER_NEEDED, METHOD, NEEDED, Spec, StoiccConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"

# As safetensors call them: those of 8 bits mean nothing without a scale.
_FLOATS = ("F64", "F32", "F16", "BF16")


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

    def update_attn_implementation(self, config: Any) -> Any:
        # The one look at the configuration before a model is made of it. A damaged one would be told by what does not
        # fit the weights, if at all.
        # One without a name was made by the caller, of no directory.
        name = getattr(config, "_name_or_path", "")
        if self.quantization_config.digest is not None and name and (Path(name) / CONFIG).is_file():
            check_config(Path(name))
        # What was there for those without us is done.
        if getattr(config, "transformers_weights", None) in (NEEDED, FORMER_NEEDED):
            del config.transformers_weights
        if getattr(config, "auto_map", None) == AUTO_MAP:
            del config.auto_map
        return config

    # What transformers asks before version 5.20, at the same place.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if checkpoint_files and self.quantization_config.files is not None:
            check_files(Path(checkpoint_files[0]).parent, [Path(file).name for file in checkpoint_files])
        for spec in self.quantization_config.specs():
            if not spec.quantised and str(model.dtype) != f"torch.{spec.dtype}":
                raise UserError(
                    f"packed weights are {spec.dtype}, the model is loaded as {model.dtype}: load it as they are"
                )
            _check_place(model, spec)
            install(model, HybridLinear.empty(spec, model.dtype))
        hashed = self.quantization_config.files is not None
        _check_tensors(model, [Path(file) for file in checkpoint_files or ()], hashed)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        for module in packed_modules(model):
            module.refresh()
        # What is saved from here on has other files.
        self.quantization_config.files = self.quantization_config.digest = None
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _check_place(model: "PreTrainedModel", spec: Spec) -> None:
    """Each part takes the place of a linear of its shape."""
    for name, rows in spec.parts:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise UserError(f"packed checkpoint: the model has no linear {name!r}, which is said to be packed")
        if (linear.out_features, linear.in_features) != (rows, spec.in_features):
            raise UserError(
                f"packed checkpoint: {name} is said to be {rows}x{spec.in_features}, the configuration says "
                f"{linear.out_features}x{linear.in_features}"
            )
        if (linear.bias is not None) != spec.bias:
            raise UserError(f"packed checkpoint: {name} and the configuration do not agree whether it has a bias")


def save_packed(
    path: str | Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    origin: Mapping[str, Any] | None = None,
    beside: Iterable[Path] = (),
) -> Path:
    """Write a model that ``compile_model`` has converted as a packed checkpoint, atomically.

    Args:
        origin: JSON data kept in its configuration: where the masks come from.
        beside: files that are copied as they are, such as those of a processor.

    Raises:
        UserError: if the model has no packed modules, some that were left dense in FP8, or ``path`` exists.
    """
    modules = packed_modules(model)
    for module in model.modules():
        if isinstance(module, DenseLinear8):
            module.refuse_to_be_saved()
    if not modules:
        raise UserError("the model has no packed weights: call stoicc.compile_model first")
    model.config.quantization_config = StoiccConfig.of([module.spec for module in modules])
    with new_directory(path) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for file in beside:
            shutil.copyfile(file, folder / file.name)
        _seal(folder, origin)
    return Path(path)


def _seal(folder: Path, origin: Mapping[str, Any] | None) -> None:
    """Add to ``config.json`` what those need who do not know us, and the hashes of all files, last its own."""
    (folder / CODE_FILE).write_text(CODE, encoding="utf-8")
    content = read_json(folder / CONFIG) | {"auto_map": AUTO_MAP, "transformers_weights": NEEDED}
    about = content["quantization_config"]
    if origin is not None:
        about["origin"] = dict(origin)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / CONFIG)
    about["files"] = {file.relative_to(folder).as_posix(): sha256(file) for file in files}
    about["digest"] = _digest(content)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _digest(config: Mapping[str, Any]) -> str:
    about = {name: value for name, value in config["quantization_config"].items() if name != "digest"}
    return hashlib.sha256(json.dumps({**config, "quantization_config": about}, sort_keys=True).encode()).hexdigest()


def check_config(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a packed checkpoint whose configuration is what was saved; of before, as it is.

    Raises:
        UserError: if ``config.json`` says something else.
    """
    content = read_json(existing(folder, CONFIG))
    about = content.get("quantization_config")
    if not isinstance(about, dict):
        raise UserError(f"{folder / CONFIG}: has no quantization_config: changed or damaged, copy it again")
    # Checkpoints of before have neither.
    if ("digest" in about or "files" in about) and _digest(content) != about.get("digest"):
        raise UserError(f"{folder / CONFIG}: its digest is not that of what it says: changed or damaged, copy it again")
    return about


def check_files(folder: Path, weights: Sequence[str] = ()) -> None:
    """Every file that is here is what was saved, and all weights are here; about a second per GiB.

    Others may be missing: the hub's cache holds what was asked for, and tokenizers are asked for apart.

    Args:
        weights: names of the files that are about to be loaded, which must be among those that were saved.

    Raises:
        UserError: naming the file that is missing or another than it was.
    """
    known = check_config(folder).get("files")
    if not isinstance(known, dict):
        raise UserError(f"{folder / CONFIG}: names no files in its quantization_config: damaged, copy it again")
    for name in known:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / CONFIG}: names {name!r} among its files, which is elsewhere: do not trust it")
    for name in weights:
        if name not in known:
            raise UserError(f"{folder / name}: {CONFIG} does not know this file: changed or damaged, copy it again")
    for name, digest in known.items():
        needed = name.endswith(".safetensors")
        if (needed or (folder / name).exists()) and sha256(existing(folder, name)) != digest:
            raise UserError(
                f"{folder / name}: its SHA-256 is not the one in {CONFIG}: changed or damaged, copy it again"
            )


def _packed_shapes(shapes: Mapping[str, Sequence[int]]) -> Counter[tuple[Any, ...]]:
    """How many packed parts there are of each kind and shape, wherever they are."""
    kinds = ((name.rpartition(".")[2], tuple(shape)) for name, shape in shapes.items())
    return Counter(each for each in kinds if each[0] in ("records", "starts", "columns", "sparse_blocks", "leads"))


def _check_tensors(model: "PreTrainedModel", files: Sequence[Path], hashed: bool) -> None:
    """The files hold the model's tensors, none more or less, each of its shape and kind.

    Where the files are those that were saved, by their hashes, names on disk may differ from those in memory, of packed
    parts as long as there are as many of each shape: what is packed has one place, whatever that is called.
    """
    if not files or any(file.suffix != ".safetensors" for file in files):
        return
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                part = tensors.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    own = model.state_dict()
    ties = model.config.get_text_config().tie_word_embeddings
    tied = {name for name in own for pattern in model._tied_weights_keys or () if ties and re.fullmatch(pattern, name)}
    missing, unexpected = sorted(own.keys() - found.keys() - tied), sorted(found.keys() - own.keys())
    if hashed and missing and unexpected:
        there = _packed_shapes({name: found[name][1] for name in unexpected})
        if there == _packed_shapes({name: own[name].shape for name in missing}):
            return
    for names, what in ((missing, "is missing"), (unexpected, "is no part of the model")):
        if names:
            raise UserError(
                f"{files[0].parent}: tensor {names[0]} {what}: incomplete or damaged, copy it again, or, of a model "
                "whose tensors have other names on disk, write it with stoicc.save_packed"
            )
    for name, (kind, shape) in found.items():
        if list(own[name].shape) != shape:
            raise UserError(f"{files[0].parent}: {name} is {shape}, the configuration says {list(own[name].shape)}")
        if kind not in (_FLOATS if own[name].is_floating_point() else ("I32", "I64", "BOOL", "U8")):
            raise UserError(f"{files[0].parent}: {name} is {kind}, the model's is {own[name].dtype}")
