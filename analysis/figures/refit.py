"""What fitting the kept weights does to masks: each mask before and after, joined by an arrow."""

import json
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.about import about
from analysis.figures.scales import scale_perplexity
from analysis.figures.series import marking
from analysis.figures.style import DASHED, INK, SMALL, WIDTHS, Width, in_paper_style, new_figure, set_title, style_of
from analysis.names import percent
from analysis.rows.load import records
from analysis.rows.points import Point, Text, gather, texts
from analysis.tables.accuracy import heading
from analysis.tables.render import significant
from patch.errors import UserError
from patch.methods import label_of

Pair = tuple[Point, Point]


def refitted_pairs(frame: pd.DataFrame, points: Sequence[Point]) -> list[Pair]:
    """Each point whose weights were fitted to its mask, after the point that it stands on, in reading order."""
    prunings = {row.trial: row.definition["pruning"] for row in records(frame.drop_duplicates("trial"))}
    plain = {_key(prunings[trial]): point for point in points for trial in point.trials}
    pairs = []
    for point in points:
        about_it = prunings[point.trials[0]]
        if "refit" in about_it:
            before = plain.get(_key({name: value for name, value in about_it.items() if name != "refit"}))
            if before is not None:
                pairs.append((before, point))
    return pairs


def mostly_refitted(points: Sequence[Point], pairs: Sequence[Pair]) -> bool:
    """Whether most of some pruned points are in pairs: then fitting is what they are about."""
    pruned = [point for point in points if point.method != "dense"]
    return bool(pairs) and 4 * len(pairs) >= len(pruned)


def _key(pruning: dict[str, object]) -> str:
    return json.dumps(pruning, sort_keys=True)


def pairs_of(frame: pd.DataFrame, points: Sequence[Point], text: Text) -> list[Pair]:
    """`refitted_pairs` of which both have been measured on a text."""
    found = refitted_pairs(frame, points)
    return [pair for pair in found if all(text in point.perplexity for point in pair)]


@in_paper_style
def draw_refit(frame: pd.DataFrame, width: Width = "single", points: Sequence[Point] | None = None) -> Figure:
    """Perplexity of each mask with the weights that it kept (bar) and with fitted ones (marker), lowest on top.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if nothing was refitted, or not beside what it stands on.
    """
    points = gather(frame) if points is None else points
    found = texts(points)
    pairs = pairs_of(frame, points, found[0]) if found else []
    if not pairs:
        raise UserError("nothing to compare with refitted weights: evaluate them and what they stand on alike")
    text = found[0]
    pairs.sort(key=lambda pair: -pair[0].perplexity[text].value)
    figure = new_figure(WIDTHS[width], 0.87 + 0.2 * len(pairs))
    axis = figure.subplots()
    values = [point.perplexity[text].value for pair in pairs for point in pair]
    dense = [p.perplexity[text].value for p in points if p.is_original and text in p.perplexity]
    for height, pair in enumerate(pairs):
        before, after = (point.perplexity[text].value for point in pair)
        style = style_of(pair[1].method)
        axis.plot([before, after], [height, height], color=style.color, linewidth=0.9, zorder=2)
        axis.plot([before], [height], marker="|", markersize=7, color=style.color, markeredgewidth=1.4, gid="before")
        look = marking(pair[1].method, pair[1].structure) | {"linestyle": "none"}
        axis.plot([after], [height], gid="after", zorder=4, **look)
        axis.annotate(
            f"{significant(before, 3)} to {significant(after, 3)}" + ", worse" * (after > before),
            (max(before, after), height),
            (6, 0),
            textcoords="offset points",
            va="center",
            size=SMALL,
            color=INK,
        )
    # Room on the right for the numbers beside the last points.
    low = min(values + dense)
    scale_perplexity(axis, low, max(values) * (max(values) / low) ** 0.45, along="x")
    for value in dense:
        axis.axvline(value, color=INK, linewidth=0.9, linestyle=DASHED, zorder=1, gid="dense")
        axis.annotate(
            "dense", (value, 1), (2, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
            size=SMALL, color=INK,
        )  # fmt: skip
    axis.set_yticks(range(len(pairs)), [_name(before) for before, _ in pairs], size=SMALL)
    axis.set_ylim(-0.6, len(pairs) - 0.4)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"{heading(text).replace('PPL', 'perplexity')},\nkept weights (bar) to\nfitted ones (marker)")
    set_title(figure, about(frame))
    return figure


def _name(point: Point) -> str:
    structure = point.structure if point.structure != "hybrid" else percent(point.sparsity)
    name = f"{label_of(point.method)} {structure}"
    return f"{name} ({point.variant})" if point.variant else name
