"""Names written at the curves that they mean, where they cover neither points nor each other."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from analysis.figures.style import FAINT, SMALL

Side = Literal["left", "right"]
# A line leads from a name to what it means from so many points of distance on.
_FAR_AWAY = 6.0


@dataclass(frozen=True)
class Label:
    """A name and where its curve ends.

    Attributes:
        text: in one line; it is wrapped.
        at: the end of the curve, or the marker, in data.
        side: where of it the name stands.
        color: of the text.
    """

    text: str
    at: tuple[float, float]
    side: Side
    color: Any


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Middles of intervals of these sizes that do not overlap, as near as may be to the wanted ones, within a range.

    Where they are too many for the range they overlap evenly.
    """
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    room = sum(sizes)
    shrink = min(1.0, (high - low) / room) if room else 1.0
    sizes = [shrink * size for size in sizes]
    # Blocks of intervals that touch: members and the middle of the whole.
    blocks: list[list[int]] = []
    for place in order:
        blocks.append([place])
        while len(blocks) > 1 and _start(blocks[-1], wanted, sizes, low, high) < _end(
            blocks[-2], wanted, sizes, low, high
        ):
            last = blocks.pop()
            blocks[-1] += last
    middles = [0.0] * len(wanted)
    for block in blocks:
        edge = _start(block, wanted, sizes, low, high)
        for place in block:
            middles[place] = edge + sizes[place] / 2
            edge += sizes[place]
    return middles


def _start(block: Sequence[int], wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> float:
    """Where a block of touching intervals begins: that which moves its members least, within the range."""
    offset, starts = 0.0, []
    for place in block:
        starts.append(wanted[place] - sizes[place] / 2 - offset)
        offset += sizes[place]
    return min(max(sum(starts) / len(starts), low), high - offset)


def _end(block: Sequence[int], wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> float:
    return _start(block, wanted, sizes, low, high) + sum(sizes[place] for place in block)


Panel = tuple[Axes, Sequence[Label], Mapping[Side, tuple[float, float]]]
"""Axes, the names in them, and for each side its free column: from the edge beside the points to the other, in data."""


def write_labels(figure: Figure, panels: Iterable[Panel]) -> None:
    """Write the names of each panel into its free columns, with a thin line to what they mean where they had to move.

    Args:
        figure: with everything else drawn, for the sizes of its panels decide.
    """
    panels = list(panels)
    if not any(labels for _, labels, _ in panels):
        return
    # The layout is what sizes depend on; it stays as it is, for names take no part in it.
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    pitch = SMALL * figure.dpi / 72
    for axes, labels, columns in panels:
        leaders: list[np.ndarray] = []
        for side, (near, far) in columns.items():
            members = [label for label in labels if label.side == side]
            width = abs(axes.transData.transform((near, 1))[0] - axes.transData.transform((far, 1))[0])
            texts = [wrapped(label.text, max(8, int(width / (0.56 * pitch)))) for label in members]
            sizes = [1.35 * (text.count("\n") + 1) * pitch for text in texts]
            wanted = [axes.transData.transform(label.at)[1] for label in members]
            box = axes.get_window_extent()
            heights = spread(wanted, sizes, box.y0 - 0.3 * pitch, box.y1 + 0.3 * pitch)
            for label, text, height in zip(members, texts, heights, strict=True):
                leaders += _write(axes, pitch / SMALL, label, text, near, height)
        # Not arrows of matplotlib, which take longer than the texts.
        lines = LineCollection(leaders, colors=FAINT, linewidths=0.4, zorder=8, clip_on=False, gid="leader")
        lines.set_in_layout(False)
        axes.add_collection(lines, autolim=False)


def wrapped(name: str, width: int) -> str:
    """A name in lines of so many characters where words allow it; what stands in brackets begins a line."""
    if len(name) <= width:
        return name
    head, bracket, tail = name.partition("(")
    parts = [part for part in (head.strip(), bracket + tail) if part]
    return "\n".join(textwrap.fill(part, width, break_long_words=False, break_on_hyphens=False) for part in parts)


def _write(axes: Axes, points: float, label: Label, text: str, x: float, height: float) -> list[np.ndarray]:
    """Write one name, ``height`` in pixels; returns the ends of a line to what it means, unless that is beside it.

    Args:
        points: pixels of a point.
    """
    to_data = axes.transData.inverted()
    y = to_data.transform((0, height))[1]
    written = axes.text(
        x,
        y,
        text,
        ha="right" if label.side == "left" else "left",
        va="center",
        size=SMALL,
        color=label.color,
        linespacing=1.1,
        zorder=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.4},
        clip_on=False,
        gid="label",
    )
    written.set_in_layout(False)
    start, end = axes.transData.transform([(x, y), label.at])
    long = float(np.hypot(*(end - start)))
    if not long > _FAR_AWAY * points:
        return []
    step = (end - start) * points / long
    return [to_data.transform([start + step, end - 3 * step])]
