"""What every kernel must compute, in plain torch."""

import torch
from torch import Tensor

from stoicc.format import HybridWeight, unpack


def linear(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias`` by unpacking: ``[..., K]`` to ``[..., N]``, on any device, in the weight's dtype."""
    return torch.nn.functional.linear(x, unpack(hybrid), bias)


def exact(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """The same product in float64, what errors are measured against."""
    return torch.nn.functional.linear(x.double(), unpack(hybrid).double(), None if bias is None else bias.double())
