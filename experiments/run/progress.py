"""How far work is, for whoever waits: a bar on a terminal, lines in a log."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from experiments.run.runtime import Progress

# Seconds between two lines about the same work.
EVERY = 15.0


@contextmanager
def shown(console: Console, quiet: bool = False) -> Iterator[Progress]:
    """Progress on a console while the body runs: bars if it is a terminal, else lines.

    Args:
        quiet: say nothing, as the ranks after the first do.
    """
    if quiet:
        yield lambda label, done, total: None
    elif console.is_terminal:
        # Labels have paths in them, which are no markup.
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Bars(*columns, TimeRemainingColumn(), console=console) as bars:
            yield _on(bars)
    else:
        yield lines()


def _on(bars: Bars) -> Progress:
    tasks: dict[str, TaskID] = {}

    def progress(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)
        if done >= total:
            bars.remove_task(tasks.pop(label))

    return progress


def _print(line: str) -> None:
    print(line, flush=True)


def lines(write: Callable[[str], None] = _print, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Progress for a log: a line at once, at the end of anything, and every `EVERY` seconds with the time left."""
    began: dict[str, tuple[float, int]] = {}
    said = -math.inf

    def progress(label: str, done: int, total: int) -> None:
        nonlocal said
        now = clock()
        started, first = began.setdefault(label, (now, done))
        if done >= total:
            del began[label]
            write(f"{label}: {done}/{total} in {_duration(now - started)}")
        elif now - said >= EVERY:
            left = f", {_duration((total - done) * (now - started) / (done - first))} left" if done > first else ""
            write(f"{label}: {done}/{total}{left}")
        else:
            return
        said = now

    return progress


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
