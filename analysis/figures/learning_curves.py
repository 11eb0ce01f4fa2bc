"""How masks were learned: cross entropy and density against the optimizer step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.figures.about import about
from analysis.figures.labels import Label, Panel, write_labels
from analysis.figures.series import DASHES, MOST_CURVES
from analysis.figures.style import WIDTHS, Width, in_paper_style, new_figure, room, set_title, style_of, text_ink
from analysis.rows.points import trial_labels
from patch.errors import UserError

# Free column for names, as a share of the steps; the first of these are left out of the scale.
_RIGHT, _START = 0.42, 0.04


@in_paper_style
def draw_learning_curves(frame: pd.DataFrame, width: Width = "double", trials: Sequence[str] | None = None) -> Figure:
    """Cross entropy and density against the step, a curve per learned trial.

    Cross entropy is drawn as a moving average (`smoothed`), with the values as logged faintly behind. The loss itself
    is not drawn: it holds penalties that change with the step by design. Dotted lines are the target densities.

    Raises:
        UserError: if there are no learning rows, or of more trials than one panel can show.
    """
    rows = frame[frame.step.notna() & frame.metric.isin(["cross_entropy", "density"])]
    if trials is not None:
        rows = rows[rows.trial.isin(trials)]
    if rows.empty:
        raise UserError("no learning rows to plot: learned trials have them")
    if rows.trial.nunique() > MOST_CURVES:
        raise UserError(f"{rows.trial.nunique()} trials are too many for one figure: plot at most {MOST_CURVES}")
    beside = width == "double"
    figure = new_figure(WIDTHS[width], 2.4 if beside else 4.2, constrained=False)
    title = about(frame[frame.trial.isin(rows.trial)])
    lines, columns = (1, 2) if beside else (2, 1)
    grid = room(figure, title, lines, columns, between=(0.54, 0.1))
    axes = figure.subplots(lines, columns, sharex=not beside, squeeze=False, gridspec_kw=grid)
    upper, lower = axes.flat
    shown = set(rows.trial)
    labels = {trial: label for trial, label in trial_labels(frame).items() if trial in shown}
    methods = rows.drop_duplicates("trial").set_index("trial").method
    last = int(rows.step.max())
    written: dict[Axes, list[Label]] = {upper: [], lower: []}
    scale: list[float] = []
    drawn_of: dict[str, int] = {}
    for trial, label in labels.items():
        method = methods[trial]
        place = drawn_of[method] = drawn_of.get(method, -1) + 1
        of_trial = rows[rows.trial == trial].sort_values("step")
        look = {"color": style_of(method).color, "linestyle": DASHES[place], "linewidth": 1.1}
        for axis, metric in ((upper, "cross_entropy"), (lower, "density")):
            line = of_trial[of_trial.metric == metric]
            steps, values = line.step.to_numpy(dtype=int), line.value.to_numpy(dtype=float)
            if not len(steps):
                continue
            drawn = draw_curve(axis, steps, values, look, smooth=metric == "cross_entropy")
            written[axis].append(Label(label, (float(steps[-1]), float(drawn[-1])), "right", text_ink(method)))
            if metric == "cross_entropy":
                scale += list(drawn[steps >= _START * last])
        lower.plot([0, last], [1 - of_trial.sparsity.iloc[0]] * 2, color="0.6", linewidth=0.6, linestyle=":", zorder=1)
    if scale:
        margin = 0.06 * (max(scale) - min(scale)) or 0.1
        upper.set_ylim(min(scale) - margin, max(scale) + margin)
    upper.set_ylabel("Cross entropy (nat/token)")
    lower.set_ylabel("Density (%)")
    lower.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    panels: list[Panel] = []
    for axis in (upper, lower):
        axis.set_xlim(0, last * (1 + _RIGHT))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_xticks([tick for tick in axis.get_xticks() if 0 <= tick <= last])
        panels.append((axis, written[axis], {"right": (last * 1.04, last * (1 + _RIGHT))}))
    lower.set_xlabel("Step")
    if beside:
        upper.set_xlabel("Step")
    set_title(figure, title)
    write_labels(figure, panels)
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred moving average over a twentieth of the logged steps, five at least; short curves as they are."""
    if len(values) < 20:
        return values
    return pd.Series(values).rolling(max(5, len(values) // 20), center=True, min_periods=1).mean().to_numpy()


def draw_curve(axis: Axes, steps: np.ndarray, values: np.ndarray, look: dict[str, Any], smooth: bool) -> np.ndarray:
    """One curve; smoothed, with the values as they are faintly behind. Returns the values it was drawn with."""
    if smooth and len(values) >= 20:
        axis.plot(steps, values, **(look | {"alpha": 0.3, "linewidth": 0.5, "linestyle": "-"}))
        values = smoothed(values)
    axis.plot(steps, values, **look)
    return values
