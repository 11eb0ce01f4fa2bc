"""What methods, texts and tasks are called in tables and figures, and in which order they are read."""

from collections.abc import Iterable

import pandas as pd

METHODS = {
    "dense": "Dense",
    "magnitude": "Magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "maskllm": "MaskLLM",
    "patch-tile": "PATCH tile",
    "patch-joint": "PATCH joint",
}
STRUCTURES = ("dense", "unstructured", "2:4", "hybrid")
SOURCES = {
    "wikitext2/test": "WikiText-2",
    "wikitext2/validation": "WikiText-2 validation",
    "embedded/test": "Held-out text",
    "embedded/validation": "Validation text",
}
TASKS = {
    "mmlu": "MMLU",
    "piqa": "PIQA",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "winogrande": "WinoGrande",
    "openbookqa": "OBQA",
    "race": "RACE",
    "race_subset": "RACE subset",
    "hellaswag": "HellaSwag",
    "lambada_openai": "LAMBADA",
    "wiki_continuation": "Continuation",
}


def rank(order: Iterable[str], name: str) -> int:
    """Position of ``name`` in ``order``; unknown names come last."""
    known = list(order)
    return known.index(name) if name in known else len(known)


def percent(share: float) -> str:
    """A share such as 0.45 as ``45%``."""
    return f"{100 * share:.4g}%"


def trial_labels(frame: pd.DataFrame) -> dict[str, str]:
    """The shortest name that tells each trial of ``frame`` from the others, such as ``PATCH joint 45%``.

    Args:
        frame: as from `analysis.rows.load_rows`.

    Returns:
        Names by trial hash, in reading order.
    """
    trials = frame.drop_duplicates("trial").set_index("trial")
    several = {column: trials[column].nunique() > 1 for column in ("model", "tile")}
    seeds = trials.groupby("method").seed.nunique()
    labels: dict[str, str] = {}
    order = sorted(
        trials.index,
        key=lambda trial: (
            trials.model[trial],
            rank(METHODS, trials.method[trial]),
            rank(STRUCTURES, trials.structure[trial]),
            -trials.sparsity[trial],
            str(trials.tile[trial]),
            trials.seed[trial],
        ),
    )
    for trial in order:
        about = trials.loc[trial]
        parts = [about.model] if several["model"] else []
        parts.append(METHODS.get(about.method, about.method))
        if about.structure != "dense":
            parts.append("2:4" if about.structure == "2:4" else percent(about.sparsity))
        if about.structure == "unstructured":
            parts.append("unstructured")
        if several["tile"] and about.structure == "hybrid":
            parts.append(about.tile)
        if seeds[about.method] > 1:
            parts.append(f"seed {about.seed}")
        labels[trial] = " ".join(parts)
    names = list(labels.values())
    return {trial: name if names.count(name) == 1 else f"{name} ({trial})" for trial, name in labels.items()}
