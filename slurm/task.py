"""What a job does: one step of a plan, a whole study on this machine, or its report.

These are submitit's callables: they are pickled when a sweep is submitted and run where Slurm puts them. All that they
know of earlier attempts lies in the results directory: a requeued job is given the same again and goes on from there.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from submitit.helpers import Checkpointable, DelayedSubmission

from analysis.rows import layout
from experiments.run import checkpoints, pipeline, progress
from experiments.run.runtime import Machine, code_allowed, leave_threads
from experiments.run.store import Store
from experiments.studies.trial import Trial, key
from patch.errors import UserError
from patch.learn.descent import Stopped
from slurm import plan, queue, torchrun
from slurm.cluster import ALONE, Launch
from slurm.plan import Step

# What Slurm sends before a time limit or a preemption, and submitit handles.
_STOP = signal.SIGUSR2

# Starts Python with that signal blocked: it would kill the process in the seconds before submitit handles it, and Slurm
# would take the job for failed instead of requeueing it. (``env --block-signal`` is not on older systems.)
LAUNCHER = (
    "import os, signal, sys; "
    f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(_STOP)}]); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)

Told = Callable[[Trial, Exception | None], None]

# Seconds for a controller of Slurm to come back.
_PATIENCE = 300.0


@dataclass(frozen=True)
class Work:
    """What every job of a sweep is told.

    Attributes:
        results: results directory.
        data: data directory, or None for the hub.
        device: a torch device name; None takes the GPU if there is one.
    """

    results: Path
    data: Path | None = None
    device: str | None = None

    def machine(self, processes: int = 1) -> Machine:
        """The machine that this job runs on, for each of so many processes that share it."""
        import torch

        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            # torch counts the cores of the node, of which this job may have been given few.
            torch.set_num_threads(max(1, min(int(cores) // processes, torch.get_num_threads())))
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        leave_threads(device)
        return Machine(device, self.data, progress.lines(), runs_code=code_allowed())


@dataclass(frozen=True)
class RunStep(Checkpointable):
    """Do one step, unless it is done or what it needs is missing, and say in the log what came of it.

    If it fails, every trial that needs it gets a row with the traceback. A step that several nodes share is called on
    each; the first one decides, and when it ends, Slurm ends the others.

    Attributes:
        launch: the processes that learn, if that is what the step does.
    """

    work: Work
    launch: Launch = ALONE

    def __call__(self, step: Step) -> None:
        _listen()
        store = Store(self.work.results)
        print(f"{step.id}: {step.label}", flush=True)
        if not int(os.environ.get("SLURM_NODEID", "0")) and not self._can_start(step, store):
            return
        try:
            if step.kind == "evaluate":
                with store.lease(f"trial-{key(step.trials[0])}"):
                    pipeline.run_trial(step.trials[0], store, self.work.machine())
            else:
                make_checkpoint(step, self.work, self.launch)
        except (Stopped, torchrun.Interrupted) as stopped:
            # Told to, and not by the signal that submitit answers: no failure.
            _leave_the_end_to_slurm()
            raise SystemExit(f"{step.id}: {stopped}") from stopped
        except subprocess.SubprocessError:
            # It was told to stop, and Slurm could not be asked to requeue it: not its failure, the next sweep has it.
            raise
        except Exception as error:
            for trial in step.trials:
                pipeline.record_failure(trial, step.label, error, store)
            raise
        print(f"{step.id}: done", flush=True)

    def _can_start(self, step: Step, store: Store) -> bool:
        """Whether it is not done, and what it needs is; if that is under way, this job is requeued."""
        if plan.is_done(step, store, self.work.machine().can_time):
            print(f"{step.id}: was done already", flush=True)
            return False
        while missing := _missing(step, store):
            # Not a failure of its own: its trial says why already, or the next sweep submits both again.
            print(f"{step.id}: cannot start without {missing}", flush=True)
            if "SLURM_JOB_ID" in os.environ and _is_under_way(missing, store):
                # Slurm takes a job for ended that it is about to requeue; when it starts this one again, it knows.
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
                raise SystemExit(f"{step.id}: requeued until {missing} is over")
            # Only a look after Slurm's answer tells: it may have been done, and left the queue, since the look before.
            if _missing(step, store) == missing:
                return False
        return True

    def checkpoint(self, step: Step) -> DelayedSubmission:
        """What a requeued job is given: the same, since all progress is on disk."""
        return DelayedSubmission(self, step)


@dataclass(frozen=True)
class RunTrials:
    """Bring all trials of a study to completion, beside other processes that do the same."""

    work: Work
    launch: Launch = ALONE

    def __call__(self, trials: tuple[Trial, ...]) -> None:
        def tell(trial: Trial, error: Exception | None) -> None:
            print(f"{trial.label}: {f'failed: {error}' if error else 'done'}", flush=True)

        store = Store(self.work.results)
        if self.launch.size > 1:
            self._learn_together(trials, store, tell)
            # What failed there must not be tried again by a single process.
            trials = tuple(trial for trial in trials if not store.failure(trial))
        # A failed trial is left to --retry-failed.
        pipeline.run_trials(trials, store, self.work.machine(), tell)

    def _learn_together(self, trials: tuple[Trial, ...], store: Store, tell: Told) -> None:
        """Make the learned checkpoints, those that other processes make last."""
        waiting = [step for step in plan.steps(trials).values() if step.kind == "learn"]
        waiting.sort(key=lambda step: step.lease in store.leased())
        for step in waiting:
            if plan.is_done(step, store) or any(store.failure(trial) for trial in step.trials):
                continue
            try:
                make_checkpoint(step, self.work, self.launch)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                for trial in step.trials:
                    pipeline.record_failure(trial, step.label, error, store)
                    tell(trial, error)


def make_checkpoint(step: Step, work: Work, launch: Launch) -> None:
    """What a pruning or learning step does, in one process or, if it learns, in as many as `launch` says."""
    store = Store(work.results)
    if step.kind == "learn" and launch.size > 1:
        torchrun.run(launch, partial(checkpoints.ensure_checkpoint, step.pruning, store), work.machine)
    else:
        checkpoints.ensure_checkpoint(step.pruning, store, work.machine())


@dataclass(frozen=True)
class WriteReport:
    """Write the table and figures of a study, of those trials that have rows."""

    work: Work

    def __call__(self, study: str, trials: tuple[Trial, ...]) -> None:
        _listen()
        from experiments.publish import reports

        for path in reports.write(study, trials, Store(self.work.results)):
            print(f"wrote {path}", flush=True)


def _missing(step: Step, store: Store) -> str | None:
    """The first step that this one needs and whose checkpoint is not there."""
    # By the folder's list, which NFS brings up to date when it is opened: that a file is not there, it may remember.
    made = set(store.listed(layout.CHECKPOINTS))
    return next((id for id in step.needs if id.partition("-")[2] not in made), None)


def _is_under_way(id: str, store: Store) -> bool:
    """Whether a step waits or runs, as far as Slurm knows; while its controller is away, asked again for minutes."""
    last = time.monotonic() + _PATIENCE
    while True:
        try:
            return any(id in steps for _, steps in queue.live(store))
        except UserError:
            if time.monotonic() > last:
                raise
            time.sleep(5)


def _leave_the_end_to_slurm() -> None:
    """Wait until Slurm ends this job, if it is one.

    It requeues a job that it preempts only if the job has not ended before, as failed; one that was cancelled has been,
    whatever it does now.
    """
    if "SLURM_JOB_ID" in os.environ:
        time.sleep(_PATIENCE)


def _listen() -> None:
    """Let the signal through that `LAUNCHER` blocked, and that may have come meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [_STOP])
