"""Runs a product with a given kernel and configuration, and says what operands must be.

    >>> y = run(x, hybrid, bias, config)

Which configuration is best is known to `stoicc.matmul`, which asks here once it has chosen, and to `stoicc.tune`, which
measures them all.
"""

import torch
from torch import Tensor

from patch.errors import UserError
from stoicc.configs import Config
from stoicc.format import HybridWeight
from stoicc.kernels import decode, hopper, portable
from stoicc.kernels.decode import DecodeConfig
from stoicc.kernels.hopper import HopperConfig
from stoicc.lowering import lowering


def check_operands(x: Tensor, hybrid: HybridWeight, bias: Tensor | None) -> None:
    """Check activations ``[..., K]`` and bias ``[N]`` against a packed weight.

    Raises:
        UserError: if dtype, device or shape do not fit.
    """
    n, k = hybrid.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise UserError(f"activations are {tuple(x.shape)}, the packed weight {n}x{k} needs a last dimension of {k}")
    if x.dtype != hybrid.dtype:
        raise UserError(f"activations are {x.dtype}, the packed weight {hybrid.dtype}: convert the activations")
    if x.device != hybrid.device:
        raise UserError(f"activations are on {x.device}, the packed weight on {hybrid.device}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise UserError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, needs {x.dtype} ({n},) on {x.device}"
        )


def run(x: Tensor, hybrid: HybridWeight, bias: Tensor | None, config: Config) -> Tensor:
    """``linear`` with a given configuration, on a GPU and with at least one token."""
    n, k = hybrid.shape
    x2d = _aligned(x.reshape(-1, k))
    # Bulk copies need rows of 16 bytes: compute into wider rows where N does not give them.
    y = x.new_empty(x2d.shape[0], n + -n % 8)[:, :n]
    pairs, quads = -(-hybrid.panels // 2), -(-hybrid.panels // 4)
    by_group = dict(zip((1, 2, 4), hybrid.orders.split([hybrid.panels, pairs, quads]), strict=True))
    with torch.cuda.device(x.device), lowering():
        if isinstance(config, HopperConfig):
            hopper.launch(x2d, hybrid, by_group[2 * config.cluster], bias, y, config)
        elif isinstance(config, DecodeConfig):
            decode.launch(x2d, hybrid, by_group[2 if config.rows > 64 else 1], bias, y, config)
        else:
            portable.launch(x2d, hybrid, bias, y, config)
    return y.reshape(*x.shape[:-1], n)


def _aligned(x2d: Tensor) -> Tensor:
    """``x2d`` with unit column stride, and rows and base 16-byte aligned; itself where it already is."""
    fits = x2d.stride(1) == 1 and x2d.stride(0) % 8 == 0 and x2d.data_ptr() % 16 == 0
    return x2d if fits else x2d.clone(memory_format=torch.contiguous_format)
