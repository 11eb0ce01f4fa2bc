"""A cluster, as its user writes it down once: one TOML file with defaults, which the command line may override.

::

    executor = "slurm"                 # or "local": processes of this machine; or "debug": in the command itself
    partition = "gpu"
    account = "my-lab"
    parallel = 16                      # tasks of one array that run at a time
    setup = ["module load cuda/12"]    # shell lines before each job's work
    gpu_memory = 80                    # GiB; sweeps that need more are refused before they are submitted

    [stages.learn]
    gpus = 1
    memory = 128                       # GiB
    time = "1-00:00:00"

`NAME.toml` lies in ``~/.config/hts`` (or ``$XDG_CONFIG_HOME/hts``); ``--cluster`` takes the name or a path.
"""

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from experiments.studies.cost import H200_TFLOPS
from patch.errors import UserError, check_name

EXECUTORS = ("slurm", "local", "debug")
STAGES = ("prune", "learn", "evaluate", "report")

# Numbers whose zero means something; that of nodes is refused where it is known which stage asks for none.
_MAY_BE_ZERO = ("gpus", "nodes", "timeouts")


@dataclass(frozen=True)
class Launch:
    """How many processes learn one mask: ``per_node`` on each of ``nodes`` nodes."""

    nodes: int = 1
    per_node: int = 1

    @property
    def size(self) -> int:
        """How many processes that is."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Resources:
    """What one task of a stage asks for.

    Attributes:
        gpus: GPUs of each node; learning runs a process on each.
        nodes: nodes; other stages than learning use one.
        cpus: cores of each node.
        memory: GiB of main memory of each node; None takes the partition's default.
        time: limit in Slurm's notation; a task that reaches it is requeued and goes on from its last checkpoint.
    """

    gpus: int = 0
    nodes: int = 1
    cpus: int = 4
    memory: float | None = None
    time: str = "4:00:00"

    @property
    def launch(self) -> Launch:
        """The processes that learn on these resources."""
        return Launch(self.nodes, max(1, self.gpus))

    @property
    def minutes(self) -> int:
        """The time limit, in whole minutes, rounded up."""
        return parse_time(self.time)


ALONE = Launch()

_DEFAULTS = {
    "prune": Resources(gpus=1, cpus=8, memory=64, time="4:00:00"),
    "learn": Resources(gpus=1, cpus=8, memory=64, time="1-00:00:00"),
    "evaluate": Resources(gpus=1, cpus=8, memory=64, time="4:00:00"),
    "report": Resources(cpus=2, memory=8, time="0:30:00"),
}


@dataclass(frozen=True)
class Cluster:
    """Where a sweep runs.

    Attributes:
        executor: one of `EXECUTORS`.
        partition, account, qos, constraint: as sbatch takes them; None leaves them to Slurm.
        parallel: tasks of one array, or processes of this machine, that run at a time; None is all, or one process.
        setup: shell lines that run in each job before its work, such as ``module load``.
        signal: seconds before the time limit, or before a preemption where the partition grants them, at which a task
            is told to stop and is requeued.
        timeouts: how often one task may reach its time limit and be requeued.
        shared_results: the results directory is on every node, though it does not look so from here.
        trust_writers: others may write into the results directory, and so run code as whoever submits.
        gpu_memory: GiB of one GPU; None does not check estimates against it.
        gpu_tflops: what one GPU sustains on this work, for the estimate of GPU hours; an H200's by default.
        stages: resources of each of `STAGES`.
    """

    executor: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    parallel: int | None = None
    setup: tuple[str, ...] = ()
    signal: int = 120
    timeouts: int = 100
    shared_results: bool = False
    trust_writers: bool = False
    gpu_memory: float | None = None
    gpu_tflops: float = H200_TFLOPS
    stages: Mapping[str, Resources] = field(default_factory=lambda: dict(_DEFAULTS))


def load(name: str) -> Cluster:
    """The cluster of a name or path; ``slurm``, ``local`` and ``debug`` need no file and may have one.

    Raises:
        UserError: if there is no such file, or naming the key in it that is unknown or has a value that does not fit.
    """
    folder = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "hts"
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        if name in EXECUTORS:
            return Cluster(executor=name)
        known = sorted({*EXECUTORS, *(file.stem for file in folder.glob("*.toml"))})
        raise UserError(f"no cluster '{name}': {path} is not there; known: {', '.join(known)}")
    try:
        return parse(tomllib.loads(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, UserError) as error:
        raise UserError(f"{path}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def parse(given: Mapping[str, Any]) -> Cluster:
    """A cluster from the content of its file.

    Raises:
        UserError: naming the first key that is unknown or has a value that does not fit.
    """
    values = dict(given)
    stages = dict(_DEFAULTS)
    tables = values.pop("stages", {})
    for name, table in (tables if isinstance(tables, dict) else {"": tables}).items():
        check_name("stage", name, STAGES)
        stages[name] = _replace(stages[name], table if isinstance(table, dict) else {"": table}, f"stages.{name}.")
    cluster = _replace(Cluster(stages=stages), values, "")
    check_name("executor", cluster.executor, EXECUTORS)
    return cluster


def override(
    cluster: Cluster,
    options: Mapping[str, Any],
    resources: Mapping[str, Iterable[str]],
) -> Cluster:
    """A cluster with what the command line says otherwise.

    Args:
        options: fields of the cluster; None and empty ones change nothing.
        resources: fields of `Resources`, each with values such as ``4`` for all stages but the report, and ``learn=4``.

    Raises:
        UserError: naming the value that does not fit.
    """
    cluster = _replace(cluster, {name: value for name, value in options.items() if value not in (None, ())}, "--")
    stages = dict(cluster.stages)
    for name, values in resources.items():
        for text in values:
            stage, _, value = text.rpartition("=")
            chosen = [check_name("stage", stage, STAGES)] if stage else [known for known in STAGES if known != "report"]
            for each in chosen:
                stages[each] = _replace(stages[each], {name: _number(value)}, "--")
    return dataclasses.replace(cluster, stages=stages)


def parse_time(text: str) -> int:
    """Minutes of a time limit in Slurm's notation: ``90``, ``1:30:00``, ``2-00``, ``2-12:30`` or ``unlimited``.

    Raises:
        UserError: if it is none of these.
    """
    if text.lower() in ("infinite", "unlimited"):
        return 365 * 24 * 60
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"time '{text}': give minutes, hours:minutes:seconds, or days-hours:minutes:seconds")
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    if days is not None:
        parts = (days * 24 + (first or 0), second or 0, third or 0)
    elif third is not None:
        parts = (first or 0, second or 0, third)
    else:
        parts = (0, first or 0, second or 0)
    return 60 * parts[0] + parts[1] + (parts[2] > 0)


def _number(text: str) -> int | float | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _replace(value: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass of this module with fields replaced, after a look at their names and types."""
    hints = get_type_hints(type(value))
    checked = {}
    for name, given in changes.items():
        check_name("key", name, [key for key in hints if key != "stages"])
        checked[name] = _check(prefix + name, given, hints[name])
    return dataclasses.replace(value, **checked)


def _check(name: str, given: Any, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)
    if kind == tuple[str, ...]:
        if isinstance(given, list | tuple) and all(isinstance(line, str) for line in given):
            return tuple(given)
        raise UserError(f"{name} is {given!r}: give a list of strings")
    if name.endswith("time") and isinstance(given, int):
        given = str(given)
    if float in kinds and isinstance(given, int) and not isinstance(given, bool):
        given = float(given)
    if not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
        wanted = " or ".join(each.__name__ for each in kinds if each is not type(None))
        raise UserError(f"{name} is {given!r}: give {wanted}")
    if isinstance(given, float) and not math.isfinite(given):
        raise UserError(f"{name} is {given}: give a finite number")
    field = name.rpartition(".")[2].removeprefix("--")
    if isinstance(given, int | float) and not isinstance(given, bool):
        if given < 0:
            raise UserError(f"{name} is {given}: give a number from 0")
        if given == 0 and field not in _MAY_BE_ZERO:
            raise UserError(f"{name} is 0: give a number above 0, or leave it out")
    if isinstance(given, str) and not given.isprintable():
        raise UserError(f"{name} is {given!r}: give one line without control characters")
    if field == "time" and not parse_time(given):
        raise UserError(f"{name} is {given!r}: give a time above 0")
    return given
