"""Signals that come while learning wait until its checkpoint is written, and then act."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import Python

from experiments.run.signals import SIGNALS, deferred_signals
from patch.learn.saved import CHECKPOINT

every_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@every_signal
def test_a_signal_waits_and_then_reaches_the_handler_before(number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda received, _: seen.append(received))
    try:
        with deferred_signals() as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop() and not seen
        assert seen == [number]
        os.kill(os.getpid(), number)
        assert seen == [number, number], "the handler is not back in its place"
    finally:
        signal.signal(number, before)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as on a terminal: a shell has its background processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_time_it_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it did not act at once")


@pytest.mark.usefixtures("interruptible")
def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_without_a_signal_nothing_changes() -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with deferred_signals() as stop:
        assert not stop()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_in_another_thread_there_is_nothing_to_defer() -> None:
    answers: list[bool] = []

    def enter() -> None:
        with deferred_signals() as stop:
            answers.append(stop())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert answers == [False]


LEARN = """
import os, signal, sys
from experiments.run import checkpoints
from experiments.studies import build
from experiments.studies.trial import Calibration
from experiments.run.runtime import Machine
from experiments.run.store import Store
from pathlib import Path

def progress(label, done, total):
    if done == 2 and "patch-joint" in label and told != "none":
        os.kill(os.getpid(), getattr(signal, told))

results, model, text, told = sys.argv[1:]
pruning = build.learned(
    model, "patch-joint", 0.45, (16, 16), text, Calibration(text, 4, 16),
    start=None, steps=4, batch=2, microbatch=1, length=32, activation_checkpointing=False, checkpoint_every=100,
)
print(checkpoints.ensure_checkpoint(pruning, Store(Path(results)), Machine("cpu", None, progress)))
"""


def test_a_process_that_is_told_to_stop_saves_and_obeys(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    name = "SIGTERM"

    def run(told: str) -> Python:
        process = Python(LEARN, tmp_path, tiny_model, tiny_text, told)
        process.wait()
        return process

    stopped = run(name)
    assert stopped.returncode == -getattr(signal, name), stopped.stderr
    assert f"{name}: stopping" in stopped.stderr
    (state,) = tmp_path.glob(f"work/*/{CHECKPOINT}")
    assert torch.load(state)["step"] == 2, "checkpoints every 100 steps: this one was written because of the signal"
    finished = run("none")
    assert finished.returncode == 0 and Path(finished.stdout.strip()).is_dir(), finished.stderr
