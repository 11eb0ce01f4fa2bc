"""By how much two numbers differ, and how sure that is: item by item where rows have what each item gave."""

import math
from dataclasses import dataclass

import numpy as np

from analysis.rows.points import Measured


@dataclass(frozen=True)
class Gap:
    """A difference.

    Attributes:
        value: right less left.
        error: its standard error, None if unknown.
        paired: whether that is of the differences of the same windows or items. Otherwise it is as if each side had
            been measured on some of its own, which is the most that it can be for results that agree more often than
            chance, as those of two prunings of one model do.
    """

    value: float
    error: float | None
    paired: bool

    @property
    def exceeds(self) -> bool:
        """Whether the difference is beyond noise: larger than two of its standard errors."""
        return self.error is not None and math.isfinite(self.value) and abs(self.value) > 2 * self.error


def gap(left: Measured, right: Measured) -> Gap:
    """The difference of two numbers, of one text or task, or means over the same tasks."""
    value = right.value - left.value
    sampled = _sampled(left, right)
    if sampled is None:
        return Gap(value, None, False)
    error, paired = sampled
    # The seeds of both sides are as if drawn for each.
    seeds = [(side.spread or 0.0) / math.sqrt(side.seeds) for side in (left, right)]
    return Gap(value, math.hypot(error, *seeds), paired)


def _sampled(left: Measured, right: Measured) -> tuple[float, bool] | None:
    """The error of a difference that comes from the finite evaluation set, and whether it is paired."""
    if left.parts and len(left.parts) == len(right.parts):
        errors = [_sampled(*pair) for pair in zip(left.parts, right.parts, strict=True)]
        known = [error for error in errors if error is not None]
        if len(known) < len(errors):
            return None
        return math.hypot(*(error for error, _ in known)) / len(known), all(paired for _, paired in known)
    if left.items is not None and right.items is not None and len(left.items) == len(right.items) > 1:
        return float(np.std(right.items - left.items, ddof=1) / math.sqrt(len(left.items))), True
    if left.stderr is None or right.stderr is None:
        return None
    return math.hypot(left.stderr, right.stderr), False
