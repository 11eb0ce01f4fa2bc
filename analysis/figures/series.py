"""What is drawn as one curve or one marker of a panel, how it looks, and which curves share a panel."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.figures.style import INK, style_of
from analysis.rows.points import Point
from patch.errors import UserError
from patch.methods import label_of

MOST_CURVES = 5
"""More curves than these in one panel cannot be told apart."""

# Variants of a method are told apart by dashes and labels, never by colour or marker, which are the method's.
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
DENSE_POINT: dict[str, Any] = {
    "marker": "*",
    "markersize": 7.0,
    "color": INK,
    "markerfacecolor": INK,
    "markeredgecolor": "white",
}
"""The dense model's look where it is a point as others are, not a line across."""
_STRUCTURES = {"unstructured": "unstructured", "2:4": "2:4", "hybrid": "tiles"}


@dataclass(frozen=True, eq=False)
class Series:
    """Points that differ in their sparsity alone, by rising sparsity."""

    model: str
    method: str
    structure: str
    tile: str | None
    variant: str
    points: tuple[Point, ...]

    @property
    def is_curve(self) -> bool:
        return len(self.points) > 1


def series_of(points: Iterable[Point]) -> list[Series]:
    """The series of some points, in the order of these."""
    found: dict[tuple[str, str, str, str | None, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.model, point.method, point.structure, point.tile, point.variant), []).append(point)
    return [Series(*about, tuple(sorted(members, key=sparsity))) for about, members in found.items()]


def sparsity(point: Point) -> float:
    """The achieved share of zeros.

    Raises:
        UserError: if the point has none.
    """
    if point.achieved is None:
        raise UserError(f"trial {point.trials[0]} has no achieved sparsity: the rows of its prune stage are missing")
    return point.achieved


def panels(series: Sequence[Series]) -> list[list[Series]]:
    """The series of one model in as few panels as show no more than `MOST_CURVES` each; a method stays together.

    What is no curve, such as a 2:4 baseline, is in the panel of its method's curves, or in all if it has none.
    """
    curves: dict[str, list[Series]] = {}
    for each in series:
        if each.is_curve:
            curves.setdefault(each.method, []).append(each)
    groups: list[list[Series]] = [[]]
    for members in curves.values():
        for start in range(0, len(members), MOST_CURVES):
            part = members[start : start + MOST_CURVES]
            if len(groups[-1]) + len(part) > MOST_CURVES:
                groups.append([])
            groups[-1] += part
    shown = [{id(each) for each in group} | {each.method for each in group} for group in groups]
    return [
        [
            each
            for each in series
            if id(each) in ids or (not each.is_curve and (each.method in ids or each.method not in curves))
        ]
        for ids in shown
    ]


def names(series: Sequence[Series]) -> dict[Series, str]:
    """The shortest name that tells each series of a panel from the others, such as ``SparseGPT 2:4``."""
    structures: dict[str, set[str]] = {}
    for each in series:
        structures.setdefault(each.method, set()).add(each.structure)
    tiles = {each.tile for each in series if each.tile}
    return {
        each: " ".join(
            filter(
                None,
                (
                    label_of(each.method),
                    _STRUCTURES.get(each.structure, "") if len(structures[each.method]) > 1 else "",
                    each.tile if len(tiles) > 1 else "",
                    f"({each.variant})" if each.variant else "",
                ),
            )
        )
        for each in series
    }


# Those of the variants that most figures have; others follow.
_OWN_DASHES = {"": 0, "guided": 1}


def looks(series: Sequence[Series]) -> dict[Series, Mapping[str, Any]]:
    """How each series of a panel is drawn: `marking`, and for variants of a method another kind of dashes each."""
    result: dict[Series, Mapping[str, Any]] = {}
    taken: dict[str, list[int]] = {}
    for each in series:
        look = marking(each.method, each.structure)
        if each.is_curve:
            used = taken.setdefault(each.method, [])
            place = _OWN_DASHES.get(each.variant, len(_OWN_DASHES))
            while place in used:
                place = max(place + 1, len(_OWN_DASHES))
            used.append(place)
            look["linestyle"] = DASHES[place % len(DASHES)]
        result[each] = look
    return result


def marking(method: str, structure: str) -> dict[str, Any]:
    """Colour and marker of the method; hollow for unstructured, a line where sparsity can be chosen."""
    style = style_of(method)
    hollow = structure == "unstructured"
    return {
        "color": style.color,
        "marker": style.marker,
        "markersize": style.size,
        "markerfacecolor": "white" if hollow else style.color,
        "markeredgecolor": style.color if hollow else "white",
        "markeredgewidth": 1.0 if hollow else 0.4,
        "linestyle": "-" if structure == "hybrid" else "none",
        "linewidth": style.width,
    }
