"""The tables of ``README.md``, made from the committed rows.

python -m experiments.readme        rewrites what stands between ``<!-- table NAME -->`` and ``<!-- end -->``
"""

import re
from collections.abc import Sequence
from pathlib import Path

from analysis.learning_speed import learning_tables
from analysis.speed import kernel_table, load_bench, model_table
from analysis.study_tables import study_tables
from analysis.tables import Table, markdown, only
from experiments import reports
from experiments.store import Store, write_atomic
from experiments.studies import STUDIES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
BENCH = RESULTS / "bench" / "nvidia-h200"

_ABOUT = ("method", "structure", "achieved_sparsity")
# For each block a study, one of its tables, and the columns that are shown, by the beginning of their names.
_STUDIES: dict[str, tuple[str, str, Sequence[str]]] = {
    "demo": ("demo", "accuracy", (*_ABOUT, "perplexity", "accuracy")),
    "learned": (
        "smollm2-learned",
        "accuracy",
        ("method", "structure", "variant", "achieved_sparsity", "perplexity", "accuracy lambada", "mean_accuracy"),
    ),
    "oneshot": ("smollm2-oneshot", "accuracy", (*_ABOUT, "perplexity", "accuracy lambada", "mean_accuracy")),
    "ablation": ("recipe-ablation", "accuracy", ("method", "variant", "perplexity")),
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


def blocks() -> dict[str, str]:
    """Every table by the name of its block, as Markdown without notes."""
    found: dict[str, Table] = {}
    for name, (study, table, columns) in _STUDIES.items():
        tables = study_tables(reports.frame(STUDIES[study].trials(), Store(RESULTS)))
        found[name] = only(tables[table], columns)
    found["kernels"] = kernel_table(load_bench(sorted((BENCH / "kernels").glob("llama-2-7b-*.jsonl"))))
    found["model"] = model_table(load_bench([BENCH / "model" / "llama-2-7b.jsonl"]))
    found |= dict(zip(("masks", "steps", "rates"), learning_tables(BENCH).values(), strict=True))
    return {name: markdown(table, notes=False) for name, table in found.items()}


def filled(text: str) -> str:
    """A README with its tables as the rows have them."""
    known = blocks()
    return _BLOCK.sub(lambda block: f"{block[1]}\n{known[block['name']]}\n\n{block[4]}", text)


if __name__ == "__main__":
    path = ROOT / "README.md"
    write_atomic(path, filled(path.read_text()))
