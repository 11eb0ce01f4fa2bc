"""Makes an ordinary transformers model run on packed weights.

    >>> report = compile_model(model.cuda(), load_masks("checkpoint"))
    >>> print(report)
    224 linears packed into 128, 0 kept dense, 0 kept since they would be slower: 12.95 GB -> 7.92 GB (0.61x)

Projections that read the same activations (query, key and value; gate and up) are packed as one weight where their tile
maps can be stacked, so that one kernel does the work of three. The first of them computes all, the others take their
rows of the result.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patch.errors import UserError
from patch.layers import check_present, prunable_linears, prunable_matrices, require_linears
from patch.mask import HybridMask
from patch.quantise.linear import QuantisedLinear
from patch.quantise.values import quantise_weight
from stoicc import dense8
from stoicc.format import DTYPES, GROUPED, SCALE_GROUP, SCALED, HybridWeight, dequantised, layout_of, pack, unpack
from stoicc.matmul import product
from stoicc.spec import Spec, StoiccConfig
from stoicc.tune import faster_packed

# Names, within one parent module, of linears that are applied to the same activations.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Fused(nn.Module):
    """Several linears that are applied to the same activations, computed as one product, for inference.

    It takes the place of the first, ``[..., K]`` to the first's ``[..., N]``; a `HybridPart` in the place of each other
    takes its features of the result.

    Args:
        parts: full names of the linears it replaces, with the output features of each.
        in_features: inputs of all of them.
    """

    def __init__(self, parts: Sequence[tuple[str, int]], in_features: int) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.in_features, self.out_features = in_features, self.parts[0][1]
        self._sizes = [rows for _, rows in self.parts]
        self._results: tuple[Tensor, int | Tensor | None, Sequence[Tensor]] | None = None

    def product(self, x: Tensor) -> Tensor:
        """The outputs of all fused linears, one after the other, for ``x`` ``[..., K]``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to the first fused linear's ``[..., N]``."""
        everything = self.all_parts(x)
        if len(everything) > 1:
            self._results = (x, _version(x), everything)
        return everything[0]

    def all_parts(self, x: Tensor) -> Sequence[Tensor]:
        """The outputs of all fused linears for ``x`` ``[..., K]``, each ``[..., its features]``."""
        return self.product(x).split(self._sizes, dim=-1)

    def part(self, x: Tensor, index: int) -> Tensor:
        """The output of fused linear ``index`` for the activations that the first was just applied to.

        Called with any other activations, or out of turn, it computes them.
        """
        results = self._results
        if index == len(self._sizes) - 1:
            self._results = None
        if results is None or results[0] is not x or not _unchanged(x, results[1]):
            return self.all_parts(x)[index]
        return results[2][index]

    def extra_repr(self) -> str:
        fused = "" if len(self._sizes) == 1 else f", fused={self._sizes}"
        return f"in_features={self.in_features}, out_features={self.out_features}{fused}"


class _Copy(Tensor):
    """A weight that was made anew: what is written to it would be lost, so that writing to it is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if re.fullmatch(r"[a-z]\w*_|__i(add|sub|mul|matmul|truediv|floordiv|pow|and|or)__|__setitem__", func.__name__):
            raise UserError("a packed weight cannot be written: pack a model after it has changed its weights")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class HybridLinear(Fused):
    """``torch.nn.Linear``, or several fused, on a packed weight: ``[..., K]`` to ``[..., N]``, for inference."""

    def __init__(self, spec: Spec, hybrid: HybridWeight, bias: Tensor | None) -> None:
        super().__init__(spec.parts, spec.in_features)
        self.spec = spec
        # How products of `float8_e4m3fn` are added up: as `stoicc.linear`.
        self.precise = False
        for name, part in hybrid.parts().items():
            self.register_buffer(name, part)
        self.register_buffer("orders", hybrid.orders, persistent=False)
        self.register_buffer("bias", bias)
        self.records: Tensor
        self.starts: Tensor
        self.columns: Tensor
        self.sparse_blocks: Tensor
        self.leads: Tensor
        self.scales: Tensor
        self.orders: Tensor
        self.bias: Tensor | None
        self._dtype, self._shape, self._tile = hybrid.dtype, list(spec.shape), list(spec.tile)
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())

    def refresh(self) -> None:
        """Check what was loaded, and derive from it what the kernels read beside it.

        Raises:
            UserError: naming the module and what is wrong.
        """
        self.orders = self.checked().orders

    @classmethod
    def empty(cls, spec: Spec, bias_dtype: torch.dtype) -> "HybridLinear":
        """One without data, on the meta device, to load a packed checkpoint into.

        Raises:
            UserError: if nothing is packed in the spec's dtype.
        """
        n, k = spec.shape
        dtype = spec.values
        layout = layout_of(dtype)
        panels, steps = -(-n // 64), -(-k // layout.columns)
        sizes = {
            "records": (spec.units, layout.unit),
            "starts": (panels + 1,),
            "columns": (panels, steps),
            "sparse_blocks": (panels,),
            "leads": (panels,),
        }
        parts = {name: torch.empty(size, dtype=torch.int32, device="meta") for name, size in sizes.items()}
        if spec.eight_bits:
            parts["scales"] = torch.empty(n, dtype=torch.float32, device="meta")
        bias = torch.empty(n, dtype=bias_dtype, device="meta") if spec.bias else None
        return cls(spec, HybridWeight(spec.shape, spec.tile, dtype, **parts, band=spec.band), bias)

    def checked(self) -> HybridWeight:
        """The packed weight, every invariant checked: what was loaded from a file goes through here before it is used.

        Raises:
            UserError: naming the module and what is wrong.
        """
        try:
            return HybridWeight(
                self.spec.shape,
                self.spec.tile,
                self._dtype,
                records=self.records,
                starts=self.starts,
                columns=self.columns,
                sparse_blocks=self.sparse_blocks,
                leads=self.leads,
                band=self.spec.band,
                scales=self.scales if self.spec.eight_bits else None,
            )
        except UserError as error:
            raise UserError(f"{self.spec.parts[0][0]}: {error}") from None

    @property
    def weight(self) -> Tensor:
        """As `weight_of` the first linear, under the name that a ``Linear`` has it by."""
        return self.weight_of(0)

    def weight_of(self, index: int) -> Tensor:
        """The masked weight ``[N, K]`` of fused linear ``index``, made anew at every call.

        For models that multiply by a linear's weight instead of calling it (Mamba's time steps): right, but no faster
        than the dense weight, and what is written to it is lost.
        """
        sizes = [rows for _, rows in self.parts]
        if self.records.is_meta:
            kept = torch.int8 if self._dtype == GROUPED else self._dtype
            return torch.empty(sizes[index], self.in_features, dtype=kept, device="meta")
        hybrid = self.checked()
        if self.spec.quantised:
            whole = dequantised(hybrid).to(torch.bfloat16 if self.bias is None else self.bias.dtype)
        else:
            whole = unpack(hybrid)
        weight: Any = whole.split(sizes)[index].as_subclass(_Copy)
        # transformers fills weights in that it did not load.
        weight._is_hf_initialized = True
        return weight

    def product(self, x: Tensor) -> Tensor:
        schedule = (self.records, self.starts, self.columns, self.sparse_blocks, self.leads)
        scales = self.scales if self.spec.eight_bits else None
        kinds = (self._dtype, self._shape, self._tile, self.spec.band)
        return product(x, schedule, scales, self.orders, self.bias, *kinds, precise=self.precise)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tile={self._tile}"


class DenseLinear8(Fused):
    """Linears of dense ``float8_e4m3fn``, computed as one by cuBLAS: left where packed tiles would be slower.

    No checkpoint has a place for it: its state cannot be saved.
    """

    def __init__(self, hybrid: HybridWeight, parts: Sequence[tuple[str, int]], bias: Tensor | None) -> None:
        super().__init__(parts, hybrid.shape[1])
        self.precise = False
        self.register_buffer("values", unpack(hybrid), persistent=False)
        self.register_buffer("scales", hybrid.scales, persistent=False)
        self.register_buffer("one", self.scales.new_ones(()), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.values: Tensor
        self.scales: Tensor
        self.one: Tensor
        self.bias: Tensor | None
        self.register_state_dict_pre_hook(DenseLinear8.refuse_to_be_saved)

    def refuse_to_be_saved(self, *_: Any) -> None:
        """Raises UserError: it has no place in a checkpoint."""
        name = self.parts[0][0]
        raise UserError(f"{name} was left dense in FP8 and cannot be saved: pack the model without `tokens` to save it")

    @property
    def nbytes(self) -> int:
        """Bytes of its weight and scales."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def weight(self) -> Tensor:
        """As `HybridLinear.weight`."""
        return self.weight_of(0)

    def weight_of(self, index: int) -> Tensor:
        """As `HybridLinear.weight_of`."""
        kept = torch.bfloat16 if self.bias is None else self.bias.dtype
        whole = (self.values.float() * self.scales[:, None]).to(kept)
        return whole.split([rows for _, rows in self.parts])[index].as_subclass(_Copy)

    def product(self, x: Tensor) -> Tensor:
        return dense8.linear(x, self.values, self.scales, self.one, self.bias, precise=self.precise)


def _version(x: Tensor) -> int | Tensor | None:
    """What tells whether ``x`` is written in place later: its version, or of an inference tensor, without one, a copy.

    None while tracing or capturing a graph, where a write in between would be seen as another tensor, or cannot be.
    """
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return x.clone() if x.is_inference() else x._version


def _unchanged(x: Tensor, version: int | Tensor | None) -> bool:
    if isinstance(version, Tensor):
        return torch.equal(x, version)
    return version is None or (not x.is_inference() and x._version == version)


class HybridPart(nn.Module):
    """Stands where a linear was that is now fused into another."""

    def __init__(self, owner: Fused, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = owner.in_features, owner.parts[index][1]
        self.index = index
        # In a tuple, so that the owner's tensors are not a second time this module's.
        self._owner = (owner,)

    @property
    def weight(self) -> Tensor:
        """As `HybridLinear.weight_of`."""
        owner: Any = self._owner[0]
        weight: Tensor = owner.weight_of(self.index)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to this linear's ``[..., N]``."""
        return self._owner[0].part(x, self.index)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, part={self.index}"


@dataclass(frozen=True)
class Report:
    """What ``compile_model`` did.

    Attributes:
        packed: specs of the packed modules.
        dense: names of the linears left as they were, since all their tiles are dense.
        slower: names of the linears left as they were, or of 8 bits made dense FP8, since they would be slower packed.
        bytes_before, bytes_after: of all masked linears, these included.
    """

    packed: tuple[Spec, ...]
    dense: tuple[str, ...]
    slower: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        linears = sum(len(spec.parts) for spec in self.packed)
        ratio = self.bytes_after / max(1, self.bytes_before)
        return (
            f"{linears} linears packed into {len(self.packed)}, {len(self.dense)} kept dense, "
            f"{len(self.slower)} kept since they would be slower: "
            f"{_size(self.bytes_before)} -> {_size(self.bytes_after)} ({ratio:.2f}x)"
        )


def _size(count: int) -> str:
    """Bytes in a unit in which a small model is not 0.01."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@torch.no_grad()
def compile_model(
    model: nn.Module,
    masks: Mapping[str, HybridMask],
    *,
    fuse: bool = True,
    tokens: Sequence[int] = (),
    keep_dense: bool = True,
    dtype: torch.dtype | None = None,
    precise: bool = False,
) -> Report:
    """Replace the masked linears of ``model`` by packed ones, in place, freeing each dense weight as it goes.

    Args:
        model: on any device; its masked linears in bfloat16 or float16.
        masks: by full name of the linear.
        fuse: pack siblings as one where their maps allow.
        tokens: how many tokens a pass will have, one or more typical numbers. On a GPU that has a tuning table, linears
            are packed if it says that this is faster, in the geometric mean over them: with one token, that may be
            those whose tiles are all dense too. Otherwise all are packed but these, to save memory. Of FP8, others
            become dense FP8, of bfloat16 models on Hopper; such a model runs, but is not to be saved. Of INT8 and INT4,
            and of FP8 elsewhere, all are packed.
        keep_dense: leave linears whose tiles are all dense as they are, as above; else they are packed like all others.
        dtype: ``float8_e4m3fn`` or ``int8``: weights are quantised to it, a scale for each output feature, and all of
            them packed but for ``tokens``. Those that are quantised already (`patch.simulate`) are packed as they are.
        precise: linears of ``float8_e4m3fn`` add up as `stoicc.linear` does if ``precise``, and with ``tokens`` are
            packed where they are faster so. A checkpoint does not keep it: `add_up_precisely` after loading one.

    Raises:
        UserError: before anything is changed, if a name is not a linear of the model, a mask does not fit its weight,
            a weight has another dtype, is offloaded or, to be quantised, not finite, ``tokens`` are no numbers of
            tokens, ``dtype`` is not one of 8 bits, or ``precise`` has no FP8.
    """
    if dtype is not None and dtype not in SCALED:
        raise UserError(f"cannot quantise to {dtype!r}: torch.float8_e4m3fn or torch.int8")
    if not isinstance(masks, Mapping):
        raise UserError(f"masks are {masks!r}: give masks by name, such as patch.checkpoint.load_masks({masks!r})")
    if not isinstance(tokens, Sequence) or any(type(count) is not int or count < 1 for count in tokens):
        raise UserError(f"tokens are {tokens!r}, must be positive whole numbers, such as (1, 2048)")
    check_present(model)
    _check_not_foreign(model, masks)
    if hasattr(model, "get_decoder"):
        strange = masks.keys() - prunable_linears(model).keys()
        if strange & prunable_matrices(model).keys():
            require_linears(model, "packing")
    for name, mask in masks.items():
        _check_linear(model, name, mask, dtype)
    if precise and torch.float8_e4m3fn not in {dtype or _dtype_packed(_linear(model, name)) for name in masks}:
        raise UserError("precise sums are of FP8: give dtype=torch.float8_e4m3fn, or a model that is quantised to it")
    packed: list[Spec] = []
    dense: list[str] = []
    slower: list[str] = []
    before = after = 0
    for names in list(groups(masks, lambda names: fuse and _stackable(model, masks, names))):
        linears = [_linear(model, name) for name in names]
        size = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
        before += size
        mask = _stack([masks[name] for name in names])
        device = linears[0].weight.device
        of_16_bits = dtype is None and not isinstance(linears[0], QuantisedLinear)
        kind = dtype or _dtype_packed(linears[0])
        runs_dense = of_16_bits or dense8.runs(device, *mask.shape, kind, linears[0].weight.dtype)
        choose = bool(tokens) and device.type == "cuda" and runs_dense
        all_dense = bool(mask.dense.all()) and of_16_bits
        if all_dense and keep_dense and not choose:
            dense += names
            after += size
            continue
        module, hybrid = _pack_linears(names, linears, mask, dtype)
        if choose and not faster_packed(device, hybrid, tokens, precise=precise and kind == torch.float8_e4m3fn):
            (dense if all_dense else slower).extend(names)
            if not of_16_bits:
                left = DenseLinear8(hybrid, module.parts, module.bias)
                install(model, left)
                size = left.nbytes
            after += size
            continue
        install(model, module)
        packed.append(module.spec)
        after += hybrid.nbytes
        del linears
    config: Any = getattr(model, "config", None)
    if packed and config is not None:
        # So that save_pretrained writes what from_pretrained reads as packed.
        config.quantization_config = StoiccConfig.of([module.spec for module in packed_modules(model)])
    if precise:
        add_up_precisely(model)
    return Report(tuple(packed), tuple(dense), tuple(slower), before, after)


def install(model: nn.Module, module: Fused) -> None:
    """Put a module and its parts where the linears that it replaces are."""
    for index, (name, _) in enumerate(module.parts):
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, HybridPart(module, index) if index else module)


def packed_modules(model: nn.Module) -> list[HybridLinear]:
    """The packed modules of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, HybridLinear)]


def add_up_precisely(model: nn.Module, precise: bool = True) -> None:
    """Let the linears of ``float8_e4m3fn`` of a model that runs packed add up as `stoicc.linear` does if ``precise``.

    Raises:
        UserError: if it has none.
    """
    made = [module for module in model.modules() if isinstance(module, HybridLinear | DenseLinear8)]
    eight = [each for each in made if isinstance(each, DenseLinear8) or each.spec.values == torch.float8_e4m3fn]
    if not eight:
        raise UserError(
            "the model has no packed FP8 linears: call stoicc.compile_model(..., dtype=float8_e4m3fn) first"
        )
    for module in eight:
        module.precise = precise


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"there is a mask for {name!r}, but the model has no such module") from None
    if not isinstance(module, nn.Linear):
        raise UserError(f"there is a mask for {name!r}, which is a {type(module).__name__} and not a torch.nn.Linear")
    return module


def _check_not_foreign(model: nn.Module, names: Collection[str]) -> None:
    """Linears that another package quantised as they were loaded may have no ``weight`` at all."""
    for name, module in model.named_modules():
        foreign = isinstance(module, nn.Linear) and not isinstance(module, QuantisedLinear)
        if name in names and foreign and hasattr(module, "weight_scale"):
            raise UserError(
                f"{name}: its weight is quantised as transformers loads it: pack the checkpoint with `hts pack`, or "
                "load it with experiments.data.models.load_model(..., quantised=True)"
            )


def _check_linear(model: nn.Module, name: str, mask: HybridMask, dtype: torch.dtype | None) -> None:
    linear = _linear(model, name)
    weight = linear.weight
    if isinstance(linear, QuantisedLinear):
        label, group = linear.precision.label, linear.quantised.group
        if linear.precision.grouped and group != SCALE_GROUP:
            raise UserError(
                f"{name}: its {label} has groups of {group} inputs, packed weights have {SCALE_GROUP}: run it unpacked"
            )
        if dtype not in (None, _dtype_packed(linear)):
            raise UserError(f"{name}: its weight is {linear.precision.label} already, it cannot become {dtype}")
    if tuple(weight.shape) != mask.shape:
        raise UserError(f"{name}: mask is for a weight of {mask.shape}, the model's is {tuple(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise UserError(f"{name}: weight is {weight.dtype}: load the model in bfloat16 or float16 to pack it")
    if weight.shape[1] % 8:
        raise UserError(f"{name}: in_features is {weight.shape[1]}, must be a multiple of 8 to be packed")
    if dtype is not None and not isinstance(linear, QuantisedLinear) and not bool(weight.isfinite().all()):
        raise UserError(f"{name}: its weight has values that are not finite, it cannot become {dtype}")


def groups(names: Collection[str], together: Callable[[Sequence[str]], bool]) -> Iterator[list[str]]:
    """Full names of linears, siblings that are all there together where ``together`` allows it."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            continue
        parent, _, child = name.rpartition(".")
        group = [name]
        for siblings in SIBLINGS:
            found = [f"{parent}.{sibling}" for sibling in siblings]
            if child in siblings and all(each in names for each in found) and together(found):
                group = found
        seen.update(group)
        yield group


def _stackable(model: nn.Module, masks: Mapping[str, HybridMask], names: Sequence[str]) -> bool:
    biases = {_linear(model, name).bias is not None for name in names}
    weights = [_linear(model, name).weight for name in names]
    alike = {
        (masks[name].tile, weight.shape[1], weight.dtype, weight.device, _dtype_packed(_linear(model, name)))
        for name, weight in zip(names, weights, strict=True)
    }
    # Only the last may end within a tile.
    whole = all(masks[name].shape[0] % masks[name].tile[0] == 0 for name in names[:-1])
    return len(biases) == 1 and len(alike) == 1 and whole


def _dtype_packed(linear: nn.Linear) -> torch.dtype:
    """What a linear's weight is packed in, if nothing else is asked for."""
    if not isinstance(linear, QuantisedLinear):
        return linear.weight.dtype
    return GROUPED if linear.precision.grouped else linear.values.dtype


def _stack(masks: Sequence[HybridMask]) -> HybridMask:
    if len(masks) == 1:
        return masks[0]
    shape = (sum(mask.shape[0] for mask in masks), masks[0].shape[1])
    dense, patterns = torch.cat([mask.dense for mask in masks]), torch.cat([mask.patterns for mask in masks])
    return HybridMask(shape, masks[0].tile, dense, patterns)


def _pack_linears(
    names: Sequence[str], linears: Sequence[nn.Linear], mask: HybridMask, dtype: torch.dtype | None
) -> tuple[HybridLinear, HybridWeight]:
    weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
    already = [linear.quantised for linear in linears if isinstance(linear, QuantisedLinear)]
    if already:
        values = torch.cat([part.values.view(torch.int8) for part in already]).view(already[0].values.dtype)
        scales = torch.cat([part.scales for part in already])
        hybrid = pack(values, mask, scales if _dtype_packed(linears[0]) == GROUPED else scales[:, 0])
    elif dtype is None:
        hybrid = pack(weight, mask)
    else:
        values, scales = quantise_weight(mask.to(weight.device).apply(weight), dtype)
        hybrid = pack(values, mask, scales)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    parts = tuple((name, linear.out_features) for name, linear in zip(names, linears, strict=True))
    units = hybrid.records.shape[0]
    spec = Spec(
        parts, linears[0].in_features, hybrid.tile, hybrid.band, units, bool(biases), str(hybrid.dtype)[len("torch.") :]
    )
    return HybridLinear(spec, hybrid, torch.cat(biases) if biases else None), hybrid
