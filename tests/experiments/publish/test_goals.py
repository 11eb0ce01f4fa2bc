"""What was aimed at, beside what was measured: every goal of linears and of whole models, and which are reached."""

from typing import Any

import pandas as pd
import pytest

from experiments.publish.goals import GOALS, table

PLAIN = {"metric": "time", "implementation": "hybrid", "tile": "128x128", "tiles": "uneven", "sparsity": 0.25}
COLUMN = {0.0: 1, 0.25: 2, 0.5: 5}


def products(speedups: dict[int, float], **more: Any) -> pd.DataFrame:
    linear = {"model": "llama-2-7b", "precision": "bf16"}
    rows = [PLAIN | linear | {"tokens": t, "own_speedup": value} | more for t, value in speedups.items()]
    # What goals are not of.
    rows += [rows[0] | {"own_speedup": 0.1} | other for other in ({"tile": "64x64"}, {"model": "x"}, {"tokens": 7})]
    return pd.DataFrame(rows)


def models(*speedups: float) -> pd.DataFrame:
    plain = PLAIN | {"precision": "fp8", "kind": "decode", "batch": 16, "length": 1}
    return pd.DataFrame([plain | {"model": str(place), "own_speedup": value} for place, value in enumerate(speedups)])


@pytest.mark.parametrize(
    ("speedups", "shown", "reached"),
    [
        ({64: 1.2, 128: 1.0}, "1.00 to 1.20 (1.00)", True),
        ({64: 1.2, 128: 0.98}, "0.98 to 1.20 (1.00)", False),
        ({64: 0.996}, "1.00 (1.00)", True),
    ],
    ids=["reached", "one-misses", "to-the-digits-shown"],
)
def test_a_goal_is_reached_where_all_that_was_measured_reaches_it(
    speedups: dict[int, float], shown: str, reached: bool
) -> None:
    made = table(products(speedups), models(1.2))
    assert made.rows[0][COLUMN[0.25]] == shown
    assert ((0, COLUMN[0.25]) in made.best) == reached
    assert made.rows[0][COLUMN[0.5]] is None and len(made.rows) == len(GOALS)


def test_even_maps_count_only_where_there_are_no_others() -> None:
    frame = pd.concat([products({64: 0.9}, tiles="even"), products({64: 1.4}, tiles="even", sparsity=0.5)])
    made = table(frame, models(1.2))
    assert made.rows[0][COLUMN[0.25]] is None and made.rows[0][COLUMN[0.5]] == "1.40 (1.30)"


def test_every_whole_model_has_to_reach_a_goal() -> None:
    made = table(products({64: 1.0}), models(1.2, 1.05))
    (place,) = (place for place, row in enumerate(made.rows) if row[0] == "Decoding, batch 16, FP8")
    assert made.rows[place][COLUMN[0.25]] == "1.05 to 1.20 (1.10)" and (place, COLUMN[0.25]) not in made.best
