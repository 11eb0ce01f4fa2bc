"""What quantising must compute, in float64 and as naively as can be said."""

import torch
from torch import Tensor

from patch.quantise.precisions import Precision
from patch.quantise.values import INT4_RANGE, LARGEST, SHARES, Quantised


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and scales ``[rows]`` in float64: of each row the nearest values of the dtype, by looking at all."""
    codes = _codes_of(dtype)
    scales = x.double().abs().amax(1).clamp(min=1e-30) / LARGEST[dtype]
    distances = (x.double() / scales[:, None])[..., None] - codes
    return codes[distances.abs().argmin(-1)], scales


def _codes_of(dtype: torch.dtype) -> Tensor:
    codes = torch.arange(-128, 128).to(torch.int8).view(dtype).double()
    return codes[codes.isfinite() & (codes.abs() <= LARGEST[dtype])]


def _codes(precision: Precision) -> Tensor:
    if precision.grouped:
        return torch.arange(INT4_RANGE[0], INT4_RANGE[1] + 1).double()
    return _codes_of(getattr(torch, precision.dtype))


def group_scale(weights: Tensor, importance: Tensor) -> float:
    """The scale of one row's group ``[columns]``, the first of those that lose least."""
    largest = float(weights.abs().max())
    best, least = 1.0, float("inf")
    for share in SHARES:
        scale = float(torch.tensor(largest * share / INT4_RANGE[1]).bfloat16()) or 1.0
        rounded = (weights.double() / scale).round().clamp(*INT4_RANGE) * scale
        loss = float(((weights.double() - rounded) ** 2 * importance.double()).sum())
        if loss < least:
            best, least = scale, loss
    return best


def sweep(weight: Tensor, hessian: Tensor, keep: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """INT4 values and scales of a masked weight, one inverse a column: optimal brain surgeon in a fixed order.

    Args:
        weight: ``[N, K]``.
        hessian: ``[K, K]``, damped.
        keep: bool ``[N, K]``.
        group: inputs that share a scale.

    Returns:
        float64 ``[N, K]`` and ``[N, groups]``.
    """
    left, n, k = weight.double().clone(), *weight.shape
    values = torch.zeros(n, k, dtype=torch.float64)
    scales = torch.ones(n, k // group, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian.double()[column:, column:]) for column in range(k)]
    importance = torch.stack([1 / inverse[0, 0] for inverse in inverses])
    for column in range(k):
        place = column // group
        for row in range(n):
            if column % group == 0:
                ours = slice(column, column + group)
                scales[row, place] = group_scale(left[row, ours] * keep[row, ours], importance[ours])
            scale, now = float(scales[row, place]), float(left[row, column])
            if keep[row, column]:
                values[row, column] = max(INT4_RANGE[0], min(INT4_RANGE[1], round(now / scale)))
            error = now - float(values[row, column]) * scale
            left[row, column:] -= error / inverses[column][0, 0] * inverses[column][0]
    return values, scales


def sweep_in_order(
    weight: Tensor, hessian: Tensor, keep: Tensor, order: list[int], precision: Precision, group: int
) -> tuple[Tensor, Tensor]:
    """`sweep` in any order of columns and precision, with scales that are chosen before."""
    codes = _codes(precision)
    left, (n, k) = (weight.double() * keep).clone(), weight.shape
    importance = 1 / torch.linalg.inv(hessian.double()).diagonal()
    if precision.grouped:
        scales = torch.tensor(
            [[group_scale(row[c : c + group], importance[c : c + group]) for c in range(0, k, group)] for row in left],
            dtype=torch.float64,
        )
    else:
        scales = left.abs().amax(1, keepdim=True).clamp(min=1e-30) / codes.max()
    values = torch.zeros(n, k, dtype=torch.float64)
    for place, column in enumerate(order):
        still = order[place:]
        inverse = torch.linalg.inv(hessian.double()[still][:, still])[0]
        scale = scales[:, column * scales.shape[1] // k]
        near = codes[(left[:, column, None] / scale[:, None] - codes).abs().argmin(-1)]
        values[:, column] = torch.where(keep[:, column], near, 0)
        left[:, still] -= ((left[:, column] - values[:, column] * scale) / inverse[0])[:, None] * inverse
    return values, scales


def product(x: Tensor, weight: Quantised, bias: Tensor | None = None, token_scales: Tensor | None = None) -> Tensor:
    """``x`` ``[T, K]`` times a quantised weight, ``[T, N]``; values of tokens with their scales ``[T]`` where given."""
    scales = weight.scales.double().repeat_interleave(weight.group, 1)
    y = x.double() @ (weight.values.double() * scales).T
    if token_scales is not None:
        y = y * token_scales.double()[:, None]
    return y if bias is None else y + bias.double()
