"""What every kernel must compute, in plain torch."""

import torch
from torch import Tensor

from stoicc.format import SCALED, HybridWeight, unpack


def linear(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias`` by unpacking: ``[..., K]`` to ``[..., N]``, on any device, in the weight's dtype."""
    return torch.nn.functional.linear(x, unpack(hybrid), bias)


def exact(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None, token_scales: Tensor | None = None) -> Tensor:
    """The same product in float64, what errors are measured against.

    Args:
        x: ``[..., K]``; of a weight of 8 bits the values of quantised activations, ``[tokens, K]`` or more columns.
        token_scales: float32 ``[tokens]``, theirs.
    """
    y = x[..., : hybrid.shape[1]].double() @ unpack(hybrid).double().T
    if hybrid.scales is not None and token_scales is not None:
        y = y * hybrid.scales.double() * token_scales.double()[:, None]
    return y if bias is None else y + bias.double()


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """8-bit values ``[rows, columns]`` and float32 scales ``[rows]``, of each row by its largest magnitude.

    Rounded to nearest, to even at the half. A row of zeros gets a small positive scale.
    """
    wide = x.float()
    scales = wide.abs().amax(1).clamp(min=1e-30) / SCALED[dtype]
    values = wide * (1 / scales)[:, None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def quantise_tokens(x: Tensor, dtype: torch.dtype, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``quantise`` of activations ``[tokens, K]``, after an RMSNorm of weight ``norm`` ``[K]`` if there is one."""
    if norm is not None:
        wide = x.float()
        x = norm * (wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    return quantise(x, dtype)
