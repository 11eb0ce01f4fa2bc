"""The product of activations with a hybrid weight: ``torch.ops.stoicc.linear`` and what chooses its kernel.

    >>> y = linear(x, hybrid, bias)

The custom operator takes the weight's tensors one by one, so that it can stand in a graph of ``torch.compile``; it
enqueues on the current stream, keeps no state between calls, and computes the same bits every time. Weights of 8 bits
have two: ``torch.ops.stoicc.quantise_tokens`` for the activations, ``torch.ops.stoicc.scaled_linear`` for the product.
"""

import warnings
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from patch.errors import UserError
from stoicc import configs, reference
from stoicc.configs import Config
from stoicc.dispatch import check_operands, check_quantised, run, run_scaled
from stoicc.format import HybridWeight
from stoicc.kernels.expand import ExpandConfig
from stoicc.kernels.portable import PortableConfig
from stoicc.quantise import quantise_for_product, quantise_tokens
from stoicc.tune import tune_shape


def linear(x: Tensor, hybrid: HybridWeight, bias: Tensor | None = None, *, precise: bool = False) -> Tensor:
    """``x @ W^T + bias``.

    Args:
        x: ``[..., K]`` of the weight's dtype, on its device; any strides, any leading dimensions, also no tokens. Of
            weights of 8 bits bfloat16 or float16, quantised here, a scale for each token; of 4 bits as it is.
        bias: ``[N]`` of the dtype of ``x``.
        precise: add up products of ``float8_e4m3fn`` in float32 throughout, slower than as tensor cores do, which keep
            fewer bits (``use_fast_accum`` of ``torch._scaled_mm``). Nothing else is changed by it.

    Returns:
        ``[..., N]`` in the dtype of ``x``, accumulated in float32, of int8 in int32. On a CPU the weight is unpacked.

    Raises:
        UserError: if dtype, device or shape do not fit.
    """
    if hybrid.scales is not None:
        check_operands(x, hybrid, bias)
    schedule = (hybrid.records, hybrid.starts, hybrid.columns, hybrid.sparse_blocks, hybrid.leads)
    kinds = (hybrid.dtype, list(hybrid.shape), list(hybrid.tile), hybrid.band)
    return product(x, schedule, hybrid.scales, hybrid.orders, bias, *kinds, precise=precise)


def product(
    x: Tensor,
    schedule: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    scales: Tensor | None,
    orders: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    shape: list[int],
    tile: list[int],
    band: int,
    precise: bool = False,
) -> Tensor:
    """`linear` on the parts of a ``HybridWeight``, as modules keep them: tensors one by one, for graphs of any kind.

    Args:
        schedule: ``records``, ``starts``, ``columns``, ``sparse_blocks`` and ``leads``.
        scales: of weights of 8 bits; activations are quantised here.
    """
    if scales is None:
        return linear_op(x, *schedule, orders, bias, dtype, shape, tile, band)
    # A compiler may put kernels of its own between the two.
    values, token_scales = quantise_for_product(x, dtype, early=not torch.compiler.is_compiling())
    y = scaled_linear_op(values, token_scales, *schedule, scales, orders, bias, x.dtype, shape, tile, band, precise)
    return y.reshape(*x.shape[:-1], shape[0])


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
        tuple(shape), tuple(tile), dtype, records, starts, columns, sparse_blocks, leads, band, None, orders
    )
    check_operands(x, hybrid, bias)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], shape[0])
    if x.device.type == "cpu":
        return reference.linear(x, hybrid, bias)
    tokens = configs.token_bucket(x.numel() // shape[1])
    return run(x, hybrid, bias, choose(x.device, shape[0], shape[1], band, tokens, dtype))


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


def _no_gradient(*_: object) -> None:
    raise UserError("packed weights are for inference and have no gradient: train the masked model, and pack it then")


linear_op.register_autograd(_no_gradient)


@torch.library.custom_op("stoicc::scaled_linear", mutates_args=())
def scaled_linear_op(
    values: Tensor,
    token_scales: Tensor,
    records: Tensor,
    starts: Tensor,
    columns: Tensor,
    sparse_blocks: Tensor,
    leads: Tensor,
    scales: Tensor,
    orders: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    shape: list[int],
    tile: list[int],
    band: int,
    precise: bool = False,
) -> Tensor:
    """The product of quantised activations with the parts of a ``HybridWeight`` of 8 bits: ``[tokens, N]``.

    Args:
        values, token_scales: what `quantise_tokens` returns, in the weight's dtype.
        out_dtype: of the result and of ``bias``, ``bfloat16`` or ``float16``.
        precise: as `linear`.

    Raises:
        UserError: if dtype, device or shape do not fit.
    """
    hybrid = HybridWeight.trusted(
        tuple(shape), tuple(tile), values.dtype, records, starts, columns, sparse_blocks, leads, band, scales, orders
    )
    check_quantised(values, token_scales, hybrid, bias, out_dtype)
    if len(values) == 0:
        return values.new_empty(0, shape[0], dtype=out_dtype)
    if values.device.type == "cpu":
        return reference.exact(values, hybrid, bias, token_scales).to(out_dtype)
    tokens = configs.token_bucket(len(values))
    config = choose(values.device, shape[0], shape[1], band, tokens, values.dtype)
    if precise and values.dtype == torch.float8_e4m3fn:
        config = configs.promoting(config)
    return run_scaled(values, token_scales, hybrid, bias, out_dtype, config)


@scaled_linear_op.register_fake
def _(
    values: Tensor,
    token_scales: Tensor,
    records: Tensor,
    starts: Tensor,
    columns: Tensor,
    sparse_blocks: Tensor,
    leads: Tensor,
    scales: Tensor,
    orders: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    shape: list[int],
    tile: list[int],
    band: int,
    precise: bool = False,
) -> Tensor:
    return values.new_empty(values.shape[0], shape[0], dtype=out_dtype)


scaled_linear_op.register_autograd(_no_gradient)
quantise_tokens.register_autograd(_no_gradient)


@cache
def choose(device: torch.device, n: int, k: int, band: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Config:
    """The configuration for a shape and the dtype of its values on a GPU: from its table, else measured now.

    Where there is no memory to measure in, and while a graph is captured, that of what is nearest of all that is known.

    Raises:
        UserError: if nothing is known while a graph is captured.
    """
    capability = configs.capability_of(device)
    name = torch.cuda.get_device_name(device)
    options = configs.candidates(tokens, capability, band, dtype)
    said = str(dtype).removeprefix("torch.")
    few = tokens <= configs.MOST_OF_FOUR
    if isinstance(options[0], ExpandConfig):
        why = f"{name} has no 2:4 tensor cores for {said}" if few else f"many tokens have no kernel for {said}"
        warnings.warn(f"{why}: the weight is expanded to 16 bits for each product", stacklevel=2)
        return options[0]
    if isinstance(options[0], PortableConfig):
        warnings.warn(f"{name} has no 2:4 tensor cores for {said}: using the portable kernel", stacklevel=2)
        return options[0]
    entry = configs.known(name, n, k, band, tokens, capability, dtype)
    if entry is not None:
        return entry.config
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        warnings.warn(
            f"no tuning table of {name} knows {said} with {tokens} tokens: each shape is measured when it is first "
            "used, for a minute or less; `hts tune` does it once for all",
            stacklevel=2,
        )
        with suppress(torch.OutOfMemoryError):
            return tune_shape(device, n, k, band, tokens, dtype).config
    entry = configs.nearest((*configs.tables(name), *configs.measured(name)), n, k, band, tokens, capability, dtype)
    if entry is None and capturing:
        raise UserError(f"no tuning table for {name}, and it cannot be measured during a graph capture: run `hts tune`")
    why = "it cannot be measured during a graph capture" if capturing else "there is too little memory to measure it"
    like = f"as {entry.n}x{entry.k} with {entry.tokens} does" if entry else "with the likeliest configuration"
    warnings.warn(
        f"no tuning table of {name} knows {n}x{k} of {said} with {tokens} tokens, and {why}: it runs {like}, maybe "
        "slowly: run `hts tune`",
        stacklevel=2,
    )
    return entry.config if entry else options[0]
