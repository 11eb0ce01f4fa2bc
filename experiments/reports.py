"""The report of a study: its table and figures, as files beside its rows."""

from collections.abc import Iterable
from pathlib import Path

from pandas import DataFrame

from analysis import tables
from analysis.figures import plot_study
from analysis.rows import load_rows
from experiments.definitions import Trial, key
from experiments.store import FAILURE, Store, write_atomic
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


def table(trials: Iterable[Trial], store: Store, format: str) -> str:
    """The study's table as ``md``, ``csv`` or ``latex``."""
    return tables.render(tables.accuracy_table(frame(trials, store)), format)


def figures(study: str, trials: Iterable[Trial], store: Store) -> list[Path]:
    """Draw the study's figures."""
    return plot_study(frame(trials, store), store.root / "reports" / study)


def write(study: str, trials: Iterable[Trial], store: Store) -> list[Path]:
    """Write the study's table and figures, and say where."""
    trials = list(trials)
    written = [store.root / "reports" / study / f"table.{format}" for format in ("md", "csv")]
    for path in written:
        write_atomic(path, table(trials, store, path.suffix[1:]) + "\n")
    return [*written, *figures(study, trials, store)]
