"""The report of studies: one HTML file that opens without a network.

Tables that sort, figures, every number with the row that it comes from, what ran on what, the definitions of the
trials, and the command that makes each study again. The page is `report.html.j2`, filled in from plain data.
"""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import pandas as pd

from analysis.figures.study import Drawing, study_drawings
from analysis.figures.style import WIDTHS, png_bytes
from analysis.names import workload_of
from analysis.rows.load import records
from analysis.rows.points import Measured, Task
from analysis.tables.render import MISSING, Table, shown_cells
from analysis.tables.study import study_tables, title
from patch.methods import label_of


@dataclass(frozen=True)
class Study:
    """What is reported of one study.

    Attributes:
        name: of the study; ``hts run NAME`` makes its rows.
        title: one line.
        frame: its rows, as from `analysis.rows.load.load_rows`.
        missing: trials of the study, by label, that have no rows at all.
    """

    name: str
    title: str
    frame: pd.DataFrame
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speed:
    """What was timed on one GPU: tables by title, and figures."""

    gpu: str
    tables: tuple[tuple[str, Table], ...]
    figures: tuple[Drawing, ...]


def report(studies: Sequence[Study], speeds: Sequence[Speed], made: str) -> str:
    """The page.

    Args:
        made: when and from which revision the page was made, one line.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis.page", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        studies=[_study(study) for study in studies], speeds=[_speed(speed) for speed in speeds], made=made
    )


def _study(study: Study) -> dict[str, Any]:
    evaluated = study.frame[study.frame.step.isna() & study.frame.layer.isna()]
    figures = [_figure(drawing) for drawing in study_drawings(study.frame)]
    return {
        "name": study.name,
        "title": study.title,
        "command": f"hts run {study.name}",
        "tables": [
            _table(title(name), table, _origins(table, evaluated)) for name, table in study_tables(study.frame).items()
        ],
        "missing": study.missing,
        "figures": [figure for figure in figures if not figure["minor"]],
        "masks": [figure for figure in figures if figure["minor"]],
        "ran_on": _ran_on(study.frame),
        "facts": [
            {
                "trial": row.trial,
                "stage": row.stage,
                "metric": row.metric + (f" ({row.task})" if row.task and row.metric != row.task else ""),
                "value": "" if pd.isna(row.value) else f"{row.value:.6g}",
                "stderr": "" if pd.isna(row.stderr) else f"{row.stderr:.2g}",
                "origin": row.origin,
                "anchor": _anchor(row.origin),
                "git": (row.git or "")[:10],
                "time": row.time or "",
            }
            for row in records(evaluated)
            if not _is_part(row)
        ],
        "definitions": [
            {
                "trial": row.trial,
                "method": label_of(row.method),
                "json": json.dumps(row.definition, indent=1),
            }
            for row in records(study.frame.drop_duplicates("trial"))
        ],
    }


def _table(title: str, table: Table, origins: Mapping[tuple[int, int], str]) -> dict[str, Any]:
    """A table as the page shows it: cells with what they sort by, and the row that each number comes from."""
    return {
        "title": title,
        "headings": [{"text": column.heading, "number": column.kind != "text"} for column in table.columns],
        "rows": [
            [
                {
                    "text": "not measured" if text == MISSING and column.kind != "text" else text,
                    "sort": _sort_key(table.rows[row][place]),
                    "best": (row, place) in table.best,
                    "origin": origins.get((row, place), ""),
                    "anchor": _anchor(origins.get((row, place), "").partition(", ")[0]),
                    "missing": text == MISSING and column.kind != "text",
                }
                for place, (column, text) in enumerate(zip(table.columns, line, strict=True))
            ]
            for row, line in enumerate(shown_cells(table))
        ],
        "notes": table.notes,
    }


def _anchor(origin: str) -> str:
    """The place in the page of a row, by its file and line."""
    return "row-" + re.sub(r"\W+", "-", origin)


def _is_part(row: Any) -> bool:
    """Parts of a task, such as a subject of MMLU, and its other metrics stay in the rows."""
    return row.stage.startswith("task:") and not row.labels.get("primary", True)


def _sort_key(value: Any) -> str:
    """What a column sorts by: the number, or the text."""
    if value is None or (isinstance(value, Measured) and math.isnan(value.value)):
        return ""
    if isinstance(value, str):
        return value
    # As JavaScript reads it.
    return "Infinity" if math.isinf(value.value) else repr(value.value)


def _origins(table: Table, evaluated: pd.DataFrame) -> dict[tuple[int, int], str]:
    """For each measured cell, the file and line of its rows."""
    places: dict[tuple[int, int], str] = {}
    rows_of = dict(list(evaluated.groupby("trial")))
    for row, trials in enumerate(table.trials):
        mine = pd.concat([rows_of[trial] for trial in trials])
        for place, column in enumerate(table.columns):
            found = mine[_behind(column.name, mine)]
            if len(found) and table.rows[row][place] is not None:
                places[row, place] = ", ".join(dict.fromkeys(found.origin))
    return places


def _behind(column: str, rows: pd.DataFrame) -> Any:
    """Which rows a cell shows, by the name of its column (`analysis.tables.accuracy`, `analysis.tables.packed`)."""
    kind, _, about = column.partition(" ")
    stage, metric = rows.stage, rows.metric
    if kind == "perplexity":
        return (metric == "perplexity") & (stage == f"perplexity:{about}")
    if kind == "accuracy":
        primary = [str(task) if labels.get("primary") else None for task, labels in _tasks_of(rows)]
        return pd.Series(primary, rows.index) == about
    if kind == "achieved_sparsity":
        return (metric == "sparsity") & (stage == "prune")
    if kind == "packed_perplexity":
        return (metric == kind) & (stage == f"packed:{about}")
    if kind == "disk":
        return (metric == "disk_bytes") & (stage == "pack")
    if kind == "packed_share" and not about:
        return (metric == "packed_bytes") & (stage == "pack")
    if kind in ("speedup", "peak_memory"):
        carried, _, work = about.rpartition(" ")
        works = [workload_of(labels) for labels in rows.labels]
        return (metric == kind) & (stage == (carried or f"speed:{work}")) & (pd.Series(works, rows.index) == work)
    return pd.Series(False, rows.index)


def _tasks_of(rows: pd.DataFrame) -> list[tuple[Task | None, dict[str, Any]]]:
    """Of each row the task, if it is of one, and its labels."""
    return [
        (None if row.task is None else Task(row.task, None if pd.isna(row.limit) else int(row.limit)), row.labels)
        for row in records(rows)
    ]


def _figure(drawing: Drawing) -> dict[str, Any]:
    return {
        "caption": drawing.caption,
        "data": "data:image/png;base64," + base64.b64encode(png_bytes(drawing.figure)).decode(),
        "width": f"{drawing.figure.get_figwidth() / WIDTHS['double']:.0%}",
        "minor": drawing.minor,
    }


def _ran_on(frame: pd.DataFrame) -> list[dict[str, str]]:
    """The machines and revisions of the rows, with how many each gave."""
    groups = frame.assign(gpu=frame.gpu.fillna("CPU alone"), git=frame.git.fillna("unknown").str[:10])
    counted = groups.groupby(["gpu", "git", "software"], sort=False).agg(rows=("trial", "size"), first=("time", "min"))
    return [{str(name): str(value) for name, value in row.items()} for row in counted.reset_index().to_dict("records")]


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "gpu": speed.gpu,
        "tables": [_table(title, table, {}) for title, table in speed.tables],
        "figures": [_figure(drawing) for drawing in speed.figures],
    }
