"""Forty trials on a real Slurm that preempts, times out, cancels, kills and restarts: nothing is lost or done twice."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dev_cluster import REPOSITORY, DevCluster, Forty, wait_until
from forty_study import IMPOSSIBLE, forty_trials

from analysis.rows.jsonl import from_lines
from experiments.run.store import FAILURE, Store
from experiments.studies.trial import key
from slurm import batches, plan, status

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory, cluster: DevCluster) -> Iterator[Any]:
    """The same trials in one process without Slurm, beside the tests that need them at their end."""
    root = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, str(REPOSITORY / "tests" / "forty_study.py"), str(root), str(text), "run"]
    process = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def rows() -> dict[str, list[Any]]:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        return measured(root)

    yield rows
    process.kill()


def measured(root: Path) -> dict[str, list[Any]]:
    """What the rows say but for provenance, durations and the file names in tracebacks."""
    facts: dict[str, list[Any]] = {}
    for path in sorted((root / "rows").rglob("*.jsonl")):
        rows = from_lines(path.read_text())
        facts[str(path.relative_to(root))] = [
            (
                row["metric"],
                row["value"],
                row["stderr"],
                {name: value for name, value in row["labels"].items() if name not in ("traceback", "during")},
                row["definition"],
            )
            for row in rows
            if row["metric"] != "prune_seconds"
        ]
    return facts


class Sweep(Forty):
    """The forty trials on their way through the cluster."""

    def queue(self, *states: str) -> list[tuple[str, str]]:
        """Job and stage of the tasks in the queue that are in one of the states."""
        out = self.cluster.run("squeue", "-hr", "-t", ",".join(states), "-O", "JobArrayID:30,Name:80")
        rows = [line.split() for line in out.splitlines()]
        return [(job, name.split("-")[2]) for job, name in rows if name.startswith("hts-forty-")]

    def status(self) -> status.Status:
        return status.examine(forty_trials(self.text), Store(self.results))

    def drained(self) -> bool:
        return not self.queue("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

    def done_by(self) -> Counter[str]:
        """How many tasks brought each step to its end, by their logs."""
        found: Counter[str] = Counter()
        for batch in batches.load_all(Store(self.results)):
            for index, step in enumerate(batch.steps):
                log = batches.log_path(Store(self.results), batch, index)
                if log.is_file():
                    found[step] += len(re.findall(rf"^{step}: done$", log.read_text(), re.MULTILINE))
        return found

    def worker(self, job: str) -> int | None:
        """The process that does the work of a running task."""
        raw = self.cluster.run("squeue", "-h", "-j", job, "-O", "JobID:20").split()[0]
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            is_worker = b"submitit.core._submit\0" in command and not command.startswith(b"srun\0")
            if is_worker and f"SLURM_JOB_ID={raw}".encode() in environment:
                return int(folder.name)
        return None

    def has_started(self, job: str) -> bool:
        """Whether a task has come to its work; before that it is submitit that runs."""
        array = job.partition("_")[0]
        logs = self.results.glob(f"sweeps/forty/*/{array}*_0_log.out")
        logs = [log for log in logs if log.name in (f"{job}_0_log.out", f"{array}_0_log.out")]
        return any("prune " in log.read_text() or "learn " in log.read_text() for log in logs)


@pytest.fixture(scope="module")
def sweep(cluster: DevCluster, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    # Slurm looks at time limits every 30 s: a job of one minute is told to stop some time in its first 45 seconds.
    return Sweep(cluster, tmp_path_factory.mktemp("sweep") / "runs", text)


def test_forty_trials_survive(
    sweep: Sweep, undisturbed: Any, cluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    file = cluster.file(tmp_path / "test.toml", partition="low", signal=15)
    options = ("forty", "--cluster", file, "--time", "learn=1")

    # Two sweeps at once: one submits, the other finds everything submitted.
    both = [sweep.start("sweep", *options) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0], [process.stderr for process in both]
    assert sorted("submitted" in process.stdout for process in both) == [False, True]
    submitted = [step for batch in batches.load_all(Store(sweep.results)) for step in batch.steps]
    known = plan.steps(forty_trials(sweep.text))
    assert Counter(submitted) == Counter([*known, "report"])
    # The cluster takes 25 tasks an array.
    assert max(len(batch.steps) for batch in batches.load_all(Store(sweep.results))) == 25
    counts = sweep.status().counts()
    assert counts["running"] + counts["pending"] + counts["done"] == 40, counts

    # A task is cancelled and another one's process killed, while they run.
    first = set(sweep.queue("R"))
    # Tasks that have just begun: a task that is told to stop goes on until Slurm kills it, and may still get done.
    wait_until("two prunings begin", lambda: len(_prunings(sweep) - first) >= 2)
    (cancelled, _), (killed, _), *_ = sorted(_prunings(sweep) - first, key=lambda task: _age(task[0]), reverse=True)
    cluster.run("scancel", cancelled)
    wait_until("its process is there", lambda: sweep.worker(killed))
    worker = sweep.worker(killed)
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    lost = {_step(sweep, job) for job in (cancelled, killed)}

    # The controller restarts in the middle.
    cluster.control("restart-controller")
    counts = sweep.status().counts()
    assert sum(counts.values()) == 40 and counts["pending"] > 0, counts

    # A job of higher priority takes the whole node while masks are learned.
    wait_until("masks are learned", lambda: [job for job, kind in sweep.queue("R") if kind == "learn"])
    learning = [job for job, kind in sweep.queue("R") if kind == "learn"]
    wait_until("one is at work", lambda: any(sweep.has_started(job) for job in learning))
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "main", "-c", "4", "-o", "/dev/null", "--wrap", "sleep 5"
    ).strip()
    wait_until("it runs", lambda: "RUNNING" in cluster.run("squeue", "-h", "-t", "all", "-j", urgent, "-o", "%T"))
    wait_until("something was requeued", lambda: sweep.status().counts()["requeued"])

    # Whatever happened, the queue runs empty, and status tells what is missing and why.
    wait_until("the queue is empty", sweep.drained, 900)
    states = {key(trial.trial): trial for trial in sweep.status().trials}
    missing = {id for id, state in states.items() if state.state == "missing"}
    stand_on_lost = {key(trial) for id in lost for trial in known[id].trials}
    failed = {id for id, state in states.items() if state.state == "failed"}
    assert missing and missing == stand_on_lost - failed
    assert failed - stand_on_lost == {key(forty_trials(sweep.text)[-1])} or failed == set()
    notes = " ".join(states[id].note for id in missing)
    assert "CANCELLED" in notes and ("FAILED" in notes or "OUT_OF_MEMORY" in notes), notes
    assert "missing" in sweep.hts("status", "forty")
    assert "slurmstepd" in sweep.hts("logs", "forty") or "Killed" in sweep.hts("logs", "forty")

    # Once more: only what is missing is submitted, and now everything comes to its end.
    before = {batch.id for batch in batches.load_all(Store(sweep.results))}
    sweep.hts("sweep", *options)
    again = [step for b in batches.load_all(Store(sweep.results)) if b.id not in before for step in b.steps]
    assert set(again) == lost | {f"evaluate-{id}" for id in missing} | {"report"}
    wait_until("the queue is empty", sweep.drained, 600)
    counts = sweep.status().counts()
    assert (counts["done"], counts["failed"]) == (39, 1), counts
    broken = forty_trials(sweep.text)[-1]
    failure = Store(sweep.results).failure(broken)
    assert failure and str(IMPOSSIBLE) in failure["error"] and "Traceback" in failure["traceback"]
    assert str(IMPOSSIBLE) in sweep.hts("status", "forty") and str(IMPOSSIBLE) in sweep.hts("logs", "forty")

    # Nothing is left to do but what failed, which is tried again only when asked for.
    assert "submitted" not in sweep.hts("sweep", *options)
    assert f"evaluate {broken.label}" in sweep.hts("sweep", *options, "--retry-failed", "--dry-run")

    # Each step was brought to its end once, and learning was interrupted and resumed.
    assert _surplus(sweep, known, broken) == {}
    restarts = cluster.run("sacct", "-nXP", "-D", "-S", "2000-01-01", "-o", "JobName,State")
    assert re.search(r"hts-forty-learn-\w+\|(PREEMPTED|REQUEUED)", restarts), restarts

    # The rows are those of a run without Slurm, and nothing else lies around.
    assert measured(sweep.results) == undisturbed()
    assert Store(sweep.results).leased() == {} and list((sweep.results / "locks").iterdir()) == []
    names = [path.name for path in sweep.results.rglob("*") if "sweeps" not in path.parts]
    assert [name for name in names if name.startswith(".") and not name.endswith(".lock")] == []
    assert [name for name in names if "partial" in name or name == "learner.pt"] == []
    assert (sweep.results / "reports" / "forty" / "accuracy.md").is_file()
    assert FAILURE not in (sweep.results / "reports" / "forty" / "accuracy.md").read_text()


def _prunings(sweep: Sweep) -> set[tuple[str, str]]:
    return {task for task in sweep.queue("R") if task[1] == "prune"}


def _age(job: str) -> tuple[int, ...]:
    """Array and index of a task, which tell the order in which tasks start."""
    return tuple(int(part) for part in job.split("_"))


def _step(sweep: Sweep, job: str) -> str:
    """The step of a task of an array."""
    array, _, index = job.partition("_")
    batch = next(batch for batch in batches.load_all(Store(sweep.results)) if batch.job == array)
    return batch.steps[int(index or 0)]


def _surplus(sweep: Sweep, known: dict[str, plan.Step], broken: Any) -> dict[str, int]:
    """Steps that were not brought to their end exactly once, with how often they were."""
    done = sweep.done_by()
    return {id: done[id] for id in known if done[id] != 1 and id != f"evaluate-{key(broken)}"}
