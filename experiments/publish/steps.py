"""What of a step of decoding is not its products: steps of a whole model beside its linears, timed alone."""

import pandas as pd

from analysis.names import percent
from analysis.rows.points import Measured
from analysis.tables.kernels import PRECISIONS, TILE
from analysis.tables.render import Column, Table, Value
from experiments.data.registry import REGISTRY

SPARSITY = 0.45
# A dense whole model by precision, and what its products are called where they are timed alone.
_DENSE = {"bf16": ("fused", "cublas"), "fp8": ("fp8_tensorwise", "fp8_tensorwise")}
_PARTS = {"step": "Step", "products": "Products alone", "rest": "The rest"}


def table(kernels: pd.DataFrame, models: pd.DataFrame, model: str = "llama-2-7b") -> Table:
    """Milliseconds of a step, of what all blocks' products take alone with weights out of the cache, and the rest.

    Args:
        kernels, models: as from `analysis.tables.kernels.load_bench`, of one GPU.
    """
    columns = (
        Column("sequences", "Sequences", "count"),
        Column("weights", "Weights", "text"),
        *(Column(name, f"{heading} (ms)", "ratio") for name, heading in _PARTS.items()),
    )
    products = kernels[(kernels.metric == "time") & (kernels.model == model)]
    steps = models[(models.metric == "time") & (models.model == model) & (models.kind == "decode")]
    rows: list[tuple[Value, ...]] = []
    for sequences in sorted(steps.batch.unique()):
        for precision, (whole, alone) in _DENSE.items():
            own = (steps.batch == sequences) & (steps.precision == precision)
            single = (products.tokens == sequences) & (products.precision == precision)
            for heading, of_step, of_product in (
                ("dense", own & (steps.implementation == whole), single & (products.implementation == alone)),
                (percent(SPARSITY), own & _packed(steps), single & _packed(products)),
            ):
                step = float(steps[of_step].value.median()) / 1e3
                block = float(products[of_product].groupby("linear").value.median().sum()) / 1e3
                blocks = REGISTRY[model].blocks * block
                times = (Measured(step), Measured(blocks), Measured(step - blocks))
                rows.append((Measured(sequences), f"{heading}, {PRECISIONS[precision]}", *times))
    return Table(columns, tuple(rows), ("",) * len(rows), frozenset(), ())


def _packed(timed: pd.DataFrame) -> pd.Series:
    """What was packed, of the tiles and the maps that whole models have."""
    return (
        (timed.implementation == "hybrid")
        & (timed.sparsity == SPARSITY)
        & (timed.tile == TILE)
        & (timed.tiles == "uneven")
    )
