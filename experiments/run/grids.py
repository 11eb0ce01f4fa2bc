"""The stages of a trial that times a model's shapes: each linear's kernels, or the whole model at each sparsity.

The same measurements as ``hts bench``, as a study that can be run, resumed, and put on a cluster.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from analysis.rows.format import Fact
from experiments.run.packed import skipped
from experiments.run.provenance import provenance
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies.trial import KernelGrid, ModelGrid, Trial
from patch.errors import UserError

LINEARS = ("qkv", "o", "gate_up", "down")

# What times kernels imports Triton, which a machine that only reads rows may not have: imported where it is used.


def stages(trial: Trial) -> list[str]:
    """``kernels:<linear>`` or ``model:<sparsity>``, in the order in which they run."""
    grid = trial.evaluation.grid
    if isinstance(grid, KernelGrid):
        return [f"kernels:{name}" for name in LINEARS]
    if isinstance(grid, ModelGrid):
        return [f"model:{100 * sparsity:g}%" for sparsity in grid.sparsities]
    return []


def validate(trials: Iterable[Trial]) -> None:
    """Check that models are of the registry, whose shapes are known without their weights.

    Raises:
        UserError: naming the first that is not.
    """
    from experiments.data.models import REGISTRY

    for trial in trials:
        if trial.evaluation.grid and trial.pruning.model not in REGISTRY:
            raise UserError(f"{trial.pruning.model}: only models of the registry are timed by shape: see `hts models`")


def run_stages(trial: Trial, missing: Collection[str], store: Store, machine: Machine) -> None:
    """Run those stages that are missing; without a GPU each leaves a row that says so."""
    grid, model = trial.evaluation.grid, trial.pruning.model
    for stage in stages(trial):
        if stage not in missing:
            continue
        started = time.monotonic()
        if not machine.can_time:
            facts = skipped(machine)
        elif isinstance(grid, KernelGrid):
            facts = _kernels(model, stage.partition(":")[2], grid, machine)
        else:
            assert grid is not None
            sparsity = grid.sparsities[stages(trial).index(stage)]
            facts = _model(model, sparsity, grid, machine)
        store.write_rows(trial, stage, facts, provenance(time.monotonic() - started))


def _kernels(model: str, name: str, grid: KernelGrid, machine: Machine) -> list[Fact]:
    from experiments.bench.kernels import bench_linear, fused_linears

    (linear,) = [linear for linear in fused_linears(model) if linear.name == name]
    done = iter(range(1, len(grid.tokens) + 1))
    rows = bench_linear(
        linear,
        grid.tokens,
        grid.tiles,
        grid.sparsities,
        grid.rounds,
        grid.compiled,
        lambda _: machine.progress(f"{model} {name}", next(done), len(grid.tokens)),
    )
    return facts_of(rows)


def _model(model: str, sparsity: float, grid: ModelGrid, machine: Machine) -> list[Fact]:
    from experiments.bench.model import bench_model

    done = iter(range(1, len(grid.workloads) + 1))
    rows = bench_model(
        model,
        (sparsity,),
        grid.tile,
        grid.workloads,
        grid.rounds,
        lambda *_: machine.progress(f"{model} {sparsity:g}", next(done), len(grid.workloads)),
        machine.device,
    )
    return facts_of(rows)


def facts_of(rows: Iterable[Mapping[str, Any]]) -> list[Fact]:
    """Rows of a bench as facts, with what the GPU reaches beside them."""
    from stoicc.timing import measure_roof

    facts = []
    for row in rows:
        about = {name: value for name, value in row.items() if name not in ("metric", "value", "unit", "cell")}
        facts.append(Fact(row["metric"], row["value"], row["unit"], dict(row["cell"]) | about))
    units = {"copy": "TB/s", "matmul": "TFLOP/s"}
    return [*facts, *(Fact(f"{name}_roof", value, units[name], {}) for name, value in asdict(measure_roof()).items())]
