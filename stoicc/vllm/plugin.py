"""What vLLM asks a quantization method for: which layers are packed, how their tensors load, how they are applied."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from patch.checkpoint import INFO_FILE, fetch_whole, load_masks
from patch.errors import UserError, one_line
from patch.mask import HybridMask
from stoicc.format import DTYPES, GROUPED, HybridWeight
from stoicc.matmul import product
from stoicc.quantizer import check_files
from stoicc.spec import METHOD, Spec, StoiccConfig
from stoicc.vllm import shards
from stoicc.vllm.shards import Part, Slice

logger = init_logger(__name__)

# Tensors of a packed linear, and what a linear beside it has that stayed dense.
_TENSORS = ("records", "starts", "columns", "sparse_blocks", "leads", "scales", "weight")


class _Layers(QuantizationConfig):
    """What both kinds of checkpoint share: the names of their linears, in the model's words and in vLLM's."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        # By what vLLM calls them.
        self._names = {name: name for name in names}
        self.folder: str | None = None
        self.revision: str | None = None

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        # The oldest with 2:4 tensor cores; on others packed weights would save memory and no time.
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [INFO_FILE]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        # The name of what maps a single name differs from version to version.
        self._names = {(hf_to_vllm_mapper.apply_list([ours]) or [ours])[0]: name for ours, name in self._names.items()}

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        self.folder, self.revision = model_name, revision

    def get_quant_method(self, layer: Any, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        parent, _, child = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(child, [child])
        called = [f"{parent}.{part}" if parent else part for part in parts]
        if not any(name in self._names for name in called):
            return UnquantizedLinearMethod()
        _refuse_adapters()
        return self._method([self._names.get(name, name) for name in called])

    def _method(self, names: Sequence[str]) -> LinearMethodBase:
        raise NotImplementedError


class MaskedConfig(_Layers):
    """A masked checkpoint, whose weights are packed once they have loaded."""

    dtype: torch.dtype | None = None
    _masks: dict[str, HybridMask] | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _Layers:
        # One name serves both kinds: what is packed says so in its config.json.
        if "modules" in config:
            return PackedConfig.from_config(config)
        if not config.get("weights"):
            raise UserError(f"{INFO_FILE} names no masks: an unstructured checkpoint is served without --quantization")
        if not isinstance(config["weights"], dict):
            raise UserError(f"{INFO_FILE}: 'weights' is no object: damaged, copy the checkpoint again")
        return cls(list(config["weights"]))

    def _method(self, names: Sequence[str]) -> LinearMethodBase:
        return MaskedLinearMethod(names, self)

    def masks(self) -> dict[str, HybridMask]:
        """The masks of the checkpoint, by its names, read when first asked for; who packs a layer takes its masks."""
        if self._masks is None:
            self._masks = _read_masks(str(self.folder), self.revision)
        return self._masks


class Float8Config(MaskedConfig):
    """The same, quantised to ``float8_e4m3fn``."""

    dtype = torch.float8_e4m3fn

    @classmethod
    def get_min_capability(cls) -> int:
        return 89


class Int8Config(MaskedConfig):
    """The same, quantised to ``int8``."""

    dtype = torch.int8


class Int4Config(MaskedConfig):
    """The same, rounded to INT4 in groups."""

    dtype = GROUPED


class PackedConfig(_Layers):
    """A packed checkpoint; its specs tell which tensors stand for which linears."""

    def __init__(self, hashed: bool, specs: Sequence[Spec]) -> None:
        super().__init__([name for spec in specs for name, _ in spec.parts])
        self._hashed = hashed
        self._specs = {name: spec for spec in specs for name, _ in spec.parts}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _Layers:
        names = ("format", "modules", "files", "digest")
        about = StoiccConfig(**{name: config[name] for name in names if name in config})
        specs = about.specs()
        kind = PackedFloat8Config if any(spec.values == torch.float8_e4m3fn for spec in specs) else PackedConfig
        return kind(about.files is not None, specs)

    def _method(self, names: Sequence[str]) -> LinearMethodBase:
        if self._hashed:
            _checked(str(self.folder), self.revision)
        return PackedLinearMethod(names, self._specs)


class PackedFloat8Config(PackedConfig):
    """The same, where some weights are ``float8_e4m3fn``."""

    @classmethod
    def get_min_capability(cls) -> int:
        return Float8Config.get_min_capability()


for _name, _config in (("", MaskedConfig), ("-fp8", Float8Config), ("-int8", Int8Config), ("-int4", Int4Config)):
    register_quantization_config(METHOD + _name)(_config)


def _read_masks(named: str, revision: str | None) -> dict[str, HybridMask]:
    """The masks of a checkpoint, all of whose files are what was saved."""
    return load_masks(fetch_whole(partial(_folder, named, revision)))


@cache
def _checked(named: str, revision: str | None) -> None:
    # vLLM loads whatever lies beside the configuration.
    folder = _folder(named, revision, ["config.json", "*.safetensors"])
    check_files(folder, [file.name for file in folder.glob("*.safetensors")])


def _folder(named: str, revision: str | None, files: Sequence[str]) -> Path:
    """Where some files of a checkpoint lie: of one on the hub, the place where vLLM loads them from."""
    if Path(named).is_dir():
        return Path(named)
    from huggingface_hub import snapshot_download

    config = get_current_vllm_config_or_none()
    place = None if config is None else config.load_config.download_dir
    try:
        return Path(snapshot_download(named, revision=revision, cache_dir=place, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise UserError(f"{named}: {', '.join(files)} cannot be had from the hub: {one_line(error)}") from error


def _refuse_adapters() -> None:
    config = get_current_vllm_config_or_none()
    if config is not None and config.lora_config is not None:
        raise UserError(
            "packed weights take no LoRA adapters: serve the masked checkpoint dense, without --quantization stoicc"
        )


def _weights_are_made_up() -> bool:
    """Whether vLLM makes weights up, which then have no zeros where masks drop: ``--load-format dummy``."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def _copies(layer: Any, sizes: Sequence[int]) -> list[int]:
    """How many processes hold the same rows, of each part of a layer."""
    return [1, *[getattr(layer, "num_kv_head_replicas", 1)] * (len(sizes) - 1)]


class _HybridLinearMethod(LinearMethodBase):
    """A layer on packed weights, once they are there."""

    def _held(self, layer: Any, names: Sequence[str], sizes: Sequence[int]) -> list[Slice]:
        """What this process has of the layer's linears."""
        inputs, copies = layer.hybrid_inputs, _copies(layer, sizes)
        return shards.slices(names, sizes, layer.output_size, inputs, layer.input_size, layer.tp_rank, copies)

    def _agree(self, layer: Any, names: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> None:
        """What the checkpoint says of the layer's linears is what the model's configuration makes of them."""
        sizes = layer.hybrid_sizes
        for name, rows in shards.whole_rows(names, sizes, layer.output_size, _copies(layer, sizes)).items():
            wanted = [rows, layer.input_size]
            if name in shapes and list(shapes[name]) != wanted:
                said = "x".join(map(str, shapes[name]))
                raise UserError(f"{name} is {said}, the model's configuration says {'x'.join(map(str, wanted))}")

    def _install(self, layer: Any, hybrid: HybridWeight) -> None:
        for name in _TENSORS:
            if name in layer._parameters:
                delattr(layer, name)
        for name, part in {**hybrid.parts(), "orders": hybrid.orders}.items():
            layer.register_parameter(name, nn.Parameter(part, requires_grad=False))
        layer.hybrid_kinds = (hybrid.dtype, list(hybrid.shape), list(hybrid.tile), hybrid.band)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        schedule = (layer.records, layer.starts, layer.columns, layer.sparse_blocks, layer.leads)
        return product(x, schedule, getattr(layer, "scales", None), layer.orders, bias, *layer.hybrid_kinds)


@register_weight_loader_v2_supported_method
class MaskedLinearMethod(_HybridLinearMethod):
    """Loads a layer as vLLM does, and packs it by its masks.

    Args:
        names: of the layer's linears in the checkpoint.
        config: which has the masks.
    """

    def __init__(self, names: Sequence[str], config: MaskedConfig) -> None:
        self._names, self._config = names, config
        self._dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.hybrid_inputs, layer.hybrid_sizes = input_size_per_partition, output_partition_sizes
        self._made_up = _weights_are_made_up()
        self._dense.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        held = self._held(layer, self._names, layer.hybrid_sizes)
        masks = self._config.masks()
        self._agree(layer, self._names, {name: masks[name].shape for name in self._names if name in masks})
        try:
            dtype = self._config.dtype
            mask = shards.layer_mask(held, masks) if shards.packable(held, dtype) else None
            if mask is None:
                step = shards.inputs_step(dtype)
                logger.warning_once("layers whose inputs in a process are no multiple of %d stay dense", step)
            if mask is None or bool(mask.dense.all()):
                # All that is kept is multiplied as fast by what vLLM has.
                layer.quant_method = self._dense
                self._dense.process_weights_after_loading(layer)
                return
            weight = layer.weight.data
            if self._made_up:
                weight = mask.to(weight.device).apply(weight)
            self._install(layer, shards.pack_layer(weight, mask, dtype))
        except UserError as error:
            raise UserError(f"{', '.join(self._names)}: {error}") from None
        for name in self._names:
            masks.pop(name, None)


@register_weight_loader_v2_supported_method
class PackedLinearMethod(_HybridLinearMethod):
    """Loads packed tensors whole, and cuts out what this process needs.

    Args:
        names: of the layer's linears in the checkpoint.
        specs: of the packed ones, by name.
    """

    def __init__(self, names: Sequence[str], specs: dict[str, Spec]) -> None:
        self._names = names
        self._specs = {name: specs[name] for name in names if name in specs}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.hybrid_inputs, layer.hybrid_sizes = input_size_per_partition, output_partition_sizes
        shapes = {name: (rows, spec.in_features) for spec in self._specs.values() for name, rows in spec.parts}
        self._agree(layer, self._names, shapes)
        loaded: dict[tuple[str, str], Tensor] = {}
        layer.hybrid_loaded = loaded
        for tensor in _TENSORS:
            # What a layer loads depends on what was packed together: it is put aside and taken apart once all is there.
            empty = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
            empty.weight_loader = self._keeper(loaded, tensor)  # type: ignore[attr-defined]
            layer.register_parameter(tensor, empty)
        # The layer asks for the loader of its bias only after this.
        layer.weight_loader = self._bias_splitter(layer.weight_loader)

    def _name(self, shard: Any) -> str:
        """Of the linear that vLLM calls q, k or v, 0 or 1, or by no name."""
        return self._names[{"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)]

    def _keeper(self, loaded: dict[tuple[str, str], Tensor], tensor: str) -> Callable[..., None]:
        def keep(_: nn.Parameter, value: Tensor, shard: Any = None) -> None:
            loaded[self._name(shard), tensor] = value

        return keep

    def _bias_splitter(self, load: Callable[..., None]) -> Callable[..., None]:
        """A loader of biases: that of a fused linear is the biases of all its parts, one after the other."""

        def split(param: nn.Parameter, value: Tensor, *shard: Any) -> None:
            spec = self._specs.get(self._name(shard[0] if shard else None))
            if spec is None or len(spec.parts) == 1:
                load(param, value, *shard)
                return
            shards_of = ("q", "k", "v") if isinstance(shard[0], str) else range(len(self._names))
            for each, part in zip(shards_of, value.split([rows for _, rows in spec.parts]), strict=True):
                load(param, part, each)

        return split

    def process_weights_after_loading(self, layer: Any) -> None:
        held = self._held(layer, self._names, layer.hybrid_sizes)
        grouped = any(spec.dtype == "int4" for spec in self._specs.values())
        dtype = GROUPED if grouped else None
        if not shards.packable(held, dtype):
            raise UserError(
                f"{held[0].name}: {len(held[0].columns)} of its inputs fall to a process, not a multiple of "
                f"{shards.inputs_step(dtype)}: serve the masked checkpoint, or with fewer processes"
            )
        device, loaded = layer.records.device, layer.hybrid_loaded
        dense = {name: loaded[name, "weight"].shape for name, kind in loaded if kind == "weight"}
        self._agree(layer, self._names, dense)
        packed = {spec.parts[0][0]: spec for spec in self._specs.values()}
        weights = {name: _load(spec, name, loaded, device) for name, spec in packed.items()}
        del layer.hybrid_loaded
        if len(packed) == 1 and _whole(held, next(iter(packed.values()))):
            self._install(layer, next(iter(weights.values())))
            return
        parts = {
            name: Part(loaded[name, "weight"].to(device), None) for name in self._names if (name, "weight") in loaded
        }
        for name, spec in packed.items():
            parts |= shards.parts_of(spec, weights[name])
        self._install(layer, shards.repacked(held, parts))


def _load(spec: Spec, name: str, loaded: dict[tuple[str, str], Tensor], device: torch.device) -> HybridWeight:
    """The packed weight of a spec, every invariant checked."""
    wanted = [tensor for tensor in _TENSORS[:-1] if tensor != "scales" or spec.eight_bits]
    for tensor in wanted:
        if (name, tensor) not in loaded:
            raise UserError(f"tensor {name}.{tensor} is missing: incomplete or damaged, copy the checkpoint again")
    parts = {tensor: loaded[name, tensor].to(device) for tensor in wanted}
    try:
        return HybridWeight(spec.shape, spec.tile, getattr(torch, spec.dtype), **parts, band=spec.band)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _whole(held: Sequence[Slice], spec: Spec) -> bool:
    """Whether a process holds exactly what a spec packs, in its order."""
    return [(each.name, len(each.rows), len(each.columns)) for each in held] == [
        (name, rows, spec.in_features) for name, rows in spec.parts
    ]
