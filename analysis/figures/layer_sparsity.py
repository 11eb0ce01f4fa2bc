"""How sparse each linear is across the depth of a model, a map for each trial."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis.figures.about import about
from analysis.figures.places import places_of
from analysis.figures.series import MOST_CURVES
from analysis.figures.style import (
    INK,
    LETTER,
    SMALL,
    WIDTHS,
    Width,
    in_paper_style,
    light_map,
    new_figure,
    set_title,
    title_lines,
)
from analysis.rows.points import trial_labels
from patch.errors import UserError

# Sparsity has a colour scale of its own, which no method's colour is on.
_MAP = light_map("#33415c")
# In inches: a row of a map, the title of a map, a line of the figure's title, the right margin with the colour bar, the
# foot with the numbers of blocks.
_ROW, _HEAD, _LINE, _RIGHT, _FOOT = 0.128, 0.175, 0.125, 0.56, 0.36


@in_paper_style
def draw_layer_sparsity(frame: pd.DataFrame, trials: Sequence[str], width: Width = "double") -> Figure:
    """Sparsity of each linear, a map per trial: a row per kind of linear, a column per block; of experts their mean.

    All maps are on one pair of axes, in inches: axes of their own would take most of the time of a page.

    Raises:
        UserError: if a trial has no rows per layer, or they are more than one figure can show.
    """
    chosen = frame[frame.trial.isin(trials)]
    rows = chosen[chosen.metric == "layer_sparsity"]
    if missing := sorted(set(trials) - set(rows.trial)):
        raise UserError(f"trial {', '.join(missing)} has no sparsity per layer: rows of its prune stage are missing")
    if len(set(trials)) > MOST_CURVES:
        raise UserError(f"{len(set(trials))} trials are too many for one figure: plot at most {MOST_CURVES}")
    places = places_of(rows.layer)
    rows = rows.assign(
        block=[places[layer][0] for layer in rows.layer], kind=[places[layer][1] for layer in rows.layer]
    )
    kinds = list(dict.fromkeys(rows.kind))
    blocks = sorted(set(rows.block))
    labels = trial_labels(chosen)
    top = max(0.5, float(rows.value.max()))
    title = about(chosen)
    left = 0.11 + LETTER * max(map(len, kinds))
    right = WIDTHS[width] - _RIGHT
    head = 0.08 + _LINE * len(title_lines(title, WIDTHS[width]))
    tall = _HEAD + _ROW * len(kinds)
    height = head + tall * len(labels) + _FOOT
    figure = new_figure(WIDTHS[width], height, constrained=False)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, WIDTHS[width])
    axis.set_ylim(height, 0)
    edges = np.linspace(left, right, len(blocks) + 1)
    for place, (trial, label) in enumerate(labels.items()):
        above = head + place * tall + _HEAD
        axis.text(left, above - 0.03, label, va="bottom", gid="trial")
        _draw(axis, rows[rows.trial == trial], kinds, blocks, (edges, above), top, trial)
    below = head + tall * len(labels)
    every = max(1, len(blocks) // 10)
    for block, middle in list(zip(blocks, (edges[1:] + edges[:-1]) / 2, strict=True))[::every]:
        axis.text(middle, below + 0.05, str(block), ha="center", va="top", size=SMALL, color=INK)
    axis.text((left + right) / 2, below + 0.18, "Block", ha="center", va="top", color="0.1")
    beside = (right + 0.06) / WIDTHS[width]
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 100 * top), _MAP),
        cax=figure.add_axes((beside, 1 - below / height, 0.1 / WIDTHS[width], (below - head - _HEAD) / height)),
        label="Sparsity (%)",
    )
    bar.outline.set_visible(False)
    set_title(figure, title)
    return figure


def _draw(
    axis: Axes,
    rows: pd.DataFrame,
    kinds: Sequence[str],
    blocks: Sequence[int],
    corner: tuple[np.ndarray, float],
    top: float,
    trial: str,
) -> None:
    """One map, from where its columns begin and end and the height of its upper edge."""
    table = rows.pivot_table(index="kind", columns="block", values="value").reindex(
        index=list(kinds), columns=list(blocks)
    )
    columns, above = corner
    axis.pcolormesh(
        columns,
        above + _ROW * np.arange(len(kinds) + 1),
        100 * table.to_numpy(dtype=float),
        cmap=_MAP,
        vmin=0,
        vmax=100 * top,
        edgecolors="white",
        linewidth=0.3,
        gid=trial,
    )
    for place, kind in enumerate(kinds):
        middle = above + _ROW * (place + 0.5)
        axis.text(columns[0] - 0.05, middle, kind, ha="right", va="center", size=SMALL, color=INK, gid="kind")
