"""Runs a product with a given kernel and configuration, and says what operands must be.

    >>> y = run(x, hybrid, bias, config)

Which configuration is best is known to `stoicc.matmul`, which asks here once it has chosen, and to `stoicc.tune`, which
measures them all.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from patch.errors import UserError
from stoicc.configs import Config
from stoicc.format import DTYPES, GROUPED, SCALED, HybridWeight
from stoicc.kernels import decode, hopper, hopper_decode, portable
from stoicc.kernels.decode import DecodeConfig
from stoicc.kernels.expand import ExpandConfig, expand
from stoicc.kernels.hopper import HopperConfig
from stoicc.kernels.hopper_decode import HopperDecodeConfig
from stoicc.lowering import lowering
from stoicc.quantise import ROW


def check_operands(x: Tensor, hybrid: HybridWeight, bias: Tensor | None) -> None:
    """Check activations ``[..., K]`` and bias ``[N]`` against a packed weight.

    Raises:
        UserError: if dtype, device or shape do not fit.
    """
    n, k = hybrid.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise UserError(f"activations are {tuple(x.shape)}, the packed weight {n}x{k} needs a last dimension of {k}")
    wanted = DTYPES if hybrid.dtype in (*SCALED, GROUPED) else (hybrid.dtype,)
    if x.dtype not in wanted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        raise UserError(
            f"activations are {x.dtype}, the packed weight {hybrid.dtype}: convert the activations to {names}"
        )
    if x.device != hybrid.device:
        raise UserError(f"activations are on {x.device}, the packed weight on {hybrid.device}")
    _check_bias(bias, n, x.dtype, x.device)


def check_quantised(
    values: Tensor, token_scales: Tensor, hybrid: HybridWeight, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    """Check what `stoicc.quantise.quantise_tokens` returns, and a bias ``[N]``, against a packed weight of 8 bits.

    Raises:
        UserError: if dtype, device or shape do not fit.
    """
    n, k = hybrid.shape
    if hybrid.dtype not in SCALED or values.dtype != hybrid.dtype or out_dtype not in DTYPES:
        raise UserError(
            f"quantised activations are {values.dtype}, the packed weight {hybrid.dtype}, the result {out_dtype}: need "
            "float8_e4m3fn or int8 of both, and bfloat16 or float16"
        )
    columns = k + -k % ROW
    if values.dim() != 2 or values.shape[1] != columns or not values.is_contiguous():
        raise UserError(
            f"quantised activations are {tuple(values.shape)} with strides {values.stride()}, the packed weight "
            f"{n}x{k} needs a contiguous [tokens, {columns}]"
        )
    if hybrid.scales is not None and hybrid.scales.dtype != torch.float32:
        raise UserError(
            f"scales of the packed weight are {hybrid.scales.dtype}, need float32: convert a model before packing it"
        )
    if tuple(token_scales.shape) != (len(values),) or token_scales.dtype != torch.float32:
        raise UserError(
            f"scales of tokens are {token_scales.dtype} {tuple(token_scales.shape)}, need float32 ({len(values)},)"
        )
    if values.device != hybrid.device or token_scales.device != hybrid.device:
        raise UserError(
            f"quantised activations are on {values.device} and {token_scales.device}, the packed weight on "
            f"{hybrid.device}"
        )
    _check_bias(bias, n, out_dtype, values.device)


def _check_bias(bias: Tensor | None, n: int, dtype: torch.dtype, device: torch.device) -> None:
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != dtype or bias.device != device):
        raise UserError(f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, needs {dtype} ({n},) on {device}")


def run(x: Tensor, hybrid: HybridWeight, bias: Tensor | None, config: Config) -> Tensor:
    """``linear`` of 16-bit activations with a given configuration, on a GPU and with at least one token."""
    y = _launch(_aligned(x.reshape(-1, hybrid.shape[1])), hybrid, bias, x.dtype, config, None)
    return y.reshape(*x.shape[:-1], hybrid.shape[0])


def run_scaled(
    values: Tensor,
    token_scales: Tensor,
    hybrid: HybridWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """The product of quantised activations ``[tokens, ...]`` with a weight of 8 bits, as `run`: ``[tokens, N]``."""
    return _launch(values, hybrid, bias, out_dtype, config, token_scales)


def _launch(
    x: Tensor,
    hybrid: HybridWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config,
    token_scales: Tensor | None,
) -> Tensor:
    if isinstance(config, ExpandConfig):
        with torch.cuda.device(x.device):
            return dense_linear(x, expand(hybrid, dtype), bias)
    n = hybrid.shape[0]
    # Bulk copies need rows of 16 bytes: compute into wider rows where N does not give them.
    y = x.new_empty(x.shape[0], n + -n % 8, dtype=dtype)[:, :n]
    pairs, quads = -(-hybrid.panels // 2), -(-hybrid.panels // 4)
    by_group = dict(zip((1, 2, 4), hybrid.orders.split([hybrid.panels, pairs, quads]), strict=True))
    with torch.cuda.device(x.device), lowering():
        if isinstance(config, HopperConfig):
            hopper.launch(x, hybrid, by_group[2 * config.cluster], bias, y, config, token_scales)
        elif isinstance(config, HopperDecodeConfig):
            hopper_decode.launch(x, hybrid, by_group[config.rows // 64], bias, y, config, token_scales)
        elif isinstance(config, DecodeConfig):
            decode.launch(x, hybrid, by_group[2 if config.rows > 64 else 1], bias, y, config, token_scales)
        else:
            portable.launch(x, hybrid, bias, y, config, token_scales)
    return y


def _aligned(x2d: Tensor) -> Tensor:
    """``x2d`` with unit column stride, and rows and base 16-byte aligned; itself where it already is."""
    fits = x2d.stride(1) == 1 and x2d.stride(0) % 8 == 0 and x2d.data_ptr() % 16 == 0
    return x2d if fits else x2d.clone(memory_format=torch.contiguous_format)
