"""Learning in several processes: they meet, one failure is told with its cause, and a signal stops and saves all."""

import contextlib
import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import rank_stubs
from dev_cluster import REPOSITORY, wait_until
from forked import Python, Torchrun
from tiny_study import tiny_trials

from experiments.run.store import Store
from patch.checkpoint import load_masks
from patch.learn.saved import CHECKPOINT
from slurm import plan, torchrun
from slurm.cluster import Launch
from slurm.plan import Step
from slurm.task import RunStep, RunTrials, Work

TWO = Launch(1, 2)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find this working tree and the tests' own modules."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's launcher starts is forked, without the launcher."""
    monkeypatch.setattr(torchrun, "subprocess", SimpleNamespace(**(vars(subprocess) | {"Popen": Torchrun})))


def introductions(folder: Path) -> dict[str, dict[str, object]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def learning(tiny_model: Path, tiny_text: Path) -> Step:
    return next(step for step in plan.steps(tiny_trials(tiny_model, tiny_text)).values() if step.kind == "learn")


def test_processes_meet_the_first_one_reports_and_an_error_is_told_with_its_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(torchrun.RankFailed, match="rank 1: ValueError: no such thing") as caught:
        torchrun.run(TWO, partial(rank_stubs.introduce_and_fail_on_the_second, tmp_path), rank_stubs.cpu)
    assert "fail_on_the_second" in caught.value.__notes__[0]
    met = introductions(tmp_path)
    assert {rank: (about["size"], about["local"]) for rank, about in met.items()} == {"0": (2, "0"), "1": (2, "1")}
    assert capfd.readouterr().out.count("progress met 0 2") == 1


def test_two_nodes_meet_at_the_first(tmp_path: Path) -> None:
    """Each node's task starts its own processes; here both nodes are this machine."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"\n')
    scontrol.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import sys, rank_stubs; from functools import partial; from pathlib import Path\n"
        "from slurm import torchrun; from slurm.cluster import Launch\n"
        "torchrun.run(Launch(2, 1), partial(rank_stubs.introduce, Path(sys.argv[1])), rank_stubs.cpu)"
    )
    common = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
    common["PATH"] = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    tasks = [Python(script, out, environment=common | {"SLURM_NODEID": node}) for node in ("0", "1")]
    assert [task.wait() for task in tasks] == [0, 0], [task.stderr for task in tasks]
    met = introductions(out)
    assert {rank: (about["size"], about["local"]) for rank, about in met.items()} == {"0": (2, "0"), "1": (2, "0")}


@pytest.mark.usefixtures("forked")
def test_a_failed_learning_is_a_row(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(tiny_text.read_text(encoding="utf-8"))
    step, store, work = learning(tiny_model, text), Store(tmp_path / "runs"), Work(tmp_path / "runs", device="cpu")
    for id in step.needs:
        RunStep(work)(plan.steps(step.trials)[id])
    text.unlink()
    with pytest.raises(torchrun.RankFailed):
        RunStep(work, TWO)(step)
    failure = store.failure(step.trials[0])
    assert failure and "text.jsonl" in failure["error"] and "load_documents" in failure["traceback"]
    assert store.leased() == {}


@pytest.mark.usefixtures("forked")
def test_local_processes_learn_what_one_learns_and_evaluate_alone(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    trials, step = tiny_trials(tiny_model, tiny_text), learning(tiny_model, tiny_text)
    RunTrials(Work(tmp_path / "two", device="cpu"), TWO)(trials)
    known = plan.steps(step.trials)
    for each in (*(known[id] for id in step.needs), step):
        RunStep(Work(tmp_path / "one", device="cpu"), Launch())(each)
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert all(plan.is_done(step, two) for step in plan.steps(trials).values())
    assert all(store.leased() == {} and not list((store.root / "locks").iterdir()) for store in (one, two))
    alone, together = (load_masks(store.checkpoint_path(step.pruning)) for store in (one, two))
    assert alone and all((alone[name].dense == together[name].dense).all() for name in alone)


SCRIPT = """
import signal, sys
from functools import partial
from pathlib import Path
import rank_stubs
from experiments.run import checkpoints
from experiments.studies import build
from experiments.studies.trial import Calibration
from experiments.run.store import Store
from slurm import torchrun
from slurm.cluster import Launch

signal.signal(signal.SIGUSR2, lambda *_: print("requeued", flush=True))
signal.signal(signal.SIGTERM, lambda *_: print("bypassed", flush=True))
results, model, text = sys.argv[1:]
pruning = build.learned(
    model, "patch-joint", 0.45, (16, 16), text, Calibration(text, 4, 16),
    start=None, steps=100_000, batch=2, microbatch=2, length=32, activation_checkpointing=False,
    checkpoint_every=50_000,
)
try:
    learn = partial(checkpoints.ensure_checkpoint, pruning, Store(Path(results)))
    torchrun.run(Launch(1, 2), learn, rank_stubs.cpu)
except torchrun.Interrupted:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_every_process_saves_and_ends_all(
    number: signal.Signals, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """As Slurm sends it: to the task, torch's agent, and the processes that learn, all at once."""
    task = Python(SCRIPT, tmp_path, tiny_model, tiny_text, session=True)
    everyone: list[psutil.Process] = []
    try:
        wait_until("they learn", lambda: "progress" in task.stdout, 120)
        everyone = psutil.Process(task.pid).children(recursive=True)
        assert len(everyone) >= 3
        os.killpg(task.pid, number)
        assert task.wait(60) == 0, task.stderr
    finally:
        for each in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        task.kill()
    assert not any(each.is_running() for each in everyone)
    (state,) = tmp_path.glob(f"work/*/{CHECKPOINT}")
    assert state.stat().st_size and Store(tmp_path).leased() == {}
    said = task.stdout.split()
    assert said[-2:] == ["requeued" if number == signal.SIGUSR2 else "bypassed", "interrupted"]
