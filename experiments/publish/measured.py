"""What was measured of trials and on GPUs, as frames and tables; draws nothing."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from pandas import DataFrame

from analysis.rows.format import Row, names
from analysis.rows.load import load_rows, records
from analysis.tables.kernels import KINDS, bench_frame, speed_tables
from analysis.tables.learning import learning_tables
from analysis.tables.render import Table
from analysis.tables.serving import serving_tables
from analysis.tables.study import study_tables, title
from experiments.run.store import FAILURE, Store
from experiments.studies.trial import Trial, key
from patch.errors import UserError

logger = logging.getLogger(__name__)


def frame(trials: Iterable[Trial], store: Store, parts: bool = True) -> DataFrame:
    """What was measured of some trials; those whose files are damaged are named and left out.

    Args:
        parts: as `rows_of`; tables need none.

    Raises:
        UserError: if nothing was.
    """
    return some(rows_of({key(trial) for trial in trials}, store, parts), store)


def rows_of(trials: Collection[str], store: Store, parts: bool = True) -> DataFrame:
    """The rows of some trials, none perhaps; those whose files are damaged are named and left out.

    Args:
        parts: whether rows of layers and steps are wanted (`analysis.rows.load.load_rows`).

    Raises:
        UserError: if all are damaged.
    """
    damaged: list[str] = []
    found = load_rows(store.root, trials, damaged.append, parts)
    found = found[found.stage != FAILURE]
    # Files of before they ended with a digest have no other hash than this.
    said = found.drop_duplicates("trial")
    edited = [row for row in records(said) if not names(row.trial, row.definition)]
    damaged += [f"{store.root}/{row.origin}: the definition is not that of trial {row.trial}" for row in edited]
    found = found[~found.trial.isin([row.trial for row in edited])]
    if damaged and found.empty:
        raise UserError(damaged[0])
    for problem in damaged:
        logger.warning("left out: %s", problem)
    return found


def some(found: DataFrame, store: Store) -> DataFrame:
    """The rows, if there are any.

    Raises:
        UserError: if there are none.
    """
    if found.empty:
        raise UserError(f"{store.root} has no rows of these trials: run the study first, or name another --results")
    return found


def table(trials: Iterable[Trial], store: Store, about: str = "accuracy", beside_published: bool = False) -> Table:
    """One of the study's tables (`analysis.tables.study`).

    Raises:
        UserError: if the rows have nothing for that table.
    """
    trials = list(trials)
    rows = frame(trials, store, parts=False)
    found = study_tables(rows, beside_published)
    if not found:
        raise UserError("nothing was timed: speed is measured on a CUDA GPU, run the study on one")
    if about not in found:
        raise UserError(f"nothing that was measured is for a table '{about}': there is {', '.join(found)}")
    table = found[about]
    if absent := [trial for trial in trials if key(trial) not in set(rows.trial)]:
        labels = Counter(trial.label for trial in trials)
        # On what and for how long a mask is learned is not in its label.
        told = [each.label if labels[each.label] == 1 else f"{each.label} ({key(each)})" for each in absent]
        return dataclasses.replace(table, notes=(*table.notes, f"Without rows, so not shown: {', '.join(told)}."))
    return table


def bench_frames(rows: Sequence[Row]) -> dict[str, DataFrame]:
    """What benches of one GPU timed, by kind.

    Args:
        rows: as from `analysis.tables.kernels.measurements`.

    Raises:
        UserError: if a bench was cut off, or something is wrong.
    """
    return {kind: bench_frame(rows, kind) for kind in KINDS}


def bench_tables(rows: Sequence[Row], frames: Mapping[str, DataFrame]) -> dict[str, Table]:
    """The tables of what benches of one GPU measured, by title.

    Args:
        rows: as from `analysis.tables.kernels.measurements`.
        frames: of these rows, as from `bench_frames`.
    """
    found: dict[str, Table] = {}
    for timed in frames.values():
        found |= {} if timed.empty else {title(name): table for name, table in speed_tables(timed).items()}
    return found | learning_tables(rows) | serving_tables(rows)
