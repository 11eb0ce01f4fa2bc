"""How certain the speedups of whole models with prompts are: what the same rows say in three ways, as a table.

With prompts power bounds every model, and its clock with it. Models are timed in turns, which share a clock; then each
works alone for the second in which its energy is counted, whose joules over watts are seconds. And dense models were
timed in a part of the bench of their own too, where no tiles were.
"""

import pandas as pd

from analysis.names import WORKLOAD, percent
from analysis.rows.points import Measured
from analysis.tables.kernels import DENSE, PRECISIONS, workload_title
from analysis.tables.render import Column, Table, Value
from experiments.studies.trial import DENSE_PART

_MODEL = ["stage", *WORKLOAD, "implementation", "precision"]


def table(models: pd.DataFrame, model: str = "llama-2-7b") -> Table:
    """Speedups of tiles over the faster dense model of their precision, by workload, precision and way.

    Args:
        models: as from `analysis.tables.kernels.load_bench`, of one GPU.
    """
    # A dense model with separate projections is not what tiles are compared with.
    some = models[(models.model == model) & (models.kind == "prefill") & (models.implementation != "dense")]
    joules = some[some.metric == "energy"][[*_MODEL, "value"]].rename(columns={"value": "joules"})
    timed = some[some.metric == "time"].merge(joules, on=_MODEL)
    timed["alone"] = timed.joules * timed.batch * timed.length / timed.power
    sparsities = sorted(timed.sparsity.dropna().unique())
    columns = (
        Column("workload", "Workload", "text"),
        Column("precision", "Precision", "text"),
        Column("way", "Timed", "text"),
        *(Column(f"speedup {percent(s)}", percent(s), "ratio") for s in sparsities),
    )
    rows: list[tuple[Value, ...]] = []
    for work, of_it in timed.groupby(WORKLOAD):
        for precision, name in PRECISIONS.items():
            own = of_it[of_it.precision == precision]
            packed = own[own.implementation == "hybrid"].set_index("sparsity")
            if packed.empty:
                continue
            dense = own[own.implementation.isin(DENSE[precision])].groupby("stage")[["value", "alone"]].min()
            ways = {
                "in turns": packed.stage.map(dense.value) / packed.value,
                "each alone": packed.stage.map(dense.alone) / packed.alone,
                "dense among dense": dense.value.get(DENSE_PART, float("nan")) / packed.value,
            }
            for way, speedups in ways.items():
                shown = speedups.to_dict()
                values = (Measured(shown[s]) if s in shown else None for s in sparsities)
                rows.append((workload_title(work), name, way, *values))
    return Table(columns, tuple(rows), ("",) * len(rows), frozenset(), ())
