"""What all figures share: column widths of a paper, type sizes, colours that the colour-blind tell apart, and writing.

No figure goes through pyplot, and settings hold only inside `paper_style`: drawing leaves no global state behind.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from patch.files import replacing
from patch.methods import METHODS

Width = Literal["single", "double"]
WIDTHS: Mapping[Width, float] = {"single": 3.35, "double": 7.0}
"""Column widths of a two-column paper, in inches."""

PALETTE = sns.color_palette("colorblind")
INK = "0.25"


@dataclass(frozen=True)
class Style:
    """How a method is drawn; sizes in points."""

    color: Any
    marker: str
    size: float = 4.2
    width: float = 1.1
    zorder: float = 3.0


DASHED = (0, (4, 2))
_UNKNOWN = Style(PALETTE[4], "P")
# Markers that look smaller than others of their size.
_SIZES = {"p": 5.0, "^": 4.8}

_RC: dict[Any, Any] = {
    "font.size": 7.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": "0.1",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


def style_of(method: str) -> Style:
    """How a method is drawn, by its entry; one that is not known any more has a style of its own."""
    known = METHODS.get(method)
    if known is None:
        return _UNKNOWN
    if known.emphasis:
        return Style(known.color, known.marker, 5.2, 1.6, 3.0 + known.emphasis)
    return Style(known.color, known.marker, _SIZES.get(known.marker, Style.size))


def paper_style() -> AbstractContextManager[None]:
    """Type sizes, lines and colours for a printed column, while the context lasts."""
    return matplotlib.rc_context(_RC)


def trial_looks(frame: pd.DataFrame, labels: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Lines that can be told apart: colour and marker by method, lighter and dashed where sparsity is lower."""
    members: dict[str, list[str]] = {}
    methods = frame.drop_duplicates("trial").set_index("trial").method
    for trial in labels:
        members.setdefault(methods[trial], []).append(trial)
    looks = {}
    dashes = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (4, 1.5, 1, 1.5)))
    for method, trials in members.items():
        style = style_of(method)
        shades = sns.light_palette(style.color, n_colors=len(trials) + 3)[3:][::-1]
        for place, trial in enumerate(trials):
            looks[trial] = {
                "color": shades[place],
                "linestyle": dashes[place % len(dashes)],
                "marker": style.marker,
                "markersize": 2.6,
                "linewidth": 1.0,
            }
    return looks


def new_figure(width: float, height: float, constrained: bool = True) -> Figure:
    """A figure in inches that no global state knows of."""
    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, hspace=0, wspace=0.02) if constrained else None
    figure = Figure(figsize=(width, height), layout=engine)
    FigureCanvasAgg(figure)
    return figure


def add_legend(figure: Figure, handles: Sequence[Line2D], columns: int) -> None:
    """A legend below the panels, in as few rows as ``columns`` and the figure's width allow, these of equal length."""
    for most in range(columns, 0, -1):
        rows = math.ceil(len(handles) / most)
        legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=math.ceil(len(handles) / rows))
        if legend.get_window_extent().width <= figure.bbox.width or most == 1:
            return
        legend.remove()


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` with ``.png`` and ``.pdf`` appended, each whole or not at all; no time or version in either."""
    nameless: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    }
    written = []
    for suffix, metadata in nameless.items():
        target = path.with_name(f"{path.name}.{suffix}")
        with replacing(target) as temporary:
            figure.savefig(temporary, format=suffix, metadata=metadata)
        written.append(target)
    return written
