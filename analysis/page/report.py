"""The report of studies: one HTML file that opens without a network.

It opens with findings, then has the studies by what they ask: tables that sort, figures, what ran on what, and the
command that makes each again; at its end every number's row and the definitions of the trials. The page is
`report.html.j2`, filled in from plain data.
"""

import base64
import gc
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import pandas as pd
from matplotlib.collections import QuadMesh

from analysis.figures.about import short_gpu
from analysis.figures.study import Drawing, WholeRows, study_drawings
from analysis.figures.style import WIDTHS, png_bytes, svg_bytes
from analysis.page.findings import Finding, errors_said, findings, kernel_findings
from analysis.page.origins import origins
from analysis.page.questions import QUESTIONS, Question, is_smallest, question, reading_order
from analysis.page.tables import anchor, page_table
from analysis.rows.load import records, uncollected
from analysis.rows.points import Point, gather, trial_labels
from analysis.tables.render import Table
from analysis.tables.study import GRID_STAGES, study_tables, title

# Figures of single masks cost as much as all else, and few look at them: a page has so many of a kind.
_MASKS = 1


@dataclass(frozen=True)
class Study:
    """What is reported of one study.

    Attributes:
        name: of the study; ``hts run NAME`` makes its rows.
        title: one line.
        frame: its rows, as from `analysis.rows.load.load_rows`; those of layers and steps may be left to ``whole``.
        missing: trials of the study, by label, that have no rows at all.
        whole: gives all rows of some trials; called in another process, perhaps.
    """

    name: str
    title: str
    frame: pd.DataFrame
    missing: tuple[str, ...] = ()
    whole: WholeRows | None = None

    @cached_property
    def evaluated(self) -> pd.DataFrame:
        """The rows that are not of a step of learning or of a layer."""
        return self.frame[self.frame.step.isna() & self.frame.layer.isna()]

    @cached_property
    def points(self) -> list[Point] | None:
        """What was measured of each pruned model; None of a grid."""
        return None if self.evaluated.stage.str.startswith(GRID_STAGES).all() else gather(self.evaluated)


@dataclass(frozen=True)
class Speed:
    """What was timed on one GPU: tables by title, and figures."""

    gpu: str
    tables: tuple[tuple[str, Table], ...]
    figures: tuple[Drawing, ...]


def report(studies: Sequence[Study], speeds: Sequence[Speed], made: str, processes: int = 1) -> str:
    """The page, the same bytes by however many processes.

    Args:
        made: when and from which revision the page was made, one line.
        processes: that draw studies; one is this process itself.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis.page", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    of_studies, of_gpus = _contents(studies, speeds, processes)
    ordered = sorted(studies, key=lambda study: reading_order(of_studies[study.name].asked, study.frame))
    of_speeds = {speed.gpu: kernel_findings(short_gpu(speed.gpu), speed.tables) for speed in speeds}
    sections = []
    for which, words in QUESTIONS.items():
        members = [study for study in ordered if of_studies[study.name].asked == which]
        timed = speeds if which == "kernels" else ()
        if members or timed:
            answers = [
                _answer(each.name, each.title, of_studies[each.name].findings, is_smallest(each.frame))
                for each in members
            ]
            answers += [_answer(f"speed-{s.gpu}", f"linears on {s.gpu}", of_speeds[s.gpu], False) for s in timed]
            answers = [each for each in answers if each["findings"]]
            bodies = [of_studies[study.name].body for study in members]
            sections.append(_section(which, words, bodies, [of_gpus[speed.gpu] for speed in timed], answers))
    return environment.get_template("report.html.j2").render(
        sections=sections,
        errors=errors_said([each for study in ordered for each in of_studies[study.name].findings]),
        facts=_facts(ordered),
        definitions=_definitions(ordered),
        made=made,
    )


def _section(
    which: Question,
    words: str,
    studies: Sequence[dict[str, Any]],
    speeds: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """One question, its answers, and the studies that ask it; what the smallest model answers is folded away."""
    return {
        "id": which,
        "question": words,
        "answers": [each for each in answers if not each["minor"]],
        "minor_answers": [each for each in answers if each["minor"]],
        "studies": studies,
        "speeds": speeds,
    }


@dataclass(frozen=True)
class _Content:
    """What the page says of one study: nearly all of its time is spent on these.

    Attributes:
        asked: the question that it is under.
        findings: its answers.
        body: tables and figures, as the template takes them.
    """

    asked: Question
    findings: Sequence[Finding]
    body: dict[str, Any]


def _content(study: Study) -> _Content:
    with _rows_set_apart():
        asked = question(study.evaluated, study.points)
        return _Content(asked, findings(study.evaluated, asked, study.points), _study(study))


@contextmanager
def _rows_set_apart() -> Iterator[None]:
    """Cycles are looked for once, and not among the rows that were read: figures have them by the thousand."""
    gc.freeze()
    try:
        with uncollected():
            yield
    finally:
        gc.collect()
        gc.unfreeze()


def _contents(
    studies: Sequence[Study], speeds: Iterable[Speed], processes: int
) -> tuple[dict[str, _Content], dict[str, dict[str, Any]]]:
    """What is said of studies by name, and of speeds by GPU."""
    processes = min(processes, len(studies))
    if processes < 2:
        return {study.name: _content(study) for study in studies}, {speed.gpu: _speed(speed) for speed in speeds}
    # Matplotlib may hold locks and threads, which a forked process would inherit.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        # The largest first, so that no process ends long after the others.
        largest = sorted(studies, key=lambda study: len(study.frame), reverse=True)
        begun = {study.name: pool.submit(_content, study) for study in largest}
        of_gpus = {speed.gpu: _speed(speed) for speed in speeds}
        return {name: content.result() for name, content in begun.items()}, of_gpus


def _answer(name: str, words: str, found: Sequence[Finding], minor: bool) -> dict[str, Any]:
    return {"anchor": name, "title": words[0].upper() + words[1:], "findings": found, "minor": minor}


def _study(study: Study) -> dict[str, Any]:
    figures = [
        _figure(drawing)
        for drawing in study_drawings(study.frame, masks=_MASKS, points=study.points, whole=study.whole)
    ]
    return {
        "name": study.name,
        "title": study.title,
        "tables": [
            page_table(title(name), table, origins(table, study.evaluated))
            for name, table in study_tables(study.evaluated, points=study.points).items()
        ],
        "missing": study.missing,
        "figures": [figure for figure in figures if not figure["minor"]],
        "masks": [figure for figure in figures if figure["minor"]],
        "ran_on": _ran_on(study.frame),
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "gpu": speed.gpu,
        "tables": [page_table(title, table, {}) for title, table in speed.tables],
        "figures": [_figure(drawing) for drawing in speed.figures],
    }


def _facts(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """Every row of every study, once, whatever studies it is in."""
    found: dict[str, dict[str, Any]] = {}
    for study in studies:
        for row in records(study.evaluated):
            # Parts of a task, such as a subject of MMLU, and its other metrics stay in the rows.
            if row.origin in found or (row.stage.startswith("task:") and not row.labels.get("primary", True)):
                continue
            found[row.origin] = {
                "trial": row.trial,
                "stage": row.stage,
                "metric": row.metric + (f" ({row.task})" if row.task and row.metric != row.task else ""),
                "value": "" if pd.isna(row.value) else f"{row.value:.6g}",
                "stderr": "" if pd.isna(row.stderr) else f"{row.stderr:.2g}",
                "origin": row.origin,
                "anchor": anchor(row.origin),
                "git": _revision(row.git, row.dirty),
                "time": (row.time or "")[:10],
            }
    return list(found.values())


def _definitions(studies: Sequence[Study]) -> list[dict[str, str]]:
    """Every trial, once, by a name that tells it from the others of its study."""
    found: dict[str, dict[str, str]] = {}
    for study in studies:
        grid = study.frame.stage.str.startswith(GRID_STAGES).all()
        labels = {} if grid else trial_labels(study.evaluated)
        for row in records(study.frame.drop_duplicates("trial")):
            text = json.dumps(row.definition, indent=1)
            name = f"{row.model}: {labels.get(row.trial, row.method)}"
            found.setdefault(row.trial, {"trial": row.trial, "name": name, "json": text})
    return list(found.values())


def _figure(drawing: Drawing) -> dict[str, Any]:
    width = drawing.figure.get_figwidth()
    # Maps of many cells are smaller as pixels.
    cells = any(isinstance(part, QuadMesh) for axes in drawing.figure.axes for part in axes.collections)
    kind, data = ("png", png_bytes(drawing.figure)) if cells else ("svg+xml", svg_bytes(drawing.figure))
    return {
        "caption": drawing.caption,
        "data": f"data:image/{kind};base64," + base64.b64encode(data).decode(),
        "wide": width > WIDTHS["single"],
        "minor": drawing.minor,
    }


def _ran_on(frame: pd.DataFrame) -> list[dict[str, str]]:
    """The machines and revisions of the rows, with how many trials each measured."""
    git = [_revision(revision, dirty) for revision, dirty in zip(frame.git, frame.dirty, strict=True)]
    groups = frame.assign(gpu=frame.gpu.fillna("CPU alone"), git=git)
    counted = groups.groupby(["gpu", "git", "software"], sort=False).agg(
        trials=("trial", "nunique"), first=("time", "min")
    )
    return [{str(name): str(value) for name, value in row.items()} for row in counted.reset_index().to_dict("records")]


def _revision(git: str | None, dirty: object) -> str:
    """A revision, and whether the code had changes that it has not."""
    return (git or "unknown")[:10] + (" with changes" if dirty is True else "")
