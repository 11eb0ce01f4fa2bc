"""The report of studies: one HTML file that opens without a network.

Tables that sort, figures, every number with the row that it comes from, what ran on what, the definitions of the
trials, and the command that makes each study again. The page is `report.html.j2`, filled in from plain data.
"""

import base64
import html
import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from analysis.figures import plot_study
from analysis.names import METHODS
from analysis.points import Measured, Point, gather, tasks, texts
from analysis.rows import records
from analysis.tables import MISSING, Table, accuracy_table, shown_cells

# What each figure of `plot_study` shows, by the beginning of its file's name.
_CAPTIONS = {
    "frontier": "Perplexity and accuracy against sparsity; error bars are standard errors.",
    "speed": "Accuracy against end-to-end speedup of the same checkpoints; the grey line is the frontier.",
    "nvidia": "Speed of the kernels on this GPU.",
    "layer-sparsity": "Sparsity of each layer.",
    "tiles": "Learned or chosen tile maps: dark tiles are dense, light ones 2:4.",
    "learning-curves": "Learning curves.",
}


@dataclass(frozen=True)
class Study:
    """What is reported of one study.

    Attributes:
        name: of the study; ``hts run NAME`` makes its rows.
        title: one line.
        frame: its rows, as from `analysis.rows.load_rows`.
        missing: trials of the study, by label, that have no rows at all.
    """

    name: str
    title: str
    frame: pd.DataFrame
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speed:
    """The speed of one GPU: Markdown tables by title, and figures."""

    gpu: str
    tables: tuple[tuple[str, str], ...]
    figures: tuple[Path, ...]


def report(studies: Sequence[Study], speeds: Sequence[Speed], made: str) -> str:
    """The page.

    Args:
        made: when and from which revision the page was made, one line.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        studies=[_study(study) for study in studies], speeds=[_speed(speed) for speed in speeds], made=made
    )


def _study(study: Study) -> dict[str, Any]:
    table = accuracy_table(study.frame)
    points = gather(study.frame)
    evaluated = study.frame[study.frame.step.isna() & study.frame.layer.isna()]
    origins = _origins(table, points, evaluated)
    cells, figures = shown_cells(table), _figures(study.frame)
    return {
        "name": study.name,
        "title": study.title,
        "command": f"hts run {study.name}",
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
            for row, line in enumerate(cells)
        ],
        "notes": table.notes,
        "missing": study.missing,
        "figures": [figure for figure in figures if not figure["name"].startswith("tiles")],
        "tile_maps": [figure for figure in figures if figure["name"].startswith("tiles")],
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
                "method": METHODS.get(row.method, row.method),
                "json": json.dumps(row.definition, indent=1),
            }
            for row in records(study.frame.drop_duplicates("trial"))
        ],
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


def _origins(table: Table, points: Sequence[Point], evaluated: pd.DataFrame) -> dict[tuple[int, int], str]:
    """For each measured cell, the file and line of its rows."""
    places: dict[tuple[int, int], str] = {}
    headings = [column.name for column in table.columns]
    for row, point in enumerate(points):
        mine = evaluated[evaluated.trial.isin(point.trials)]
        for text in texts(evaluated):
            found = mine[(mine.metric == "perplexity") & (mine.source == text.source) & (mine.length == text.length)]
            _add(places, row, headings, f"perplexity {text}", found)
        primary = mine[[bool(labels.get("primary")) for labels in mine.labels]]
        for task in tasks(evaluated):
            _add(places, row, headings, f"accuracy {task}", primary[primary.task == task.name])
        _add(places, row, headings, "achieved_sparsity", mine[(mine.metric == "sparsity") & (mine.stage == "prune")])
    return places


def _add(places: dict[tuple[int, int], str], row: int, headings: list[str], wanted: str, found: pd.DataFrame) -> None:
    if wanted in headings and len(found):
        places[row, headings.index(wanted)] = ", ".join(dict.fromkeys(found.origin))


def _figures(frame: pd.DataFrame) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path in plot_study(frame, Path(folder)) if path.suffix == ".png"]
        return [_figure(path) for path in paths]


def _figure(path: Path) -> dict[str, str]:
    kind = next((kind for kind in _CAPTIONS if path.stem.startswith(kind)), "")
    subject = path.stem.removeprefix(kind).strip("-").replace("-", " ")
    caption = " ".join(filter(None, (_CAPTIONS.get(kind, ""), subject and f"({subject})")))
    return {
        "name": path.stem,
        "caption": caption or path.stem,
        "data": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
    }


def _ran_on(frame: pd.DataFrame) -> list[dict[str, str]]:
    """The machines and revisions of the rows, with how many each gave."""
    groups = frame.assign(gpu=frame.gpu.fillna("CPU alone"), git=frame.git.fillna("unknown").str[:10])
    counted = groups.groupby(["gpu", "git", "software"], sort=False).agg(rows=("trial", "size"), first=("time", "min"))
    return [{str(name): str(value) for name, value in row.items()} for row in counted.reset_index().to_dict("records")]


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "gpu": speed.gpu,
        "tables": [{"title": title, "html": _markdown_table(text)} for title, text in speed.tables],
        "figures": [_figure(path) for path in speed.figures if path.suffix == ".png"],
    }


def _markdown_table(text: str) -> str:
    """A Markdown table, as `analysis.speed` writes them, as the rows of an HTML one."""
    lines = [re.split(r"\s*\|\s*", line.strip().strip("|").strip()) for line in text.splitlines()]
    head, _, *body = lines
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    return f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody>"
