"""Every figure of a study, and of a GPU's bench.

Each ``draw_*`` of this package takes rows and returns a figure; the same rows give the same bytes. Which of them a
study's rows have something for, with a caption each, is said here; nothing is written but by `plot_study`.

    >>> frame = load_rows(Path("results"))
    >>> plot_study(frame[frame.model == "embedded"], Path("figures"))
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.ablation import ablated, draw_ablation
from analysis.figures.about import about, gpus
from analysis.figures.frontier import draw_frontier, frontier_of
from analysis.figures.kernels import FEW_BITS, draw_precisions, draw_roof, draw_speedup
from analysis.figures.layer_sparsity import draw_layer_sparsity
from analysis.figures.learning_curves import draw_learning_curves
from analysis.figures.model_speed import draw_model_speed
from analysis.figures.refit import draw_refit, mostly_refitted, pairs_of
from analysis.figures.series import MOST_CURVES
from analysis.figures.speed_frontier import draw_speed_frontier
from analysis.figures.spent import costed, draw_cost
from analysis.figures.style import FORMATS, Width, save_figure
from analysis.figures.tile_maps import draw_tile_maps, legible
from analysis.figures.tile_shapes import draw_tile_shapes, swept
from analysis.rows.points import Point, gather, texts, trial_labels
from analysis.rows.same_checkpoint import timed_on
from analysis.tables.kernels import TILE, from_rows
from analysis.tables.packed import projected_shapes, workloads

# Of single masks a study shows so many figures of a kind.
_MASKS = 4

WholeRows = Callable[[Collection[str]], pd.DataFrame]

_BARS = "Bars are the spread over seeds, or the standard error of one: all points share their texts and items."


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure with its name.

    Attributes:
        name: of its file, without suffix.
        caption: what it shows, of which model, tiles and GPU, and how to read it.
        figure: as drawn.
        minor: whether it shows single masks, which few readers look at.
    """

    name: str
    caption: str
    figure: Figure
    minor: bool = False


def plot_study(
    frame: pd.DataFrame, folder: Path, width: Width = "double", formats: Collection[str] = FORMATS[:1]
) -> list[Path]:
    """Write every figure of `study_drawings` in one folder; returns the written paths."""
    written: list[Path] = []
    for drawing in study_drawings(frame, width):
        written += save_figure(drawing.figure, folder / drawing.name, formats)
    return written


def study_drawings(
    frame: pd.DataFrame,
    width: Width = "double",
    masks: int = _MASKS,
    points: Sequence[Point] | None = None,
    whole: WholeRows | None = None,
) -> Iterator[Drawing]:
    """Every figure that the rows have something for.

    Of trials that differ only in their seeds, the first stands for the others wherever single masks are shown.

    Args:
        masks: how many figures of a kind are drawn of single masks: the sparsest tile maps, of other kinds the last
            in reading order.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.
        whole: gives all rows of some trials, where ``frame`` is without those of layers and steps.
    """
    # Without learning curves and layers, of which most rows are, everything else is quick.
    everything, frame = frame, frame[frame.step.isna() & frame.layer.isna()]
    points = gather(frame) if points is None else points
    measured = texts(points)
    pairs = pairs_of(frame, points, measured[0]) if measured else []
    only_pairs = mostly_refitted(points, pairs)
    groups = ablated(points) if measured and not only_pairs else {}
    of = about(frame)
    if pairs:
        caption = f"What fitting the kept weights does to each mask: {of}."
        yield Drawing("refit", caption, draw_refit(frame, points=points))
    if groups:
        caption = f"Perplexity of each variant, lowest on top: {of}. Bars are the spread over seeds."
        yield Drawing("ablation", caption, draw_ablation(frame, width, points))
    elif measured and not only_pairs and swept(points):
        caption = f"Perplexity by tile shape, all else equal: {of}. {_BARS}"
        yield Drawing("tile-shapes", caption, draw_tile_shapes(frame, points=points))
    if measured and not only_pairs and not groups and not _one_sparsity(points) and frontier_of(points):
        yield Drawing(
            "frontier", f"Quality against sparsity: {of}. {_BARS}", draw_frontier(frame, width, points=points)
        )
    if measured and len({point.model for point in points}) == 1 and costed(frame, points, measured[0]):
        caption = f"Quality against the GPU time that each mask took, hollow where kept weights were trained: {of}."
        yield Drawing("cost", caption, draw_cost(frame, width, points))
    yield from _speed_drawings(frame, points, width)
    yield from kernel_drawings(from_rows(frame, "kernels"))
    yield from model_drawings(from_rows(frame, "model"))
    # The masks of an ablation's many variants are not what it is about; what was refitted has those of others.
    if not only_pairs and not groups:
        yield from _mask_drawings(everything, points, width, masks, whole or partial(_of_trials, everything))


def _one_sparsity(points: Sequence[Point]) -> bool:
    """Whether points are a sweep over tile shapes at one sparsity, and nothing else."""
    return len({point.sparsity for point in points if point.method != "dense"}) == 1 and bool(swept(points))


def _speed_drawings(frame: pd.DataFrame, points: Sequence[Point], width: Width) -> Iterator[Drawing]:
    # One model alone has nothing that it is faster than, and speed is drawn against perplexity.
    if not workloads(frame) or not texts(points) or frame[frame.stage.str.startswith("speed:")].trial.nunique() < 2:
        return
    of = f"{about(frame)}, timed on one {gpus([timed_on(frame)])}"
    how = "The line is the Pareto front; what is far slower stands at the edge with its speed."
    yield Drawing(
        "speed",
        f"Quality against end-to-end speedup of each checkpoint: {of}. {how}",
        draw_speed_frontier(frame, width, points=points),
    )
    for shape in projected_shapes(frame):
        yield Drawing(
            f"carried-{_file_name(shape)}",
            f"Quality against the speed of the same tile statistics on {shape} shapes with random weights: {of}.",
            draw_speed_frontier(frame, width, shape, points),
        )


def kernel_drawings(kernels: pd.DataFrame) -> Iterator[Drawing]:
    """The figures of timed products, as `analysis.tables.kernels` has them."""
    if kernels.empty:
        return
    on = f"tiles of {TILE}, timed on {gpus(kernels.gpu)}"
    hybrid = kernels[(kernels.implementation == "hybrid") & (kernels.tile == TILE)]
    for model in dict.fromkeys(hybrid.model):
        caption = (
            f"Speedup of the linears of {model} over the fastest dense product (geometric mean), {on}, beside what "
            "halving instructions (compute limit) or reading fewer bytes (memory limit) would allow."
        )
        yield Drawing(f"speedup-{_file_name(model)}", caption, draw_speedup(kernels, model))
        if set(hybrid[hybrid.model == model].precision) & set(FEW_BITS):
            caption = (
                f"Speedup of the linears of {model} in few bits over the fastest dense product (geometric mean), {on}: "
                "in bfloat16, with a dash at the left for the dense product of the same precision, and over that one."
            )
            yield Drawing(f"precisions-{_file_name(model)}", caption, draw_precisions(kernels, model))
    caption = f"What each product reaches, {on}, beside a large dense product and a large copy."
    yield Drawing("roof", caption, draw_roof(kernels))


def model_drawings(timed: pd.DataFrame) -> Iterator[Drawing]:
    """The figures of timed models, as `analysis.tables.kernels` has them."""
    hybrid = timed[timed.implementation == "hybrid"] if len(timed) else timed
    for model in dict.fromkeys(hybrid.model) if len(hybrid) else ():
        caption = (
            f"Speedup of {model} end to end over the dense model in bfloat16, timed on {gpus(hybrid.gpu)}, in every "
            "precision beside the fastest dense model of that precision."
        )
        yield Drawing(f"end-to-end-{_file_name(model)}", caption, draw_model_speed(timed, model))


def _of_trials(frame: pd.DataFrame, trials: Collection[str]) -> pd.DataFrame:
    return frame[frame.trial.isin(trials)]


def _mask_drawings(
    frame: pd.DataFrame, points: Sequence[Point], width: Width, most: int, whole: WholeRows
) -> Iterator[Drawing]:
    """Single masks: their tiles or their sparsity per layer, and how they were learned."""
    # A trial may have lost its prune stage, or be under way.
    per_layer = set(frame[frame.metric == "layer_sparsity"].trial)
    hybrid = [point for point in points if point.structure == "hybrid" and point.trials[0] in per_layer]
    labels = trial_labels(frame[frame.trial.isin([point.trials[0] for point in hybrid])])
    maps = set(frame[frame.metric == "tile_map"].trial)
    mapped = [point for point in hybrid if point.trials[0] in maps]
    several = len({point.model for point in hybrid}) > 1
    layers: dict[str, list[str]] = {}
    for model, method in dict.fromkeys((point.model, point.method) for point in hybrid):
        members = [point for point in hybrid if (point.model, point.method) == (model, method)]
        name = f"layer-sparsity-{model} {method}" if several else f"layer-sparsity-{method}"
        layers |= _legible(name, members)
    learned = set(frame[frame.step.notna() & (frame.metric == "cross_entropy")].trial)
    curves = [point for point in points if point.trials[0] in learned]
    learning = _legible("learning-curves", curves)
    of_layers, of_learning = (list(each.items())[-most:] for each in (layers, learning))
    of_maps: dict[str, list[str]] = {}
    for point in mapped:
        of_maps.setdefault(point.model, []).append(point.trials[0])
    # All at once: whatever is read of published rows, their whole table is gone through.
    wanted = [*(maps[:most] for maps in of_maps.values()), *(shown for _, shown in (*of_layers, *of_learning))]
    all_rows = whole(set().union(*wanted))
    tile_maps = all_rows[all_rows.metric == "tile_map"]
    unclear = {
        model for model, (first, *_) in of_maps.items() if not legible(tile_maps[tile_maps.trial == first].layer)
    }
    mapped = [point for point in mapped if point.model not in unclear]
    for point in mapped[:most]:
        rows, label = _of_trials(all_rows, point.trials[:1]), labels[point.trials[0]]
        caption = f"Tile map of {label}: {about(rows)}.{_others(mapped, most)}"
        yield Drawing(f"tiles-{_file_name(label)}", caption, draw_tile_maps(rows, point.trials[0]), minor=True)
    for part, shown in of_layers:
        rows = _of_trials(all_rows, shown)
        caption = f"Sparsity of each linear across the depth: {about(rows)}.{_others(layers, most)}"
        yield Drawing(part, caption, draw_layer_sparsity(rows, shown, width), minor=True)
    for part, shown in of_learning:
        rows = _of_trials(all_rows, shown)
        caption = (
            f"Cross entropy while learning, as a moving average with the logged values behind, and the masks' density "
            f"with its target dotted: {about(rows)}.{_others(learning, most)}"
        )
        yield Drawing(part, caption, draw_learning_curves(rows, width, shown), minor=True)


def _others(figures: Sized, most: int) -> str:
    """What a caption says of figures that are not drawn."""
    left = len(figures) - most
    return f" {left} more are left out: hts plot draws those of trials that --where names." if left > 0 else ""


def _legible(name: str, points: Sequence[Point]) -> dict[str, list[str]]:
    """The first trials of points by the figure that shows them: one, or where they are too many one a variant.

    A variant of more than a panel can show is cut into parts.
    """
    by_name: dict[str, list[str]] = {}
    for point in points:
        own = f"{name} {point.method} {point.variant}" if len(points) > MOST_CURVES else name
        by_name.setdefault(_file_name(own), []).append(point.trials[0])
    return {
        name if start == 0 else f"{name}-{start // MOST_CURVES + 1}": trials[start : start + MOST_CURVES]
        for name, trials in by_name.items()
        for start in range(0, len(trials), MOST_CURVES)
    }


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label.lower().replace("%", "")).strip("-")
