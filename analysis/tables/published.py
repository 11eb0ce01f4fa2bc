"""The numbers that the PATCH paper reports, to print beside ours.

Hourri, Mozaffari, Mehri Dehnavi: PATCH: Learnable Tile-level Hybrid Sparsity for LLMs, arXiv:2509.23410.
WikiText-2 perplexity in windows of 4096 tokens, and the mean accuracy of eight zero-shot tasks. PATCH is *joint* up to
one billion parameters and *tile* above.
"""

import re
from dataclasses import dataclass

from patch.methods import METHODS

CITATION = "Hourri et al., PATCH: Learnable Tile-level Hybrid Sparsity for LLMs, arXiv:2509.23410"
WINDOW = 4096
MODELS = ("Qwen2.5-0.5B", "LLaMA-3.2-1B", "Gemma-3-1B", "LLaMA-2-7B", "LLaMA-3.1-8B")
_LEARNED_JOINTLY = MODELS[:3]

# (method, structure, sparsity): perplexity and mean accuracy in percent, one pair per model.
_RESULTS: dict[tuple[str, str, float], tuple[tuple[float, float], ...]] = {
    ("dense", "dense", 0.0): ((12.08, 46.00), (9.06, 47.70), (11.67, 47.01), (5.12, 54.61), (5.84, 60.31)),
    ("magnitude", "2:4", 0.5): (
        (6734.97, 30.16),
        (563.44, 29.66),
        (5005.56, 31.66),
        (54.39, 43.44),
        (765.92, 35.93),
    ),
    ("wanda", "2:4", 0.5): ((72.48, 32.97), (78.18, 31.61), (69.41, 34.16), (11.15, 44.30), (21.29, 41.77)),
    ("sparsegpt", "2:4", 0.5): ((36.59, 34.81), (32.73, 35.55), (44.59, 35.58), (10.12, 45.09), (15.11, 45.53)),
    ("maskllm", "2:4", 0.5): ((15.22, 39.33), (12.93, 41.04), (12.82, 41.84), (6.78, 48.62), (8.58, 52.80)),
    ("patch", "hybrid", 0.45): ((14.57, 40.29), (12.23, 42.08), (11.96, 42.80), (6.55, 48.99), (8.20, 53.60)),
    ("patch", "hybrid", 0.35): ((13.84, 41.15), (11.67, 42.72), (11.48, 43.30), (6.18, 50.08), (7.89, 55.28)),
    ("patch", "hybrid", 0.25): ((13.47, 42.39), (11.00, 43.81), (11.17, 44.07), (5.86, 51.58), (7.34, 56.48)),
}


@dataclass(frozen=True)
class Published:
    """One reported point; ``mean_accuracy`` is a share, perplexity is at `WINDOW` tokens."""

    model: str
    method: str
    structure: str
    sparsity: float
    perplexity: float
    mean_accuracy: float


def _results() -> tuple[Published, ...]:
    results = []
    for place, model in enumerate(MODELS):
        for (method, structure, sparsity), values in _RESULTS.items():
            if method == "patch":
                method = "patch-joint" if model in _LEARNED_JOINTLY else "patch-tile"
            perplexity, accuracy = values[place]
            results.append(Published(model, method, structure, sparsity, perplexity, round(accuracy / 100, 4)))
    return tuple(results)


RESULTS = _results()
# By falling perplexity, alike on each of the models. Dense is not in it: Gemma-3-1B's is above PATCH's at 35%.
ORDER = tuple(about for about in _RESULTS if about[0] != "dense")


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
    dense = {result.model: result.perplexity for result in RESULTS if result.method == "dense"}
    about = (method, structure, sparsity)
    factors = [
        result.perplexity / dense[result.model]
        for result in RESULTS
        if (result.method, result.structure, result.sparsity) == about
    ]
    return (min(factors), max(factors)) if factors else None


def _plain(model: str) -> str:
    """A hub id or registry name without organisation, case and the suffixes of conversions of the same weights."""
    return re.sub(r"^meta-|-(hf|pt)$", "", model.rpartition("/")[2].lower())
