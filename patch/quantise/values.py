"""Values of few bits and their scales.

    >>> values, scales = quantise_weight(mask.apply(weight), torch.float8_e4m3fn)   # a scale for each output feature
    >>> values, scales = quantise_rows(tokens, torch.int8)                          # a scale for each token

Rounded symmetrically, so what is zero stays zero and a mask stays a mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patch.errors import UserError
from patch.quantise.precisions import PRECISIONS, Precision

# Of 8 bits, the largest magnitude of each.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
INT4_RANGE = (-8, 7)
# Scales that are tried for a group of INT4, as shares of that which its largest magnitude just fits.
SHARES = tuple(1 - step / 40 for step in range(21))


@dataclass(frozen=True, eq=False)
class Quantised:
    """A weight ``[N, K]`` of few bits: ``values * scales``, each scale repeated over its group of inputs.

    Attributes:
        values: ``[N, K]``, float8_e4m3fn or int8; of 4 bits int8 from -8 to 7.
        scales: float32 ``[N, groups]``; one group is a whole row.

    Raises:
        UserError: if shapes or dtypes do not fit, or a scale is not positive and finite.
    """

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        values, scales = self.values, self.scales
        if values.dim() != 2 or values.dtype not in LARGEST:
            raise UserError(f"quantised values are {values.dtype} {tuple(values.shape)}, need 8 bits [N, K]")
        if scales.dim() != 2 or len(scales) != len(values) or scales.dtype != torch.float32:
            raise UserError(f"scales are {scales.dtype} {tuple(scales.shape)}, need float32 [{len(values)}, groups]")
        if not scales.shape[1] or values.shape[1] % scales.shape[1]:
            raise UserError(
                f"scales are of {scales.shape[1]} groups, which {values.shape[1]} inputs cannot be cut into"
            )
        if scales.is_meta:
            return
        # e4m3 has no infinity, and is no number where all bits but that of the sign are set; integers always are.
        if values.dtype == torch.float8_e4m3fn and bool(((values.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise UserError("quantised values are not all finite: damaged")
        wrong = (~(scales.isfinite() & (scales > 0))).nonzero()
        if len(wrong):
            row, group = (int(place) for place in wrong[0])
            raise UserError(
                f"scale of row {row}, group {group} is {float(scales[row, group])}: must be positive, finite"
            )

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    def dequantised(self) -> Tensor:
        """The weight, float32 ``[N, K]``."""
        return self.values.float() * self.scales.repeat_interleave(self.group, 1)

    def to(self, device: torch.device | str) -> "Quantised":
        return Quantised(self.values.to(device), self.scales.to(device))


def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """8-bit values ``[rows, columns]`` and float32 scales ``[rows]``, of each row by its largest magnitude.

    Rounded to nearest, to even at the half. A row of zeros gets a small positive scale; one that is not finite a scale
    that is not.
    """
    wide = x.float()
    # By a tensor: on a GPU torch multiplies by a number's reciprocal instead, and rounds twice.
    scales = wide.abs().amax(1).clamp(min=1e-30) / wide.new_full((), LARGEST[dtype])
    values = wide * (1 / scales)[:, None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def quantise_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values ``[N, K]`` and float32 scales ``[N]`` of a weight ``[N, K]``, rounded to nearest; mask it before.

    The largest magnitude of each output feature becomes the largest of the dtype, so zeros stay zeros.

    Raises:
        UserError: if ``dtype`` is not one of 8 bits, or the weight has values that are not finite.
    """
    check_dtype(dtype)
    check_finite(weight)
    return quantise_rows(weight, dtype)


def quantise_groups(weight: Tensor, group: int) -> Quantised:
    """INT4 of a weight ``[N, K]`` in groups of ``group`` inputs, rounded to nearest; mask it before.

    Raises:
        UserError: if the weight has values that are not finite.
    """
    check_finite(weight)
    groups = weight.float().reshape(-1, group)
    scales = group_scales(groups, torch.ones(group, device=weight.device))
    values = (groups / scales[:, None]).round().clamp(*INT4_RANGE).to(torch.int8)
    return Quantised(values.reshape(weight.shape), scales.reshape(len(weight), -1))


def limits(precision: Precision) -> tuple[float, float]:
    """The lowest and the highest value."""
    if precision.grouped:
        return INT4_RANGE
    largest = LARGEST[getattr(torch, precision.dtype)]
    return -largest, largest


def nearest(scaled: Tensor, precision: Precision) -> Tensor:
    """The nearest values of a precision, float32, of weights divided by their scales; of what is beyond, the last."""
    inside, dtype = scaled.clamp(*limits(precision)), getattr(torch, precision.dtype)
    return inside.to(dtype).float() if dtype.is_floating_point else inside.round()


def weight_scales(weight: Tensor, precision: Precision, group: int, importance: Tensor) -> Tensor:
    """Scales ``[N, groups]`` of a weight ``[N, K]`` that is masked already, float32.

    With 8 bits of each row by its largest magnitude; with 4 of each ``group`` inputs, by search (`group_scales`).

    Args:
        importance: ``[K]``, what a squared error of each input's weights adds to the squared error of the outputs.
    """
    if not precision.grouped:
        return quantise_rows(weight, getattr(torch, precision.dtype))[1][:, None]
    return group_scales(weight.float().unflatten(1, (-1, group)), importance.unflatten(0, (-1, group)))


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that a weight ``[N, K]`` may take in a precision, once its scales are chosen.

    Attributes:
        scales: float32 ``[N, groups]``.
    """

    precision: Precision
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor, precision: Precision, group: int) -> "Grid":
        """That on which a weight loses least; in groups of ``group`` inputs, where scales have some.

        Raises:
            UserError: if the weight has values that are not finite.
        """
        check_finite(weight)
        return cls(
            precision, weight_scales(weight, precision, group, torch.ones(weight.shape[1], device=weight.device))
        )

    def rows(self, part: slice, device: torch.device) -> "Grid":
        """Of some rows."""
        return Grid(self.precision, self.scales[part].to(device))

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest of its values to each element of a weight, like the weight.

        Divided by their scales, as in sweeps; `quantise_rows` multiplies by their reciprocals, as kernels do, and of
        two values that are as near takes the other once in some thousand weights.
        """
        wide = weight.float().unflatten(1, (self.scales.shape[1], -1))
        return (
            (nearest(wide / self.scales[..., None], self.precision) * self.scales[..., None])
            .flatten(1)
            .to(weight.dtype)
        )


def rounded(weight: Tensor, precision: Precision, group: int) -> Tensor:
    """What a weight ``[N, K]`` is rounded to nearest in a precision, like the weight; in groups of ``group`` inputs."""
    return Grid.of(weight, precision, group).rounded(weight)


class GroupRounding:
    """INT4 of a weight ``[N, K]`` that is settled column by column from left to right, changing as it goes.

    A group's scales are chosen when its first column is reached, from the weight as it is by then.

    Args:
        shape: of the weight.
        group: inputs that share a scale; ``K`` is a multiple of it.
    """

    precision = PRECISIONS["int4"]

    def __init__(self, shape: tuple[int, int], group: int, device: torch.device) -> None:
        self.group = group
        self.values = torch.zeros(shape, dtype=torch.int8, device=device)
        self.scales = torch.ones(shape[0], shape[1] // group, device=device)

    def open(self, column: int, weight: Tensor, importance: Tensor) -> None:
        """Choose the scales of the group that starts at ``column``.

        Args:
            weight: its columns, float32 ``[N, columns]``, zero where they will be dropped.
            importance: ``[columns]``, what a squared error of each adds to the squared error of the outputs.
        """
        self.scales[:, column // self.group] = group_scales(weight, importance)

    def scales_of(self, start: int, stop: int) -> Tensor:
        """Those of some columns of one group, ``[N, columns]``."""
        return self.scales[:, start // self.group, None].expand(-1, stop - start)

    def take(self, start: int, values: Tensor) -> None:
        """Keep the values ``[N, columns]`` of columns from ``start`` on."""
        self.values[:, start : start + values.shape[1]] = values.to(torch.int8)

    @property
    def quantised(self) -> Quantised:
        return Quantised(self.values, self.scales)


class ScaledRounding:
    """A weight ``[N, K]`` whose scales are known, settled column by column in any order.

    Args:
        scales: float32 ``[N, groups]``.
        order: int64 ``[K]``, a permutation: which column of the weight is settled first, second, ...
    """

    group = None

    def __init__(self, precision: Precision, scales: Tensor, order: Tensor) -> None:
        self.precision = precision
        self._scales = scales
        self._order = order
        self._groups = order // (len(order) // scales.shape[1])
        # In the order in which they are settled.
        shape = len(scales), len(order)
        self._values = torch.zeros(shape, dtype=getattr(torch, precision.dtype), device=scales.device)

    def scales_of(self, start: int, stop: int) -> Tensor:
        """Those of the columns that are settled from ``start`` on, ``[N, columns]``."""
        return self._scales[:, self._groups[start:stop]]

    def take(self, start: int, values: Tensor) -> None:
        """Keep the values ``[N, columns]`` of the columns that are settled from ``start`` on."""
        self._values[:, start : start + values.shape[1]] = values.to(self._values.dtype)

    @property
    def quantised(self) -> Quantised:
        # As bytes: torch moves all numbers of 8 bits, but knows indices of few of them.
        values = torch.empty_like(self._values)
        values.view(torch.uint8)[:, self._order] = self._values.view(torch.uint8)
        return Quantised(values, self._scales)


def group_scales(weight: Tensor, importance: Tensor) -> Tensor:
    """The scales ``[N, ...]`` at which groups of INT4, ``[N, ..., columns]``, lose least, of `SHARES`; float32.

    They are numbers of bfloat16, which servers hold scales in: all read the same weight. A group of zeros gets 1.

    Args:
        importance: ``[..., columns]``, of the elements of every row.
    """
    largest = weight.abs().amax(-1)
    best = torch.ones_like(largest)
    least = torch.full_like(largest, torch.inf)
    for scales in _candidates(largest):
        values = (weight / scales[..., None]).round().clamp(*INT4_RANGE)
        loss = ((weight - values * scales[..., None]).square() * importance).sum(-1)
        better = loss < least
        best, least = torch.where(better, scales, best), torch.where(better, loss, least)
    return best


def _candidates(largest: Tensor) -> Iterator[Tensor]:
    for share in SHARES:
        scales = (largest * (share / INT4_RANGE[1])).to(torch.bfloat16).to(largest.dtype)
        yield torch.where(scales > 0, scales, 1.0)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises UserError unless ``dtype`` is one of 8 bits."""
    if dtype not in LARGEST:
        raise UserError(f"cannot quantise to {dtype}: float8_e4m3fn or int8")


def check_finite(weight: Tensor) -> None:
    """Raises UserError if a weight has values that are not finite."""
    if not bool(weight.isfinite().all()):
        raise UserError(f"weight {tuple(weight.shape)} has values that are not finite: it cannot be quantised")
