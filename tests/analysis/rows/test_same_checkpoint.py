"""One point, one artefact: which rows may stand together."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from analysis.rows.points import gather
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
