"""Reports: a study's tables and figures as files, a GPU's measured speed, and all of it as one page."""

import logging
import os
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from pandas import DataFrame

from analysis.figures.study import kernel_drawings, plot_study
from analysis.figures.style import FORMATS
from analysis.page import report
from analysis.rows import consolidate, layout
from analysis.rows.format import Row
from analysis.rows.load import journal_rows, load_rows
from analysis.tables.kernels import KINDS, bench_frame, measurements, speed_tables
from analysis.tables.learning import learning_tables
from analysis.tables.render import Table, render
from analysis.tables.study import study_tables, title
from experiments.run.provenance import revision
from experiments.run.store import FAILURE, Store
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Trial, key
from patch.errors import UserError, check_name
from patch.files import write_atomic

logger = logging.getLogger(__name__)


def frame(trials: Iterable[Trial], store: Store) -> DataFrame:
    """What was measured of some trials; those whose files are damaged are named and left out.

    Raises:
        UserError: if nothing was.
    """
    return _some(_rows_of({key(trial) for trial in trials}, store), store)


def _rows_of(trials: Collection[str], store: Store) -> DataFrame:
    """The rows of some trials, none perhaps; those whose files are damaged are named and left out.

    Raises:
        UserError: if all are damaged.
    """
    damaged: list[str] = []
    found = load_rows(store.root, trials, damaged.append)
    found = found[found.stage != FAILURE]
    if damaged and found.empty:
        raise UserError(damaged[0])
    for problem in damaged:
        logger.warning("left out: %s", problem)
    return found


def _some(found: DataFrame, store: Store) -> DataFrame:
    if found.empty:
        raise UserError(f"{store.root} has no rows of these trials: run the study first, or name another --results")
    return found


def consolidate_into(runs: Path, results: Path, allow_dirty: bool = False) -> list[Path]:
    """Publish the rows of a results directory and its benches as tables of another, or its own; returns what changed.

    Raises:
        UserError: if there are none, one is damaged or contradicts what is published, or was measured in a working tree
            with changes, unless that is allowed.
    """
    bench = runs / layout.BENCH
    folders = [Path(), *(path.relative_to(runs) for path in sorted(bench.glob("*")) if path.is_dir())]
    changed, found = [], False
    for folder in folders:
        if not (runs / folder).is_dir():
            continue
        theirs = consolidate.published_stages(runs / folder)
        new = consolidate.merged(theirs, consolidate.stages_of(journal_rows(runs / folder)), allow_dirty=True)
        if new:
            found = True
            ours = consolidate.published_stages(results / folder)
            changed += consolidate.write(results / folder, consolidate.merged(ours, new, allow_dirty))
    if not found:
        raise UserError(f"{runs} has no rows: run a study first, or name another results directory")
    return changed


def table(trials: Iterable[Trial], store: Store, about: str = "accuracy", beside_published: bool = False) -> Table:
    """One of the study's tables (`analysis.tables.study`).

    Raises:
        UserError: if the rows have nothing for that table.
    """
    found = study_tables(frame(trials, store), beside_published)
    if not found:
        raise UserError("nothing was timed: speed is measured on a CUDA GPU, run the study on one")
    return found[check_name("table", about, found)]


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
    rows = _rows_of({trial for _, members, _ in wanted for trial in members}, store) if wanted else None
    studies = [
        report.Study(name, STUDIES[name].title, _some(rows[rows.trial.isin(members)], store), missing)
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
    tables = bench_tables(rows)
    if not tables:
        raise UserError(f"{folder}: nothing was timed there: run `hts bench kernels`, or name another GPU")
    kernels = bench_frame(rows, "kernels")
    figures = [] if kernels.empty else kernel_drawings(kernels)
    return report.Speed(folder.name, tuple(tables.items()), tuple(figures))


def bench_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """The tables of what benches of one GPU measured, by title.

    Args:
        rows: as from `analysis.tables.kernels.measurements`.

    Raises:
        UserError: if a bench was cut off, or something is wrong.
    """
    found: dict[str, Table] = {}
    for kind in KINDS:
        timed = bench_frame(rows, kind)
        found |= {} if timed.empty else {title(name): table for name, table in speed_tables(timed).items()}
    return found | learning_tables(rows)


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
