"""The product of activations with a hybrid weight: ``torch.ops.stoicc.linear`` and what chooses its kernel.

    >>> y = linear(x, hybrid, bias)

The custom operator takes the weight's tensors one by one, so that it can stand in a graph of ``torch.compile``; it
enqueues on the current stream, keeps no state between calls, and computes the same bits every time.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from patch.errors import UserError
from stoicc import configs, reference
from stoicc.configs import Config
from stoicc.dispatch import check_operands, run
from stoicc.format import HybridWeight
from stoicc.kernels.portable import PortableConfig
from stoicc.tune import tune_shape


def linear(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias``.

    Args:
        x: ``[..., K]`` of the weight's dtype, on its device; any strides, any leading dimensions, also no tokens.
        bias: ``[N]`` of the same dtype.

    Returns:
        ``[..., N]``, accumulated in float32. On a CPU the weight is unpacked first.

    Raises:
        UserError: if dtype, device or shape do not fit.
    """
    parts = (*hybrid.parts().values(), hybrid.orders)
    return linear_op(x, *parts, bias, hybrid.dtype, list(hybrid.shape), list(hybrid.tile), hybrid.band)


@torch.library.custom_op("stoicc::linear", mutates_args=())
def linear_op(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    columns: Tensor,
    sparse_blocks: Tensor,
    leads: Tensor,
    orders: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    shape: list[int],
    tile: list[int],
    band: int,
) -> Tensor:
    """``linear`` on the parts of a ``HybridWeight`` and its ``orders``: ``[..., K]`` to ``[..., N]``.

    Raises:
        UserError: if dtype, device or shape of ``x`` or ``bias`` do not fit.
    """
    hybrid = HybridWeight.trusted(
        tuple(shape), tuple(tile), dtype, records, starts, columns, sparse_blocks, leads, band, orders
    )
    check_operands(x, hybrid, bias)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], shape[0])
    if x.device.type == "cpu":
        return reference.linear(x, hybrid, bias)
    tokens = x.numel() // shape[1]
    return run(x, hybrid, bias, choose(x.device, shape[0], shape[1], band, configs.token_bucket(tokens)))


@linear_op.register_fake
def _(
    x: Tensor,
    records: Tensor,
    starts: Tensor,
    columns: Tensor,
    sparse_blocks: Tensor,
    leads: Tensor,
    orders: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    shape: list[int],
    tile: list[int],
    band: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@cache
def choose(device: torch.device, n: int, k: int, band: int, tokens: int) -> Config:
    """The configuration for a shape on a GPU: from its table, else measured now.

    Raises:
        UserError: if it would have to be measured while a graph is captured.
    """
    capability = configs.capability_of(device)
    name = torch.cuda.get_device_name(device)
    options = configs.candidates(tokens, capability, band)
    if isinstance(options[0], PortableConfig):
        warnings.warn(f"{name} has no 2:4 tensor cores that are supported: using the portable kernel", stacklevel=2)
        return options[0]
    entry = configs.nearest(configs.tables(name), n, k, band, tokens, capability)
    if entry is not None:
        return entry.config
    if torch.cuda.is_current_stream_capturing():
        raise UserError(f"no tuning table for {name}, and it cannot be measured during a graph capture: run `hts tune`")
    return tune_shape(device, n, k, band, tokens).config
