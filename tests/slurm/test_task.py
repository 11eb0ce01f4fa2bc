"""What a job does when what it needs is not there: whether it waits, goes on, or ends depends on who still makes it."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_study import tiny_trials

from experiments.run.store import Store
from patch.errors import UserError
from slurm import plan, queue, task, torchrun
from slurm.batches import Batch
from slurm.cluster import Launch
from slurm.plan import Step
from slurm.task import RunStep, Work


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return Work(tmp_path / "runs", device="cpu")


@pytest.fixture
def steps(tiny_model: Path, tiny_text: Path) -> tuple[Step, Step]:
    """The making of a one-shot checkpoint, and its evaluation."""
    known = plan.steps(tiny_trials(tiny_model, tiny_text)).values()
    evaluate = next(step for step in known if step.kind == "evaluate" and len(step.needs) == 1)
    return next(step for step in known if step.id == evaluate.needs[0]), evaluate


def test_what_gets_done_while_slurm_is_asked_is_not_missing(
    work: Work, steps: tuple[Step, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued learning and the evaluation that waits for it start together, and the one ends as the other looks."""
    prune, evaluate = steps

    def live(store: Store) -> list[Any]:
        monkeypatch.setattr(queue, "live", lambda _: pytest.fail("one answer tells"))
        RunStep(work)(prune)
        return []

    monkeypatch.setattr(queue, "live", live)
    RunStep(work)(evaluate)
    assert plan.is_done(evaluate, Store(work.results))


def test_what_nobody_makes_is_waited_for_by_nobody(
    work: Work, steps: tuple[Step, Step], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(queue, "live", lambda _: [])
    RunStep(work)(steps[1])
    assert f"cannot start without {steps[0].id}" in capsys.readouterr().out
    assert not plan.is_done(steps[1], Store(work.results))
    # The next sweep submits both: this is not a failure.
    assert Store(work.results).failure(steps[1].trials[0]) is None


def test_what_is_under_way_is_waited_for_in_the_queue(
    work: Work, steps: tuple[Step, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    answers = iter([UserError("squeue failed: Unable to contact slurm controller"), None])
    batch = Batch("ab", "tiny", "slurm", "prune", "hts-tiny-prune-ab", (steps[0].id,), 0.0, "76")

    def live(store: Store) -> list[Any]:
        # The controller is away for a moment.
        if error := next(answers):
            raise error
        return [(batch, [steps[0].id])]

    monkeypatch.setattr(queue, "live", live)
    monkeypatch.setattr(task.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    with pytest.raises(SystemExit, match=f"requeued until {steps[0].id} is over"):
        RunStep(work)(steps[1])
    assert asked == [["scontrol", "requeue", "77"]]


def test_a_step_that_was_told_to_stop_leaves_its_end_to_slurm(
    work: Work, steps: tuple[Step, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that ends by itself while it is preempted has failed, and is not requeued."""
    waited: list[float] = []

    def stop(*_: object) -> None:
        raise torchrun.Interrupted("told to")

    monkeypatch.setattr(task, "make_checkpoint", stop)
    monkeypatch.setattr(task.time, "sleep", waited.append)
    with pytest.raises(SystemExit, match="told to"):
        RunStep(work)(steps[0])
    assert sum(waited) >= 60
    assert Store(work.results).failure(steps[0].trials[0]) is None


def test_the_other_nodes_of_a_job_learn_along_and_tell_of_errors(
    work: Work, steps: tuple[Step, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torchrun.RankFailed("rank 1: ValueError: no such thing")

    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setattr(task, "make_checkpoint", fail)
    monkeypatch.setattr(queue, "live", lambda _: pytest.fail("the first node asks"))
    with pytest.raises(torchrun.RankFailed):
        RunStep(work, Launch(2, 1))(dataclasses.replace(steps[0], needs=("prune-elsewhere",)))
    failure = Store(work.results).failure(steps[0].trials[0])
    assert failure and "no such thing" in failure["error"]
