"""Tables of a joined study: accuracy, size and speed of one checkpoint, and its tile statistics on other shapes."""

from collections.abc import Callable, Sequence

import pandas as pd

from analysis.names import WORKLOAD, workload_name, workload_of
from analysis.rows.points import Measured, Point, Text, gather, texts
from analysis.rows.same_checkpoint import timed_on
from analysis.tables.accuracy import Field, heading, identity_fields
from analysis.tables.kernels import SUPERSEDED
from analysis.tables.render import Column, Table, Value
from patch.errors import UserError

_PROJECTED = "carried:"
_TIMED = "x: dense time over packed time, end to end, both with compiled blocks and CUDA graphs, on one {}."


def workloads(frame: pd.DataFrame) -> list[str]:
    """The workloads that were timed, such as ``decode@1x1``: decoding first, the smallest first."""
    stages = frame[(frame.metric == "speedup") & frame.stage.str.startswith("speed:")].stage
    return sorted({stage.partition(":")[2] for stage in stages}, key=_size)


def projected_shapes(frame: pd.DataFrame) -> list[str]:
    """The models on whose shapes tile statistics were timed."""
    stages = frame[(frame.metric == "speedup") & frame.stage.str.startswith(_PROJECTED)].stage
    return [stage.removeprefix(_PROJECTED) for stage in dict.fromkeys(stages)]


def wrong(frame: pd.DataFrame) -> set[str]:
    """Trials whose packed model does not compute what the unpacked one does: no results."""
    checked = frame[frame.stage.str.startswith("packed:") | (frame.stage == "pack")]
    return {trial for trial, labels in zip(checked.trial, checked.labels, strict=True) if labels.get("agrees") is False}


def speed_table(frame: pd.DataFrame, points: Sequence[Point] | None = None) -> Table:
    """One row per checkpoint: perplexity unpacked and packed, size, peak memory and speed against the dense model.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if nothing was packed or timed, or rows of one point are of different checkpoints or GPUs.
    """
    gathered = gather(frame) if points is None else points
    timed = workloads(frame)
    stages = ["pack", *(f"speed:{work}" for work in timed)]
    points = [point for point in gathered if any(_any(frame, point, stage) for stage in stages)]
    if not points:
        raise UserError("nothing was packed or timed: run a frontier study first")
    fields = identity_fields(points)
    for text in texts(gathered)[:1]:
        fields.append((Column(f"perplexity {text}", heading(text), "perplexity"), _perplexity(text)))
        packed = Column(f"packed_perplexity {text}", "Packed PPL", "perplexity")
        fields.append((packed, _of(frame, f"packed:{text}", "packed_perplexity")))
    share = Column("packed_share", "Masked weights (x dense)", "ratio")
    fields.append((share, _ratio(frame, "pack", ("packed_bytes", {}), ("masked_bytes", {}))))
    fields.append((Column("disk", "On disk (MB)", "number"), _of(frame, "pack", "disk_bytes", 1e-6)))
    for work in timed[:1]:
        peak = Column(f"peak_memory {work}", f"Peak memory, {workload_name(work).lower()} (x dense)", "ratio")
        fields.append((peak, _memory(frame, f"speed:{work}", {})))
    for work in timed:
        column = Column(f"speedup {work}", f"{workload_name(work)} (x)", "ratio")
        fields.append((column, _of(frame, f"speed:{work}", "speedup")))
    notes = ["Perplexity (PPL): lower is better; packed, it is that of the same weights through the kernels."]
    if timed:
        notes += _superseded(frame[frame.stage.str.startswith("speed:")])
        notes.append(_TIMED.format(timed_on(frame)))
    else:
        notes.append("Nothing was timed: speed is measured on a CUDA GPU.")
    bad = wrong(frame)
    for point in points:
        if bad & set(point.trials):
            names = ", ".join(point.trials)
            notes.append(f"{names}: the packed model does not compute what the unpacked one does: no result.")
    return _table(points, fields, notes)


def projected_table(frame: pd.DataFrame, shape: str, points: Sequence[Point] | None = None) -> Table:
    """One row per hybrid checkpoint: the speed of its share of dense tiles on a larger model's shapes.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        shape: one of `projected_shapes`.
        points: as `speed_table`.

    Raises:
        UserError: if nothing was timed on that model's shapes, or not all of it on one kind of GPU.
    """
    stage = _PROJECTED + shape
    points = [point for point in (gather(frame) if points is None else points) if _any(frame, point, stage)]
    if not points:
        raise UserError(f"no tile statistics were timed on the shapes of {shape}: run a frontier study on a GPU first")
    rows = frame[(frame.stage == stage) & (frame.metric == "speedup")]
    fields = identity_fields(points)
    share = Column("packed_share", "Masked weights (x dense)", "ratio")
    fields.append((share, _ratio(frame, stage, ("packed_bytes", {}), ("masked_bytes", {}))))
    works = {workload_of(labels): {name: labels[name] for name in WORKLOAD} for labels in rows.labels}
    timed = {name: works[name] for name in sorted(works, key=_size)}
    for name, work in list(timed.items())[:1]:
        peak = Column(f"peak_memory {stage} {name}", f"Peak memory, {workload_name(name).lower()} (x dense)", "ratio")
        fields.append((peak, _memory(frame, stage, work)))
    for name, work in timed.items():
        column = Column(f"speedup {stage} {name}", f"{workload_name(name)} (x)", "ratio")
        fields.append((column, _of(frame, stage, "speedup", labels=work)))
    tiles = {"x".join(map(str, labels["tile"])) for labels in rows.labels}
    notes = [
        f"Shapes of {shape} with random weights: each linear has the share of dense tiles that the checkpoint's linear "
        f"of the same kind and relative depth has, on a random map of {', '.join(sorted(tiles))} tiles.",
        *_superseded(rows),
        _TIMED.format(timed_on(frame)),
    ]
    return _table(points, fields, notes)


def _superseded(rows: pd.DataFrame) -> list[str]:
    """What must be said of speedups over a dense model that was not the fastest."""
    return [SUPERSEDED] if unfused(rows) else []


def unfused(rows: pd.DataFrame) -> bool:
    """Whether some speedups are over a dense model with separate projections."""
    return any(labels.get("dense") != "fused" for labels in rows[rows.metric == "speedup"].labels)


def _size(workload: str) -> tuple[str, list[int]]:
    kind, _, size = workload.partition("@")
    return kind, [int(number) for number in size.split("x")]


def _table(points: Sequence[Point], fields: Sequence[Field], notes: Sequence[str]) -> Table:
    rows = tuple(tuple(value(point) for _, value in fields) for point in points)
    columns = tuple(column for column, _ in fields)
    sections = tuple(point.model for point in points)
    return Table(columns, rows, sections, frozenset(), tuple(notes), trials=tuple(point.trials for point in points))


def _any(frame: pd.DataFrame, point: Point, stage: str) -> bool:
    return bool((frame.trial.isin(point.trials) & (frame.stage == stage)).any())


def _mean(frame: pd.DataFrame, stage: str, metric: str, labels: dict[str, object]) -> Callable[[Point], float | None]:
    """A fact of the trials of a point, which differ in their seeds."""
    rows = frame[(frame.stage == stage) & (frame.metric == metric)]
    rows = rows[[labels.items() <= found.items() for found in rows.labels]] if len(rows) else rows
    rows = rows[rows.value.notna()]
    values: dict[str, list[float]] = {}
    for trial, measured in zip(rows.trial, rows.value, strict=True):
        values.setdefault(trial, []).append(measured)

    def mean(point: Point) -> float | None:
        found = [measured for trial in point.trials for measured in values.get(trial, ())]
        return sum(found) / len(found) if found else None

    return mean


def _of(
    frame: pd.DataFrame, stage: str, metric: str, factor: float = 1.0, labels: dict[str, object] | None = None
) -> Callable[[Point], Value]:
    mean = _mean(frame, stage, metric, labels or {})

    def value(point: Point) -> Value:
        found = mean(point)
        return None if found is None else Measured(factor * found)

    return value


def _ratio(
    frame: pd.DataFrame, stage: str, over: tuple[str, dict[str, object]], under: tuple[str, dict[str, object]]
) -> Callable[[Point], Value]:
    """One fact over another."""
    means = [_mean(frame, stage, *fact) for fact in (over, under)]

    def value(point: Point) -> Value:
        top, bottom = (mean(point) for mean in means)
        return None if top is None or not bottom else Measured(top / bottom)

    return value


def _memory(frame: pd.DataFrame, stage: str, labels: dict[str, object]) -> Callable[[Point], Value]:
    """Peak memory of the packed model over that of the dense one; that one's own is 1."""
    facts = [("peak_memory", labels | {"implementation": name}) for name in ("packed", "dense")]
    ratio = _ratio(frame, stage, facts[0], facts[1])
    return lambda point: Measured(1.0) if point.is_original and _any(frame, point, stage) else ratio(point)


def _perplexity(text: Text) -> Callable[[Point], Value]:
    return lambda point: point.perplexity.get(text)
