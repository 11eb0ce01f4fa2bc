"""What making a checkpoint took: seconds, GPUs, memory, and joules where the GPUs count them."""

import math
import time

import torch

from analysis.rows.format import Fact
from experiments.run.runtime import Machine


class Spending:
    """Begins when it is made.

    Args:
        together: whether all ranks of the machine work, and each asks for `facts`; else this one alone does.
    """

    def __init__(self, machine: Machine, together: bool) -> None:
        self._machine = machine
        self._together = together
        self._started = time.monotonic()
        if machine.can_time:
            torch.cuda.reset_peak_memory_stats()
        self._joules = self._read()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._started

    def facts(self) -> list[Fact]:
        """``prune_seconds``; on GPUs also ``peak_memory`` of this one, how many ``gpus`` worked, and their ``energy``.

        The energy is all that these GPUs used in the meantime, for whatever process.
        """
        facts = [Fact("prune_seconds", self.seconds, "s", {})]
        if not self._machine.can_time:
            return facts
        ranks = self._machine.ranks
        size = ranks.size if self._together else 1
        joules = self._read() - self._joules
        if size > 1:
            joules = size * float(ranks.mean(torch.tensor(joules, device=self._machine.device)))
        facts += [Fact("peak_memory", torch.cuda.max_memory_allocated(), "B", {}), Fact("gpus", size, "1", {})]
        return facts + ([Fact("energy", joules, "J", {})] if math.isfinite(joules) else [])

    def _read(self) -> float:
        if not self._machine.can_time:
            return math.nan
        # NVML is of no use without a GPU.
        from experiments.bench.power import meter

        joules = meter(self._machine.device).energy()
        return math.nan if joules is None else joules
