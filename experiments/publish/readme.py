"""The tables and numbers of the README, made from the committed rows, and REPRODUCTION.md's table.

python -m experiments.publish.readme        rewrites what stands between ``<!-- table NAME -->`` and ``<!-- end -->``,
                                    and within a line between ``<!-- value NAME -->`` and ``<!-- end -->``
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pandas import DataFrame

from analysis.rows.points import Measured, Point, gather
from analysis.tables.kernels import kernel_table, load_bench, model_table
from analysis.tables.learning import learning_tables, rates_table
from analysis.tables.render import Table, markdown, only
from analysis.tables.study import study_tables
from experiments.publish import reports, reproduction
from experiments.run.store import Store
from experiments.studies.build import TARGETS
from experiments.studies.registry import STUDIES
from patch.files import write_atomic

ROOT = Path(__file__).parents[2]
README, GUIDE = ROOT / "README.md", ROOT / "experiments" / "publish" / "REPRODUCTION.md"
RESULTS = ROOT / "results"
# The GPU whose speed is shown; what learning costs is shown of all.
BENCH = RESULTS / "bench" / "nvidia-h100-80gb-hbm3"
LEARNING = sorted((RESULTS / "bench").glob("*/learning/*.jsonl"))

_ABOUT = ("method", "structure", "achieved_sparsity")
# For each block a study, one of its tables, and the columns that are shown, by the beginning of their names.
_STUDIES: dict[str, tuple[str, str, Sequence[str]]] = {
    "demo": ("demo", "accuracy", (*_ABOUT, "perplexity", "accuracy")),
    "learned": (
        "smollm2-learned",
        "accuracy",
        ("method", "structure", "variant", "achieved_sparsity", "perplexity", "accuracy lambada", "mean_accuracy"),
    ),
    "recipes": ("smollm2-recipes", "accuracy", ("method", "variant", "seeds", "perplexity")),
    "oneshot": (
        "smollm2-oneshot",
        "accuracy",
        ("method", "structure", "variant", "achieved_sparsity", "perplexity", "accuracy lambada", "mean_accuracy"),
    ),
    "ablation": ("recipe-ablation", "accuracy", ("method", "variant", "perplexity")),
    "refit": ("smollm2-refit", "accuracy", ("method", "structure", "variant", "achieved_sparsity", "perplexity")),
    "tiles": ("smollm2-tiles", "accuracy", ("method", "variant", "tile", "achieved_sparsity", "perplexity")),
    "joined": (
        "frontier-smollm2",
        "speed",
        ("method", "structure", "variant", "achieved_sparsity", "perplexity", "packed_perplexity", "speedup"),
    ),
    "carried": (
        "frontier-smollm2",
        "carried-llama-2-7b",
        ("method", "target_sparsity", "packed_share", "peak_memory", "speedup"),
    ),
}
_BLOCK = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
_VALUE = re.compile(r"(<!-- value (?P<name>[\w-]+) -->)(?P<value>.*?)(<!-- end -->)")


def blocks() -> dict[str, str]:
    """Every table of the README by the name of its block, as Markdown without notes."""
    found: dict[str, Table] = {}
    for name, (study, table, columns) in _STUDIES.items():
        tables = study_tables(reports.frame(STUDIES[study].trials(), Store(RESULTS)))
        found[name] = only(tables[table], columns)
    found["kernels"] = kernel_table(load_bench(sorted((BENCH / "kernels").glob("llama-2-7b-*.jsonl"))))
    found["model"] = model_table(load_bench([BENCH / "model" / "llama-2-7b.jsonl"]))
    found["masks"], found["steps"], *_ = learning_tables(BENCH).values()
    found["rates"] = rates_table(LEARNING)
    return {name: markdown(table, notes=False) for name, table in found.items()}


def values() -> dict[str, str]:
    """Every number of the README's text by its name."""
    store = Store(RESULTS)
    learned = gather(reports.frame(STUDIES["smollm2-learned"].trials(), store))
    kernels = load_bench(sorted((BENCH / "kernels").glob("llama-2-7b-*.jsonl")))
    tiles = gather(reports.frame(STUDIES["embedded-tiles"].trials(), store))
    by_tile = {point.tile: _perplexity(point) for point in tiles if point.tile}
    return {
        "closed": _closed(learned, "", ""),
        "closed-distilled": _closed(learned, "distillation=1", "distillation=1"),
        "closed-guided": _closed(learned, "guided", "distillation=1"),
        "max-autotune": _max_autotune_gain(kernels),
        "hours-8b": _hours(rates_table(LEARNING), "llama-3.1-8b", 90e6),
        "two-gpus": _gain_of_two(rates_table(LEARNING)),
        "smallest-tile": f"{by_tile['16x16']:.1f}",
        "largest-tile": f"{by_tile['128x128']:.1f}",
    }


def _perplexity(point: Point) -> float:
    """Of a point that has been measured on one text."""
    return next(iter(point.perplexity.values())).value


def _closed(points: Sequence[Point], variant: str, baseline: str) -> str:
    """How much a variant of PATCH joint closes of the distance of one of MaskLLM to dense, in percent, by sparsity."""
    found = {(point.method, point.sparsity, point.variant): _perplexity(point) for point in points}
    dense, maskllm = found["dense", 0.0, ""], found["maskllm", 0.5, baseline]
    patch = [found["patch-joint", target, variant] for target in TARGETS]
    *first, last = (f"{100 * (maskllm - value) / (maskllm - dense):.0f}" for value in patch)
    return f"{', '.join(first)} and {last}%"


def _max_autotune_gain(kernels: DataFrame) -> str:
    """How much less time than cuBLAS torch.compile's choice takes with one token: the range over linears."""
    one = kernels[(kernels.tokens == 1) & kernels.implementation.isin(["cublas", "compiled"])]
    times = one.pivot_table(index="linear", columns="implementation", values="value")
    saved = 100 * (1 - times.compiled / times.cublas)
    return f"{saved.min():.0f} to {saved.max():.0f}%"


def _hours(rates: Table, model: str, tokens: float) -> str:
    """How long learning on so many tokens takes at the measured rate."""
    column = [column.name for column in rates.columns].index("rate")
    (rate,) = (row[column] for row in rates.rows if row[0] == model)
    assert isinstance(rate, Measured)
    return f"{tokens / rate.value / 3600:.1f}"


def _gain_of_two(rates: Table) -> str:
    """How much faster two GPUs of a kind learn than one, the shapes and passes being the same."""
    gpus, rate = ([column.name for column in rates.columns].index(name) for name in ("gpus", "rate"))
    by_gpus = {row[gpus]: row[rate] for row in rates.rows}
    (pair,) = (name for name in by_gpus if str(name).startswith("2 x "))
    together, alone = by_gpus[pair], by_gpus[str(pair).replace("2 x", "1 x")]
    assert isinstance(together, Measured) and isinstance(alone, Measured)
    return f"{together.value / alone.value:.2f}"


def contents() -> dict[Path, tuple[dict[str, str], dict[str, str]]]:
    """The tables and the numbers of each file, by name."""
    return {README: (blocks(), values()), GUIDE: ({"published": reproduction.table()}, {})}


def fill(text: str, tables: Mapping[str, str], numbers: Mapping[str, str]) -> str:
    """A text with these tables and numbers in their places."""
    text = _BLOCK.sub(lambda block: f"{block[1]}\n{tables[block['name']]}\n\n{block[4]}", text)
    return _VALUE.sub(lambda value: f"{value[1]}{numbers[value['name']]}{value[4]}", text)


if __name__ == "__main__":
    for path, (tables, numbers) in contents().items():
        write_atomic(path, fill(path.read_text(), tables, numbers))
