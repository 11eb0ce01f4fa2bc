"""Speedup of whole models against sparsity, in every precision that was timed, beside dense models of those precisions.

Draws rows of ``hts bench model``, all over the dense model in bfloat16, so that precisions can be compared. Precisions
are shades of one colour: colours of methods mean methods alone.
"""

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.about import gpus
from analysis.figures.labels import Label, Panel
from analysis.figures.sparsities import along_sparsities, finish
from analysis.figures.style import FAINT, INK, WIDTHS, Width, in_paper_style, light_shades, new_figure, room
from analysis.tables.kernels import DENSE, PRECISIONS, precisions, typical, workload_title

_RIGHT = 26.0


@in_paper_style
def draw_model_speed(frame: pd.DataFrame, model: str, width: Width = "double") -> Figure:
    """A panel a workload: packed models as lines, the fastest dense model of each precision as a dashed one across.

    Args:
        frame: as from `analysis.tables.kernels.load_bench`, of whole models.
    """
    chosen = frame[(frame.model == model) & (frame.metric == "time")]
    hybrid = chosen[chosen.implementation == "hybrid"]
    works = sorted(set(zip(hybrid.kind, hybrid.batch, hybrid.length, strict=True)))
    shown = precisions(hybrid)
    colors = dict(zip(PRECISIONS, light_shades("#4a1486", len(PRECISIONS) + 2)[:1:-1], strict=True))
    columns = 2 if width == "double" else 1
    lines = -(-len(works) // columns)
    figure = new_figure(WIDTHS[width], 0.4 + 2.1 * lines, constrained=False)
    title = f"{model} end to end, tiles of {hybrid.tile.iloc[0]}, timed on {gpus(chosen.gpu)}"
    place_of = room(figure, title, lines, columns, above=0.19, between=(0.36, 0.28))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, gridspec_kw=place_of)
    panels: list[Panel] = []
    for axis, work in zip(axes.flat, works, strict=False):
        timed = chosen[[row == work for row in zip(chosen.kind, chosen.batch, chosen.length, strict=True)]]
        labels: list[Label] = []
        for precision in shown:
            own = timed[(timed.implementation == "hybrid") & (timed.precision == precision)].sort_values("sparsity")
            axis.plot(100 * own.sparsity, own.speedup, color=colors[precision], marker="|", markersize=5, linewidth=1.1)
            if len(own):
                end = (100 * float(own.sparsity.iloc[-1]), float(own.speedup.iloc[-1]))
                labels.append(Label(f"{PRECISIONS[precision]} tiles", end, "right", colors[precision]))
        for precision, names in DENSE.items():
            dense = typical(timed[timed.implementation.isin(names)], "speedup")
            if precision == "bf16" or dense.empty:
                continue
            axis.axhline(dense.max(), color=FAINT, linewidth=0.9, linestyle="--", gid="dense")
            labels.append(Label(f"dense {PRECISIONS[precision]}", (50.0, float(dense.max())), "right", INK))
        axis.axhline(1, color=INK, linewidth=0.6, gid="dense")
        labels.append(Label("dense bfloat16", (50.0, 1.0), "right", INK))
        axis.set_title(workload_title(work), loc="left")
        axis.margins(y=0.1)
        panels.append((axis, labels, along_sparsities(axis, _RIGHT)))
    for axis in axes.flat[len(works) :]:
        axis.set_visible(False)
    finish(figure, axes, panels, title, "Speedup over dense bfloat16")
    return figure
