"""What it takes to reproduce each published table and figure: the table in ``experiments/publish/REPRODUCTION.md``."""

from collections.abc import Iterable

from experiments.studies import cost
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Trial

# What a GPU sustains, in 1e12 operations a second: the H200's is measured, the others' are that times the ratio of
# dense bfloat16 peaks.
TFLOPS = {"H200": cost.H200_TFLOPS, "A100": 60.0, "A6000": 30.0}

# What is published, and the study that makes it.
PUBLISHED = {
    "Accuracy, models up to 1B": "accuracy-small",
    "Accuracy, LLaMA-2-7B and LLaMA-3.1-8B": "accuracy-large",
    "Perplexity against tile shape": "tile-shapes",
    "Perplexity and accuracy from 0 to 50%": "sparsities",
    "Ablation of the prior": "priors",
    "Joint against tile-only learning": "joint-or-tile",
    "Accuracy against speed, LLaMA-2-7B": "frontier-llama-2-7b",
    "Accuracy against speed, LLaMA-3.1-8B": "frontier-llama-3.1-8b",
    "Kernel speed": "speed-kernels",
    "End-to-end speed": "speed-models",
    "Accuracy, a small model": "smollm2-learned",
    "Accuracy against speed, a small model": "frontier-smollm2",
}


def flops(trials: Iterable[Trial]) -> float:
    """Operations of a study: each pruning and each prior once, and every evaluation."""
    trials = list(trials)
    prunings = cost.with_priors(trial.pruning for trial in trials)
    total = sum(cost.pruning_flops(pruning) or 0.0 for pruning in prunings)
    return total + sum(cost.evaluation_flops(trial.pruning.model, trial.evaluation) or 0.0 for trial in trials)


def table() -> str:
    """Markdown: what is published, the command, GPU hours on each GPU, and GiB of checkpoints."""
    lines = [
        "| published | command | " + " | ".join(f"{gpu} hours" for gpu in TFLOPS) + " | disk (GiB) |",
        "|---|---|" + "---:|" * (len(TFLOPS) + 1),
    ]
    for published, study in PUBLISHED.items():
        trials = STUDIES[study].trials()
        timed = sum(cost.grid_seconds(trial.evaluation.grid) for trial in trials)
        hours = [(flops(trials) / (1e12 * rate) + timed) / 3600 for rate in TFLOPS.values()]
        cells = [
            published,
            f"`hts run {study}`",
            *map(_rounded, hours),
            _rounded(cost.disk(trial.pruning for trial in trials)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rounded(value: float) -> str:
    """To two digits: these are estimates."""
    return f"{float(f'{value:.2g}'):g}"
