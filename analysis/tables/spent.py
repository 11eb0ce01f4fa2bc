"""Accuracy beside what it took: a line per pruned model, the cheapest of each sparsity first."""

from collections.abc import Sequence

import pandas as pd

from analysis.rows.points import Measured, Point, gather, mean_tasks, tasks, texts
from analysis.rows.spent import spent
from analysis.tables.accuracy import heading
from analysis.tables.render import Column, Table
from patch.errors import UserError
from patch.methods import label_of


def cost_table(frame: pd.DataFrame, points: Sequence[Point] | None = None) -> Table:
    """GPU hours, energy and tokens of each pruned model that was made on a GPU, with its perplexity and accuracy.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if no row says what a mask took.
    """
    points = gather(frame) if points is None else points
    took = spent(frame, points)
    members = [point for point in points if point.trials in took]
    if not members:
        raise UserError("no row says what a mask took: those that do have a metric gpus, of masks made on GPUs")
    members.sort(key=lambda point: (point.model, -point.sparsity, took[point.trials].gpu_hours))
    text = texts(points)[0]
    with_energy = any(took[point.trials].kilojoules is not None for point in members)
    averaged = mean_tasks(tasks(points))
    columns = [
        Column("target_sparsity", "Target (%)", "percent"),
        Column("method", "Method", "text"),
        Column("structure", "Structure", "text"),
        Column("variant", "Variant", "text"),
        Column("tokens", "Million tokens", "number"),
        Column("gpu_hours", "GPU hours", "number"),
        *([Column("kilojoules", "Energy (kJ)", "number")] if with_energy else []),
        Column(f"perplexity {text}", heading(text), "perplexity"),
        *([Column("mean_accuracy", f"Mean of {len(averaged)} (%)", "mean")] if averaged else []),
    ]
    rows = []
    for point in members:
        found = took[point.trials]
        energy = None if found.kilojoules is None else Measured(found.kilojoules)
        variant = f"{point.variant} (this alone)" if found.alone else point.variant
        rows.append(
            (
                Measured(point.sparsity),
                label_of(point.method),
                point.structure,
                variant or None,
                Measured(found.tokens / 1e6) if found.tokens else None,
                Measured(found.gpu_hours),
                *([energy] if with_energy else []),
                point.perplexity.get(text),
                *([point.mean_accuracy] if averaged else []),
            )
        )
    on = ", ".join(sorted({gpu for point in members for gpu in took[point.trials].gpus}))
    notes = [
        f"On {on}. GPU hours are those that processes held a GPU, the mean over seeds; priors are not in them.",
        "Where several processes shared a GPU they are the most that it took.",
    ]
    if any(took[point.trials].alone for point in members):
        notes.append("This alone: without what the mask took before, which no row says.")
    sections = tuple(f"{point.model} {point.sparsity}" for point in members)
    return Table(
        tuple(columns), tuple(rows), sections, frozenset(), tuple(notes), tuple(point.trials for point in members)
    )
