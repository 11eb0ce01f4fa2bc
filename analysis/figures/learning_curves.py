"""How masks were learned: cross entropy and density against the optimizer step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from analysis.figures.style import WIDTHS, Width, add_legend, new_figure, paper_style, save_figure, trial_looks
from analysis.rows.points import trial_labels
from patch.errors import UserError


def plot_learning_curves(
    frame: pd.DataFrame, path: Path, width: Width = "double", trials: Sequence[str] | None = None
) -> list[Path]:
    """Cross entropy and density against the step, a line per learned trial; the former also smoothed.

    The loss itself is not drawn: it holds penalties that change with the step by design.

    Raises:
        UserError: if there are no learning rows.
    """
    with paper_style():
        return save_figure(draw_learning_curves(frame, width, trials), path)


def draw_learning_curves(frame: pd.DataFrame, width: Width = "double", trials: Sequence[str] | None = None) -> Figure:
    """The figure of `plot_learning_curves`."""
    rows = frame[frame.step.notna() & frame.metric.isin(["cross_entropy", "density"])]
    if trials is not None:
        rows = rows[rows.trial.isin(trials)]
    if rows.empty:
        raise UserError("no learning rows to plot: learned trials have them")
    beside = width == "double"
    figure = new_figure(WIDTHS[width], 2.5 if beside else 4.2)
    axes = figure.subplots(1 if beside else 2, 2 if beside else 1, sharex=not beside, squeeze=False)
    upper, lower = axes.flat
    shown = set(rows.trial)
    labels = {trial: label for trial, label in trial_labels(frame).items() if trial in shown}
    looks = trial_looks(rows, labels)
    for trial in labels:
        of_trial = rows[rows.trial == trial].sort_values("step")
        for axis, metric in ((upper, "cross_entropy"), (lower, "density")):
            line = of_trial[of_trial.metric == metric]
            steps, values = line.step.to_numpy(dtype=int), line.value.to_numpy(dtype=float)
            draw_curve(axis, steps, values, looks[trial], smooth=metric == "cross_entropy")
        lower.axhline(1 - of_trial.sparsity.iloc[0], color="0.6", linewidth=0.6, linestyle=":", zorder=1)
    upper.set_ylabel("Cross entropy (nat/token)")
    lower.set_ylabel("Density (%)")
    lower.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    lower.set_xlabel("Step")
    if beside:
        upper.set_xlabel("Step")
    handles = [Line2D([], [], label=labels[trial], **(looks[trial] | {"marker": ""})) for trial in labels]
    add_legend(figure, handles, 4 if beside else 2)
    return figure


def draw_curve(axis: Axes, steps: np.ndarray, values: np.ndarray, look: Mapping[str, Any], smooth: bool) -> None:
    """One curve against the step; smoothed, with the values as they are faintly behind."""
    look = {**look, "marker": ""}
    if smooth and len(values) >= 20:
        axis.plot(steps, values, **(look | {"alpha": 0.25, "linewidth": 0.5, "linestyle": "-"}))
        values = pd.Series(values).rolling(max(5, len(values) // 40), center=True, min_periods=1).mean().to_numpy()
    axis.plot(steps, values, **look)
