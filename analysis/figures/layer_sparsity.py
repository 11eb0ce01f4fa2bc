"""How sparse each linear is across the depth of a model, a map for each trial."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from analysis.figures.about import about
from analysis.figures.places import places_of
from analysis.figures.series import MOST_CURVES
from analysis.figures.style import SMALL, WIDTHS, Width, in_paper_style, new_figure, set_title
from analysis.rows.points import trial_labels
from patch.errors import UserError

# Sparsity has a colour scale of its own, which no method's colour is on.
_MAP = sns.light_palette("#33415c", as_cmap=True)
_ROW = 0.115


@in_paper_style
def draw_layer_sparsity(frame: pd.DataFrame, trials: Sequence[str], width: Width = "double") -> Figure:
    """Sparsity of each linear, a map per trial: a row per kind of linear, a column per block; of experts their mean.

    Raises:
        UserError: if a trial has no rows per layer, or they are more than one figure can show.
    """
    rows = frame[frame.trial.isin(trials) & (frame.metric == "layer_sparsity")]
    if missing := sorted(set(trials) - set(rows.trial)):
        raise UserError(f"trial {', '.join(missing)} has no sparsity per layer: rows of its prune stage are missing")
    if len(set(trials)) > MOST_CURVES:
        raise UserError(f"{len(set(trials))} trials are too many for one figure: plot at most {MOST_CURVES}")
    places = places_of(rows.layer)
    rows = rows.assign(
        block=[places[layer][0] for layer in rows.layer], kind=[places[layer][1] for layer in rows.layer]
    )
    kinds = list(dict.fromkeys(rows.kind))
    chosen = frame[frame.trial.isin(trials)]
    labels = trial_labels(chosen)
    figure = new_figure(WIDTHS[width], 0.7 + (0.2 + _ROW * len(kinds)) * len(labels))
    axes = figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0]
    top = max(0.5, float(rows.value.max()))
    for axis, (trial, label) in zip(axes, labels.items(), strict=True):
        _draw(axis, rows[rows.trial == trial], kinds, top)
        axis.set_title(label, loc="left", pad=2)
    axes[-1].set_xlabel("Block")
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 100 * top), _MAP), ax=list(axes), pad=0.01, aspect=30, label="Sparsity (%)"
    )
    bar.outline.set_visible(False)
    set_title(figure, about(chosen))
    return figure


def _draw(axis: Axes, rows: pd.DataFrame, kinds: Sequence[str], top: float) -> None:
    table = rows.pivot_table(index="kind", columns="block", values="value").reindex(list(kinds))
    count = len(table.columns)
    axis.pcolormesh(
        100 * table.to_numpy(dtype=float), cmap=_MAP, vmin=0, vmax=100 * top, edgecolors="white", linewidth=0.3
    )
    axis.set_ylim(len(kinds), 0)
    axis.set_yticks(np.arange(len(kinds)) + 0.5, kinds, size=SMALL)
    every = max(1, count // 10)
    axis.set_xticks(np.arange(0, count, every) + 0.5, [str(block) for block in table.columns[::every]], size=SMALL)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
