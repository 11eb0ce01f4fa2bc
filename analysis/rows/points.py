"""What was measured of each pruned model: the rows of its trials, gathered into one point of a table or figure.

Trials that differ only in their seeds are one point, with the spread over seeds; trials of the same pruning with
different evaluations complete each other. Trials that differ in anything else, such as the recipe, are separate points,
told apart by their ``variant``.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.names import PAPER_TASKS, TASKS, percent, rank
from analysis.rows.format import PACKED_STAGES
from analysis.rows.items import task_items, window_items
from analysis.rows.load import records
from analysis.rows.same_checkpoint import check_one_artefact
from analysis.rows.variants import canonical, variants_of
from patch.errors import UserError
from patch.learn.recipe import HOW_IT_RUNS
from patch.methods import METHODS, label_of
from patch.quantise.precisions import PRECISIONS
from patch.structures import STRUCTURES


@dataclass(frozen=True)
class Measured:
    """A number and how sure it is.

    Attributes:
        value: the mean over seeds.
        stderr: standard error from the finite evaluation set (of several seeds, which share that set, the root mean
            square), or None.
        spread: standard deviation over seeds; None for a single one.
        seeds: how many.
        items: what each window or item of the evaluation set adds to the value, so that their mean's error is the
            value's, where rows have it; of several seeds the mean.
        parts: what the value is the mean of, if it is one of several tasks.
    """

    value: float
    stderr: float | None = None
    spread: float | None = None
    seeds: int = 1
    items: np.ndarray | None = field(default=None, repr=False, compare=False)
    parts: "tuple[Measured, ...]" = field(default=(), repr=False, compare=False)

    @property
    def error(self) -> float | None:
        """What is printed after the number: the spread over seeds if there are several, else the standard error."""
        return self.stderr if self.spread is None else self.spread


@dataclass(frozen=True)
class Text:
    """A text that perplexity is measured on, in windows of ``length`` tokens."""

    source: str
    length: int

    def __str__(self) -> str:
        return f"{self.source}@{self.length}"


@dataclass(frozen=True)
class Task:
    """A task, in full or only its first ``limit`` items."""

    name: str
    limit: int | None = None

    def __str__(self) -> str:
        return self.name if self.limit is None else f"{self.name}[:{self.limit}]"


@dataclass(frozen=True)
class Point:
    """One pruned model (or several that differ in their seeds) and what was measured of it.

    Attributes:
        model: its name.
        method: such as ``wanda``.
        structure: ``dense``, ``unstructured``, ``2:4`` or ``hybrid``.
        sparsity: target share of zeros.
        tile: such as ``64x64``, for hybrid structures; otherwise None.
        variant: what tells it from points that agree in all of the above, such as ``steps=500``;
            mostly empty.
        achieved: measured share of zeros, or None.
        perplexity: by text.
        accuracy: the primary metric of each task, a share.
        mean_accuracy: plain mean over `mean_tasks`, where every one was measured.
        trials: hashes of the trials it is made of, by rising seed.
        trained: whether what the mask keeps was trained (`patch.recover`): such points are compared with one another,
            not with those whose weights are as they were or fitted in one shot.
        precision: of its weights, as it is called in tables; None where they are as they were.
    """

    model: str
    method: str
    structure: str
    sparsity: float
    tile: str | None
    variant: str
    achieved: float | None
    perplexity: Mapping[Text, Measured]
    accuracy: Mapping[Task, Measured]
    mean_accuracy: Measured | None
    trials: tuple[str, ...]
    trained: bool = False
    precision: str | None = None

    @property
    def is_original(self) -> bool:
        """Whether it is the model as it was, which all others are compared with."""
        return self.method == "dense" and not self.variant


def gather(frame: pd.DataFrame) -> list[Point]:
    """The points of a table of rows, in reading order: dense, one-shot methods, learned ones by falling sparsity.

    Args:
        frame: as from `analysis.rows.load.load_rows`.

    Raises:
        UserError: if two trials give different values for one quantity of one model, or are of different checkpoints
            (`analysis.rows.same_checkpoint`).
    """
    groups: dict[str, dict[str, list[str]]] = {}
    definitions = {row.trial: row.definition for row in records(frame.drop_duplicates("trial"))}
    for trial, definition in definitions.items():
        seedless, seeds = _split_seeds(definition["pruning"])
        groups.setdefault(canonical(seedless), {}).setdefault(canonical(seeds), []).append(trial)
    perplexity, accuracy = _by_trial(_perplexity_rows(frame)), _by_trial(_accuracy_rows(frame))
    averaged = mean_tasks(_in_order(task for found in accuracy.values() for task, _ in found))
    achieved_by = dict(zip(frame.trial, frame.achieved, strict=True))
    contents: dict[str, set[Any]] = {}
    for trial, content in zip(frame.trial, frame.checkpoint, strict=True):
        contents.setdefault(trial, set()).add(content if isinstance(content, str) else None)
    packed = bool(frame.stage.str.partition(":")[0].isin(PACKED_STAGES).any())
    points = []
    for about, variant in variants_of([json.loads(group) for group in groups]):
        seeded = groups[canonical(about)].items()
        by_seed = [trials for _, trials in sorted(seeded, key=lambda item: list(json.loads(item[0]).values()))]
        for trials in by_seed:
            found = set().union(*(contents[trial] for trial in trials))
            if len(found) > 1 or (packed and None in found):
                check_one_artefact(frame[frame.trial.isin(trials)], trials)
        perplexities = [_quantities(perplexity, trials) for trials in by_seed]
        accuracies = [_quantities(accuracy, trials) for trials in by_seed]
        complete = [seed for seed in accuracies if averaged and all(task in seed for task in averaged)]
        members = tuple(trial for trials in by_seed for trial in trials)
        achieved = [achieved_by[trial] for trial in members]
        points.append(
            Point(
                model=about["model"],
                method=about["method"],
                structure=about["structure"],
                sparsity=about["sparsity"],
                tile=_tile(about),
                variant=variant,
                achieved=None if any(map(math.isnan, achieved)) else statistics.fmean(achieved),
                perplexity=_over_seeds(perplexities),
                accuracy=_over_seeds(accuracies),
                mean_accuracy=_measured([_mean(seed, averaged) for seed in complete]) if complete else None,
                trials=members,
                trained="recovery" in about,
                precision=_precision(about),
            )
        )
    return sorted(points, key=_reading_order)


def _precision(about: Mapping[str, Any]) -> str | None:
    name = about.get("quantisation", {}).get("precision")
    return PRECISIONS[name].label if name in PRECISIONS else name


def variants(definitions: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What tells each trial from others of its model, method and structure, as `Point.variant`.

    Args:
        definitions: of trials, by their hash.
    """
    seedless = {trial: _split_seeds(definition["pruning"])[0] for trial, definition in definitions.items()}
    distinct = {canonical(about): about for about in seedless.values()}
    found = {canonical(about): variant for about, variant in variants_of(list(distinct.values()))}
    return {trial: found[canonical(about)] for trial, about in seedless.items()}


def across_seeds(definition: Mapping[str, Any]) -> tuple[str, str]:
    """A trial's pruning without its seeds, and the seeds: trials that share the first differ in seeds alone."""
    seedless, seeds = _split_seeds(definition["pruning"])
    return canonical(seedless), canonical(seeds)


def texts(points: Iterable[Point]) -> list[Text]:
    """The texts that perplexity was measured on, WikiText-2 first."""
    found = {text for point in points for text in point.perplexity}
    return sorted(found, key=lambda text: (text.source != "wikitext2/test", text.source, text.length))


def tasks(points: Iterable[Point]) -> list[Task]:
    """The tasks that were evaluated, in the order of the published table."""
    return _in_order(task for point in points for task in point.accuracy)


def _in_order(found: Iterable[Task]) -> list[Task]:
    return sorted(set(found), key=lambda task: (rank(TASKS, task.name), task.name, task.limit or 0))


def mean_tasks(found: Iterable[Task]) -> list[Task]:
    """The tasks that a mean accuracy is taken over: the published eight where all are there in full, otherwise all."""
    found = list(found)
    paper = [task for task in found if task.limit is None and task.name.removesuffix("_subset") in PAPER_TASKS]
    return paper if len(paper) == len(PAPER_TASKS) else found


def _perplexity_rows(frame: pd.DataFrame) -> "list[_Quantity]":
    # LAMBADA has a perplexity too, of its last words.
    rows = frame[(frame.metric == "perplexity") & frame.stage.str.startswith("perplexity:")]
    return [
        (row.trial, Text(row.source, int(row.length)), _one(row, window_items(row.labels, row.value)))
        for row in records(rows)
    ]


def _accuracy_rows(frame: pd.DataFrame) -> "list[_Quantity]":
    rows = frame[frame.stage.str.startswith("task:")]
    # Most are of parts of a task.
    primary = [labels.get("primary", metric == "acc") for labels, metric in zip(rows.labels, rows.metric, strict=True)]
    return [
        (
            row.trial,
            Task(row.task, None if pd.isna(row.limit) else int(row.limit)),
            _one(row, task_items(row.labels)),
        )
        for row in records(rows[np.array(primary, dtype=bool)])
    ]


# The trial, what was measured, and the number.
_Quantity = tuple[str, Any, Measured]


def _one(row: Any, items: np.ndarray | None) -> Measured:
    return Measured(row.value, None if math.isnan(row.stderr) else row.stderr, items=items)


def _by_trial(quantities: "Iterable[_Quantity]") -> dict[str, list[tuple[Any, Measured]]]:
    found: dict[str, list[tuple[Any, Measured]]] = {}
    for trial, key, measured in quantities:
        found.setdefault(trial, []).append((key, measured))
    return found


def _quantities(by_trial: Mapping[str, Sequence[tuple[Any, Measured]]], trials: Sequence[str]) -> dict[Any, Measured]:
    """What the trials of one pruning measured; they may differ in what they evaluate, not in the outcome."""
    found: dict[Any, Measured] = {}
    for trial in trials:
        for key, measured in by_trial.get(trial, ()):
            if found.setdefault(key, measured) != measured and not math.isnan(measured.value):
                raise UserError(
                    f"trials {', '.join(trials)} are of the same pruned model, but measured {found[key].value} and "
                    f"{measured.value} for {key}: select one of them"
                )
    return found


def _over_seeds(by_seed: Sequence[Mapping[Any, Measured]]) -> dict[Any, Measured]:
    keys = dict.fromkeys(key for seed in by_seed for key in seed)
    return {key: _measured([seed[key] for seed in by_seed if key in seed]) for key in keys}


def _measured(values: Sequence[Measured]) -> Measured:
    if len(values) == 1:
        return values[0]
    numbers = [measured.value for measured in values]
    errors = [measured.stderr for measured in values if measured.stderr is not None]
    stderr = math.sqrt(statistics.fmean(error**2 for error in errors)) if len(errors) == len(values) else None
    finite = all(map(math.isfinite, numbers))
    spread = statistics.stdev(numbers) if finite else math.nan
    each = [measured.items for measured in values]
    alike = len({None if items is None else len(items) for items in each}) == 1 and each[0] is not None
    items = np.mean(np.stack([items for items in each if items is not None]), axis=0) if alike else None
    parts = tuple(_measured(part) for part in zip(*(measured.parts for measured in values), strict=True))
    return Measured(sum(numbers) / len(numbers), stderr, spread, len(values), items, parts)


def _mean(accuracy: Mapping[Task, Measured], over: Sequence[Task]) -> Measured:
    """Mean over tasks, which are independent."""
    chosen = [accuracy[task] for task in over]
    errors = [measured.stderr for measured in chosen if measured.stderr is not None]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(over) if len(errors) == len(over) else None
    return Measured(statistics.fmean(measured.value for measured in chosen), stderr, parts=tuple(chosen))


def _split_seeds(pruning: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """A definition without its seeds (its own, of calibration, of the prior), and the seeds by dotted name.

    How learning ran is in neither.
    """
    seedless: dict[str, Any] = {}
    seeds: dict[str, Any] = {}
    for name, value in pruning.items():
        if name == "seed":
            seeds[prefix + name] = value
        elif isinstance(value, dict):
            seedless[name], inner = _split_seeds(value, f"{prefix}{name}.")
            seeds |= inner
        elif name not in HOW_IT_RUNS:
            seedless[name] = value
    return seedless, seeds


def _tile(about: Mapping[str, Any]) -> str | None:
    # Masks at 2:4 have a tile shape for the methods that start from them; their weights do not depend on it.
    return "x".join(map(str, about["tile"])) if about["structure"] == "hybrid" and about["tile"] else None


def tile_order(tile: str | None) -> tuple[int, str]:
    """Sorts tile shapes such as ``64x128`` by their size; none comes first."""
    return (math.prod(int(side) for side in tile.split("x")), tile) if tile else (0, "")


def _reading_order(point: Point) -> tuple[Any, ...]:
    return (
        point.model,
        rank(METHODS, point.method),
        rank(STRUCTURES, point.structure),
        -point.sparsity,
        tile_order(point.tile),
        point.variant,
    )


def trial_labels(frame: pd.DataFrame) -> dict[str, str]:
    """The shortest name that tells each trial of ``frame`` from the others, such as ``PATCH joint 45%``.

    Args:
        frame: as from `analysis.rows.load.load_rows`.

    Returns:
        Names by trial hash, in reading order.
    """
    trials = frame.drop_duplicates("trial").set_index("trial")
    several = {column: trials[column].nunique() > 1 for column in ("model", "tile")}
    named = variants(dict(zip(trials.index, trials.definition, strict=True)))
    seeds = trials.groupby("method").seed.nunique()
    labels: dict[str, str] = {}
    order = sorted(
        trials.index,
        key=lambda trial: (
            trials.model[trial],
            rank(METHODS, trials.method[trial]),
            rank(STRUCTURES, trials.structure[trial]),
            -trials.sparsity[trial],
            tile_order(None if pd.isna(trials.tile[trial]) else trials.tile[trial]),
            named[trial],
            trials.seed[trial],
        ),
    )
    for trial in order:
        about = trials.loc[trial]
        parts = [about.model] if several["model"] else []
        parts.append(label_of(about.method))
        if about.structure != "dense":
            parts.append("2:4" if about.structure == "2:4" else percent(about.sparsity))
        if about.structure == "unstructured":
            parts.append("unstructured")
        if several["tile"] and about.structure == "hybrid":
            parts.append(about.tile)
        if seeds[about.method] > 1:
            parts.append(f"seed {about.seed}")
        if named[trial]:
            parts.append(f"({named[trial]})")
        labels[trial] = " ".join(parts)
    names = list(labels.values())
    return {trial: f"{name} ({trial})" if names.count(name) > 1 else name for trial, name in labels.items()}
