"""What making a checkpoint takes is counted over all processes that worked at it."""

import json
from pathlib import Path

import pytest

from experiments.run import spending
from experiments.run.runtime import Machine
from experiments.run.spending import Spending, noted

CPU = Machine("cpu", None, lambda *_: None)


def test_a_stopped_run_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(spending.time, "monotonic", lambda: now)
    first = Spending(CPU, True, tmp_path)
    now += 30
    first.note()
    assert not list(tmp_path.iterdir()), "once a minute is enough"
    with pytest.raises(KeyboardInterrupt), noted(first):
        raise KeyboardInterrupt
    now += 1000
    second = Spending(CPU, True, tmp_path)
    now += 12
    assert second.seconds == 42
    (fact,) = second.facts()
    assert (fact.metric, fact.value) == ("prune_seconds", 42)
    second.forget()
    assert Spending(CPU, True, tmp_path).seconds == 0


def test_a_damaged_note_is_as_none(tmp_path: Path) -> None:
    for content in ("", "[]", json.dumps({"seconds": "x", "gpu_seconds": 0, "joules": 0})):
        (tmp_path / "spent.json").write_text(content)
        assert Spending(CPU, True, tmp_path).seconds < 60


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="why"), noted(Spending(CPU, False)):
        raise ValueError("why")
    assert not list(tmp_path.iterdir())
