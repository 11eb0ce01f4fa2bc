"""The numbers that the PATCH paper reports, to print beside ours.

Hourri, Mozaffari, Mehri Dehnavi: PATCH: Learnable Tile-level Hybrid Sparsity for LLMs, arXiv:2509.23410.
WikiText-2 perplexity in windows of 4096 tokens, and the accuracy of eight tasks, as ``patch_paper.csv`` beside
this file has them. PATCH is *joint* up to one billion parameters and *tile* above.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from analysis.names import PAPER_TASKS
from patch.methods import METHODS

CITATION = "Hourri et al., PATCH: Learnable Tile-level Hybrid Sparsity for LLMs, arXiv:2509.23410"
WINDOW = 4096
# What the table of the paper is called here. Of the last one MaskLLM is not reported.
_NAMES = {
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "llama-3.2-1b": "LLaMA-3.2-1B",
    "gemma-3-1b": "Gemma-3-1B",
    "llama-2-7b": "LLaMA-2-7B",
    "llama-3.1-8b": "LLaMA-3.1-8B",
    "llama-2-13b": "LLaMA-2-13B",
}
# Those of which everything is reported that is compared here.
MODELS = tuple(_NAMES.values())[:5]
_TABLE = Path(__file__).with_name("patch_paper.csv")


@dataclass(frozen=True)
class Published:
    """One reported point; accuracies are shares, perplexity is at `WINDOW` tokens.

    Attributes:
        accuracy: by the name of the task.
        mean_accuracy: over all of them.
    """

    model: str
    method: str
    structure: str
    sparsity: float
    perplexity: float
    mean_accuracy: float
    accuracy: Mapping[str, float] = field(default_factory=dict)


def _results() -> tuple[Published, ...]:
    with open(_TABLE, encoding="utf-8", newline="") as file:
        return tuple(
            Published(
                _NAMES[row["model"]],
                row["method"],
                "dense" if row["method"] == "dense" else row["pattern"],
                int(row["sparsity"]) / 100,
                float(row["wikitext2_ppl_4096"]),
                _share(row["mean"]),
                {task: _share(row[task]) for task in PAPER_TASKS},
            )
            for row in csv.DictReader(file)
        )


def _share(percent: str) -> float:
    return round(float(percent) / 100, 4)


RESULTS = _results()
# By falling perplexity, alike on each of `MODELS`, of the methods that are here. Dense is not in it: Gemma-3-1B's is
# above PATCH's at 35%.
ORDER = tuple(
    (result.method.partition("-")[0], result.structure, result.sparsity)
    for result in RESULTS
    if result.model == MODELS[0] and result.method in METHODS and result.method != "dense"
)


def name_of(method: str) -> str:
    """What the published tables call a method: there, PATCH is one."""
    known = METHODS.get(method)
    return (known and known.published) or method


def find(model: str, method: str, structure: str, sparsity: float) -> Published | None:
    """The reported point for a model by whatever name it goes (``meta-llama/Llama-2-7b-hf``), or None."""
    for result in RESULTS:
        same = (result.method, result.structure, result.sparsity) == (method, structure, sparsity)
        if same and _plain(result.model) == _plain(model):
            return result
    return None


def over_dense(method: str, structure: str, sparsity: float) -> tuple[float, float] | None:
    """The lowest and the highest of the reported perplexities over their models' dense ones; None if there are none."""
    dense = {r.model: r.perplexity for r in RESULTS if r.method == "dense" and r.model in MODELS}
    about = (method, structure, sparsity)
    factors = [
        result.perplexity / dense[result.model]
        for result in RESULTS
        if (result.method, result.structure, result.sparsity) == about and result.model in dense
    ]
    return (min(factors), max(factors)) if factors else None


def _plain(model: str) -> str:
    """A hub id or registry name without organisation, case and the suffixes of conversions of the same weights."""
    return re.sub(r"^meta-|-(hf|pt)$", "", model.rpartition("/")[2].lower())
