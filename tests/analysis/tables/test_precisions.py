"""What fewer bits cost: masks beside themselves, errors of the same windows alone."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from analysis.rows.points import Text, gather
from analysis.tables.precisions import precision_table
from analysis.tables.render import shown_cells
from analysis.tables.study import study_tables, title

Make = Callable[..., Any]
LOSSES = (3.0, 3.1, 2.9)


@pytest.fixture
def frame(study: Make, make_pruning: Make, make_trial: Make) -> pd.DataFrame:
    dense = make_pruning("m", "dense", "dense", 0.0)
    mask = make_pruning("m", "sparsegpt", "2:4", 0.5)

    def rounded(about: dict[str, Any], precision: str, sink_aware: bool = False) -> dict[str, Any]:
        how = {"precision": precision, "joint": False} | ({"sink_aware": True} if sink_aware else {})
        return about | {"quantisation": how}

    trials = {}
    for number, (about, added) in enumerate(
        [
            (dense, (0.0, 0.0, 0.0)),
            (rounded(dense, "fp8"), (0.01, 0.02, 0.0)),
            (rounded(dense, "int4"), (0.1, 0.2, 0.0)),
            (rounded(dense, "int4", True), (0.05, 0.05, 0.05)),
            (mask, (0.5, 0.5, 0.5)),
            (rounded(mask, "fp8"), None),
        ]
    ):
        losses = [before + more for before, more in zip(LOSSES, added, strict=True)] if added else None
        perplexity = math.exp(sum(losses) / 3) if losses else 40.0
        trial = f"{number:012x}"
        rows = make_trial(trial, about, perplexity)
        for row in rows:
            if losses and row["metric"] == "perplexity":
                row["labels"] = row["labels"] | {"window_losses": losses}
        trials[trial] = rows
    return study(trials)


def test_each_precision_is_beside_its_mask(frame: pd.DataFrame) -> None:
    table = precision_table(gather(frame), Text("wikitext2/test", 2048))
    cells = [[str(cell) for cell in row] for row in shown_cells(table)]
    assert [column.heading for column in table.columns][-2:] == ["FP8 (%)", "INT4 (%)"]
    assert [row[:3] for row in cells] == [["Dense", "", ""], ["Dense", "", "sink-aware"], ["SparseGPT", "50%", ""]]
    assert [row[-2:] for row in cells] == [["+1.0 ± 0.6", "+10.5 ± 7.0"], ["—", "+5.1 ± 0.3"], ["+20.8", "—"]]


def test_it_is_among_the_tables_of_a_study_of_fewer_bits(frame: pd.DataFrame) -> None:
    assert list(study_tables(frame)) == ["accuracy", "precisions"]
    assert title("precisions") == "What fewer bits cost"
    plain = frame[["quantisation" not in about["pruning"] for about in frame.definition]]
    assert list(study_tables(plain)) == ["accuracy"]
