"""Where a number comes from: code revision, machine, GPU and its clocks, library versions, time."""

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from patch.errors import UserError

_LIBRARIES = ("torch", "triton", "transformers", "numpy", "lm-eval", "datasets")


def command_line() -> str:
    """What this process was called with, as a shell would take it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def revision() -> tuple[str, bool | None]:
    """Git revision of the code and whether it has uncommitted changes.

    ``HTS_REVISION`` names it where the code runs from an exported tree or a container without its repository; whether
    that tree was changed cannot be known, so the second part is None.

    Raises:
        UserError: if it does not name a whole commit; one that was mistyped or cut off leads nowhere.
    """
    if named := os.environ.get("HTS_REVISION"):
        if not re.fullmatch("[0-9a-f]{40}", named):
            raise UserError(f"HTS_REVISION={named}: not a commit of 40 digits: give what `git rev-parse HEAD` prints")
        return named, None
    here = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", here, "rev-parse", "HEAD")
    if commit is None:
        return _installed_version(), None
    # Rows and figures that a run itself writes do not make the code dirty.
    return commit, bool(_output("git", "-C", here, "status", "--porcelain", "--", ":/", ":(exclude,top)results"))


@cache
def machine() -> dict[str, Any]:
    """Host, processor, GPU name and library versions; all that does not change while a process runs."""
    import torch

    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": platform.machine() + " " + _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions | ({"cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
    }


def _installed_version() -> str:
    try:
        return f"v{metadata.version('hybrid-tile-sparsity')}"
    except metadata.PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def clocks() -> dict[str, str] | None:
    """Current SM and memory clock of the first GPU, or None where there is none."""
    line = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader", "--id=0")
    if not line:
        return None
    sm, memory = line.split(", ")
    return {"sm": sm, "memory": memory}


def provenance(
    wall_seconds: float, sources: dict[str, str] | None = None, checkpoint: str | None = None
) -> dict[str, Any]:
    """The provenance part of a row.

    To that of making a checkpoint is added as ``base`` the content hash of the one whose mask it has, if there is one
    (`experiments.studies.trial.Pruning.masked_as`).

    Args:
        wall_seconds: how long the measured stage took.
        sources: SHA-256 of each text that the stage read, or that a checkpoint was made of, by name; of tasks too.
        checkpoint: content hash of the weights and masks that were measured (`experiments.data.models.content`); rows
            of different content are never drawn as one point.
    """
    commit, dirty = revision()
    facts = machine()
    return {
        "git": commit,
        "dirty": dirty,
        **facts,
        "clocks": clocks() if facts["gpu"] else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_s": round(wall_seconds, 2),
        "sources": sources or {},
        "checkpoint": checkpoint,
    }
