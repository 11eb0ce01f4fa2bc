"""Output tokens a second in a server, from the rows of `experiments.bench.serving`, as a table."""

from collections.abc import Iterable, Mapping
from typing import Any

from analysis.names import percent
from analysis.rows.points import Measured
from analysis.tables.render import Column, Table, Value

Row = Mapping[str, Any]

_LOAD = ("kind", "batch", "length", "outputs")
# What dense engines of fewer bits are compared with as well.
_BASE = "bf16"


def serving_tables(rows: Iterable[Row]) -> dict[str, Table]:
    """The table of what a GPU's server was timed with, by its title; none without rows.

    Args:
        rows: as from `analysis.tables.kernels.measurements`.
    """
    table = throughput_table([row for row in rows if row["metric"] == "output_tokens_per_second"])
    return {"Output tokens a second in vLLM": table} if table.rows else {}


def throughput_table(rows: Iterable[Row]) -> Table:
    """Dense and packed engines side by side, a line per model, precision and load; those of 16 bits first."""
    columns = (
        Column("model", "Shapes of", "text"),
        Column("blocks", "Blocks", "count"),
        Column("server", "Server", "text"),
        Column("precision", "Precision", "text"),
        Column("load", "Benchmark", "text"),
        Column("sparsity", "Sparsity", "text"),
        Column("dense", "Dense (tokens/s)", "number"),
        Column("packed", "Packed (tokens/s)", "number"),
        Column("speedup", "Speedup (x)", "ratio"),
        Column("base_speedup", "Over dense bf16 (x)", "ratio"),
    )
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    base: dict[tuple[Any, ...], float] = {}
    for row in rows:
        labels = row["labels"]
        case = (row["trial"], row["provenance"]["gpu"], labels["precision"], *(labels[name] for name in _LOAD))
        found.setdefault(case, {})[labels["implementation"]] = row
        if labels["implementation"] == "dense" and labels["precision"] == _BASE:
            base[_served(row)] = row["value"]
    lines: list[tuple[Value, ...]] = []
    for each in sorted(
        found.values(), key=lambda each: any(row["labels"]["precision"] != _BASE for row in each.values())
    ):
        if each.keys() < {"dense", "hybrid"}:
            continue
        dense, packed = each["dense"]["value"], each["hybrid"]["value"]
        wide = base.get(_served(each["hybrid"]))
        labels, about = each["hybrid"]["labels"], each["hybrid"]["definition"]
        load = f"{labels['kind']}, {labels['batch']} x ({labels['length']} + {labels['outputs']})"
        told = (labels["server"], labels["precision"], load, percent(labels["sparsity"]))
        lines.append(
            (
                about["model"],
                Measured(about["blocks"]),
                *told,
                *map(Measured, (dense, packed, packed / dense)),
                None if wide is None else Measured(packed / wide),
            )
        )
    notes = ("By vLLM's own benchmarks, in turns: sequences x (tokens given + tokens made). Random weights and masks.",)
    return Table(columns, tuple(lines), ("",) * len(lines), frozenset(), notes)


def _served(row: Row) -> tuple[Any, ...]:
    """What was served, where and under which load, of whichever precision."""
    about, labels = row["definition"], row["labels"]
    where = (row["provenance"]["gpu"], labels["server"], about["model"], about["blocks"])
    return (*where, *(labels[name] for name in _LOAD))
