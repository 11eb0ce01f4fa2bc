"""What fewer bits cost: every mask beside itself in each precision that it was quantised to."""

from collections.abc import Sequence

from analysis.names import percent
from analysis.rows.paired import gap
from analysis.rows.points import Point, Text
from analysis.tables.accuracy import heading
from analysis.tables.render import Column, Table, Value
from patch.methods import label_of

# How parts of a variant begin that say how it was quantised.
_HOW = ("sink-aware", "pruned and rounded in one sweep", "trained as ")
_Mask = tuple[str, str, str, float, str]


def precision_table(points: Sequence[Point], text: Text) -> Table:
    """One row a mask and way of quantising it: perplexity as it is, and by how many percent more in fewer bits.

    Errors are of the differences over the same windows, where rows have these; elsewhere there are none.

    Args:
        points: as from `analysis.rows.points.gather`, of one model.
        text: what perplexity is of.
    """
    plain = {_mask(point): point for point in points if point.precision is None and text in point.perplexity}
    quantised = [point for point in points if point.precision and text in point.perplexity and _mask(point) in plain]
    precisions = sorted({point.precision for point in quantised if point.precision})
    rows: dict[tuple[_Mask, str], dict[str, Point]] = {}
    for point in quantised:
        assert point.precision
        rows.setdefault((_mask(point), _how(point)), {})[point.precision] = point
    columns = (
        Column("method", "Method", "text"),
        Column("sparsity", "Sparsity", "text"),
        Column("variant", "Variant", "text"),
        Column("perplexity", heading(text), "perplexity"),
        *(Column(f"cost {name}", f"{name} (%)", "text") for name in precisions),
    )
    table: list[tuple[Value, ...]] = []
    for (mask, how), found in sorted(rows.items(), key=lambda each: list(plain).index(each[0][0])):
        point = plain[mask]
        said = ", ".join(filter(None, (mask[4], how)))
        costs = (_cost(point, found[name], text) if name in found else None for name in precisions)
        share = "" if point.structure == "dense" else percent(point.sparsity)
        table.append((label_of(point.method), share, said, point.perplexity[text], *costs))
    notes = ("Percent of perplexity that each precision adds to the same mask in bfloat16.",)
    return Table(columns, tuple(table), tuple("" for _ in table), frozenset(), notes)


def _parts(point: Point) -> list[str]:
    return [part for part in point.variant.split(", ") if part and part != point.precision]


def _mask(point: Point) -> _Mask:
    """What tells a mask from others, whatever its precision."""
    variant = ", ".join(part for part in _parts(point) if not part.startswith(_HOW))
    return point.method, point.structure, point.tile or "", point.sparsity, variant


def _how(point: Point) -> str:
    return ", ".join(part for part in _parts(point) if part.startswith(_HOW))


def _cost(plain: Point, quantised: Point, text: Text) -> str:
    before, after = plain.perplexity[text], quantised.perplexity[text]
    found, share = gap(before, after), 100 / before.value
    # An error that is not of the same windows is that of two texts, and says nothing of so small a difference.
    return f"{share * found.value:+.1f}" + (f" ± {share * found.error:.1f}" if found.paired and found.error else "")
