"""Rows of a bench as tables: speedup over the fastest dense implementation.

A bench file is JSON lines; the first says where its rows come from. No torch.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.names import percent, workload_name
from analysis.rows.load import records
from analysis.rows.points import Measured
from analysis.tables.render import Column, Table, Value
from patch.errors import UserError

SCHEMA = 1
DENSE = ("cublas", "compiled", "dense")


def load_bench(paths: Iterable[Path]) -> pd.DataFrame:
    """One row a measurement: the cell's fields, implementation, time in microseconds, the best dense time, speedup.

    Raises:
        UserError: if a file is missing or is not a bench file, naming it and the line.
    """
    frames = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such bench file: run `hts bench kernels`")
        rows = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise UserError(f"{path}: line {number} is not JSON: the file is damaged, measure it again") from None
        if not rows or rows[0].get("schema") != SCHEMA:
            raise UserError(f"{path}: not a bench file of schema {SCHEMA}")
        header, *measured = rows
        frame = pd.DataFrame([row["cell"] | {k: v for k, v in row.items() if k != "cell"} for row in measured])
        frame["copy_roof"], frame["matmul_roof"] = header["roof"]["copy"], header["roof"]["matmul"]
        frame["gpu"], frame["git"], frame["origin"] = (
            header["provenance"]["gpu"],
            header["provenance"]["git"],
            str(path),
        )
        frames.append(frame)
    return _compared(pd.concat(frames, ignore_index=True))


def from_rows(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of a study's grid as `load_bench` has those of a bench.

    Args:
        rows: as from `analysis.rows.load.load_rows`.
        kind: ``kernels`` or ``model``; where nothing of it was timed, the table is empty.
    """
    chosen = rows[rows.stage.str.startswith(f"{kind}:")]
    timed = chosen[chosen.metric.isin(["time", "bytes"])]
    if timed.empty:
        return pd.DataFrame()
    same = ("metric", "value", "gpu", "git", "origin")
    frame = pd.DataFrame([row.labels | {name: getattr(row, name) for name in same} for row in records(timed)])
    for roof in ("copy_roof", "matmul_roof"):
        frame[roof] = chosen[chosen.metric == roof].value.median()
    return _compared(frame)


def _compared(frame: pd.DataFrame) -> pd.DataFrame:
    """With the best dense time of each cell, and the speedup over it.

    Raises:
        UserError: if a product was further from float64 than cuBLAS's: its time says nothing.
    """
    for column in ("sparsity", "tile", "tiles", "fallback", "bytes", "error", "status"):
        if column not in frame:
            frame[column] = None
    for row in records(frame[frame.status == "wrong"]):
        raise UserError(
            f"{row.origin}: {row.linear} with {row.tokens} tokens is wrong by {row.error:.2g}: mend the kernel"
        )
    frame["tile"] = [f"{t[0]}x{t[1]}" if isinstance(t, list) else None for t in frame.tile]
    cell = ["model", "linear", "tokens"] if "linear" in frame else ["model", "sparsity", "kind", "batch", "length"]
    dense = frame[frame.implementation.isin(DENSE)].groupby(cell).value.min().rename("dense")
    frame = frame.join(dense, on=cell)
    frame["speedup"] = frame.dense / frame.value
    return frame


def geometric_mean(values: pd.Series) -> float:
    return float(np.exp(np.log(values.astype(float)).mean()))


def kernel_table(frame: pd.DataFrame, tile: str = "128x128") -> Table:
    """Geometric-mean speedup over the linears of a model, by tokens and sparsity.

    Args:
        frame: as from `load_bench`, of the kernels of one model.
    """
    chosen = frame[(frame.implementation == "hybrid") & (frame.tile == tile)]
    means = chosen.groupby(["tokens", "sparsity"]).speedup.apply(geometric_mean).unstack()
    sparsities = [float(str(sparsity)) for sparsity in means.columns]
    library = frame[frame.implementation.isin(("cusparselt", "semi_structured"))]
    best = dict(library.groupby(["tokens", "linear"]).speedup.max().groupby("tokens").apply(geometric_mean).items())
    columns = [
        Column("tokens", "Tokens", "count"),
        *(Column(f"speedup {percent(sparsity)}", percent(sparsity), "ratio") for sparsity in sparsities),
        Column("library", "Best 2:4 library, 50%", "ratio"),
    ]
    rows = [
        (Measured(float(str(tokens))), *map(Measured, row), Measured(best[tokens]) if tokens in best else None)
        for tokens, row in means.iterrows()
    ]
    compiled = sorted(frame[frame.implementation == "compiled"].tokens.unique())
    dense = "Dense is cuBLAS."
    if compiled:
        some = "" if len(compiled) == frame.tokens.nunique() else " where that was timed"
        dense = f"Dense is the faster of cuBLAS and torch.compile's max-autotune{some}."
    return _plain(columns, rows, [dense])


def model_table(frame: pd.DataFrame) -> Table:
    """Speedup of a whole model over dense by workload and sparsity, and its masked weights' bytes over dense.

    Args:
        frame: as from `load_bench`, of one whole model.
    """
    hybrid = frame[frame.implementation == "hybrid"]
    times = hybrid[hybrid.metric == "time"]
    sizes = frame[frame.metric == "bytes"].pivot_table(index="sparsity", columns="implementation", values="value")
    sparsities = sorted(times.sparsity.unique())
    columns = [
        Column("workload", "Workload", "text"),
        *(Column(f"speedup {percent(sparsity)}", percent(sparsity), "ratio") for sparsity in sparsities),
    ]
    rows: list[tuple[Value, ...]] = []
    for (kind, batch, length), group in times.groupby(["kind", "batch", "length"]):
        by_sparsity = group.set_index("sparsity").speedup
        name = workload_name(f"{kind}@{batch:.0f}x{length:.0f}")
        rows.append((name, *(Measured(float(by_sparsity[sparsity])) for sparsity in sparsities)))
    shares = (Measured(float(sizes.hybrid[sparsity] / sizes.dense[sparsity])) for sparsity in sparsities)
    rows.append(("Bytes of the masked weights (x dense)", *shares))
    return _plain(columns, rows)


def _plain(columns: Sequence[Column], rows: Sequence[tuple[Value, ...]], notes: Sequence[str] = ()) -> Table:
    return Table(tuple(columns), tuple(rows), ("",) * len(rows), frozenset(), tuple(notes))
