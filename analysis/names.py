"""What texts and tasks are called in tables and figures, and in which order they are read."""

from collections.abc import Iterable, Mapping
from typing import Any

SOURCES = {
    "wikitext2/test": "WikiText-2",
    "wikitext2/validation": "WikiText-2 validation",
    "python/test": "Held-out Python",
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
    "humaneval": "HumanEval",
    "wiki_continuation": "Continuation",
}

# Over these the published means are taken; RACE may be a subset, called so where it is shown.
PAPER_TASKS = ("mmlu", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "race", "hellaswag")

# The labels of a row that say what was timed of a whole model, and what that is called.
WORKLOAD = ["kind", "batch", "length"]
_WORKLOADS = {"decode": "Decoding, batch {batch}", "prefill": "Prefill, {batch} x {length} tokens"}


def workload_of(labels: Mapping[Any, Any]) -> str:
    """What was timed, from the labels of its row: ``decode@16x1``; parts that they lack are left out."""
    batch, length = (f"{labels[name]:.0f}" if name in labels else "" for name in ("batch", "length"))
    return f"{labels.get('kind', '')}@{batch}x{length}"


def workload_name(workload: str) -> str:
    """What a workload such as ``decode@16x1`` is called: ``Decoding, batch 16``."""
    kind, _, size = workload.partition("@")
    batch, _, length = size.partition("x")
    return _WORKLOADS.get(kind, workload).format(batch=batch, length=length)


def rank(order: Iterable[str], name: str) -> int:
    """Position of ``name`` in ``order``; unknown names come last."""
    known = list(order)
    return known.index(name) if name in known else len(known)


def percent(share: float) -> str:
    """A share such as 0.45 as ``45%``."""
    return f"{100 * share:.4g}%"
