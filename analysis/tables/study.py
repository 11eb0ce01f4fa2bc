"""Every table of a study."""

import dataclasses
from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.rows.points import Point, gather, texts, trial_labels
from analysis.rows.same_checkpoint import of_other_masks
from analysis.rows.spent import spent
from analysis.tables.accuracy import accuracy_table
from analysis.tables.kernels import PRECISIONS, from_rows, kind_of, speed_tables
from analysis.tables.packed import projected_shapes, projected_table, speed_table, workloads
from analysis.tables.precisions import precision_table
from analysis.tables.render import Table
from analysis.tables.speed_frontier import front_table, placed
from analysis.tables.spent import cost_table

GRID_STAGES = ("kernels:", "model:")
# How a note begins that stays with a table wherever it is shown.
WARNING = "Warning:"


def study_tables(
    frame: pd.DataFrame, beside_published: bool = False, points: Sequence[Point] | None = None
) -> dict[str, Table]:
    """The tables that the rows have something for, by name.

    Of pruned models ``accuracy``, ``speed``, ``front``, ``precisions``, ``cost``, ``carried-<model>``; of grids those
    of `analysis.tables.kernels.speed_tables`.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        beside_published: as `analysis.tables.accuracy.accuracy_table`.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.

    Raises:
        UserError: if there are no rows, or they contradict each other.
    """
    found: dict[str, Table] = {}
    for kind in ("kernels", "model"):
        timed = from_rows(frame, kind)
        if len(timed):
            found |= speed_tables(timed)
    if frame.stage.str.startswith(GRID_STAGES).all():
        # Where nothing could be timed there is nothing to show either.
        return warned(found, frame)
    points = gather(frame) if points is None else points
    found["accuracy"] = accuracy_table(frame, beside_published, points)
    if (frame.stage == "pack").any() or workloads(frame):
        found["speed"] = speed_table(frame, points)
        if len({point.model for point in points}) == 1 and workloads(frame) and texts(points):
            by_workload = {workload: placed(frame, workload, points=points) for workload in workloads(frame)}
            found["front"] = front_table(by_workload, texts(points)[0])
    for text in texts(points) if len({point.model for point in points}) == 1 else ():
        costs = precision_table(points, text)
        if costs.rows:
            other = f"-{text}".replace("/", "-") if "precisions" in found else ""
            found[f"precisions{other}"] = costs
    # Beside nothing that was learned or trained, what one shot took says little.
    if any(each.tokens for each in spent(frame, points).values()):
        found["cost"] = cost_table(frame, points)
    for shape in projected_shapes(frame):
        found[f"carried-{shape}"] = projected_table(frame, shape, points)
    return warned(found, frame)


def warned(tables: dict[str, Table], frame: pd.DataFrame) -> dict[str, Table]:
    """The tables with notes, if some of what they are made of cannot be traced, or is not what it stands beside.

    Untraced is what no revision made; of other texts or another checkpoint of a mask is not what it is compared with.

    Of another text to learn or calibrate on a note tells, which the text of a page may take up; all else are warnings.
    """
    made = frame.stage == "prune"
    notes = [f"{WARNING} {note}" for note in (*_untraced(frame), *_other_masks(frame), *_other_texts(frame[~made]))]
    notes += [f"{note[0].upper()}{note[1:]}" for note in _other_texts(frame[made])]
    return {name: dataclasses.replace(table, notes=(*table.notes, *notes)) for name, table in tables.items()}


def _untraced(frame: pd.DataFrame) -> Iterator[str]:
    dirty = frame[frame.dirty.eq(True)]
    if len(dirty):
        yield f"measured with changes that no revision has: {_told(dirty, frame)}."


def _other_masks(frame: pd.DataFrame) -> Iterator[str]:
    others: dict[str, list[str]] = {}
    for trial, plain in of_other_masks(frame):
        others.setdefault(plain, []).append(trial)
    for plain, trials in others.items():
        of, stands = (_told(frame[frame.trial.isin(some)], frame) for some in (trials, [plain]))
        yield f"made of another checkpoint than that of {stands} which stands beside: {of}."


def _other_texts(frame: pd.DataFrame) -> Iterator[str]:
    """A line for each text or task of which trials read another content than most did."""
    read: dict[str, dict[str, set[str]]] = {}
    once = frame.drop_duplicates(["trial", "stage"])
    for trial, sources in zip(once.trial, once.sources, strict=True):
        for name, digest in (sources or {}).items():
            read.setdefault(name, {}).setdefault(digest, set()).add(trial)
    for name, contents in sorted(read.items()):
        usual, *others = sorted(contents, key=lambda digest: (-len(contents[digest]), digest))
        for digest in others:
            told = _told(frame[frame.trial.isin(contents[digest])], frame)
            yield f"the text {name} had other content ({digest[:12]}, in other rows {usual[:12]}) for {told}."


def _told(some: pd.DataFrame, frame: pd.DataFrame) -> str:
    """The names of the trials of some rows of a frame."""
    names = trial_labels(frame) if "pruning" in some.definition.iloc[0] else {}
    return ", ".join(sorted({names.get(trial, trial) for trial in some.trial}))


def title(name: str) -> str:
    """What a table of `study_tables` shows, in a line."""
    if name.startswith("carried-"):
        return f"Tile statistics projected onto the shapes of {name.removeprefix('carried-')}"
    for precision, spelled in PRECISIONS.items():
        own = "" if precision == "bf16" else f" {spelled}"
        kernels, models = (f"{kind_of(kind, precision)}-" for kind in ("kernels", "model"))
        if name.startswith(kernels):
            model = name.removeprefix(kernels)
            return f"{model}: its linears{own}, speedup over dense{own} by sparsity, 128x128 tiles, geometric mean"
        if name.startswith(models):
            return f"{name.removeprefix(models)}: end to end{own}, speedup over dense{own} by sparsity"
    if name.startswith("energy-"):
        return f"{name.removeprefix('energy-')}: end to end, joules a token"
    titles = {"accuracy": "Accuracy", "speed": "Size and speed of the same checkpoints"}
    titles |= {"front": "On the frontier of perplexity and speed", "precisions": "What fewer bits cost"}
    if name.startswith("precisions-"):
        return f"{titles['precisions']}: {name.removeprefix('precisions-')}"
    return (titles | {"cost": "What each mask took, and what it reaches"})[name]
