"""The report of a study: its table and figures, as files beside its rows."""

import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pandas import DataFrame

from analysis import report, tables
from analysis.figures import plot_study
from analysis.rows import load_rows
from analysis.speed import kernel_table, load_bench, model_table
from analysis.speed_figures import plot_roof, plot_speedup
from experiments.definitions import Trial, check_name, key
from experiments.provenance import revision
from experiments.store import FAILURE, Store, write_atomic
from experiments.studies import STUDIES
from patch.errors import UserError


def frame(trials: Iterable[Trial], store: Store) -> DataFrame:
    """What was measured of some trials.

    Raises:
        UserError: if nothing was.
    """
    found = load_rows(store.root / "rows", {key(trial) for trial in trials})
    found = found[found.stage != FAILURE]
    if found.empty:
        raise UserError(f"{store.root} has no rows of these trials: run the study first, or name another --results")
    return found


def table(trials: Iterable[Trial], store: Store, format: str, beside_published: bool = False) -> str:
    """The study's table as ``md``, ``csv`` or ``latex``."""
    return tables.render(tables.accuracy_table(frame(trials, store), beside_published), format)


def figures(study: str, trials: Iterable[Trial], store: Store) -> list[Path]:
    """Draw the study's figures."""
    return plot_study(frame(trials, store), store.root / "reports" / study)


def page(names: Sequence[str], store: Store) -> str:
    """Some studies and every GPU's measured speed as one HTML page (`analysis.report`).

    Args:
        names: of studies; none of them takes all that have rows.

    Raises:
        UserError: if a study that is named has no rows, or there are none at all.
    """
    studies = []
    for name in names or STUDIES:
        trials = STUDIES[check_name("study", name, STUDIES)].trials()
        has_rows = [(store.root / "rows" / key(trial)).is_dir() for trial in trials]
        # The dense model alone is no study.
        if names or any(rows and trial.pruning.method != "dense" for rows, trial in zip(has_rows, trials, strict=True)):
            missing = tuple(trial.label for rows, trial in zip(has_rows, trials, strict=True) if not rows)
            studies.append(report.Study(name, STUDIES[name].title, frame(trials, store), missing))
    with tempfile.TemporaryDirectory() as folder:
        speeds = [_speed(path, Path(folder)) for path in sorted((store.root / "bench").glob("*/kernels"))]
        if not studies and not speeds:
            raise UserError(f"{store.root} has no rows of any study: run one first, or name another --results")
        commit, dirty = revision()
        when = time.strftime("%Y-%m-%d", time.gmtime())
        return report.report(studies, speeds, f"Made on {when} from revision {commit[:10]}{' (changed)' * bool(dirty)}")


def _speed(kernels: Path, folder: Path) -> report.Speed:
    """The tables and figures of one GPU's bench files, drawn in ``folder``."""
    rows = load_bench(sorted(kernels.glob("*.jsonl")))
    gpu = kernels.parent.name
    tables = [
        (f"{model}: linears against dense by tokens, tiles of 128x128, geometric mean", kernel_table(rows, model))
        for model in dict.fromkeys(rows.model)
    ]
    for path in sorted((kernels.parent / "model").glob("*.jsonl")):
        tables.append((f"{path.stem}: end to end against dense", model_table(load_bench([path]))))
    figures = [*plot_speedup(rows, folder / f"{gpu}-speedup"), *plot_roof(rows, folder / f"{gpu}-roof")]
    return report.Speed(gpu, tuple(tables), tuple(figures))


def write(study: str, trials: Iterable[Trial], store: Store) -> list[Path]:
    """Write the study's table and figures, and say where."""
    trials = list(trials)
    written = [store.root / "reports" / study / f"table.{format}" for format in ("md", "csv")]
    for path in written:
        write_atomic(path, table(trials, store, path.suffix[1:]) + "\n")
    return [*written, *figures(study, trials, store)]
