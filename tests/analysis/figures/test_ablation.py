"""Many variants of one method: what counts as an ablation, and how it is drawn."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.figures.ablation import ablated, draw_ablation
from analysis.figures.study import plot_study
from analysis.rows.points import gather
from patch.errors import UserError

Make = Callable[..., Any]
PERPLEXITIES = {1e-3: 30.0, 2e-3: 31.0, 3e-3: 28.0, 4e-3: 35.0, 5e-3: 29.0, 6e-3: 90.0}


@pytest.fixture
def frame(study: Make, make_pruning: Make, make_trial: Make) -> pd.DataFrame:
    trials = {"0" * 12: make_trial("0" * 12, make_pruning("m", "dense", "dense", 0.0), 20.0)}
    for name, (lr, perplexity) in zip("abcdef", PERPLEXITIES.items(), strict=True):
        learning = {"source": "train", "recipe": {"mode": "joint", "steps": 200, "lr": lr}}
        about = make_pruning("m", "patch-joint", "hybrid", 0.45, learning=learning)
        trials[name * 12] = make_trial(name * 12, about, perplexity)
    return study(trials)


def test_more_variants_than_markers_are_an_ablation(frame: pd.DataFrame) -> None:
    points = gather(frame)
    assert [len(members) for members in ablated(points).values()] == [len(PERPLEXITIES)]
    curve = [dataclasses.replace(points[1], sparsity=0.25, achieved=0.25), *points[:-1]]
    assert not ablated(curve), "a frontier can show five"
    assert ablated([*curve, points[-1]])
    assert not ablated(points[:2]), "one variant is no ablation"


def test_variants_are_drawn_lowest_on_top(frame: pd.DataFrame) -> None:
    (axis,) = draw_ablation(frame).axes
    ranked = sorted(PERPLEXITIES, key=lambda lr: -PERPLEXITIES[lr])
    assert [label.get_text() for label in axis.get_yticklabels()] == [f"lr={lr:g}" for lr in ranked]
    assert [text.get_text() for text in axis.texts if text.get_text() != "dense"] == [
        "90.00",
        "35.00",
        "31.00",
        "30.00",
        "29.00",
        "28.00",
    ]
    assert axis.get_xlim()[0] < 20.0 < 90.0 < axis.get_xlim()[1]
    (dense,) = [line for line in axis.lines if line.get_gid() == "dense"]
    assert list(dense.get_xdata()) == [20.0, 20.0]


def test_variants_of_the_dense_model_are_points_and_have_no_sparsity(
    study: Make, make_pruning: Make, make_trial: Make
) -> None:
    plain = make_pruning("m", "dense", "dense", 0.0)
    few = {name: plain | {"quantisation": {"precision": name}} for name in ("fp8", "int8")}
    trials = {"0" * 12: make_trial("0" * 12, plain, 20.0)}
    for letter, (value, about) in zip("ab", ((21.0, few["fp8"]), (20.5, few["int8"])), strict=True):
        trials[letter * 12] = make_trial(letter * 12, about, value)
    (axis,) = draw_ablation(study(trials)).axes
    markers = [float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "*"]
    assert sorted(markers) == [20.0, 20.5, 21.0]
    assert axis.get_title("right") == "Dense"


def test_it_stands_for_what_cannot_tell_variants_apart(frame: pd.DataFrame, tmp_path: Path) -> None:
    assert {path.name for path in plot_study(frame, tmp_path)} == {"ablation.png"}


def test_one_variant_is_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no ablation to plot"):
        draw_ablation(frame[frame.trial.isin(["0" * 12, "a" * 12])])
