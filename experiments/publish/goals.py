"""What the kernels were to reach, beside what the committed rows say.

Each goal is a speedup over the better dense implementation of the same precision, by sparsity: of LLaMA-2-7B's linears
in the geometric mean, for every number of tokens named; of whole models, for every model that was timed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from analysis.names import percent, workload_name
from analysis.tables.kernels import TILE, geometric_means
from analysis.tables.render import Column, Table, Value

SPARSITIES = (0.0, 0.25, 0.35, 0.45, 0.5)
LINEARS = "llama-2-7b"
# No product and no model was to be slower than this.
SLOWEST = 0.97


@dataclass(frozen=True)
class Goal:
    """Speedups to reach.

    Attributes:
        what: how it is called in the table.
        precision: of `analysis.tables.kernels.PRECISIONS`.
        tokens: of the linears; none of whole models.
        workload: of whole models, ``decode@16x1``.
        least: by sparsity.
    """

    what: str
    precision: str
    least: Mapping[float, float]
    tokens: tuple[int, ...] = ()
    workload: str = ""


def _of_linears(name: str, precision: str, tokens: tuple[int, ...], *least: float) -> Goal:
    several = f"{tokens[0]} and {tokens[1]}" if len(tokens) == 2 else f"{tokens[0]} to {tokens[-1]}"
    what = f"Linears, {name}, {several} tokens"
    return Goal(what, precision, dict(zip(SPARSITIES, least, strict=True)), tokens=tokens)


def _of_models() -> Iterator[Goal]:
    for name, precision, kinds in (
        ("bfloat16", "bf16", {"decode": (1.30, 1.40, 1.52), "prefill": (1.12, 1.20, 1.30)}),
        ("FP8", "fp8", {"decode": (1.10, 1.18, 1.28), "prefill": (1.06, 1.13, 1.22)}),
    ):
        for workload in ("decode@1x1", "decode@16x1", "prefill@1x2048", "prefill@8x2048"):
            shown = workload_name(workload)
            least = dict(zip(SPARSITIES[1:4], kinds[workload.partition("@")[0]], strict=True))
            yield Goal(f"{shown}, {name}", precision, {0.0: SLOWEST} | least, workload=workload)


_MIDDLE, _MANY = (64, 128, 256, 512), (1024, 2048, 4096, 8192)
GOALS = (
    _of_linears("bfloat16", "bf16", _MIDDLE, SLOWEST, 1.00, 1.10, 1.20, 1.30),
    _of_linears("bfloat16", "bf16", _MANY, 0.99, 1.16, 1.26, 1.42, 1.50),
    _of_linears("FP8", "fp8", (1, 16), 0.97, 1.12, 1.20, 1.32, 1.40),
    _of_linears("FP8", "fp8", _MIDDLE, SLOWEST, 1.00, 1.05, 1.15, 1.20),
    _of_linears("FP8", "fp8", _MANY[1:], 0.96, 1.10, 1.18, 1.28, 1.35),
    _of_linears("INT4", "int4", (1, 8, 16), 0.97, 1.08, 1.12, 1.18, 1.22),
    *_of_models(),
)


def table(kernels: pd.DataFrame, models: pd.DataFrame) -> Table:
    """A row a goal: of each sparsity the least and the most that was measured, and in brackets what was to be reached.

    Best are those of which all that was measured reaches it, to the digits that are shown.

    Args:
        kernels, models: as from `analysis.tables.kernels.load_bench`, of one GPU.
    """
    columns = (Column("what", "What", "text"), *(Column(percent(s), percent(s), "text") for s in SPARSITIES))
    rows: list[tuple[Value, ...]] = []
    reached = set()
    for goal in GOALS:
        found = _speedups(goal, kernels, models)
        shown: list[Value] = [goal.what]
        for sparsity in SPARSITIES:
            measured, least = found.get(sparsity, []), goal.least.get(sparsity)
            shown.append(_shown(measured, least))
            if measured and least is not None and round(min(measured), 2) >= least:
                reached.add((len(rows), len(shown) - 1))
        rows.append(tuple(shown))
    return Table(columns, tuple(rows), ("",) * len(rows), frozenset(reached), ())


def _speedups(goal: Goal, kernels: pd.DataFrame, models: pd.DataFrame) -> dict[float, list[float]]:
    """By sparsity what was measured: for each number of tokens, or each model."""
    frame = kernels if goal.tokens else models
    timed = frame[(frame.metric == "time") & (frame.implementation == "hybrid") & (frame.precision == goal.precision)]
    if goal.tokens:
        # With no or all tiles 2:4 there is one map; learned maps are uneven.
        uneven = (timed.tiles == "uneven") | timed.sparsity.isin((0.0, 0.5))
        chosen = timed[(timed.model == LINEARS) & (timed.tile == TILE) & timed.tokens.isin(goal.tokens) & uneven]
        means = geometric_means(chosen, "own_speedup", ("sparsity", "tokens"))
    else:
        kind, _, size = goal.workload.partition("@")
        batch, _, length = size.partition("x")
        of_it = (timed.kind == kind) & (timed.batch == int(batch)) & (timed.length == int(length))
        means = timed[of_it].groupby(["sparsity", "model"]).own_speedup.mean()
    return {float(str(s)): list(some) for s, some in means.groupby(level="sparsity")}


def _shown(measured: list[float], least: float | None) -> Value:
    """``1.03 to 1.29 (1.10)``."""
    if not measured:
        return None
    ends = (f"{min(measured):.2f}", f"{max(measured):.2f}")
    return " to ".join(dict.fromkeys(ends)) + (f" ({least:.2f})" if least is not None else "")
