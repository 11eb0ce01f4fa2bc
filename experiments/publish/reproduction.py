"""What learning takes, and what it takes to reproduce each published table and figure: tables of the docs."""

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.data.registry import REGISTRY
from experiments.studies import cost
from experiments.studies.build import learned
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Calibration, Trial

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
    "Accuracy, a small model": "smollm2-published",
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


# What is learned, as a heading and changes of the published recipe of PATCH joint, or of tiles alone.
_LEARNED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "joint": ("patch-joint", {}),
    "joint, bfloat16 logits": ("patch-joint", {"logit_dtype": "bfloat16"}),
    "tiles alone": ("patch-tile", {}),
}
# Tokens of learning, as steps, sequences a step and tokens a sequence: what the small model's results took, and what is
# published.
_LENGTHS = {"33 million tokens": (2000, 16, 1024), "2100 million tokens": (2000, 256, 4096)}


def first_of_each_shape() -> list[str]:
    """The models of the registry, but for the embedded one and what has the shape of one before it."""
    shapes: dict[tuple[object, ...], str] = {}
    for name, spec in REGISTRY.items():
        if name != "embedded":
            shape = spec.hidden, spec.intermediate, spec.blocks, spec.heads, spec.kv_heads, spec.vocab
            shapes.setdefault(shape, name)
    return list(shapes.values())


def needs() -> str:
    """Markdown: for each model of the registry the GiB that learning takes on one GPU, and H200 hours.

    Models of one shape take the same: the first stands for all.
    """
    heads = [f"{name} (GiB)" for name in _LEARNED] + [f"{name} (H200 hours)" for name in _LENGTHS]
    lines = ["| model | parameters | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    seen = Calibration("c4", 128, 2048)
    for name in first_of_each_shape():
        spec = REGISTRY[name]
        masks = [learned(name, method, 0.45, (128, 128), "c4", seen, **new) for method, new in _LEARNED.values()]
        sizes = [cost.memory(mask) or 0.0 for mask in masks]
        runs = [
            learned(name, "patch-joint", 0.45, (128, 128), "c4", seen, steps=steps, batch=batch, length=length)
            for steps, batch, length in _LENGTHS.values()
        ]
        hours = [(cost.pruning_flops(run) or 0.0) / (1e12 * cost.H200_TFLOPS) / 3600 for run in runs]
        cells = [f"`{name}`", f"{spec.parameters / 1e9:.2g} billion", *map(_rounded, [*sizes, *hours])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rounded(value: float) -> str:
    """To two digits: these are estimates."""
    return f"{float(f'{value:.2g}'):g}"
