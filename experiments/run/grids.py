"""The stages of a trial that times a model's shapes: each linear's kernels, or the whole model at each sparsity.

They are the parts of ``hts bench kernels`` and ``hts bench model`` (`experiments.bench.harness`), as a study that can
be run, resumed, and put on a cluster.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from experiments.run.packed import skipped
from experiments.run.provenance import provenance
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies.trial import KernelGrid, Trial
from patch.errors import UserError

if TYPE_CHECKING:
    from experiments.bench.harness import Bench

# What times kernels imports Triton, which a machine that only reads rows may not have: imported where it is used.


def stages(trial: Trial) -> list[str]:
    """``kernels:<linear>``, or ``model:dense`` and ``model:<sparsity>``, in the order in which they run."""
    return trial.evaluation.grid.parts if trial.evaluation.grid else []


def validate(trials: Iterable[Trial]) -> None:
    """Check that models are of the registry, whose shapes are known without their weights.

    Raises:
        UserError: naming the first that is not.
    """
    from experiments.data.registry import REGISTRY

    for trial in trials:
        if trial.evaluation.grid and trial.pruning.model not in REGISTRY:
            raise UserError(f"{trial.pruning.model}: only models of the registry are timed by shape: see `hts models`")


def run_stages(trial: Trial, missing: Collection[str], store: Store, machine: Machine) -> None:
    """Run those stages that are missing; without a GPU each leaves a row that says so."""
    wanted = [stage for stage in stages(trial) if stage in missing]
    if not machine.can_time:
        for stage in wanted:
            store.write_rows(trial, stage, skipped(machine), provenance(0.0))
    elif wanted:
        from experiments.bench import harness

        lab = harness.Lab(machine.device, progress=machine.progress)
        for stage, facts, seconds in harness.measure(bench_of(trial), trial, wanted, lab):
            store.write_rows(trial, stage, facts, provenance(seconds))


def bench_of(trial: Trial) -> "Bench":
    """What measures a trial's grid."""
    from experiments.bench import kernels, model

    return kernels.BENCH if isinstance(trial.evaluation.grid, KernelGrid) else model.BENCH
