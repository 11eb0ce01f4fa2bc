"""What making a checkpoint took: seconds, GPUs, memory, and joules where the GPUs count them.

Learning may be stopped and go on in another process. What the earlier ones took is kept in the run's folder, up to the
last minute of one that was killed.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from analysis.rows.format import Fact
from experiments.run.runtime import Machine
from patch.files import write_atomic

# Seconds between two notes.
_EVERY = 60.0
_NOTE = "spent.json"


class Spending:
    """Begins when it is made.

    Args:
        together: whether all ranks of the machine work, and each asks for `facts`; else this one alone does.
        work: folder of a run that may go on in another process; None if none does.
    """

    def __init__(self, machine: Machine, together: bool, work: Path | None = None) -> None:
        self._machine = machine
        self._together = together
        self._started = self._noted = time.monotonic()
        if machine.can_time:
            torch.cuda.reset_peak_memory_stats()
        self._at_first = self._read()
        # Of earlier processes, of whatever number; rank 0 keeps the notes of all.
        self._note = work / _NOTE if work and machine.ranks.rank == 0 else None
        self._before = {"seconds": 0.0, "gpu_seconds": 0.0, "joules": 0.0}
        if self._note:
            with suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads(self._note.read_text(encoding="utf-8"))
                self._before = {name: float(found[name]) for name in self._before}

    @property
    def seconds(self) -> float:
        """So far, earlier processes included."""
        return self._before["seconds"] + self._here

    def note(self, now: bool = False) -> None:
        """Keep what was spent for a process that goes on; once a minute, or ``now``."""
        if self._note and (now or time.monotonic() - self._noted > _EVERY):
            self._noted = time.monotonic()
            # Of the other ranks' GPUs this one knows nothing until the end: they do the same.
            joules = self._before["joules"] + self._size * (self._read() - self._at_first)
            spent = {"seconds": self.seconds, "gpu_seconds": self._gpu_seconds, "joules": joules}
            write_atomic(self._note, json.dumps(spent))

    def forget(self) -> None:
        """The checkpoint is there: nothing goes on."""
        if self._note:
            self._note.unlink(missing_ok=True)

    @property
    def _here(self) -> float:
        return time.monotonic() - self._started

    @property
    def _size(self) -> int:
        return self._machine.ranks.size if self._together else 1

    @property
    def _gpu_seconds(self) -> float:
        return self._before["gpu_seconds"] + self._size * self._here

    def facts(self) -> list[Fact]:
        """``prune_seconds``; on GPUs also ``peak_memory`` of this one, how many ``gpus`` worked, and their ``energy``.

        The energy is all that these GPUs used in the meantime, for whatever process.
        """
        facts = [Fact("prune_seconds", self.seconds, "s", {})]
        if not self._machine.can_time:
            return facts
        ranks, size = self._machine.ranks, self._size
        joules = self._read() - self._at_first
        if size > 1:
            joules = size * float(ranks.mean(torch.tensor(joules, device=self._machine.device)))
        joules += self._before["joules"]
        # The mean, where processes of another number went before.
        gpus = self._gpu_seconds / max(self.seconds, 1e-9)
        facts += [Fact("peak_memory", torch.cuda.max_memory_allocated(), "B", {}), Fact("gpus", gpus, "1", {})]
        return facts + ([Fact("energy", joules, "J", {})] if math.isfinite(joules) else [])

    def _read(self) -> float:
        if not self._machine.can_time:
            return math.nan
        # NVML is of no use without a GPU.
        from experiments.bench.power import meter

        joules = meter(self._machine.device).energy()
        return math.nan if joules is None else joules


@contextmanager
def noted(spending: Spending) -> Iterator[None]:
    """What was spent is kept if the body is stopped or fails: the next process begins with it."""
    try:
        yield
    except BaseException:
        # A full disk, which may have stopped it, is told of by what was stopped.
        with suppress(OSError):
            spending.note(now=True)
        raise
