"""``hts doctor``: what this machine can run, and why not."""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from experiments.cli.options import DEFAULT_RESULTS, Data, Results, console
from patch.errors import UserError

_OPTIONAL = {"lm-eval": ("lm_eval", "tasks", "eval"), "submitit": ("submitit", "Slurm sweeps", "slurm")}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, whether it serves, and what follows."""

    subject: str
    ok: bool
    detail: str


def doctor(results: Results = DEFAULT_RESULTS, data: Data = None) -> None:
    """Say what this machine can run, and why not."""
    table = Table("", "what", "found", box=None, pad_edge=False, show_header=False)
    for finding in examine(results, data):
        table.add_row(Text(*(("ok", "green") if finding.ok else ("--", "yellow"))), finding.subject, finding.detail)
    console.print(table)


def examine(results: Path, data: Path | None) -> list[Finding]:
    """Look at libraries, accelerators, texts, tasks and disk."""
    return [*_libraries(), *_accelerators(), _slurm(), *_data(data), _models(), _disk(results)]


def _libraries() -> list[Finding]:
    required = ("torch", "transformers", "datasets", "triton")
    findings = []
    for name in required:
        try:
            findings.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, False, "not installed"))
    for name, (module, use, extra) in _OPTIONAL.items():
        there = importlib.util.find_spec(module) is not None
        missing = f"not installed, so no {use}: pip install 'hybrid-tile-sparsity[{extra}]'"
        findings.append(Finding(name, there, importlib.metadata.version(name) if there else missing))
    return findings


def _accelerators() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        cores = torch.get_num_threads()
        return [
            Finding("GPU", False, f"none that torch {torch.__version__} sees: {cores} CPU threads, small models only")
        ]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        sparse_cores = properties.major >= 8
        detail = f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        findings.append(
            Finding(
                f"GPU {index}", sparse_cores, detail if sparse_cores else f"{detail}: no 2:4 tensor cores (needs 8.0)"
            )
        )
    return findings


def _data(data: Path | None) -> list[Finding]:
    if data is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        note = "texts, tasks and models come from the Hugging Face hub; --data DIR or HTS_DATA names local copies"
        return [
            Finding("data", not offline, "HF_HUB_OFFLINE is set and there is no data directory" if offline else note)
        ]
    from experiments.data import text
    from experiments.eval import tasks

    return [
        *(_check(f"text {name}", partial(text.check_source, name, data)) for name in text.SOURCES),
        *(_check(f"task {name}", partial(tasks.check_tasks, [name], data)) for name in tasks.TASKS),
    ]


def _check(subject: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except UserError as error:
        return Finding(subject, False, str(error))
    return Finding(subject, True, "ready")


def _slurm() -> Finding:
    command = shutil.which("sbatch")
    return Finding("Slurm", command is not None, command or "no sbatch on the PATH: sweeps run with --cluster local")


def _models() -> Finding:
    from experiments.data import models

    return Finding("models", True, ", ".join(models.REGISTRY))


def _disk(results: Path) -> Finding:
    place = next(parent for parent in (results.absolute(), *results.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free / 2**30
    return Finding("disk", free > 5, f"{free:.0f} GiB free at {place} (a checkpoint is as large as its model)")
