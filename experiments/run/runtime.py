"""Where trials run."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from experiments.run.sources import Sources
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
        runs_code: whether programs that a model wrote may be run, in a sandbox (`experiments.eval.humaneval`).
    """

    device: str
    data: Path | None
    progress: Progress
    ranks: Ranks = ALONE
    runs_code: bool = False

    @cached_property
    def sources(self) -> Sources:
        """What texts, tasks and models of the hub hold here."""
        return Sources(self.data)

    @property
    def dtype(self) -> torch.dtype | None:
        """Weights are used as they are stored, but a CPU computes in float32: few have fast bfloat16."""
        return torch.float32 if self.device == "cpu" else None

    @property
    def can_time(self) -> bool:
        """Whether a time taken here says something: kernels are for GPUs, and CUDA graphs are how they are timed."""
        return self.device.startswith("cuda")


def code_allowed() -> bool:
    """Whether jobs may run programs that a model wrote: as their environment says, which they have from who submits."""
    return os.environ.get("HTS_RUN_GENERATED_CODE", "0").lower() not in ("", "0", "false", "no")


# Of the CPU, what a process takes beside its GPU. What runs there is little, and several processes on one machine with
# torch's default, a thread for every core each, keep all cores busy waiting for one another and leave GPUs idle.
THREADS_BESIDE_GPU = 4


def leave_threads(device: str) -> None:
    """Have this process compute in few threads if its device is a GPU; never in more than it was given.

    ``OMP_NUM_THREADS`` says otherwise where it is set.
    """
    if device.startswith("cuda") and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), THREADS_BESIDE_GPU))


def product_rate(machine: Machine) -> float:
    """Operations a second that a large matrix product reaches here; takes a fraction of a second."""
    size, dtype = (1024, torch.float32) if machine.device == "cpu" else (4096, torch.bfloat16)
    operand = torch.ones(size, size, device=machine.device, dtype=dtype)
    seconds = []
    # The first one also starts libraries up.
    for _ in range(4):
        started = time.perf_counter()
        (operand @ operand)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def memory(machine: Machine) -> float:
    """GiB of memory that the device has, the machine's own for a CPU."""
    if machine.device.startswith("cuda"):
        total = torch.cuda.get_device_properties(machine.device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total / 2**30
