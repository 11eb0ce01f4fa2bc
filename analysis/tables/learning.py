"""What learning costs, from the rows of `experiments.bench.soft_mask` and `experiments.bench.learning`, as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.rows.points import Measured
from analysis.tables.render import Column, Table, Value
from patch.errors import UserError

Row = Mapping[str, Any]

_STEPS = {
    ("frozen", "", ""): "Frozen model, as transformers runs it",
    ("frozen", "compiled", ""): "Frozen model, compiled blocks",
    ("frozen", "compiled", "captured"): "Frozen model, compiled blocks, one CUDA graph",
    ("fused", "compiled", "captured"): "Learning: compiled, one CUDA graph",
    ("fused", "compiled", ""): "Learning: compiled",
    ("fused", "", ""): "Learning: eager model, fused masks",
    ("eager", "", ""): "Learning: eager model and masks",
}


def learning_tables(rows: Iterable[Row]) -> dict[str, Table]:
    """The tables that a GPU's bench has rows for, by title.

    Args:
        rows: as from `analysis.tables.kernels.measurements`.

    Raises:
        UserError: if a bench was cut off.
    """
    found: dict[str, Table] = {}
    rows = list(rows)
    masks = [row for row in rows if row["stage"] == "bench:relax" or row["stage"].startswith("soft_mask:")]
    if masks:
        found["Soft masks of LLaMA-3.2-1B, forward and backward pass"] = masks_table(masks)
        if any(row["metric"] == "step" for row in masks):
            found["A step on 1 x 4096 tokens, LLaMA-3.2-1B"] = steps_table(masks)
    rates = rates_table(rows)
    if rates.rows:
        found["Learning, PATCH joint"] = rates
    return found


def masks_table(rows: Sequence[Row]) -> Table:
    """Time and transient memory of all soft masks of a model, fused against eager, by mode and logits."""
    columns = (
        Column("mode", "Mode", "text"),
        Column("logits", "Logits", "text"),
        Column("fused", "Fused (ms)", "ratio"),
        Column("eager", "Eager (ms)", "number"),
        Column("speedup", "Speedup (x)", "ratio"),
        Column("bandwidth", "Fused (TB/s)", "ratio"),
        Column("memory", "Transient memory, fused (MiB a block)", "number"),
        Column("eager_memory", "Eager (MiB a block)", "number"),
    )
    lines: list[tuple[Value, ...]] = []
    timed = [row for row in rows if row["metric"] == "time"]
    for mode, logits in dict.fromkeys((row["labels"]["mode"], row["labels"]["logits"]) for row in timed):
        about = {"mode": mode, "logits": logits}
        # Eager launches outlast the head start that the GPU gives the host: the lower of both ways is the fairer.
        eager = min(_value(rows, way, about | {"implementation": "eager"}) for way in ("time", "time_with_host"))
        fused = _value(rows, "time", about | {"implementation": "fused"})
        moved = next(row["labels"]["bytes"] for row in timed if about.items() <= row["labels"].items())
        memory = [
            max(
                row["value"]
                for row in rows
                if row["metric"] == "transient_memory"
                and (about | {"implementation": name}).items() <= row["labels"].items()
            )
            for name in ("fused", "eager")
        ]
        numbers = [fused, eager, eager / fused, moved / fused / 1e9, *(size / 2**20 for size in memory)]
        lines.append((mode, logits.removeprefix("torch."), *map(Measured, numbers)))
    notes = ("Medians in one process; bandwidth counts what both passes must read and write.",)
    return Table(columns, tuple(lines), ("",) * len(lines), frozenset(), notes)


def steps_table(rows: Sequence[Row]) -> Table:
    """A whole step of learning, optimizer included, beside the frozen model's own."""
    columns = (
        Column("step", "Step", "text"),
        Column("checkpointing", "Activation checkpointing", "text"),
        Column("time", "Median (ms)", "number"),
        Column("p20", "p20", "number"),
        Column("p80", "p80", "number"),
        Column("memory", "Peak memory (GiB)", "number"),
    )
    lines: list[tuple[Value, ...]] = []
    for row in rows:
        if row["metric"] == "step":
            labels = row["labels"]
            way = tuple(name if labels.get(name) else "" for name in ("compiled", "captured"))
            name = _STEPS.get((labels["implementation"], *way), labels["implementation"])
            memory = _value(rows, "step_memory", labels)
            checkpointing = "yes" if labels.get("activation_checkpointing") else "no"
            numbers = (row["value"], row["p20"], row["p80"], memory / 2**30)
            lines.append((name, checkpointing, *map(Measured, numbers)))
    notes = ("The peak of memory includes what earlier lines of the same process left allocated.",)
    return Table(columns, tuple(lines), ("",) * len(lines), frozenset(), notes)


def rates_table(rows: Iterable[Row]) -> Table:
    """Tokens a second and peak memory of learning, a line per definition and GPU.

    Args:
        rows: as from `analysis.tables.kernels.measurements`, of one GPU or several.

    Raises:
        UserError: if a bench was cut off.
    """
    columns = (
        Column("model", "Shapes of", "text"),
        Column("blocks", "Blocks", "count"),
        Column("gpus", "GPUs", "text"),
        Column("logits", "Logits", "text"),
        Column("checkpointing", "Activation checkpointing", "text"),
        Column("microbatch", "Sequences a pass", "count"),
        Column("tokens", "Tokens a step", "count"),
        Column("step", "Step (ms)", "number"),
        Column("rate", "Tokens/s", "number"),
        Column("memory", "Peak memory (GiB a GPU)", "number"),
    )
    lines: list[tuple[Value, ...]] = []
    benches: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["stage"] in ("bench:learning", "learning"):
            benches.setdefault((row["trial"], row["provenance"]["gpu"]), []).append(row)
    for mine in benches.values():
        about = mine[0]["definition"]
        recipe = about["recipe"]
        numbers = (_value(mine, "step", {}), _value(mine, "tokens_per_second", {}))
        memory = _value(mine, "peak_memory", {}) / 2**30
        lines.append(
            (
                about["model"],
                Measured(about["blocks"]),
                f"{about['processes']} x {mine[0]['provenance']['gpu']}",
                recipe.get("logit_dtype", "float32"),
                "yes" if recipe["activation_checkpointing"] else "no",
                Measured(recipe["microbatch"]),
                Measured(recipe["batch"] * recipe["length"]),
                *map(Measured, (*numbers, memory)),
            )
        )
    lines.sort(key=lambda line: (line[0], line[2]))
    notes = ("Random weights, tiles of 128x128, 45%. Sequences a pass are those of all GPUs together.",)
    return Table(columns, tuple(lines), ("",) * len(lines), frozenset(), notes)


def _value(rows: Sequence[Row], metric: str, labels: Mapping[str, Any]) -> float:
    """The value of the first row of a metric that has these labels."""
    found = (row["value"] for row in rows if row["metric"] == metric and labels.items() <= row["labels"].items())
    value = next(found, None)
    if value is None:
        raise UserError(f"no row of {metric} with {dict(labels)}: the bench was cut off, measure it again")
    return float(value)
