"""Dense FP8 by cuBLAS: what runs in place of packed tiles that would be slower.

With a scale for each feature and each token cuBLAS splits no sums over K, so that with few outputs most
multiprocessors stand idle; with a single scale of each operand it does. So few sums are taken with scales of one, in
float32, and scaled afterwards by operations that a compiler makes part of whatever follows.
"""

import torch
from torch import Tensor

from stoicc import configs
from stoicc.quantise import quantise_for_product

# With so few outputs for the inputs that they sum, splitting gains more than scaling takes. On an H100, quantisation
# included, 4096 features of 4096 inputs take 13 us instead of 16 with 128 tokens, but 18 instead of 17 with 256.
OUTPUTS_AN_INPUT = 128


def linear(
    x: Tensor, weight: Tensor, scales: Tensor, one: Tensor, bias: Tensor | None = None, *, precise: bool = False
) -> Tensor:
    """``x @ W^T + bias``, ``[..., K]`` to ``[..., N]``, where `runs`.

    Args:
        x: ``[..., K]``, bfloat16; quantised here, a scale for each token, as for a packed weight.
        weight, scales: ``float8_e4m3fn`` ``[N, K]`` and float32 ``[N]``.
        one: float32 ``[]``, 1, on the device; kept by the caller, since making it would take a kernel for each product.
        bias: ``[N]``, bfloat16.
        precise: as `stoicc.matmul.linear`.
    """
    values, token_scales = quantise_for_product(x, weight.dtype)
    y = product(values, token_scales, weight, scales, one, bias, precise=precise)
    return y.to(x.dtype).reshape(*x.shape[:-1], len(weight))


def product(
    values: Tensor,
    token_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    one: Tensor,
    bias: Tensor | None = None,
    *,
    precise: bool = False,
) -> Tensor:
    """As `linear`, of activations that are quantised: ``values`` ``[T, K]`` and ``token_scales`` ``[T]``."""
    # Not compiled, scaling afterwards would be kernels of its own.
    if torch.compiler.is_compiling() and splits(len(values), *weight.shape):
        y = sums(values, weight, one, precise=precise) * token_scales[:, None] * scales
        return (y if bias is None else y + bias).to(torch.bfloat16)
    return torch._scaled_mm(
        values,
        weight.t(),
        scale_a=token_scales[:, None],
        scale_b=scales[None, :],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=not precise,
    )


def splits(tokens: int, features: int, inputs: int) -> bool:
    """Whether a product has so few outputs for its inputs that it is scaled afterwards."""
    return tokens * features <= OUTPUTS_AN_INPUT * inputs


def sums(values: Tensor, weight: Tensor, one: Tensor, *, precise: bool = False) -> Tensor:
    """``values @ weight^T``, float32 ``[T, N]``, unscaled."""
    return torch._scaled_mm(
        values, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=not precise
    )


def runs(device: torch.device, n: int, k: int, dtype: torch.dtype, out: torch.dtype) -> bool:
    """Whether cuBLAS multiplies weights of this shape and dtype with a scale for each feature and each token."""
    fits = dtype == torch.float8_e4m3fn and out == torch.bfloat16 and n % 16 == k % 16 == 0
    return fits and device.type == "cuda" and configs.capability_of(device) >= (9, 0)
