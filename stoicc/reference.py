"""What every kernel must compute, in plain torch."""

import torch
from torch import Tensor

from patch.quantise.values import quantise_rows
from stoicc.format import GROUPED, HybridWeight, dequantised, unpack


def linear(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias`` by unpacking: ``[..., K]`` to ``[..., N]``, on any device, in the dtype of ``x``."""
    weight = dequantised(hybrid).to(x.dtype) if hybrid.dtype == GROUPED else unpack(hybrid)
    return torch.nn.functional.linear(x, weight, bias)


def exact(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None, token_scales: Tensor | None = None) -> Tensor:
    """The same product in float64, what errors are measured against.

    Args:
        x: ``[..., K]``; of a weight of 8 bits the values of quantised activations, ``[tokens, K]`` or more columns.
        token_scales: float32 ``[tokens]``, theirs.
    """
    if hybrid.dtype == GROUPED:
        y = x.double() @ dequantised(hybrid).double().T
        return y if bias is None else y + bias.double()
    y = x[..., : hybrid.shape[1]].double() @ unpack(hybrid).double().T
    if hybrid.scales is not None and token_scales is not None:
        y = y * hybrid.scales.double() * token_scales.double()[:, None]
    return y if bias is None else y + bias.double()


def quantise_tokens(x: Tensor, dtype: torch.dtype, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Activations ``[tokens, K]`` in 8 bits, after an RMSNorm of weight ``norm`` ``[K]`` if there is one."""
    if norm is not None:
        wide = x.float()
        x = norm * (wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    return quantise_rows(x, dtype)
