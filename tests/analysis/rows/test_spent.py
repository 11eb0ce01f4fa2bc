"""What masks take, out of rows that say it: hours of all GPUs, with what a mask was made of; table and figure of it."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from analysis.figures.spent import draw_cost
from analysis.rows.points import gather
from analysis.rows.spent import spent
from analysis.tables.spent import cost_table
from analysis.tables.study import study_tables
from patch.errors import UserError

RECOVERY = {
    "source": "text",
    "recipe": {"steps": 10, "batch": 2, "length": 8, "block_epochs": 2, "block_windows": 4, "lr": 1e-4},
    "seed": 0,
}
Make = Callable[..., Any]


@pytest.fixture
def frame(study: Callable[..., pd.DataFrame], make_pruning: Make, make_trial: Make) -> pd.DataFrame:
    learning = {"source": "text", "recipe": {"mode": "joint", "steps": 100, "batch": 4, "length": 8}}
    guided = make_pruning("m", "patch-joint", "hybrid", 0.45) | {"learning": learning}
    one_shot = make_pruning("m", "sparsegpt", "hybrid", 0.45)
    trials = {
        "a" * 12: (make_pruning("m", "dense", "dense", 0.0), 20.0, {}),
        "b" * 12: (one_shot, 60.0, {"prune_seconds": 36.0, "gpus": 1}),
        "c" * 12: (guided, 32.0, {"prune_seconds": 360.0, "gpus": 4, "energy": 5e5}),
        "d" * 12: (guided | {"recovery": RECOVERY}, 25.0, {"prune_seconds": 720.0, "gpus": 2, "energy": 1e6}),
        "e" * 12: (make_pruning("m", "wanda", "hybrid", 0.45), 80.0, {"prune_seconds": 5.0}),
    }
    rows = {}
    for trial, (about, perplexity, facts) in trials.items():
        made = make_trial(trial, about, perplexity)
        (first,) = [row for row in made if row["metric"] == "sparsity"]
        made += [first | {"metric": metric, "value": value} for metric, value in facts.items()]
        rows[trial] = [
            row | {"provenance": row["provenance"] | {"gpu": "NVIDIA H100" if facts else None}} for row in made
        ]
    return study(rows)


def test_hours_are_of_all_gpus_and_of_what_was_recovered(frame: pd.DataFrame) -> None:
    points = gather(frame)
    found = {trials[0][0]: each for trials, each in spent(frame, points).items()}
    assert sorted(found) == ["b", "c", "d", "e"], "what is not trained is of one GPU, whatever its rows say"
    assert found["e"].gpu_hours == pytest.approx(5 / 3600)
    assert found["b"].gpu_hours == pytest.approx(0.01) and found["b"].kilojoules is None
    assert found["c"].gpu_hours == pytest.approx(0.4) and found["c"].kilojoules == pytest.approx(500)
    assert found["d"].gpu_hours == pytest.approx(0.8) and found["d"].kilojoules == pytest.approx(1500)
    assert (found["b"].tokens, found["c"].tokens, found["d"].tokens) == (0, 3200, 3200 + 8 * (10 * 2 + 2 * 4))
    assert found["d"].made_of == "c" * 12 and found["c"].made_of is None


def test_where_no_row_says_what_a_mask_took_there_is_what_was_done_to_it(frame: pd.DataFrame) -> None:
    untold = frame[(frame.trial != "c" * 12) | (frame.metric != "gpus")]
    found = {trials[0][0]: each for trials, each in spent(untold, gather(untold)).items()}
    assert sorted(found) == ["b", "d", "e"], "learned rows that do not say how many GPUs it was are left out"
    assert found["d"].alone and not found["b"].alone
    assert found["d"].gpu_hours == pytest.approx(0.4) and found["d"].tokens == 8 * (10 * 2 + 2 * 4)
    table = study_tables(untold)["cost"]
    assert str(table.rows[-1][3]).endswith("(this alone)") and "This alone" in table.notes[-1]
    with pytest.raises(UserError, match="no cost to plot"):
        draw_cost(untold)


def test_the_cheapest_comes_first(frame: pd.DataFrame) -> None:
    table = cost_table(frame)
    assert [trials[0][0] for trials in table.trials] == ["e", "b", "c", "d"]
    assert "cost" in study_tables(frame)
    accuracy = study_tables(frame)["accuracy"]
    weights = [column.name for column in accuracy.columns].index("weights")
    assert [row[weights] for row in accuracy.rows].count("trained") == 1


def test_trained_weights_are_hollow_beside_what_they_were_made_of(frame: pd.DataFrame) -> None:
    figure = draw_cost(frame)
    (axis,) = figure.axes
    lines = {line.get_gid() for line in axis.lines}
    assert {"patch-joint cost", "sparsegpt cost", "made of", "dense"} <= lines
    fills = [line.get_markerfacecolor() for line in axis.lines if str(line.get_gid()).endswith("cost")]
    assert fills.count("white") == 1


def test_without_rows_that_say_it_there_is_no_cost(smollm: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no row says what a mask took"):
        cost_table(smollm)
    with pytest.raises(UserError, match="no cost to plot"):
        draw_cost(smollm)
    assert "cost" not in study_tables(smollm)
