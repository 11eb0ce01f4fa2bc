"""What a study found, in sentences that its rows fill in: what was compared, what won, by how much, how surely."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.figures.ablation import ablated
from analysis.figures.about import gpus
from analysis.figures.refit import pairs_of
from analysis.figures.tile_shapes import swept
from analysis.names import SOURCES, percent, workload_name
from analysis.page.questions import Question
from analysis.rows.paired import Gap, gap
from analysis.rows.points import Measured, Point, Text, gather, texts
from analysis.rows.same_checkpoint import timed_on
from analysis.tables.packed import workloads
from analysis.tables.render import Table, significant
from analysis.tables.speed_frontier import placed
from patch.methods import label_of


@dataclass(frozen=True)
class Finding:
    """One sentence.

    Attributes:
        about: what was compared.
        text: what came out.
        gaps: the differences that it states, for what is said of their errors.
    """

    about: str
    text: str
    gaps: tuple[Gap, ...] = ()


def findings(frame: pd.DataFrame, asked: Question, points: Sequence[Point] | None = None) -> list[Finding]:
    """What the rows of a study answer to its question; none where too little was measured.

    Args:
        frame: as from `analysis.rows.load.load_rows`; learning curves and layers do not matter.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.
    """
    if asked == "kernels":
        return []
    points = gather(frame) if points is None else points
    if not (measured := texts(points)):
        return []
    text = measured[0]
    found = {
        "methods": lambda: _methods(points, text),
        "recipes": lambda: _recipes(points, text),
        "tiles": lambda: _tiles(points, text),
        "refit": lambda: _refit(frame, points, text),
        "speed": lambda: _speed(frame, points, text),
    }[asked]()
    return list(found)


def kernel_findings(gpu: str, tables: Sequence[tuple[str, Table]]) -> list[Finding]:
    """The range of speedups of the first model's linears at one sparsity, from the table that the page shows."""
    for title, table in tables:
        names = [column.name for column in table.columns]
        if names[0] == "tokens" and "speedup 45%" in names:
            place = names.index("speedup 45%")
            speeds = [(row[place], row[0]) for row in table.rows]
            known = [
                (speed.value, tokens.value)
                for speed, tokens in speeds
                if isinstance(speed, Measured) and isinstance(tokens, Measured)
            ]
            if known:
                (low, few), (high, many) = min(known), max(known)
                said = f"tiles at 45% take the products to {high:.2f}x dense with {many:.0f} tokens"
                return [Finding(f"{title.partition(':')[0]}, {gpu}", f"{said}, and to {low:.2f}x with {few:.0f}.")]
    return []


def name(point: Point) -> str:
    """A point in words: ``PATCH joint 45% (guided)``."""
    parts = [label_of(point.method)]
    if point.method != "dense":
        parts.append("2:4" if point.structure == "2:4" else percent(point.sparsity))
    if point.structure == "unstructured":
        parts.append("unstructured")
    return " ".join([*parts, f"({point.variant})"] if point.variant else parts)


def _methods(points: Sequence[Point], text: Text) -> Iterator[Finding]:
    """At each sparsity, structured methods against each other."""
    groups: dict[tuple[str, float, bool], list[Point]] = {}
    for point in points:
        if point.structure in ("2:4", "hybrid"):
            groups.setdefault((point.model, point.sparsity, point.trained), []).append(point)
    for (model, sparsity, trained), members in groups.items():
        about = f"{_of(model, points)}{percent(sparsity)}" + ", kept weights trained" * trained
        yield from _won(about, members, text, points)


def _recipes(points: Sequence[Point], text: Text) -> Iterator[Finding]:
    for (model, method, sparsity, *_), members in ablated(points).items():
        about = f"{_of(model, points)}{label_of(method)} {percent(sparsity)}"
        yield from _won(about, members, text, points, by=lambda point: point.variant or "the unchanged recipe")


def _won(about: str, members: Sequence[Point], text: Text, points: Sequence[Point], by=name) -> Iterator[Finding]:  # type: ignore[no-untyped-def]
    """Who has the lowest perplexity, and by how much it is below the next."""
    ranked = sorted(
        (point for point in members if text in point.perplexity and math.isfinite(point.perplexity[text].value)),
        key=lambda point: point.perplexity[text].value,
    )
    if len(ranked) < 2:
        return
    first, second = (point.perplexity[text] for point in ranked[:2])
    between = gap(first, second)
    of_model = [p for p in points if p.is_original and p.model == ranked[0].model and text in p.perplexity]
    dense = f" (dense {significant(of_model[0].perplexity[text].value)})" if of_model else ""
    said = (
        f"{by(ranked[0])} has the lowest {_text(text)} perplexity of {len(ranked)}, {shown(first)}{dense}; "
        f"{by(ranked[1])} is next, {difference(between)} above"
    )
    yield Finding(about, f"{said}.{_doubt(between)}", (between,))


def _tiles(points: Sequence[Point], text: Text) -> Iterator[Finding]:
    for (model, method, sparsity, _), members in swept(points).items():
        ranked = sorted(
            (point for point in members if text in point.perplexity), key=lambda point: point.perplexity[text].value
        )
        if len(ranked) > 1:
            best, worst = ranked[0], ranked[-1]
            between = gap(best.perplexity[text], worst.perplexity[text])
            said = (
                f"of {len(ranked)} shapes {best.tile} has the lowest {_text(text)} perplexity, "
                f"{shown(best.perplexity[text])}, and {worst.tile} the highest, {difference(between)} above"
            )
            about = f"{_of(model, points)}{label_of(method)} {percent(sparsity)}"
            yield Finding(about, f"{said}.{_doubt(between)}", (between,))


def _refit(frame: pd.DataFrame, points: Sequence[Point], text: Text) -> Iterator[Finding]:
    pairs = pairs_of(frame, points, text)
    by_model: dict[str, list[tuple[Point, Gap]]] = {}
    for before, after in pairs:
        by_model.setdefault(before.model, []).append((before, gap(before.perplexity[text], after.perplexity[text])))
    for model, changes in by_model.items():
        helped = [each for each in changes if each[1].value < 0 and each[1].exceeds]
        hurt = [each for each in changes if each[1].value > 0 and each[1].exceeds]
        parts = []
        if helped:
            most = min(helped, key=lambda each: each[1].value)
            parts.append(f"it lowers perplexity of {len(helped)}, most of {name(most[0])} by {difference(most[1])}")
        if hurt:
            worst = max(hurt, key=lambda each: each[1].value)
            parts.append(f"it raises that of {len(hurt)}, most of {name(worst[0])} by {difference(worst[1])}")
        if rest := len(changes) - len(helped) - len(hurt):
            parts.append(f"the change of {rest} is within two standard errors")
        said = f"of {len(changes)} masks, " + "; ".join(parts)
        yield Finding(model, f"{said} ({_text(text)}).", tuple(change for _, change in changes))


def _speed(frame: pd.DataFrame, points: Sequence[Point], text: Text) -> Iterator[Finding]:
    """The fastest of each structure, workload by workload."""
    gpu = gpus([timed_on(frame)])
    for workload in workloads(frame):
        parts = []
        all_here = placed(frame, workload, points=points)
        for structure, called in (("hybrid", "tiles"), ("2:4", "2:4"), ("unstructured", "unstructured")):
            here = [each for each in all_here if each.point.structure == structure and each.agrees]
            here = [each for each in here if text in each.point.perplexity]
            if here:
                # Where several are equally fast to two digits, the most accurate of them.
                best = min(here, key=lambda each: (-round(each.speedup, 2), each.point.perplexity[text].value))
                at = significant(best.point.perplexity[text].value, 3)
                parts.append(f"{called} {best.speedup:.2f}x ({name(best.point)}, perplexity {at})")
        if parts:
            yield Finding(f"{workload_name(workload)}, {gpu}", f"{'; '.join(parts)}.")


def _of(model: str, points: Sequence[Point]) -> str:
    """The model, where a study has several; its title names it otherwise."""
    return f"{model}, " if len({point.model for point in points}) > 1 else ""


def _text(text: Text) -> str:
    return SOURCES.get(text.source, text.source)


def shown(measured: Measured) -> str:
    """A perplexity with its error."""
    value = significant(measured.value)
    if measured.error is None or not math.isfinite(measured.error):
        return value
    return f"{value} ± {measured.error:.{len(value.partition('.')[2])}f}"


def difference(between: Gap) -> str:
    """A difference without its sign, with its error."""
    value = abs(between.value)
    digits = 2 if value < 100 else 0
    error = "unknown error" if between.error is None else f"± {between.error:.{digits}f}"
    return f"{value:.{digits}f} {error}"


def _doubt(between: Gap) -> str:
    if between.exceeds:
        return ""
    return (
        " The difference is within two of its standard errors."
        if between.error is not None
        else " Its error is unknown."
    )


def errors_said(found: Sequence[Finding]) -> str:
    """What the errors of these findings' differences are."""
    gaps = [each for finding in found for each in finding.gaps]
    paired = sum(each.paired for each in gaps)
    if not gaps:
        return ""
    if paired == len(gaps):
        return "Differences ± their standard error, window by window over the same text."
    some = "" if not paired else f"{paired} of {len(gaps)} are window by window over the same text; for the others "
    rest = (
        "the rows lack what each window gave, so that their error is as if each side had been measured on a text of "
        "its own, which is more than it is"
    )
    return f"Differences ± their standard error: {some}{rest}."
