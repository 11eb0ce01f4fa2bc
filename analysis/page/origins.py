"""Which rows a table's numbers come from."""

from typing import Any

import pandas as pd

from analysis.names import workload_of
from analysis.rows.load import records
from analysis.rows.points import Task
from analysis.tables.render import Table

_ONCE = {
    ("prune", "sparsity"): "achieved_sparsity",
    ("pack", "disk_bytes"): "disk",
    ("pack", "packed_bytes"): "packed_share",
}


def origins(table: Table, evaluated: pd.DataFrame) -> dict[tuple[int, int], str]:
    """For each measured cell, the file and line of its rows."""
    behind: dict[tuple[str, str], list[str]] = {}
    for row in records(evaluated):
        if (column := _column(row)) is not None:
            behind.setdefault((row.trial, column), []).append(row.origin)
    places: dict[tuple[int, int], str] = {}
    for line, trials in enumerate(table.trials):
        for place, about in enumerate(table.columns):
            found = [origin for trial in trials for origin in behind.get((trial, about.name), ())]
            if found and table.rows[line][place] is not None:
                places[line, place] = ", ".join(dict.fromkeys(found))
    return places


def _column(row: Any) -> str | None:
    """The column that a row is shown in, by its name (`analysis.tables.accuracy`, `analysis.tables.packed`)."""
    stage, _, about = row.stage.partition(":")
    if stage == row.metric == "perplexity":
        return f"perplexity {about}"
    if stage == "task" and row.labels.get("primary"):
        return f"accuracy {Task(row.task, None if pd.isna(row.limit) else int(row.limit))}"
    if stage == "packed" and row.metric == "packed_perplexity":
        return f"packed_perplexity {about}"
    if stage in ("speed", "carried") and row.metric in ("speedup", "peak_memory"):
        carried = f"{row.stage} " if stage == "carried" else ""
        return f"{row.metric} {carried}{workload_of(row.labels)}"
    return _ONCE.get((row.stage, row.metric))
