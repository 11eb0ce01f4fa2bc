"""Rows of a bench as tables: speedup over the fastest dense implementation of the same precision.

A bench has rows as a study's stage does. Of older ones a whole model's dense baseline has separate projections, which
is superseded. No torch.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.names import WORKLOAD, percent, workload_name, workload_of
from analysis.rows.format import Row
from analysis.rows.load import records, stored_rows
from analysis.rows.points import Measured
from analysis.tables.render import Column, Table, Value
from patch.errors import UserError

# What is dense, by precision; of a whole model, "dense" has separate projections and counts only where nothing else is.
DENSE = {
    "bf16": ("cublas", "compiled", "fused", "dense"),
    "fp8": ("fp8_rowwise", "fp8_tensorwise", "fp8_dense8"),
    "fp8_precise": ("fp8_precise_rowwise", "fp8_precise_tensorwise", "fp8_precise_dense8"),
    "int4": ("int4",),
}
# Tiles of the products that tables and figures show.
TILE = "128x128"
KINDS = ("kernels", "model")
LIBRARIES = ("cusparselt", "cusparselt_fp8", "semi_structured")
PRECISIONS = {"bf16": "bfloat16", "fp8": "FP8", "fp8_precise": "FP8 with float32 sums", "int4": "INT4"}
SUPERSEDED = (
    "Superseded: over a dense model with separate projections; with query, key and value, and gate and up, computed as "
    "one it is faster (LLaMA-2-7B on an H100: 1 to 6%)."
)


def measurements(path: Path) -> list[Row]:
    """The rows of a GPU's bench folder, as benches wrote them and as they were published, or of one file.

    Where a workload of a part of a whole model was timed in several benches, that in which least failed counts, and of
    those the newest: what is compared was timed together.

    Raises:
        UserError: if it is missing or is not a bench file, naming it and the line.
    """
    if not path.exists():
        raise UserError(f"{path}: no such bench file: run `hts bench`")
    rows = list(stored_rows(path))
    failed = Counter(
        (_timed(row), row["trial"]) for row in rows if str(row["labels"].get("status")).startswith("failed")
    )
    chosen: dict[Any, tuple[int, str, str]] = {}
    for row in rows:
        about, trial = _timed(row), row["trial"]
        when = (-failed[about, trial], row["provenance"].get("time") or "", trial)
        chosen[about] = max(when, chosen.get(about, when)) if about else when
    in_parts = {about[0] for about in chosen if about and about[1]}
    return [
        row
        for row in rows
        if (about := _timed(row)) is None
        or (chosen[about][2] == row["trial"] and (about[1] != "" or about[0] not in in_parts))
    ]


def _timed(row: Row) -> tuple[str, str, Any] | None:
    """The model, the part of it that a row says something about, none in older rows, and the workload; None of other
    benches."""
    kind, _, part = row["stage"].partition(":")
    if kind != "model":
        return None
    model = row["definition"].get("model") or row["definition"].get("pruning", {}).get("model", "")
    return model, part, tuple(row["labels"].get(name) for name in WORKLOAD)


def load_bench(paths: Iterable[Path], kind: str) -> pd.DataFrame:
    """One row a measurement: its labels, metric and value, the best dense times of its cell, and speedups over them.

    Of a product that several benches timed the newest row counts, over the fastest dense product that was timed beside
    it; only what max-autotune gains over cuBLAS is taken from another bench where its own did not time that.

    Args:
        paths: folders of a GPU's bench, or files.
        kind: ``kernels`` or ``model``; where nothing of it was timed, the table is empty.

    Raises:
        UserError: as `measurements`, or if something that was timed is wrong.
    """
    return bench_frame((row for path in paths for row in measurements(path)), kind)


def bench_frame(rows: Iterable[Row], kind: str) -> pd.DataFrame:
    """As `load_bench`, of rows."""
    chosen = [row for row in rows if row["stage"].partition(":")[0] == kind]
    if not any(row["metric"] == "time" for row in chosen):
        return pd.DataFrame()
    frame = _frame(
        row["labels"]
        | {name: row[name] for name in ("metric", "value", "stage")}
        | {name: row["provenance"].get(name) for name in ("gpu", "git", "time")}
        | {"origin": f"{row['trial']} {row['stage']}"}
        | {"process": f"{row['trial']} {row['stage']} {row['provenance'].get('time')}"}
        for row in chosen
    )
    return _newest(_compared(frame))


def from_rows(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of a study's grid as `load_bench` has those of a bench.

    Args:
        rows: as from `analysis.rows.load.load_rows`.
        kind: ``kernels`` or ``model``; where nothing of it was timed, the table is empty.
    """
    chosen = rows[rows.stage.str.startswith(f"{kind}:")]
    if not (chosen.metric == "time").any():
        return pd.DataFrame()
    same = ("metric", "value", "stage", "gpu", "git", "origin")
    return _compared(
        _frame(
            row.labels | {name: getattr(row, name) for name in same} | {"process": f"{row.trial} {row.stage}"}
            for row in records(chosen)
        )
    )


def _frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Rows of one or more parts as a table, the roofs that were measured beside them as columns."""
    frame = pd.DataFrame(list(rows))
    # As rows of studies have them: what is taken from a table again and again is slow in Arrow's strings.
    frame = frame.astype(dict.fromkeys(frame.select_dtypes("str"), "object"))
    roofs = {name: frame[frame.metric == name].value.median() for name in ("copy_roof", "matmul_roof")}
    frame = frame[~frame.metric.isin(tuple(roofs))]
    return frame.assign(**roofs)


def _newest(frame: pd.DataFrame) -> pd.DataFrame:
    """Without rows of what was measured again later, in another file; of what began early and late, the faster."""
    told = ["stage", "model", "linear", "tokens", *WORKLOAD, "metric"]
    told += ["implementation", "precision", "sparsity", "tile", "tiles"]
    same = [name for name in told if name in frame and not (name == "stage" and "linear" in frame)]
    ordered = frame.sort_values(["time", "value"], ascending=[True, False], na_position="first")
    return ordered.drop_duplicates(same, keep="last").sort_index()


def _compared(frame: pd.DataFrame) -> pd.DataFrame:
    """With the best dense times of each cell, in bfloat16 and in the row's own precision, and speedups over them.

    Raises:
        UserError: if something that was timed was further from float64 than it may be: its time says nothing.
    """
    missing = ("sparsity", "tile", "tiles", "fallback", "bytes", "error", "status", "precision", "clock", "power")
    frame = frame.assign(**{column: None for column in missing if column not in frame})
    for row in records(frame[frame.status == "wrong"]):
        what = (
            f"{row.linear} with {row.tokens:.0f} tokens"
            if "linear" in frame
            else f"{row.kind} {row.batch:.0f}x{row.length:.0f}"
        )
        error = row.value if row.metric == "error" else row.error
        raise UserError(f"{row.origin}: {row.implementation}, {what}, is wrong by {error:.2g}: mend the kernel")
    frame["precision"] = frame.precision.where(frame.precision.notna(), "bf16")
    frame["tile"] = [f"{t[0]}x{t[1]}" if isinstance(t, list) else None for t in frame.tile]
    if "linear" in frame:
        cell = ["model", "linear", "tokens", "process"]
    else:
        # Older rows name the sparsity that the dense model was timed beside, newer ones the stage.
        frame["beside"] = frame.stage.where(frame.stage.str.contains(":"), frame.sparsity.astype(str))
        cell = ["model", "beside", *WORKLOAD]
    timed = frame[frame.metric == "time"]
    fused = set(map(tuple, timed[timed.implementation == "fused"][cell].to_numpy().tolist()))
    superseded = [
        row[-1] == "dense" and tuple(row[:-1]) in fused for row in timed[[*cell, "implementation"]].to_numpy().tolist()
    ]
    timed = timed[~np.array(superseded, dtype=bool)]
    best = {precision: timed[is_dense(timed, precision)].groupby(cell).value.min() for precision in DENSE}
    frame = frame.join(pd.DataFrame(best), on=cell)
    if "linear" in frame:
        gain = _autotuned(timed)
        products = zip(frame.process, frame.model, frame.linear, frame.tokens, strict=True)
        frame["bf16"] *= [
            1.0 if process in gain.processes else gain.shares.get(tuple(product), 1.0) for process, *product in products
        ]
    frame["dense"], frame["own"] = frame.bf16, np.nan
    for name in DENSE:
        frame["own"] = frame.own.where(frame.precision != name, frame[name])
    times = frame.value.where(frame.metric == "time")
    frame["speedup"], frame["own_speedup"] = frame.dense / times, frame.own / times
    return frame.drop(columns=list(DENSE))


def is_dense(timed: pd.DataFrame, precision: str) -> pd.Series:
    """Which of what was timed is dense in a precision: `DENSE`, and of 8 bits what was left dense with no tile 2:4.

    Of that one row a cell, and none of 16 bits, where it is cuBLAS once more: the fastest of equal ones would be noise.
    """
    named = timed.implementation.isin(DENSE[precision])
    if precision not in ("fp8", "fp8_precise"):
        return named
    left = timed.fallback.str.startswith("predicted").fillna(value=False).astype(bool)
    own = (timed.implementation == "hybrid") & (timed.precision == precision)
    return named | (own & left & (timed.sparsity == 0) & (timed.tile == TILE))


class _Autotuned(NamedTuple):
    """What max-autotune's choice takes of cuBLAS's time, at most 1, by product; and the processes that timed it."""

    shares: Mapping[Any, float]
    processes: Collection[str]


def _autotuned(timed: pd.DataFrame) -> _Autotuned:
    some = timed[timed.implementation.isin(["cublas", "compiled"])]
    product = ["model", "linear", "tokens"]
    times = some.pivot_table(index=[*product, "process"], columns="implementation", values="value", aggfunc="min")
    if "compiled" not in times or "cublas" not in times:
        return _Autotuned({}, ())
    times = times.dropna()
    shares = (times.compiled / times.cublas).clip(upper=1.0).groupby(level=product).min()
    return _Autotuned(shares.to_dict(), set(times.index.get_level_values("process")))


def geometric_means(rows: pd.DataFrame, quantity: str, by: Sequence[str]) -> pd.Series:
    return rows.assign(log=np.log(rows[quantity].astype(float))).groupby(list(by)).log.mean().map(math.exp)


def precisions(frame: pd.DataFrame) -> list[str]:
    """Those in which hybrid weights were timed."""
    found = set(frame[frame.implementation == "hybrid"].precision)
    return [precision for precision in PRECISIONS if precision in found]


def kind_of(kind: str, precision: str) -> str:
    """How the names of the tables of one kind and precision begin."""
    return kind if precision == "bf16" else f"{kind} {precision}"


def typical(rows: pd.DataFrame, quantity: str) -> pd.Series:
    """By workload and implementation the middle one of its rows: dense models are timed beside each sparsity."""
    return rows.groupby([*WORKLOAD, "implementation"])[quantity].median()


def speed_tables(frame: pd.DataFrame) -> dict[str, Table]:
    """The tables of what was timed, by name: ``kernels-<model>``, of other precisions ``kernels fp8-<model>``;
    ``model-<model>`` and ``model fp8-<model>``, and ``energy-<model>``.

    Args:
        frame: as from `load_bench`, of kernels or of whole models.
    """
    found: dict[str, Table] = {}
    for model in sorted(set(frame.model)):
        own = frame[frame.model == model]
        if "linear" in frame:
            for precision in precisions(own):
                found[f"{kind_of('kernels', precision)}-{model}"] = kernel_table(own, precision=precision)
        elif (own.implementation == "hybrid").any():
            for precision in precisions(own):
                found[f"{kind_of('model', precision)}-{model}"] = model_table(own, precision)
            if energy := energy_table(own):
                found[f"energy-{model}"] = energy
    return found


def kernel_table(frame: pd.DataFrame, tile: str = TILE, precision: str = "bf16") -> Table:
    """Geometric-mean speedup over the linears of a model, by tokens and sparsity, over dense of the same precision.

    Args:
        frame: as from `load_bench`, of the kernels of one model.
    """
    timed = frame[frame.metric == "time"]
    own = timed[timed.precision == precision]
    chosen = own[(own.implementation == "hybrid") & (own.tile == tile)]
    means = geometric_means(chosen, "own_speedup", ("tokens", "sparsity")).unstack()
    sparsities = [float(str(sparsity)) for sparsity in means.columns]
    libraries = best_of_linears(own[own.implementation.isin(LIBRARIES)], "own_speedup")
    more = {"Best 2:4 library, 50%": libraries} if libraries else {}
    name = PRECISIONS[precision]
    if precision == "bf16":
        eight = best_of_linears(timed[is_dense(timed, "fp8")], "speedup")
        four = best_of_linears(timed[is_dense(timed, "int4")], "speedup")
        more |= {"Dense FP8": eight} if eight else {}
        more |= {"Dense INT4": four} if four else {}
    else:
        more[f"Dense {name} over bfloat16"] = best_of_linears(own[is_dense(own, precision)], "speedup")
    columns = [
        Column("tokens", "Tokens", "count"),
        *(Column(f"speedup {percent(sparsity)}", percent(sparsity), "ratio") for sparsity in sparsities),
        *(Column(heading.lower(), heading, "ratio") for heading in more),
    ]
    rows = [
        (
            Measured(float(str(tokens))),
            *map(Measured, row),
            *(Measured(found[tokens]) if tokens in found else None for found in more.values()),
        )
        for tokens, row in means.iterrows()
    ]
    compiled = sorted(timed[timed.implementation == "compiled"].tokens.unique())
    dense = "Dense is cuBLAS."
    if compiled:
        some = "" if len(compiled) == timed.tokens.nunique() else " where that was timed"
        dense = (
            f"Dense is the faster of cuBLAS and torch.compile's max-autotune{some}: in the same process, or by what it "
            "gained over cuBLAS in another."
        )
    if precision != "bf16":
        dense = (
            f"Over the fastest dense {name} product of the same process, with a scale a token, with a single one, and "
            "where packed tiles would be slower that which runs instead; activations are quantised within all."
        )
    if precision == "int4":
        dense = f"Over torch's dense {name} product in the same process; activations stay as they are."
    notes = [dense]
    for why, fallen in chosen.fallback.value_counts().items():
        how = "ran dense, since packed was expected to be slower" if str(why).startswith("predicted") else f"were {why}"
        notes.append(f"{fallen} of {len(chosen)} packed products {how}.")
    return _plain(columns, rows, notes)


def best_of_linears(rows: pd.DataFrame, speedup: str) -> dict[Any, float]:
    """The best of some implementations on each linear, as the geometric mean over linears, by tokens."""
    if rows.empty:
        return {}
    best = rows.groupby(["tokens", "linear"])[speedup].max().reset_index()
    return dict(geometric_means(best, speedup, ("tokens",)).items())


# Of whole models: implementations whose speedup stands beside that of packed weights.
_BESIDE = {
    "Dense, separate projections": ("dense",),
    "Dense, max-autotune": ("autotuned",),
    "Dense FP8": DENSE["fp8"],
    "Dense INT4": DENSE["int4"],
}


def model_table(frame: pd.DataFrame, precision: str = "bf16") -> Table:
    """Speedup of a whole model over dense of the same precision, by workload and sparsity, and its masked weights'
    bytes over dense ones of 16 bits.

    Args:
        frame: as from `load_bench`, of one whole model.
    """
    times = frame[frame.metric == "time"]
    fused = bool((times.implementation == "fused").any())
    hybrid = times[(times.implementation == "hybrid") & (times.precision == precision)]
    sparsities = sorted(hybrid.sparsity.unique())
    beside = {
        heading: times[times.implementation.isin(names)]
        for heading, names in _BESIDE.items()
        if precision == "bf16" and fused and times.implementation.isin(names).any()
    }
    if precision != "bf16":
        beside[f"Dense {PRECISIONS[precision]} over bfloat16"] = times[times.implementation.isin(DENSE[precision])]
        beside |= {f"{percent(s)} over bfloat16": hybrid[hybrid.sparsity == s] for s in sparsities if 0 < s < 0.5}
    columns = [
        Column("workload", "Workload", "text"),
        *(Column(f"speedup {percent(sparsity)}", percent(sparsity), "ratio") for sparsity in sparsities),
        *(Column(heading.lower(), heading, "ratio") for heading in beside),
    ]
    rows: list[tuple[Value, ...]] = []
    others = [typical(some, "speedup").groupby(WORKLOAD).max().dropna().to_dict() for some in beside.values()]
    for work, group in hybrid.groupby(WORKLOAD):
        by_sparsity = group.set_index("sparsity").own_speedup
        speedups = [*(by_sparsity.get(s) for s in sparsities), *(other.get(work) for other in others)]
        rows.append((workload_title(work), *(Measured(float(x)) if x is not None else None for x in speedups)))
    shares = _shares(frame, precision)
    rows.append(
        (
            "Bytes of the masked weights (x dense" + (")" if precision == "bf16" else " bfloat16)"),
            *(Measured(shares[sparsity]) if sparsity in shares else None for sparsity in sparsities),
            *(None for _ in beside),
        )
    )
    notes = [] if fused else [SUPERSEDED]
    if precision != "bf16":
        of_activations = "stay in 16 bits in" if precision == "int4" else "are quantised within"
        notes.append(f"Over the fastest dense {PRECISIONS[precision]} model; activations {of_activations} both.")
    return _plain(columns, rows, notes)


def precision_table(frame: pd.DataFrame, sparsities: Sequence[float] = (0.25, 0.45)) -> Table:
    """Speedup of a whole model over dense of 16 bits, by workload: dense and tiles of every precision that was timed.

    Args:
        frame: as from `load_bench`, of one whole model.
    """
    times = frame[frame.metric == "time"]
    kinds: dict[str, pd.DataFrame] = {}
    for precision in PRECISIONS:
        own = times[times.precision == precision]
        name = PRECISIONS[precision]
        if precision != "bf16" and is_dense(own, precision).any():
            kinds[f"{name}, dense"] = own[is_dense(own, precision)]
        packed = own[(own.implementation == "hybrid") & own.sparsity.isin(sparsities)]
        kinds |= {f"{name}, {percent(float(str(s)))}": some for s, some in packed.groupby("sparsity")}
    columns = [Column("workload", "Workload", "text"), *(Column(name.lower(), name, "ratio") for name in kinds)]
    best = [typical(some, "speedup").groupby(WORKLOAD).max().dropna().to_dict() for some in kinds.values()]
    rows: list[tuple[Value, ...]] = [
        (workload_title(work), *(Measured(found[work]) if work in found else None for found in best))
        for work, _ in times.groupby(WORKLOAD)
    ]
    return _plain(columns, rows)


def energy_table(frame: pd.DataFrame) -> Table | None:
    """Joules a token of a whole model, dense and packed, by workload; None where they were not counted.

    Args:
        frame: as from `load_bench`, of one whole model.
    """
    energy = frame[frame.metric == "energy"]
    if energy.empty:
        return None
    kinds = {"Dense": energy[energy.implementation == "fused"]}
    kinds |= {
        heading: energy[energy.implementation.isin(names)]
        for heading, names in _BESIDE.items()
        if names in DENSE.values() and energy.implementation.isin(names).any()
    }
    for precision in precisions(energy):
        hybrid = energy[(energy.implementation == "hybrid") & (energy.precision == precision)]
        own = "" if precision == "bf16" else f" {PRECISIONS[precision]}"
        kinds |= {f"{percent(s)}{own}": hybrid[hybrid.sparsity == s] for s in sorted(hybrid.sparsity.unique())}
    works = list(energy.groupby(WORKLOAD).groups)
    columns = [
        Column("model", "Model", "text"),
        *(Column(title.lower(), title, "number") for title in map(workload_title, works)),
    ]
    least = [typical(some, "value").groupby(WORKLOAD).min().to_dict() for some in kinds.values()]
    rows: list[tuple[Value, ...]] = [
        (name, *(Measured(found[work]) if work in found else None for work in works))
        for name, found in zip(kinds, least, strict=True)
    ]
    notes = ["Of the whole GPU, by its own counter, over a second of work."]
    if energy.origin.str.partition(" ")[0].nunique() > 1:
        notes.append("Rows are of several benches, whose joules of the same model differ by up to a seventh.")
    return _plain(columns, rows, notes)


def workload_title(work: Any) -> str:
    """What a kind of pass, its batch and its length are called, as frames are grouped by them."""
    return workload_name(workload_of(dict(zip(WORKLOAD, work, strict=True))))


def _shares(frame: pd.DataFrame, precision: str) -> dict[float, float]:
    """Bytes of the masked weights in a precision over dense ones of 16 bits, by sparsity."""
    sizes = frame[frame.metric == "bytes"]
    if len(sizes):
        table = sizes.pivot_table(index="sparsity", columns="implementation", values="value")
        return {float(str(sparsity)): float(row.hybrid / row.dense) for sparsity, row in table.iterrows()}
    packed = frame[(frame.implementation == "hybrid") & (frame.precision == precision) & frame.bytes.notna()]
    dense = frame[(frame.implementation == "fused") & frame.bytes.notna()].bytes
    return {} if dense.empty else {row.sparsity: row.bytes / dense.max() for row in records(packed)}


def _plain(columns: Sequence[Column], rows: Sequence[tuple[Value, ...]], notes: Sequence[str] = ()) -> Table:
    return Table(tuple(columns), tuple(rows), ("",) * len(rows), frozenset(), tuple(notes))
