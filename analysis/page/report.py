"""The report of studies: one HTML file that opens without a network.

Tables that sort, figures, every number with the row that it comes from, what ran on what, the definitions of the
trials, and the command that makes each study again. The page is `report.html.j2`, filled in from plain data.
"""

import base64
import io
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from analysis.figures.study import plot_study
from analysis.figures.style import WIDTHS
from analysis.names import workload_of
from analysis.rows.load import records
from analysis.rows.points import Measured, Task
from analysis.tables.render import MISSING, Table, shown_cells
from analysis.tables.study import study_tables, title
from patch.methods import label_of

# What each figure of `plot_study` shows, by the beginning of its file's name.
_CAPTIONS = {
    "ablation": "Perplexity of each variant, lowest on top; the dashed line is the dense model.",
    "frontier": "Perplexity and accuracy against sparsity; error bars are standard errors.",
    "speedup": "Speedup of a model's linears over the fastest dense one, with what bytes and instructions would allow.",
    "roof": "What the kernels reach by shape, beside what a large dense product and a large copy reach.",
    "carried": "Accuracy against the speed of the same tile statistics on a larger model's shapes with random weights.",
    "speed": "Accuracy against end-to-end speedup of the same checkpoints; the grey line is the frontier.",
    "layer-sparsity": "Sparsity of each layer.",
    "tile-shapes": "Perplexity against the tile shape, all else equal; the dashed line is the dense model.",
    "tiles": "Learned or chosen tile maps: dark tiles are dense, light ones 2:4.",
    "learning-curves": "Learning curves.",
}


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
    figures: tuple[Path, ...]


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
    figures = _figures(study.frame)
    return {
        "name": study.name,
        "title": study.title,
        "command": f"hts run {study.name}",
        "tables": [
            _table(title(name), table, _origins(table, evaluated)) for name, table in study_tables(study.frame).items()
        ],
        "missing": study.missing,
        "figures": [figure for figure in figures if not figure["name"].startswith("tiles-")],
        "tile_maps": [figure for figure in figures if figure["name"].startswith("tiles-")],
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
                    "second": (row, place) in table.second,
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


def _figures(frame: pd.DataFrame) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path in plot_study(frame, Path(folder)) if path.suffix == ".png"]
        return [_figure(path) for path in paths]


def _figure(path: Path) -> dict[str, str]:
    kind = next((kind for kind in _CAPTIONS if path.stem.startswith(kind)), "")
    subject = path.stem.removeprefix(kind).strip("-").replace("-", " ")
    caption = " ".join(filter(None, (_CAPTIONS.get(kind, ""), subject and f"({subject})")))
    with Image.open(path) as image:
        return {
            "name": path.stem,
            "caption": caption or path.stem,
            "data": "data:image/png;base64," + base64.b64encode(_few_colours(image)).decode(),
            "width": f"{image.width / image.info['dpi'][0] / WIDTHS['double']:.0%}",
        }


def _few_colours(image: Image.Image) -> bytes:
    """A PNG of 256 colours, which figures have no more of to the eye, at a third of its size."""
    with io.BytesIO() as small:
        image.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
        return small.getvalue()


def _ran_on(frame: pd.DataFrame) -> list[dict[str, str]]:
    """The machines and revisions of the rows, with how many each gave."""
    groups = frame.assign(gpu=frame.gpu.fillna("CPU alone"), git=frame.git.fillna("unknown").str[:10])
    counted = groups.groupby(["gpu", "git", "software"], sort=False).agg(rows=("trial", "size"), first=("time", "min"))
    return [{str(name): str(value) for name, value in row.items()} for row in counted.reset_index().to_dict("records")]


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "gpu": speed.gpu,
        "tables": [_table(title, table, {}) for title, table in speed.tables],
        "figures": [_figure(path) for path in speed.figures if path.suffix == ".png"],
    }
