"""What all figures share: column widths of a paper, type sizes, how a method is drawn, titles and writing.

A method's colour and marker are in its entry of `patch.methods`.

No figure goes through pyplot, and settings hold only inside `paper_style`: drawing leaves no global state behind.
"""

import functools
import io
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from PIL import Image

from patch.errors import check_name
from patch.files import replacing
from patch.methods import METHODS

P = ParamSpec("P")
T = TypeVar("T")
Width = Literal["single", "double"]
WIDTHS: Mapping[Width, float] = {"single": 3.35, "double": 7.0}
"""Column widths of a two-column paper, in inches."""

INK = "0.25"
FAINT = "0.55"
SMALL = 6.0
"""Points of labels inside of panels."""
LETTER = 0.052
"""Inches that a letter of such a label takes, at most on average."""
DPI = 200
FORMATS = ("png", "pdf")

_LIGHT = "0.944"

# Characters of a title to an inch.
_TITLE_PITCH = 17


@dataclass(frozen=True)
class Style:
    """How a method is drawn; sizes in points."""

    color: Any
    marker: str
    size: float = 4.2
    width: float = 1.1
    zorder: float = 3.0


DASHED = (0, (4, 2))
_UNKNOWN = Style("#cc78bc", "P")
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
    "grid.color": "0.92",
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "pdf.fonttype": 42,
    # Text stays text: its outlines, as its pixels, take longer to make than all else of a figure.
    "svg.fonttype": "none",
    "svg.hashsalt": "hybrid tile sparsity",
}


def style_of(method: str) -> Style:
    """How a method is drawn, by its entry; one that is not known any more has a style of its own."""
    known = METHODS.get(method)
    if known is None:
        return _UNKNOWN
    if known.emphasis:
        return Style(known.color, known.marker, 5.2, 1.6, 3.0 + known.emphasis)
    return Style(known.color, known.marker, _SIZES.get(known.marker, Style.size))


def text_ink(method: str) -> Any:
    """The colour of a method, darker: for its name in small type."""
    return tuple(0.7 * part for part in to_rgb(style_of(method).color))


def light_map(color: str) -> LinearSegmentedColormap:
    """From next to white to a colour, for quantities."""
    return LinearSegmentedColormap.from_list(f"light {color}", [_LIGHT, color])


def light_shades(color: str, count: int) -> list[tuple[float, ...]]:
    """So many shades of `light_map`, evenly, the lightest first."""
    return [tuple(shade) for shade in light_map(color)(np.linspace(0, 1, count))[:, :3]]


def paper_style() -> AbstractContextManager[None]:
    """Type sizes, lines and colours for a printed column, while the context lasts."""
    return matplotlib.rc_context(_RC)


def in_paper_style(draw: Callable[P, T]) -> Callable[P, T]:
    """A function that draws, with the settings of `paper_style` while it does."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with paper_style():
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float, height: float, constrained: bool = True) -> Figure:
    """A figure in inches that no global state knows of."""
    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, hspace=0, wspace=0.02) if constrained else None
    figure = Figure(figsize=(width, height), dpi=DPI, layout=engine)
    FigureCanvasAgg(figure)
    return figure


def set_title(figure: Figure, title: str) -> None:
    """What the figure is of, over all its panels, flush left, in as many lines as its width needs."""
    text = "\n".join(title_lines(title, figure.get_figwidth()))
    figure.suptitle(text, x=0.005, ha="left", size=7.5, color="0.1")


def title_lines(title: str, inches: float) -> list[str]:
    """The lines of a title on a figure so wide."""
    return textwrap.wrap(title, title_width(inches))


def title_width(inches: float) -> int:
    """How many characters a line of a title has on a figure so wide."""
    return round(_TITLE_PITCH * inches)


def room(
    figure: Figure,
    title: str,
    rows: int = 1,
    columns: int = 1,
    left: float = 0.46,
    right: float = 0.03,
    bottom: float = 0.38,
    above: float = 0.0,
    between: tuple[float, float] = (0.0, 0.0),
) -> dict[str, float]:
    """Where a grid of panels lies whose labels are of known sizes, for ``gridspec_kw``.

    To measure the labels, as constrained layout does, takes as long as to draw them.

    Args:
        title: of `set_title`.
        left, right, bottom: inches beside and below the panels.
        above: inches between the title and the panels.
        between: inches between columns, and between rows.
    """
    width, height = figure.get_size_inches()
    top = 0.1 + 0.125 * len(title_lines(title, width)) + above
    wide = (width - left - right - (columns - 1) * between[0]) / columns
    tall = (height - top - bottom - (rows - 1) * between[1]) / rows
    return {
        "left": left / width,
        "right": 1 - right / width,
        "bottom": bottom / height,
        "top": 1 - top / height,
        "wspace": between[0] / wide,
        "hspace": between[1] / tall,
    }


def add_legend(figure: Figure, handles: Sequence[Line2D], columns: int) -> int:
    """A legend below the panels, in as few rows as ``columns`` and the figure's width allow, these of equal length.

    Returns how many.
    """
    rows = 1
    for most in range(columns, 0, -1):
        rows = math.ceil(len(handles) / most)
        place: Any = "outside lower center" if figure.get_layout_engine() else "lower center"
        legend = figure.legend(handles=list(handles), loc=place, ncols=math.ceil(len(handles) / rows))
        if legend.get_window_extent().width <= figure.bbox.width or most == 1:
            break
        legend.remove()
    return rows


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, which it has no more of to the eye, at a third of the size of a full one.

    A ninth of the pixels is enough to choose the colours from: all of them cost more than drawing.
    """
    with paper_style(), io.BytesIO() as small:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
        colors = image.resize((image.width // 3, image.height // 3), Image.Resampling.NEAREST).quantize(256)
        mapped = image.quantize(palette=colors, dither=Image.Dither.NONE)
        # Pillow looks colours up in steps of four: white, which the first pixel has, would be grey.
        palette, white = mapped.getpalette() or [], 3 * int(np.asarray(mapped)[0, 0])
        palette[white : white + 3] = [255, 255, 255]
        mapped.putpalette(palette)
        mapped.save(small, "PNG", dpi=(DPI, DPI), optimize=True)
        return small.getvalue()


def svg_bytes(figure: Figure) -> bytes:
    """The figure as SVG, in half the time of a PNG; its letters are DejaVu's or Verdana's, which are as wide."""
    with paper_style(), io.BytesIO() as written:
        # Not ``savefig``, which draws twice.
        FigureCanvasSVG(figure).print_svg(written, metadata={"Creator": None, "Date": None})
        return written.getvalue()


def save_figure(figure: Figure, path: Path, formats: Collection[str] = FORMATS[:1]) -> list[Path]:
    """Write ``path`` with the suffix of each format appended, each whole or not at all; no time or version in any.

    Raises:
        UserError: for another format than `FORMATS`.
    """
    written = []
    for suffix in formats:
        check_name("figure format", suffix, FORMATS)
        target = path.with_name(f"{path.name}.{suffix}")
        with replacing(target) as temporary:
            if suffix == "png":
                temporary.write_bytes(png_bytes(figure))
            else:
                nameless: dict[str, Any] = {"Creator": None, "Producer": None, "CreationDate": None}
                with paper_style():
                    figure.savefig(temporary, format=suffix, metadata=nameless)
        written.append(target)
    return written
