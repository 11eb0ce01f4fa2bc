"""Which checkpoints are on the frontier of quality and speed: no other is both better and as fast."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.names import WORKLOAD, percent, workload_name, workload_of
from analysis.rows.paired import gap
from analysis.rows.points import Measured, Point, Text, gather
from analysis.tables.accuracy import heading
from analysis.tables.kernels import DENSE, PRECISIONS, typical
from analysis.tables.packed import wrong
from analysis.tables.render import Column, Table, Value
from patch.methods import label_of
from patch.structures import TILED


@dataclass(frozen=True)
class Placed:
    """A point and its speed.

    Attributes:
        point: what was pruned how, and its accuracy.
        speedup: of a workload over the dense model.
        agrees: whether the packed model computes what the unpacked one does; a point that does not is no result.
    """

    point: Point
    speedup: float
    agrees: bool


def placed(
    frame: pd.DataFrame, workload: str, shape: str | None = None, points: Sequence[Point] | None = None
) -> list[Placed]:
    """The points that were timed.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        workload: one of `analysis.tables.packed.workloads`.
        shape: instead of the checkpoints' own speed, that of their tile statistics on this model's shapes; the dense
            model is at 1.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if rows of one point are of different checkpoints (`analysis.rows.same_checkpoint`).
    """
    stage = f"carried:{shape}" if shape else f"speed:{workload}"
    rows = frame[(frame.stage == stage) & (frame.metric == "speedup")]
    if shape:
        rows = rows[[workload_of(labels) == workload for labels in rows.labels]]
    speeds = rows.groupby("trial").value.mean()
    bad = wrong(frame)
    found = []
    for point in gather(frame) if points is None else points:
        timed = [float(speeds[trial]) for trial in point.trials if trial in speeds.index]
        if shape and point.is_original:
            timed = [1.0]
        if timed:
            found.append(Placed(point, sum(timed) / len(timed), not bad & set(point.trials)))
    return found


def pareto(points: Sequence[tuple[float, float]], lower_is_better: bool) -> list[tuple[float, float]]:
    """Those of (speedup, quality) that no other beats in both, by rising speedup."""
    sign = 1 if lower_is_better else -1
    kept: list[tuple[float, float]] = []
    for speedup, quality in sorted(points, key=lambda each: (-each[0], sign * each[1])):
        if not kept or sign * quality < sign * kept[-1][1]:
            kept.append((speedup, quality))
    return kept[::-1]


def on_front(found: Sequence[Placed], quality: Callable[[Point], Measured | None]) -> list[Placed]:
    """Of what was placed and is a result, what is on the frontier of a quality of which less is better."""
    measured = [(each, value.value) for each in found if each.agrees and (value := quality(each.point))]
    best = pareto([(each.speedup, value) for each, value in measured], lower_is_better=True)
    return [each for step in best for each, value in measured if (each.speedup, value) == step]


def workloads_of(timed: pd.DataFrame) -> list[str]:
    """What whole models were timed at, as from `analysis.tables.kernels.load_bench`: decoding first, smallest first."""
    found = timed[WORKLOAD].drop_duplicates().sort_values(WORKLOAD)
    return [workload_of(each) for each in found.to_dict("records")]


def placed_on_shapes(points: Sequence[Point], timed: pd.DataFrame, workload: str) -> list[Placed]:
    """Points at the speed of a larger model of random weights, in as many bits and with as many zeros in random tiles.

    Args:
        timed: of that model, as from `analysis.tables.kernels.load_bench`, of whole models.
        workload: such as ``decode@1x1``.
    """
    times = timed[timed.metric == "time"]
    here = times[[workload_of(each) == workload for each in times[WORKLOAD].to_dict("records")]]
    found = []
    for point in points:
        precision = next((name for name, label in PRECISIONS.items() if label == (point.precision or "bfloat16")), None)
        if point.structure == "dense":
            speeds = typical(here[here.implementation.isin(DENSE.get(precision or "", ()))], "speedup")
        else:
            packed = here[(here.implementation == "hybrid") & (here.precision == precision)]
            same = packed.sparsity == point.sparsity
            speeds = typical(packed[same & (point.structure in TILED)], "speedup")
        if len(speeds):
            found.append(Placed(point, float(speeds.max()), agrees=True))
    return found


def front_table(by_workload: Mapping[str, Sequence[Placed]], text: Text) -> Table:
    """One row per point on the frontier of perplexity and speed, a section a workload, the slowest first."""
    columns = (
        Column("workload", "Workload", "text"),
        Column("speedup", "Speedup (x)", "ratio"),
        Column("method", "Method", "text"),
        Column("target_sparsity", "Sparsity", "text"),
        Column("precision", "Precision", "text"),
        Column("perplexity", heading(text), "perplexity"),
        Column("difference", "More than the one above", "text"),
    )
    rows: list[tuple[Value, ...]] = []
    trials: list[tuple[str, ...]] = []
    for workload, found in by_workload.items():
        before: Measured | None = None
        for each in on_front(found, lambda point: point.perplexity.get(text)):
            point, value = each.point, each.point.perplexity[text]
            rows.append(
                (
                    workload_name(workload),
                    Measured(each.speedup),
                    f"{label_of(point.method)} {more_of(point)}".strip(),
                    "" if point.structure == "dense" else percent(point.sparsity),
                    point.precision or "bfloat16",
                    value,
                    _difference(before, value),
                )
            )
            trials.append(point.trials)
            before = value
    notes = ("Nothing else that was timed is as fast and has a lower perplexity.",)
    return Table(columns, tuple(rows), tuple(str(row[0]) for row in rows), frozenset(), notes, trials=tuple(trials))


def more_of(point: Point) -> str:
    """What a point's variant says beside its precision."""
    said = [part for part in point.variant.split(", ") if part and part not in (point.precision, "sink-aware")]
    return f"({', '.join(said)})" if said else ""


def _difference(before: Measured | None, value: Measured) -> str:
    if before is None:
        return ""
    found = gap(before, value)
    # Else the error is that of two texts.
    return f"{found.value:.2f}" + (f" ± {found.error:.2f}" if found.paired else "")
