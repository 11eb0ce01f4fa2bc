"""Every figure of a study.

Each ``plot_*`` takes rows and a path, writes ``<path>.png`` and ``<path>.pdf``, and returns the two paths; the same
rows give the same bytes. Each ``draw_*`` returns the figure, or draws on given axes, and writes nothing.

    >>> frame = load_rows(Path("results/rows"))
    >>> plot_study(frame[frame.model == "embedded"], Path("figures"))
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.figures.ablation import ablated, plot_ablation
from analysis.figures.frontier import plot_frontier
from analysis.figures.kernels import plot_roof, plot_speedup
from analysis.figures.learning_curves import plot_learning_curves
from analysis.figures.speed_frontier import plot_speed_frontier
from analysis.figures.style import Width
from analysis.figures.tile_maps import plot_layer_sparsity, plot_tile_maps
from analysis.figures.tile_shapes import plot_tile_shapes, swept
from analysis.rows.load import records
from analysis.rows.points import Point, gather, texts, trial_labels
from analysis.tables.kernels import from_rows
from analysis.tables.packed import carried_shapes, workloads

_MOST_LINES = 8


def plot_study(frame: pd.DataFrame, folder: Path, width: Width = "double") -> list[Path]:
    """Every figure that the rows have something for, in one folder; returns the written paths.

    Of trials that differ only in their seeds, the first stands for the others wherever single masks are shown.
    """
    written: list[Path] = []
    points = gather(frame)
    crowded = bool(ablated(points)) and bool(texts(frame))
    one_sparsity = len({point.sparsity for point in points if point.method != "dense"}) == 1
    if crowded:
        written += plot_ablation(frame, folder / "ablation", width)
    elif texts(frame) and not (one_sparsity and swept(points)):
        written += plot_frontier(frame, folder / "frontier", width)
    if workloads(frame):
        written += plot_speed_frontier(frame, folder / "speed", width)
    for shape in carried_shapes(frame):
        written += plot_speed_frontier(frame, folder / f"carried-{_file_name(shape)}", width, shape)
    if texts(frame) and swept(points):
        written += plot_tile_shapes(frame, folder / "tile-shapes")
    kernels = from_rows(frame, "kernels")
    for model in sorted(set(kernels.model)) if len(kernels) else ():
        written += plot_speedup(kernels, folder / f"speedup-{_file_name(model)}", model)
    if len(kernels):
        written += plot_roof(kernels, folder / "roof")
    # The masks of an ablation's many variants are not what it is about.
    # What was refitted has the masks of what it stands on.
    refitted = {row.trial for row in records(frame.drop_duplicates("trial")) if "refit" in row.definition["pruning"]}
    hybrid = [] if crowded else [p for p in points if p.structure == "hybrid" and p.trials[0] not in refitted]
    trials = [point.trials[0] for point in hybrid]
    labels = trial_labels(frame[frame.trial.isin(trials)])
    for trial in trials:
        written += plot_tile_maps(frame, trial, folder / f"tiles-{_file_name(labels[trial])}")
    for model, method in dict.fromkeys((point.model, point.method) for point in hybrid):
        members = [point for point in hybrid if (point.model, point.method) == (model, method)]
        several = len({point.model for point in hybrid}) > 1
        name = f"layer-sparsity-{model} {method}" if several else f"layer-sparsity-{method}"
        for part, shown in _readable(name, members).items():
            written += plot_layer_sparsity(frame, shown, folder / part, width)
    learned = set(frame[frame.step.notna() & (frame.metric == "cross_entropy")].trial)
    curves = [] if crowded else [point for point in points if point.trials[0] in learned]
    for part, shown in _readable("learning-curves", curves).items():
        written += plot_learning_curves(frame, folder / part, width, shown)
    return written


def _readable(name: str, points: Sequence[Point]) -> dict[str, list[str]]:
    """The first trials of points by the file that shows them: one, or where lines are too many one for each variant."""
    files: dict[str, list[str]] = {}
    for point in points:
        own = f"{name} {point.variant}" if len(points) > _MOST_LINES else name
        files.setdefault(_file_name(own), []).append(point.trials[0])
    return files


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label.lower().replace("%", "")).strip("-")
