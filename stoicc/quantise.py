"""Eight bits: activations as values of ``float8_e4m3fn`` or ``int8``, and scales, by a kernel; weights' are `patch`'s.

>>> values, scales = quantise_weight(mask.apply(weight), torch.float8_e4m3fn)   # a scale for each output feature
>>> hybrid = pack(values, mask, scales)
>>> values, scales = quantise_tokens(x, torch.float8_e4m3fn)                    # a scale for each token
"""

import torch
from torch import Tensor

from patch.errors import UserError
from patch.quantise.values import check_dtype, quantise_rows
from stoicc import configs, reference
from stoicc.format import DTYPES
from stoicc.kernels import quantise

# Values of a token are padded with zeros to rows of this many, for copies of 16 bytes.
ROW = 16


@torch.library.custom_op("stoicc::quantise_tokens", mutates_args=())
def quantise_tokens(
    x: Tensor, dtype: torch.dtype, norm: Tensor | None = None, eps: float = 1e-6, early: bool = False
) -> tuple[Tensor, Tensor]:
    """Values and scales of activations ``[..., K]``: 8 bits ``[tokens, K rounded up to 16]``, float32 ``[tokens]``.

    Args:
        x: bfloat16 or float16, any strides and leading dimensions; a token that is not finite gets a scale that is not.
        norm: ``[K]``, the weight of an RMSNorm that is applied first, with its ``eps``.
        early: let the next kernel on the stream begin at once. Only where that is the product with these values:
            another may not wait for what ran before.

    Raises:
        UserError: if a dtype, shape or device does not fit.
    """
    check_dtype(dtype)
    if x.dim() == 0 or x.dtype not in DTYPES:
        raise UserError(
            f"activations are {x.dtype} {tuple(x.shape)}, need bfloat16 or float16 [..., K] to be quantised"
        )
    k = x.shape[-1]
    if norm is not None and (tuple(norm.shape) != (k,) or norm.device != x.device):
        raise UserError(f"norm is {tuple(norm.shape)} on {norm.device}, needs ({k},) on {x.device}")
    x2d = x.reshape(-1, k)
    x2d = x2d if x2d.stride(1) == 1 else x2d.contiguous()
    simulated = x.device.type == "cpu" or not converts(x.device, dtype)
    values = torch.zeros if simulated else torch.empty
    quantised = values(x2d.shape[0], k + -k % ROW, dtype=dtype, device=x.device)
    if simulated or x2d.shape[0] == 0:
        own, scales = reference.quantise_tokens(x2d, dtype, norm, eps)
        quantised[:, :k] = own
        return quantised, scales
    scales = torch.empty(x2d.shape[0], dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        pdl = configs.capability_of(x.device) >= (9, 0)
        quantise.launch(x2d, dtype, norm, eps, quantised, scales, pdl, early)
    return quantised, scales


def converts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has an instruction that makes values of this dtype; without one torch makes them, step by step.

    That the product falls back as well is said where its kernel is chosen (`stoicc.matmul.choose`).
    """
    return dtype != torch.float8_e4m3fn or configs.capability_of(device) >= (8, 9)


def fuses(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `fusible` may stand for `quantise_tokens`: under ``torch.compile`` it needs no kernel of its own."""
    return torch.compiler.is_compiling() and x.is_cuda and x.shape[-1] % ROW == 0 and converts(x.device, dtype)


def fusible(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `quantise_tokens`, of whole rows, in operations that a compiler makes one kernel of with what is in front.

    A norm, or a product of gate and up, is computed anyway; values differ where the compiler divides less exactly.
    """
    return quantise_rows(x.reshape(-1, x.shape[-1]), dtype)


def quantise_for_product(x: Tensor, dtype: torch.dtype, early: bool = False) -> tuple[Tensor, Tensor]:
    """As `quantise_tokens`, in whichever way is fastest here."""
    return fusible(x, dtype) if fuses(x, dtype) else quantise_tokens(x, dtype, early=early)


@quantise_tokens.register_fake
def _(
    x: Tensor, dtype: torch.dtype, norm: Tensor | None = None, eps: float = 1e-6, early: bool = False
) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    tokens = x.numel() // k
    return x.new_empty(tokens, k + -k % ROW, dtype=dtype), x.new_empty(tokens, dtype=torch.float32)
