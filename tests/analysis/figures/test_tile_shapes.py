"""Perplexity by tile shape: what counts as a sweep, and what is drawn of it."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from analysis.figures.tile_shapes import draw_tile_shapes, swept
from analysis.rows.points import gather
from patch.errors import UserError

Make = Callable[..., Any]
SHAPES = {(64, 64): 30.0, (128, 64): 31.0, (32, 32): 29.0, (192, 192): 34.0}


@pytest.fixture
def frame(study: Make, make_pruning: Make, make_trial: Make) -> pd.DataFrame:
    abouts = [make_pruning("m", "dense", "dense", 0.0)]
    abouts += [make_pruning("m", "patch-joint", "hybrid", 0.35, tile=list(tile)) for tile in SHAPES]
    abouts += [make_pruning("m", "patch-joint", "hybrid", 0.25, tile=list(tile)) for tile in list(SHAPES)[:2]]
    values = [20.0, *SHAPES.values(), 25.0, 26.0]
    names = [letter * 12 for letter in "dabc123"]
    return study(
        {name: make_trial(name, about, value) for name, about, value in zip(names, abouts, values, strict=True)}
    )


def test_a_sweep_is_three_shapes_of_the_same_pruning(frame: pd.DataFrame) -> None:
    (group,) = swept(gather(frame))
    assert group == ("m", "patch-joint", 0.35, "")
    assert [point.tile for point in swept(gather(frame))[group]] == ["32x32", "64x64", "128x64", "192x192"]


def test_it_is_drawn_by_rising_size_over_the_dense_model(frame: pd.DataFrame) -> None:
    (axis,) = draw_tile_shapes(frame).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["32x32", "64x64", "128x64", "192x192"]
    lines = [[float(value) for value in line.get_ydata()] for line in axis.lines]
    assert [29.0, 30.0, 31.0, 34.0] in lines and [20.0, 20.0] in lines
    assert [text.get_text() for text in axis.texts] == ["PATCH joint 35%", "Dense"]


def test_two_shapes_are_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no sweep over tile shapes"):
        draw_tile_shapes(frame[frame.sparsity != 0.35])
