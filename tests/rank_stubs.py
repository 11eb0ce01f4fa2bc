"""What several processes are given to do in tests: functions of a module that each of them can import."""

import json
import os
from pathlib import Path

from experiments.run.runtime import Machine


def cpu(processes: int) -> Machine:
    return Machine("cpu", None, lambda *told: print("progress", *told, flush=True))


def introduce(folder: Path, machine: Machine) -> None:
    """Leave this process's rank and place, once all have met."""
    machine.ranks.agree(True, machine.device)
    machine.progress("met", machine.ranks.rank, machine.ranks.size)
    about = {"size": machine.ranks.size, "local": os.environ["LOCAL_RANK"], "pid": os.getpid()}
    (folder / f"{machine.ranks.rank}.json").write_text(json.dumps(about))


def introduce_and_fail_on_the_second(folder: Path, machine: Machine) -> None:
    """An error of rank 1, while rank 0 waits for it."""
    introduce(folder, machine)
    if machine.ranks.rank == 1:
        raise ValueError("no such thing")
    machine.ranks.agree(True, machine.device)
