"""Curves of learning in the trackers that people use, whose modules stand in here."""

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from patch.errors import UserError
from patch.learn import tracking
from patch.learn.tracking import check_tracker, curves

CONFIG = {"lr": 0.1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What was asked of wandb and mlflow, neither of which need be installed."""
    asked: list[tuple[str, Any]] = []

    class Run:
        def log(self, metrics: Any) -> None:
            asked.append(("log", metrics))

        def define_metric(self, *_: object, **__: object) -> None: ...

        def finish(self) -> None:
            asked.append(("finish", None))

    def init(**options: Any) -> Run:
        asked.append(("init", options))
        return Run()

    @contextmanager
    def start_run(**options: Any) -> Iterator[None]:
        asked.append(("init", options))
        yield
        asked.append(("finish", None))

    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    for module in (wandb, mlflow):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    wandb.__dict__.update(
        init=init, setup=lambda: SimpleNamespace(settings=SimpleNamespace(base_url="https://localhost:9"))
    )
    mlflow.__dict__.update(
        set_tracking_uri=lambda uri: asked.append(("uri", uri)),
        set_experiment=lambda name: asked.append(("experiment", name)),
        start_run=start_run,
        log_params=lambda params: asked.append(("params", params)),
        log_metrics=lambda metrics, step: asked.append(("log", {"step": step, **metrics})),
    )
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.mark.parametrize("track", ["wandb", "mlflow"])
def test_a_tracker_gets_what_tensorboard_gets(track: str, calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    with curves(tmp_path / "run", 0, CONFIG, track) as places:
        for place in places:
            place.log(1, {"loss": 2.0})
            place.flush()
    assert ("log", {"step": 1, "loss": 2.0}) in calls and calls[-1] == ("finish", None)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_without_a_server_wandb_keeps_the_curves_here(
    calls: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_answers", lambda url: False)
    with curves(tmp_path / "run", 0, CONFIG, "wandb"):
        pass
    (_, options), *_ = calls
    assert options["mode"] == "offline" and options["dir"] == str(tmp_path / "run") and options["id"] == "run"


def test_without_a_server_mlflow_keeps_the_curves_here(calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    with curves(tmp_path / "run", 0, CONFIG, "mlflow"):
        pass
    assert calls[0] == ("uri", f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")


def test_a_port_where_nothing_listens_does_not_answer() -> None:
    assert not tracking._answers("http://127.0.0.1:1")


def test_trackers_are_checked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="wandbb"):
        check_tracker("wandbb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracker wandb is not installed: pip install '.\[wandb\]'"):
        check_tracker("wandb")
