"""Dense products of the precisions that people deploy, for hybrid weights to be compared with.

FP8 is e4m3 for weights and activations (``torch._scaled_mm`` with fast accumulation), in ways of which the fastest
counts: *rowwise*, a scale for each output feature and one for each token, found on the fly; *tensorwise*, one scale for
the weight and one for the activations, known beforehand as after calibration; and *dense8*, rowwise as it runs here in
place of packed tiles that would be slower (`stoicc.dense8`). Activations are quantised within what is timed, by a
kernel that ``torch.compile`` makes of it, or fuses into what comes before. INT4 is symmetric, in groups of as many
inputs as hybrid weights have, with 16-bit activations (``aten._weight_int4pack_mm``).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from patch.layers import prunable_linears
from patch.quantise.linear import QuantisedLinear as Simulated
from stoicc import dense8
from stoicc.format import SCALE_GROUP
from stoicc.linear import Fused, groups, install

Model = TypeVar("Model", bound=nn.Module)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Of `quantised`.
WAYS = ("fp8_rowwise", "fp8_tensorwise", "fp8_dense8", "int4")
# K tiles that a thread of the INT4 kernel takes together.
INNER_K_TILES = 8


def fp8_scale(values: Tensor, dim: int | None = None) -> Tensor:
    """The float32 scale at which the largest magnitude, of each slice along ``dim`` or of all, is FP8's largest."""
    largest = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    return largest.float().clamp(min=1e-12) / FP8_MAX


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    return (values.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def fp8_rowwise(x: Tensor, weight: Tensor, scale: Tensor, fast: bool = True) -> Tensor:
    """``x`` ``[T, K]`` times an e4m3 weight ``[N, K]`` with scales ``[N, 1]``, with fast accumulation or without."""
    scales = fp8_scale(x, dim=1)
    return torch._scaled_mm(
        to_fp8(x, scales), weight.t(), scale_a=scales, scale_b=scale.t(), out_dtype=x.dtype, use_fast_accum=fast
    )


def fp8_tensorwise(x: Tensor, weight: Tensor, scale: Tensor, x_scale: Tensor, fast: bool = True) -> Tensor:
    """As `fp8_rowwise`, each with a single scale."""
    return torch._scaled_mm(
        to_fp8(x, x_scale), weight.t(), scale_a=x_scale, scale_b=scale, out_dtype=x.dtype, use_fast_accum=fast
    )


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values 0 to 15 of ``[N, K]``, 8 being zero, and the scales ``[N, K / SCALE_GROUP]`` of their groups."""
    groups = weight.float().unflatten(1, (-1, SCALE_GROUP))
    scale = (groups.abs().amax(2, keepdim=True) / 7).clamp(min=1e-12).to(weight.dtype)
    values = (groups / scale.float()).round().clamp(-8, 7) + 8
    return values.flatten(1).to(torch.uint8), scale.squeeze(2)


def from_int4(values: Tensor, scale: Tensor) -> Tensor:
    """What `to_int4` stands for, in float64."""
    return ((values.double() - 8).unflatten(1, (-1, SCALE_GROUP)) * scale.double()[:, :, None]).flatten(1)


def pack_int4(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of `int4` from those of `to_int4`."""
    packed = torch.ops.aten._convert_weight_to_int4pack(values[:, ::2] << 4 | values[:, 1::2], INNER_K_TILES)
    return packed, torch.stack([scale, torch.zeros_like(scale)], 2).transpose(0, 1).contiguous()


def int4(x: Tensor, packed: Tensor, scales: Tensor, group: int = SCALE_GROUP) -> Tensor:
    """``x`` ``[T, K]`` times a weight of `pack_int4`, in groups of ``group`` inputs."""
    return torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


class DenseLinear(Fused):
    """Dense linears that are computed as one, in their own dtype."""

    def __init__(self, parts: Sequence[tuple[str, int]], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(parts, weight.shape[1])
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class QuantisedLinear(Fused):
    """Dense linears that are computed as one by a function of this module, ``[T, K]`` and operands to ``[T, N]``."""

    def __init__(
        self,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        function: Callable[..., Tensor],
        operands: Sequence[Tensor],
        bias: Tensor | None,
    ) -> None:
        super().__init__(parts, in_features)
        self.function, self.count = function, len(operands)
        for index, operand in enumerate(operands):
            self.register_buffer(f"operand{index}", operand)
        self.register_buffer("bias", bias)
        self.bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        operands = [getattr(self, f"operand{index}") for index in range(self.count)]
        y = self.function(x.flatten(0, -2), *operands)
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])


def sharing(model: Model) -> Model:
    """A copy of a model with modules of its own and the same tensors."""
    return copy.deepcopy(model, {id(part): part for part in (*model.parameters(), *model.buffers())})


def fused(model: nn.Module) -> None:
    """Compute siblings as one from now on, as servers do; the linears' own weights become views of the fused ones."""

    def make(names: Sequence[str], linears: Sequence[nn.Linear]) -> Fused:
        weight = _stacked(linears)
        for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
            linear.weight.data = part
        return DenseLinear(_parts(names, linears), weight, _bias(linears))

    _replace(model, make)


def quantised(model: nn.Module, way: str, largest: Mapping[str, Tensor]) -> None:
    """Compute siblings as one, from weights of eight or four bits.

    Args:
        way: one of `WAYS`.
        largest: of what each linear is applied to the largest magnitude, by its name; for ``fp8_tensorwise``.
    """

    def make(names: Sequence[str], linears: Sequence[nn.Linear]) -> Fused:
        weight = _stacked(linears)
        function: Callable[..., Tensor]
        operands: Sequence[Tensor]
        if way == "int4":
            function, operands = int4, pack_int4(*to_int4(weight))
        elif way != "fp8_tensorwise":
            scale = fp8_scale(weight, dim=1)
            function, operands = rowwise(to_fp8(weight, scale), scale, ours=way == "fp8_dense8")
        else:
            scale, x_scale = fp8_scale(weight), fp8_scale(torch.stack([largest[name] for name in names]))
            function, operands = fp8_tensorwise, (to_fp8(weight, scale), scale, x_scale)
        parts = _parts(names, linears)
        return QuantisedLinear(parts, weight.shape[1], function, operands, _bias(linears))

    _replace(model, make)


def deployed(model: nn.Module) -> None:
    """Compute the quantised weights of a model (`patch.simulate`) as people deploy them, siblings as one.

    The values and scales are those that the model has, FP8 or INT4.
    """

    def make(names: Sequence[str], linears: Sequence[nn.Linear]) -> Fused:
        given = [linear.quantised for linear in linears if isinstance(linear, Simulated)]
        values = torch.cat([part.values.view(torch.int8) for part in given]).view(given[0].values.dtype)
        scales = torch.cat([part.scales for part in given])
        function: Callable[..., Tensor]
        if values.dtype == FP8:
            n, k = values.shape
            ours = dense8.runs(values.device, n, k, values.dtype, linears[0].weight.dtype)
            function, operands = rowwise(values, scales, ours=ours)
        else:
            function = partial(int4, group=given[0].group)
            operands = pack_int4((values + 8).to(torch.uint8), scales.to(linears[0].weight.dtype))
        return QuantisedLinear(_parts(names, linears), values.shape[1], function, operands, _bias(linears))

    _replace(model, make)


def rowwise(values: Tensor, scales: Tensor, ours: bool) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """`fp8_rowwise` or, if ``ours``, `stoicc.dense8`, and its operands: e4m3 values ``[N, K]``, scales ``[N, 1]``."""
    if ours:
        return dense8.linear, (values, scales[:, 0], scales.new_ones(()))
    return fp8_rowwise, (values, scales)


@contextmanager
def watching(model: nn.Module, largest: dict[str, Tensor]) -> Iterator[None]:
    """Keep in ``largest`` the largest magnitude of what each prunable linear is applied to meanwhile."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = inputs[0].abs().amax()
            largest[name] = torch.maximum(largest.get(name, found), found)

        return keep

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in prunable_linears(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _replace(model: nn.Module, make: Callable[[Sequence[str], Sequence[nn.Linear]], Fused]) -> None:
    linears = prunable_linears(model)
    alike = lambda names: len({linears[name].bias is None for name in names}) == 1  # noqa: E731
    for names in list(groups(linears, alike)):
        install(model, make(names, [linears[name] for name in names]))


def _stacked(linears: Sequence[nn.Linear]) -> Tensor:
    return torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight.data


def _bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    biases = [linear.bias.data for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


def _parts(names: Sequence[str], linears: Sequence[nn.Linear]) -> list[tuple[str, int]]:
    return [(name, linear.out_features) for name, linear in zip(names, linears, strict=True)]
