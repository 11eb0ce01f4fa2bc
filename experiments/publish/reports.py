"""Reports: a study's tables and figures as files, and all that was measured as one page."""

import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from analysis.figures.study import kernel_drawings, model_drawings, plot_study
from analysis.figures.style import FORMATS
from analysis.page import report
from analysis.rows import layout
from analysis.rows.load import load_rows
from analysis.tables.kernels import measurements
from analysis.tables.render import render
from analysis.tables.study import study_tables
from experiments.publish.measured import bench_frames, bench_tables, frame, rows_of, some
from experiments.run.provenance import revision
from experiments.run.store import Store
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Trial, key
from patch.errors import UserError, check_name
from patch.files import write_atomic


def figures(study: str, trials: Iterable[Trial], store: Store, format: str = FORMATS[0]) -> list[Path]:
    """Draw the study's figures.

    Raises:
        UserError: for another format than ``FORMATS``, before anything is read.
    """
    check_name("figure format", format, FORMATS)
    return plot_study(frame(trials, store), store.root / layout.REPORTS / study, formats=[format])


def page(names: Sequence[str], store: Store) -> str:
    """Some studies and every GPU's measured speed as one HTML page (`analysis.page.report`).

    Args:
        names: of studies; none of them takes all that have rows.

    Raises:
        UserError: if a study that is named has no rows, or there are none at all.
    """
    wanted: list[tuple[str, list[str], tuple[str, ...]]] = []
    started = store.started()
    for name in names or STUDIES:
        trials = STUDIES[check_name("study", name, STUDIES)].trials()
        has_rows = [key(trial) in started for trial in trials]
        # The dense model alone is no study.
        if names or any(rows and trial.pruning.method != "dense" for rows, trial in zip(has_rows, trials, strict=True)):
            missing = tuple(trial.label for rows, trial in zip(has_rows, trials, strict=True) if not rows)
            wanted.append((name, [key(trial) for trial in trials], missing))
    # Studies share trials: rows are read once.
    rows = rows_of({trial for _, members, _ in wanted for trial in members}, store, parts=False) if wanted else None
    studies = [
        report.Study(
            name,
            STUDIES[name].title,
            some(rows[rows.trial.isin(members)], store),
            missing,
            partial(load_rows, store.root),
        )
        for name, members, missing in wanted
        if rows is not None
    ]
    speeds = [speed(path) for path in sorted((store.root / layout.BENCH).glob("*")) if path.is_dir()]
    if not studies and not speeds:
        raise UserError(f"{store.root} has no rows of any study: run one first, or name another --results")
    return report.report(studies, speeds, _made(), processes=len(os.sched_getaffinity(0)))


def _made() -> str:
    """When the page is made, and by which code: a revision is named alone only where nothing differs from it."""
    commit, dirty = revision()
    code = f"code that has changes since revision {commit[:10]}" if dirty else f"revision {commit[:10]}"
    return f"Made on {time.strftime('%Y-%m-%d', time.gmtime())} by {code}"


def speed(folder: Path) -> report.Speed:
    """The tables and figures of one GPU's bench folder.

    Raises:
        UserError: if nothing was timed there, or a file is damaged.
    """
    rows = measurements(folder)
    frames = bench_frames(rows)
    tables = bench_tables(rows, frames)
    if not tables:
        raise UserError(f"{folder}: nothing was timed there: run `hts bench kernels`, or name another GPU")
    figures = (*kernel_drawings(frames["kernels"]), *model_drawings(frames["model"]))
    return report.Speed(folder.name, tuple(tables.items()), figures)


def write(study: str, trials: Iterable[Trial], store: Store) -> list[Path]:
    """Write the study's tables and figures, and say where."""
    trials = list(trials)
    rows = frame(trials, store)
    written = []
    for name, table in study_tables(rows).items():
        for format in ("md", "csv", "tex"):
            path = store.root / layout.REPORTS / study / f"{name}.{format}"
            write_atomic(path, render(table, {"tex": "latex"}.get(format, format)) + "\n")
            written.append(path)
    return [*written, *plot_study(rows, store.root / layout.REPORTS / study)]
