"""Submission without Slurm: the debug executor, processes of this machine, and what `hts` says on bad input."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Python
from tiny_study import tiny_trials

from experiments.run.store import Store
from experiments.studies.build import Study
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Calibration, Evaluation, Pruning, Trial, key
from patch.errors import UserError
from slurm import batches, queue, status, submit, task
from slurm.batches import Batch
from slurm.cluster import Cluster
from slurm.queue import ArrayTask
from slurm.submit import Sweep
from slurm.task import Work


@pytest.fixture
def hts(hts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """The command on a machine without Slurm, whatever is installed on this one."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    return hts


def counts(trials: tuple[Trial, ...], root: Path) -> dict[str, int]:
    return {state: count for state, count in status.examine(trials, Store(root)).counts().items() if count}


def test_the_debug_executor_runs_a_study_once(hts, tiny: tuple, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = hts("sweep", "tiny", "--cluster", "debug")
    assert code == 0 and "3 done" in out, err
    found = list(batches.load_all(Store(tmp_path / "runs")))
    assert [(batch.kind, len(batch.steps)) for batch in found] == [
        ("prune", 2),
        ("evaluate", 1),
        ("learn", 1),
        ("evaluate", 1),
        ("evaluate", 1),
    ]
    code, out, _ = hts("sweep", "tiny", "--cluster", "debug")
    assert code == 0 and "submitted" not in out
    code, out, _ = hts("logs", "tiny")
    assert code == 0 and "nothing runs" in out
    # Nothing to wait for.
    code, out, _ = hts("status", "tiny", "--watch")
    assert code == 0 and "3 done" in out
    code, out, _ = hts("status", "tiny", "--trials")
    assert code == 0 and all(key(trial) in out for trial in tiny)


def test_a_failed_trial_is_a_row_and_is_retried_when_asked(  # type: ignore[no-untyped-def]
    hts, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    text = tmp_path / "late.jsonl"
    text.write_text("")
    trials = (tiny[0], tiny_trials(tiny_model, text)[2])
    monkeypatch.setitem(STUDIES, "tiny", Study("a test", lambda: trials))
    code, out, err = hts("sweep", "tiny", "--cluster", "debug")
    assert code == 1 and "1 done, 1 failed" in out and "--retry-failed" in err
    failure = Store(tmp_path / "runs").failure(trials[1])
    assert failure and "late.jsonl" in failure["error"] and "Traceback" in failure["traceback"]
    code, out, _ = hts("status", "tiny")
    assert "late.jsonl" in out.replace("\n", "") and "1 failed" in out
    # The row of a failure does not get into the way of the others.
    code, out, err = hts("table", "tiny")
    assert code == 0 and "Dense" in out and "failure" not in out, err
    code, out, _ = hts("sweep", "tiny", "--cluster", "debug")
    assert code == 0 and "submitted" not in out
    text.write_text(Path(tiny[1].evaluation.perplexity[0].source).read_text(encoding="utf-8"))
    code, out, _ = hts("sweep", "tiny", "--cluster", "debug", "--retry-failed")
    assert code == 0 and "2 done" in out
    assert Store(tmp_path / "runs").failure(trials[1]) is None


def test_local_processes_share_a_study(hts, tiny: tuple, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = hts("sweep", "tiny", "--cluster", "local", "--parallel", "2")
    assert code == 0 and out.count("submitted process") == 2, err
    # They run already: nobody else is needed.
    code, out, _ = hts("sweep", "tiny", "--cluster", "local")
    assert code == 0 and "submitted" not in out
    code, out, _ = hts("cancel", "tiny")
    assert code == 0 and "cancelled 2" in out
    assert set(counts(tiny, tmp_path / "runs")) <= {"missing", "done"}


def test_a_dry_run_writes_nothing(hts, tiny: tuple, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = hts("sweep", "tiny", "--cluster", "debug", "--dry-run")
    assert code == 0 and "6 tasks for 3 trials" in out and "GPU hours" in out, err
    assert not (tmp_path / "runs").exists()


def test_the_list_shows_every_study(hts) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = hts("sweep", "--list")
    assert code == 0 and "GPU hours" in out
    # Lines that go on with what a study shows may begin with another's name.
    lines = [words for line in out.splitlines() if (words := line.split()) and words[0] in STUDIES]
    rows = {name: told for name, *told in lines if told and told[0].isdecimal()}
    for name, study in STUDIES.items():
        trials, steps, hours = rows[name][:3]
        assert int(trials) == len(study.trials()) and int(steps) >= int(trials), name
        assert float(hours.replace(",", "")) > 0, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "no Slurm here"),
        (["demo", "--cluster", "debgu"], "no cluster 'debgu'"),
        (["demo", "--cluster", "debug", "--gpus", "lern=1"], "did you mean learn"),
        (["demo", "--cluster", "debug", "--time", "soon"], "time 'soon'"),
        (["demo", "--cluster", "debug", "--gpus", "few"], "few"),
        (["dmo"], "did you mean demo"),
        ([], "name a study"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_one_line_and_submits_nothing(  # type: ignore[no-untyped-def]
    hts, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = hts("sweep", *arguments)
    assert code == 1 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_is_too_small_is_said_before_anything_is_submitted(  # type: ignore[no-untyped-def]
    hts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.toml").write_text('executor = "debug"\ngpu_memory = 0.01')
    code, _, err = hts("sweep", "demo", "--cluster", tmp_path / "small.toml")
    assert code == 1 and "GiB of GPU memory" in err and "gpu_memory" in err


def test_without_submitit_only_submission_is_refused(  # type: ignore[no-untyped-def]
    hts, tiny: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name in ("slurm.submit", "slurm.task") or name.startswith("submitit")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("slurm.submit", raising=False)
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = hts("sweep", "tiny", "--cluster", "debug")
    assert code == 1 and "sweeps need submitit" in err and "[slurm]" in err
    code, out, _ = hts("status", "tiny")
    assert code == 0 and "3 missing" in out


def a_batch(**changes: object) -> Batch:
    fields = {"id": "ab", "study": "tiny", "executor": "slurm", "kind": "evaluate", "name": "hts-tiny-evaluate-ab"}
    return Batch(**(fields | {"steps": ("x",), "submitted": 0.0} | changes))  # type: ignore[arg-type]


def test_a_record_of_an_earlier_version_loads(tmp_path: Path) -> None:
    store = Store(tmp_path)
    batches.save(store, a_batch())
    path = batches.folder(store, a_batch()).with_suffix(".json")
    path.write_text(path.read_text().replace('"kind"', '"stage"'))
    assert list(batches.load_all(store)) == [a_batch()]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[" * 100_000, b"\xff\xfe", b'{"kind": "learn"}', b"whole, of another job"],
    ids=["empty", "list", "nested", "no-text", "no-fields", "odd-fields"],
)
def test_a_record_that_cannot_be_read_is_named_and_left_out(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    batches.save(store, a_batch())
    damaged = tmp_path / "sweeps" / "tiny" / "zz.json"
    if content.startswith(b"whole"):
        content = batches.folder(store, a_batch()).with_suffix(".json").read_bytes().replace(b"null", b'"no number"')
    damaged.write_bytes(content)
    assert list(batches.load_all(store)) == [a_batch()]
    assert str(damaged) in caplog.text


@pytest.mark.parametrize("arrived", [True, False], ids=["before-it-died", "never"])
def test_a_submitter_that_died_is_cleaned_up_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    store = Store(tmp_path)
    batches.save(store, a_batch())
    found = {("ab", 0): ArrayTask("77", "PENDING")} if arrived else {}
    monkeypatch.setattr(queue, "tasks", lambda asked: found)
    live = queue.live(store)
    assert [(batch.job, steps) for batch, steps in live] == ([("77", ["x"])] if arrived else [])
    submit.submit(Sweep("tiny", (), Cluster(executor="debug"), Work(tmp_path)))
    assert [batch.job for batch in batches.load_all(store)] == (["77"] if arrived else [])


@pytest.mark.parametrize(
    ("task", "state"),
    [
        (ArrayTask("7", "RUNNING"), "running"),
        (ArrayTask("7", "COMPLETING"), "running"),
        (ArrayTask("7", "PENDING", reason="Priority"), "pending"),
        (ArrayTask("7", "PENDING", restarts=2), "requeued"),
        (ArrayTask("7", "REQUEUE_HOLD"), "requeued"),
        (ArrayTask("7", "OUT_OF_MEMORY"), "missing"),
        (None, "missing"),
    ],
    ids=lambda value: value.state + str(value.restarts) if isinstance(value, ArrayTask) else None,
)
def test_status_says_what_slurm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: ArrayTask | None, state: str
) -> None:
    trial, store = Trial(Pruning("embedded", "dense", "dense", 0.0), Evaluation()), Store(tmp_path)
    batches.save(store, a_batch(steps=(f"evaluate-{key(trial)}",), job="7"))
    monkeypatch.setattr(queue, "tasks", lambda asked: {("ab", 0): task} if task else {})
    [found] = status.examine([trial], store).trials
    assert found.state == state
    if task and state == "missing":
        assert "OUT_OF_MEMORY" in found.note
    # Nobody knows better than the rows: a failure that is recorded is one, once the task is over.
    store.write_failure(trial, "evaluate", ValueError("boom"), {})
    [found] = status.examine([trial], store).trials
    assert found.state == ("failed" if state == "missing" else state)


def test_without_an_answer_nothing_is_submitted_and_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_: object) -> None:
        raise UserError("squeue failed: Unable to contact slurm controller")

    trial, store = Trial(Pruning("embedded", "dense", "dense", 0.0), Evaluation()), Store(tmp_path)
    batches.save(store, a_batch(steps=(f"evaluate-{key(trial)}",), job="7"))
    monkeypatch.setattr(queue, "tasks", silent)
    assert "Unable to contact" in str(status.examine([trial], store).problem)
    with pytest.raises(UserError, match="Unable to contact"):
        submit.submit(Sweep("tiny", (trial,), Cluster(executor="debug"), Work(tmp_path)))


def simulate(count: int, results: Path) -> dict[str, float]:
    """Submit trials through the debug executor, which runs nothing until it is asked to; seconds of each part."""
    seconds, started = {}, time.monotonic()

    def lap(what: str) -> None:
        nonlocal started
        seconds[what], started = time.monotonic() - started, time.monotonic()

    trials = tuple(
        Trial(Pruning("embedded", "wanda", "hybrid", 0.25, (64, 64), calibration=Calibration(seed=seed)), Evaluation())
        for seed in range(count)
    )
    sweep = Sweep("large", trials, Cluster(executor="debug"), Work(results))
    lap("define")
    submitted = submit.submit(sweep)
    lap("submit")
    assert [len(jobs) for _, jobs in submitted] == [count, count]
    assert len(list((results / "sweeps").rglob("*.json"))) == 2
    # The debug executor's jobs are in this process.
    assert submit.submit(sweep) == []
    lap("submit again")
    assert len(status.examine(trials, Store(results)).trials) == count
    lap("status")
    return seconds


def test_a_thousand_trials_are_two_batches(tmp_path: Path) -> None:
    simulate(1_000, tmp_path)


@pytest.mark.slurm
def test_ten_thousand_trials_take_seconds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with capsys.disabled():
        for count in (2_500, 5_000, 10_000):
            seconds = simulate(count, tmp_path / str(count))
            print(
                f"\n{count:6} trials: " + ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items()), end=""
            )
    assert sum(seconds.values()) < 60


def test_ctrl_c_on_the_command_line_leaves_no_claim(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from experiments.run.store import Store\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with Store(Path(sys.argv[1])).lease('sweep'): os.kill(os.getpid(), signal.SIGINT)"
    )
    outcome = Python(script, tmp_path)
    assert outcome.wait() and "KeyboardInterrupt" in outcome.stderr
    assert list((tmp_path / "locks").iterdir()) == []
    assert json.dumps(sorted(Store(tmp_path).leased())) == "[]"


def test_a_signal_to_stop_waits_until_it_is_handled(tmp_path: Path) -> None:
    """It comes while Python starts, as preemptions do: the process lives, and its handler gets it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "signal.signal(signal.SIGUSR2, lambda *_: print('handled'))\n"
        "print('started', flush=True)\n"
        "from slurm import task\n"
        "task._listen()\n"
    )
    command = [sys.executable, "-I", "-S", "-c", task.LAUNCHER, "-u", str(script)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    assert outcome.stdout.split() == ["started", "handled"]
