"""Where trials run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from patch.learn.distributed import ALONE, Ranks

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Machine:
    """Where trials run.

    Attributes:
        device: a torch device name, such as ``cpu`` or ``cuda``.
        data: data directory with local copies of texts and tasks; None takes them from the Hugging Face hub.
        progress: called with (label, done, total) as work goes on.
        ranks: the processes that learn together; only rank 0 does anything else, and writes.
    """

    device: str
    data: Path | None
    progress: Progress
    ranks: Ranks = ALONE

    @property
    def dtype(self) -> torch.dtype | None:
        """Weights are used as they are stored, but a CPU computes in float32: few have fast bfloat16."""
        return torch.float32 if self.device == "cpu" else None

    @property
    def can_time(self) -> bool:
        """Whether a time taken here says something: kernels are for GPUs, and CUDA graphs are how they are timed."""
        return self.device.startswith("cuda")
