"""Panels along sparsities from 0 to 50%, with room on the right for what their lines are called."""

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.figures.labels import Panel, write_labels
from analysis.figures.style import set_title


def along_sparsities(axis: Axes, room: float, begin: float = -1) -> dict[Literal["left", "right"], tuple[float, float]]:
    """Percents along an axis from ``begin`` on, with so much room after 50; where its labels are to be written."""
    axis.set_xlim(begin, 50 + room)
    axis.set_xticks(range(0, 51, 10))
    return {"right": (52.0, 50 + room)}


def finish(figure: Figure, axes: NDArray[Any], panels: Sequence[Panel], title: str, quantity: str) -> None:
    """Name the axes of a grid of panels along sparsities, and write title and labels."""
    for axis in axes[-1]:
        axis.set_xlabel("Sparsity (%)")
    for axis in axes[:, 0]:
        axis.set_ylabel(quantity)
    set_title(figure, title)
    write_labels(figure, panels)
