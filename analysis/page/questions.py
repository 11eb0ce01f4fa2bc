"""What a study asks, as its rows show: the report is in this order."""

from collections.abc import Sequence
from typing import Literal

import pandas as pd

from analysis.figures.ablation import ablated
from analysis.figures.refit import mostly_refitted, refitted_pairs
from analysis.figures.tile_shapes import swept
from analysis.rows.points import Point, gather, texts
from analysis.tables.packed import workloads
from analysis.tables.study import GRID_STAGES

Question = Literal["methods", "recipes", "tiles", "refit", "speed", "kernels"]

QUESTIONS: dict[Question, str] = {
    "methods": "Which method keeps most of the model?",
    "recipes": "Which recipe learns the best mask?",
    "tiles": "How large may a tile be?",
    "refit": "Does fitting the kept weights help?",
    "speed": "What does the same checkpoint give up for its speed?",
    "kernels": "How fast are the kernels, and what does learning cost?",
}
# The model that everything can be tried on without a download; what it shows comes after what others show.
_SMALLEST = "embedded"


def question(frame: pd.DataFrame, points: Sequence[Point] | None = None) -> Question:
    """What the rows of a study ask.

    Args:
        frame: as from `analysis.rows.load.load_rows`; learning curves and layers do not matter.
        points: those of the rows (`analysis.rows.points.gather`), if they are at hand.
    """
    if frame.stage.str.startswith(GRID_STAGES).all():
        return "kernels"
    if workloads(frame):
        return "speed"
    points = gather(frame) if points is None else points
    if mostly_refitted(points, refitted_pairs(frame, points)):
        return "refit"
    if texts(points) and ablated(points):
        return "recipes"
    return "tiles" if swept(points) else "methods"


def reading_order(asked: Question, frame: pd.DataFrame) -> tuple[int, bool]:
    """Sorts studies by question, those of the smallest model last."""
    return list(QUESTIONS).index(asked), is_smallest(frame)


def is_smallest(frame: pd.DataFrame) -> bool:
    """Whether a study is of the smallest model alone."""
    return set(frame.model) == {_SMALLEST}
