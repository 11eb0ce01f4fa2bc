"""One point, one artefact: which rows may stand together."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from analysis.rows.points import gather, trial_labels
from analysis.rows.same_checkpoint import of_other_masks
from analysis.tables.study import WARNING, study_tables
from patch.errors import UserError

Row = dict[str, Any]
OLD, NEW = "a" * 64, "b" * 64


@pytest.fixture
def trial(make_pruning: Callable[..., Row], make_trial: Callable[..., list[Row]]) -> Callable[..., list[Row]]:
    """``(trial, checkpoint, packed)`` to the rows of a trial, all of which name ``checkpoint``."""

    def make(name: str, checkpoint: str | None, packed: bool = False) -> list[Row]:
        rows = make_trial(name, make_pruning("m", "wanda", "hybrid", 0.45), 20.0)
        if packed:
            rows.append(rows[-1] | {"stage": "speed:decode@1x1", "metric": "speedup", "value": 1.2, "labels": {}})
        return [row | {"provenance": row["provenance"] | {"checkpoint": checkpoint}} for row in rows]

    return make


def test_rows_of_one_checkpoint_are_one_point(study: Callable[..., pd.DataFrame], trial: Callable) -> None:
    frame = study({"1" * 12: trial("1" * 12, NEW, packed=True)})
    assert set(frame.checkpoint) == {NEW}
    assert len(gather(frame)) == 1


def test_rows_of_two_checkpoints_are_refused(study: Callable[..., pd.DataFrame], trial: Callable) -> None:
    mixed = [*trial("1" * 12, NEW)[:-1], trial("1" * 12, OLD)[-1]]
    with pytest.raises(UserError, match=f"different checkpoints.*{OLD[:12]}.*{NEW[:12]}"):
        gather(study({"1" * 12: mixed}))


def test_trials_of_one_pruning_but_two_checkpoints_are_refused(
    study: Callable[..., pd.DataFrame], trial: Callable
) -> None:
    other = [row | {"definition": row["definition"] | {"evaluation": {"limit": 3}}} for row in trial("2" * 12, OLD)]
    with pytest.raises(UserError, match="different checkpoints"):
        gather(study({"1" * 12: trial("1" * 12, NEW), "2" * 12: other}))


def test_unknown_checkpoints_stand_with_unpacked_rows_but_not_with_packed_ones(
    study: Callable[..., pd.DataFrame], trial: Callable
) -> None:
    unknown = trial("1" * 12, None)
    assert len(gather(study({"1" * 12: unknown}))) == 1
    partly = [*unknown[:-1], trial("1" * 12, NEW)[-1]]
    assert len(gather(study({"1" * 12: partly}))) == 1
    with pytest.raises(UserError, match=r"packed checkpoint, but which one .* is unknown"):
        gather(study({"1" * 12: [*unknown, trial("1" * 12, NEW, packed=True)[-1]]}))


def test_the_unknown_is_named_even_where_nothing_is_known(study: Callable[..., pd.DataFrame], trial: Callable) -> None:
    with pytest.raises(UserError, match="is unknown"):
        gather(study({"1" * 12: trial("1" * 12, None, packed=True)}))


@pytest.fixture
def within(make_pruning: Callable[..., Row], make_trial: Callable[..., list[Row]]) -> Callable[..., pd.DataFrame]:
    """``(step, base)`` to rows of a mask, of checkpoint ``NEW``, and of what was made within that of ``base``."""

    def make(step: dict[str, Row], base: str | None) -> dict[str, list[Row]]:
        plain = make_pruning("m", "sparsegpt", "hybrid", 0.45)
        rows = {"1" * 12: (plain, {"checkpoint": NEW}), "2" * 12: (plain | step, {"checkpoint": "c" * 64})}
        return {
            name: [
                row
                | {"provenance": row["provenance"] | where}
                | ({} if row["stage"] != "prune" else {"provenance": row["provenance"] | where | {"base": base}})
                for row in make_trial(name, about, 20.0)
            ]
            for name, (about, where) in rows.items()
        }

    return make


FP8 = {"quantisation": {"precision": "fp8", "calibration": None, "joint": False}}
JOINT = {"quantisation": {"precision": "int4", "calibration": None, "joint": True}}
REFIT = {"refit": {"source": "novels", "windows": 8, "length": 16, "seed": 0}}


@pytest.mark.parametrize(
    ("step", "base", "told"),
    [
        (FP8, OLD, True),
        (FP8, NEW, False),
        (FP8, None, False),
        (JOINT, OLD, False),
        (REFIT, OLD, True),
        (FP8 | REFIT, OLD, False),
    ],
    ids=["another", "the-same", "unknown", "in-one-sweep", "refitted", "whose-base-is-not-there"],
)
def test_what_was_made_of_another_checkpoint_of_its_mask_is_told(
    study: Callable[..., pd.DataFrame], within: Callable[..., Any], step: Row, base: str | None, told: bool
) -> None:
    frame = study(within(step, base))
    assert list(of_other_masks(frame)) == ([("2" * 12, "1" * 12)] if told else [])
    of, plain = (trial_labels(frame)[name * 12] for name in "21")
    note = f"{WARNING} made of another checkpoint than that of {plain} which stands beside: {of}."
    assert all((note in table.notes) == told for table in study_tables(frame).values())
