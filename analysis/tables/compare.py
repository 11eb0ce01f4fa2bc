"""Two pruned models side by side: what differs, and whether by more than the noise.

>>> left, right = select(points, "method=maskllm"), select(points, "method=patch-joint,target=0.45")
>>> print(render(comparison(left, right), "md"))
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.rows.paired import gap
from analysis.rows.points import Measured, Point
from analysis.tables.accuracy import heading, task_heading
from analysis.tables.render import Column, Table, Value, significant
from patch.errors import UserError, check_name
from patch.methods import label_of

# So many points are named where a selector means none or several.
_MOST = 8
_FIELDS = ("model", "method", "structure", "target", "tile", "variant", "trial")


@dataclass(frozen=True)
class Difference:
    """One quantity of both.

    Attributes:
        name: for readers.
        left, right: what was measured; accuracies as shares.
        share: whether it is a share, shown in percent.
    """

    name: str
    left: Measured
    right: Measured
    share: bool

    @property
    def value(self) -> float:
        """Right less left."""
        return self.right.value - self.left.value

    @property
    def error(self) -> float | None:
        """Standard error of the difference (`analysis.rows.paired`), None if unknown."""
        return gap(self.left, self.right).error

    @property
    def verdict(self) -> str:
        """Whether the difference is beyond noise, as in all tables (`analysis.rows.paired.Gap.exceeds`)."""
        if self.error is None or not math.isfinite(self.value):
            return "unknown"
        return "yes" if gap(self.left, self.right).exceeds else "no"


def select(points: Iterable[Point], selector: str) -> Point:
    """The one point that a selector means: ``KEY=VALUE,...``, or the first digits of a trial's hash.

    Where it says nothing of the variant and several differ, the plain method is meant.

    Raises:
        UserError: if it means none or several, naming those that it may mean.
    """
    points = list(points)
    wanted = _parsed(selector)
    for field in wanted.keys() - {"target", "trial"}:
        check_name(field, wanted[field], dict.fromkeys(str(getattr(point, field) or "") for point in points))
    found = [point for point in points if all(_has(point, name, value) for name, value in wanted.items())]
    if len(found) > 1 and "variant" not in wanted:
        found = [point for point in found if not point.variant] or found
    if len(found) != 1:
        # The nearest first.
        near = found or sorted(points, key=lambda p: -sum(_has(p, name, value) for name, value in wanted.items()))
        more = f"; and {len(near) - _MOST} more, which hts table shows" if len(near) > _MOST else ""
        listed = "; ".join(_told_apart(near[:_MOST])) + more
        raise UserError(f"'{selector}' means {len(found) or 'none'} of these: {listed}")
    return found[0]


def _parsed(selector: str) -> dict[str, str]:
    """The values that are wanted, by field. A variant is written as tables do, with commas of its own."""
    if "=" not in selector:
        return {"trial": selector}
    wanted: dict[str, str] = {}
    last = ""
    for part in selector.split(","):
        name, _, value = part.partition("=")
        if name in _FIELDS:
            wanted[name], last = value, name
        elif last == "variant":
            wanted[last] += f",{part}"
        else:
            check_name("field", name, _FIELDS)
    return wanted


def _has(point: Point, name: str, value: str) -> bool:
    if name == "target":
        try:
            target = float(value.rstrip("%")) / (100 if value.endswith("%") else 1)
        except ValueError as error:
            raise UserError(f"target={value}: give a sparsity, such as 0.45 or 45%") from error
        return math.isclose(point.sparsity, target)
    if name == "trial":
        return any(trial.startswith(value) for trial in point.trials)
    return str(getattr(point, name) or "") == value


def describe(point: Point) -> str:
    """A point by the selector that finds it."""
    fields = _fields(point)
    return f"{fields.pop('model')} " + ",".join(f"{name}={value}" for name, value in fields.items() if value)


def _fields(point: Point) -> dict[str, str]:
    return {
        "model": point.model,
        "method": point.method,
        "structure": point.structure,
        "target": f"{point.sparsity:g}",
        "tile": point.tile or "",
        "variant": point.variant,
    }


def _told_apart(points: Sequence[Point]) -> list[str]:
    """Each by those fields that not all have alike."""
    fields = [_fields(point) for point in points]
    differing = [name for name in fields[0] if len({each[name] for each in fields}) > 1] or ["method"]
    return [",".join(f"{name}={each[name]}" for name in differing if each[name]) for each in fields]


def differences(left: Point, right: Point) -> list[Difference]:
    """Every quantity that both have."""
    found = [
        Difference(heading(text), measured, right.perplexity[text], share=False)
        for text, measured in left.perplexity.items()
        if text in right.perplexity
    ]
    found += [
        Difference(task_heading(task), measured, right.accuracy[task], share=True)
        for task, measured in left.accuracy.items()
        if task in right.accuracy
    ]
    if left.mean_accuracy and right.mean_accuracy:
        found.append(Difference("Mean accuracy", left.mean_accuracy, right.mean_accuracy, share=True))
    return found


def comparison(left: Point, right: Point) -> Table:
    """A line for each quantity that both have.

    Raises:
        UserError: if they have none in common.
    """
    found = differences(left, right)
    if not found:
        raise UserError(f"nothing was measured of both {describe(left)} and {describe(right)}: evaluate them alike")
    columns = (
        Column("quantity", "Quantity", "text"),
        Column("left", _title(left, right), "text"),
        Column("right", _title(right, left), "text"),
        Column("difference", "Difference", "text"),
        Column("error", "Standard error", "text"),
        Column("exceeds_noise", "Beyond noise", "text"),
    )
    rows: Sequence[tuple[Value, ...]] = [
        (
            each.name,
            _shown(each.left.value, each.share),
            _shown(each.right.value, each.share),
            _shown(each.value, each.share, signed=True),
            None if each.error is None else _shown(each.error, each.share),
            each.verdict,
        )
        for each in found
    ]
    notes = (f"Left: {describe(left)}. Right: {describe(right)}.", how_sure(found))
    return Table(columns, tuple(rows), tuple("" for _ in rows), frozenset(), notes)


def how_sure(found: Sequence[Difference]) -> str:
    """What the standard errors are of."""
    paired = [each.name for each in found if gap(each.left, each.right).paired]
    several = any(side.seeds > 1 for each in found for side in (each.left, each.right))
    seeds = ", which the spread over seeds is part of" if several else ""
    noise = f"Beyond noise: more than two standard errors{seeds}"
    if len(paired) == len(found):
        return f"{noise}, of the differences window by window and item by item."
    own = "as if each side had been measured on items of its own: both have the same, so they are surer than that."
    if not paired:
        return f"{noise}, taken {own}"
    return f"{noise}, of {', '.join(paired)} window by window and item by item, of all else taken {own}"


def _title(point: Point, other: Point) -> str:
    parts = [label_of(point.method)]
    if point.structure != "dense":
        parts.append(f"{100 * point.sparsity:g}%")
    if point.model != other.model:
        parts.insert(0, point.model)
    return " ".join([*parts, point.variant]).strip()


def _shown(value: float, share: bool, signed: bool = False) -> str:
    text = f"{100 * value:.2f}%" if share else significant(value)
    return f"+{text}" if signed and value > 0 else text
