"""An operator and a module on the unstructured kernel, for contrast: linears without the zeros of unstructured masks.

>>> y = unstructured_linear(x, pack_unstructured(weight))   # of which any elements are zero
>>> compile_unstructured(model, prunable_linears(model))    # a whole model
"""

import torch
import triton
from torch import Tensor, nn

from patch.errors import UserError
from stoicc.kernels.unstructured import UnstructuredWeight, launch, pack_unstructured, unpack_unstructured

# Thread blocks for each multiprocessor that split K aims at, and the most parts that it makes.
OVERSUBSCRIBE = 4
MOST_SPLITS = 16


def unstructured_linear(x: Tensor, packed: UnstructuredWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias``: ``[..., K]`` to ``[..., N]`` in the dtype of ``x``, which is the weight's.

    Accumulated in float32. On a CPU the weight is unpacked first.

    Raises:
        UserError: if dtype, device or shape do not fit.
    """
    return unstructured_op(x, packed.bits, packed.values, packed.rows, bias, list(packed.shape))


@torch.library.custom_op("stoicc::unstructured_linear", mutates_args=())
def unstructured_op(
    x: Tensor, bits: Tensor, values: Tensor, rows: Tensor, bias: Tensor | None, shape: list[int]
) -> Tensor:
    """``unstructured_linear`` on the parts of an ``UnstructuredWeight``: ``[..., K]`` to ``[..., N]``.

    Raises:
        UserError: if dtype, device or shape of ``x`` do not fit.
    """
    n, k = shape
    packed = UnstructuredWeight((n, k), bits, values, rows)
    if x.dim() == 0 or x.shape[-1] != k:
        raise UserError(f"activations are {tuple(x.shape)}, the packed weight {n}x{k} needs a last dimension of {k}")
    if x.dtype != values.dtype or x.device != values.device:
        raise UserError(f"activations are {x.dtype} on {x.device}, the packed weight {values.dtype} on {values.device}")
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], n)
    if x.device.type == "cpu":
        return torch.nn.functional.linear(x, unpack_unstructured(packed), bias)
    x2d = x.reshape(-1, k)
    x2d = x2d if x2d.stride(1) == 1 else x2d.contiguous()
    with torch.cuda.device(x.device):
        y = launch(x2d, packed, _splits(x2d, packed))
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], n)


@unstructured_op.register_fake
def _(x: Tensor, bits: Tensor, values: Tensor, rows: Tensor, bias: Tensor | None, shape: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _splits(x: Tensor, packed: UnstructuredWeight) -> int:
    """Enough parts for several thread blocks a multiprocessor, but no more than there are blocks to sum."""
    panels, steps = packed.rows.shape[:2]
    wanted = OVERSUBSCRIBE * torch.cuda.get_device_properties(x.device).multi_processor_count
    blocks = panels * triton.cdiv(x.shape[0], 64)
    return max(1, min(steps, MOST_SPLITS, wanted // blocks))


class UnstructuredLinear(nn.Module):
    """``torch.nn.Linear`` on an `UnstructuredWeight`: ``[..., K]`` to ``[..., N]``, for inference."""

    def __init__(self, packed: UnstructuredWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self._shape = list(packed.shape)
        for name in ("bits", "values", "rows"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        self.bits: Tensor
        self.values: Tensor
        self.rows: Tensor
        self.bias: Tensor | None

    @property
    def packed(self) -> UnstructuredWeight:
        return UnstructuredWeight((self.out_features, self.in_features), self.bits, self.values, self.rows)

    @property
    def weight(self) -> Tensor:
        """The weight ``[N, K]``, made anew: for models that multiply by it instead of calling a linear."""
        return unpack_unstructured(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        return unstructured_op(x, self.bits, self.values, self.rows, self.bias, self._shape)


@torch.no_grad()
def compile_unstructured(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Replace linears of ``model``, by full name, by packed ones, in place; each of its own, siblings are not fused."""
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        bias = None if linear.bias is None else linear.bias.detach()
        module = UnstructuredLinear(pack_unstructured(linear.weight), bias)
        model.get_submodule(parent).register_module(child, module)
