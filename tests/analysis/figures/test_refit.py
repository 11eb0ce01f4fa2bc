"""What fitting weights does: which masks are pairs, and how they are drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.figures.refit import draw_refit, refitted_pairs
from analysis.figures.study import plot_study
from analysis.rows.points import gather
from patch.errors import UserError

Make = Callable[..., Any]
FITTED = {"refit": {"source": "novels", "windows": 128, "length": 2048, "seed": 0}}


@pytest.fixture
def frame(study: Make, make_pruning: Make, make_trial: Make) -> pd.DataFrame:
    values = {"wanda": (80.0, 50.0), "patch-joint": (30.0, 33.0)}
    trials = {"d" * 12: make_trial("d" * 12, make_pruning("m", "dense", "dense", 0.0), 20.0)}
    for place, (method, (before, after)) in enumerate(values.items()):
        plain = make_pruning("m", method, "hybrid", 0.45)
        for name, about, value in ((f"{place}a", plain, before), (f"{place}b", plain | FITTED, after)):
            trials[name * 6] = make_trial(name * 6, about, value)
    # What it stands on was not measured.
    trials["c" * 12] = make_trial("c" * 12, make_pruning("m", "sparsegpt", "2:4", 0.5) | FITTED, 60.0)
    return study(trials)


def test_a_pair_differs_in_nothing_but_the_fit(frame: pd.DataFrame) -> None:
    pairs = refitted_pairs(frame, gather(frame))
    assert [(before.trials, after.trials) for before, after in pairs] == [
        (("0a" * 6,), ("0b" * 6,)),
        (("1a" * 6,), ("1b" * 6,)),
    ]


def test_both_ends_are_drawn_and_what_gets_worse_is_said(frame: pd.DataFrame) -> None:
    (axis,) = draw_refit(frame).axes
    ends = {gid: [line.get_xdata()[0] for line in axis.lines if line.get_gid() == gid] for gid in ("before", "after")}
    assert ends == {"before": [80.0, 30.0], "after": [50.0, 33.0]}
    assert [text.get_text() for text in axis.texts] == ["80.0 to 50.0", "30.0 to 33.0, worse", "dense"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Wanda 45%", "PATCH joint 45%"]


def test_it_stands_for_a_frontier(frame: pd.DataFrame, tmp_path: Path) -> None:
    assert [path.name for path in plot_study(frame, tmp_path)] == ["refit.png"]


def test_without_what_was_fitted_there_is_nothing_to_plot(frame: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="nothing to compare with refitted weights"):
        draw_refit(frame[frame.trial.isin(["0a" * 6, "d" * 12])])
