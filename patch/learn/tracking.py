"""Where the curves of learning go while it runs: files of TensorBoard, and beside them what else people look at.

What an earlier process logged after its last checkpoint happens again, under the same steps.
"""

import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from patch import install
from patch.errors import UserError, check_name

PROJECT = "hybrid-tile-sparsity"
# The environment variable that names a tracker: jobs and processes that a command starts inherit it.
TRACK = "HTS_TRACK"
# Seconds that a tracker's server has to answer before its curves stay here.
_PATIENCE = 3


class Curves(Protocol):
    """One place that takes curves."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...


def check_tracker(name: str) -> str:
    """The name of a tracker that is installed.

    Raises:
        UserError: if it is unknown, or not installed.
    """
    check_name("tracker", name, TRACKERS)
    if importlib.util.find_spec(name) is None:
        raise UserError(f"tracker {name} is not installed: {install.how(name)}")
    return name


@contextmanager
def curves(work: Path | None, step: int, config: Mapping[str, Any], track: str | None) -> Iterator[list[Curves]]:
    """All places that the curves of a run go to.

    Args:
        work: the run's folder, whose name tells it from other runs; what is written without a server lies there. None
            for a process that leaves it to another.
        step: that it goes on from.
        config: the settings of the run, for trackers.
        track: wandb or mlflow, beside TensorBoard.
    """
    with ExitStack() as opened:
        if work is None:
            yield []
            return
        places = [opened.enter_context(_tensorboard(work, step))]
        if track:
            places.append(opened.enter_context(TRACKERS[check_tracker(track)](work, config)))
        yield places


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()


@contextmanager
def _tensorboard(work: Path, step: int) -> Iterator[Curves]:
    # Takes a second to import.
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(work / "tensorboard", purge_step=step + 1 if step else None) as writer:
        yield _TensorBoard(writer)


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # Not as its own step, which must grow: a run that goes on repeats some.
        self._run.log({"step": step, **metrics})

    def flush(self) -> None:
        pass


@contextmanager
def _wandb(work: Path, config: Mapping[str, Any]) -> Iterator[Curves]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=work.name,
        name=work.name,
        resume="allow",
        dir=str(work),
        config=dict(config),
        mode=os.environ.get("WANDB_MODE") or ("online" if _answers(wandb.setup().settings.base_url) else "offline"),
    )
    run.define_metric("*", step_metric="step")
    try:
        yield _Wandb(run)
    finally:
        run.finish()


class _Mlflow:
    def __init__(self, mlflow: Any) -> None:
        self._mlflow = mlflow

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def flush(self) -> None:
        pass


@contextmanager
def _mlflow(work: Path, config: Mapping[str, Any]) -> Iterator[Curves]:
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{work.absolute() / 'mlflow.db'}")
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    with mlflow.start_run(run_name=work.name):
        mlflow.log_params(dict(config))
        yield _Mlflow(mlflow)


def _answers(url: str) -> bool:
    """Whether a server can be reached: without one, curves are kept here instead of waiting for it."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


TRACKERS = {"wandb": _wandb, "mlflow": _mlflow}
