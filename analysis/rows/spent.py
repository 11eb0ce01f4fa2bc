"""What each pruned model took to make, from its rows: GPU hours, joules, tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.rows.load import records
from analysis.rows.points import Point
from analysis.rows.variants import canonical

# Parts of a definition that are done to what was there before, the last first.
_DONE_AFTER = ("recovery", "refit")


@dataclass(frozen=True)
class Spent:
    """What making a checkpoint took, with what it was made of where the rows have that too; the mean over seeds.

    Attributes:
        gpu_hours: seconds that processes held a GPU, each counted. Where others shared that GPU it is the most that it
            took.
        kilojoules: of the GPUs; None where the rows do not say.
        tokens: that were learned on, or what is kept trained on; 0 in one shot.
        gpus: their names.
        made_of: a trial of the checkpoint that was recovered or refitted; None of any other.
        alone: what that one had taken is not known: all this is of what was done to it.
    """

    gpu_hours: float
    kilojoules: float | None
    tokens: int
    gpus: tuple[str, ...]
    made_of: str | None = None
    alone: bool = False


def spent(frame: pd.DataFrame, points: Sequence[Point]) -> dict[tuple[str, ...], Spent]:
    """By the trials of each point what it took, of those whose rows say how many GPUs it was.

    Older rows do not, and their seconds leave out what a run that was stopped had taken before. What is not trained
    is neither stopped and taken up nor shared by several: those of a GPU are of one.

    Args:
        frame: as from `analysis.rows.load.load_rows`; ``prune`` rows without layers and steps will do.
    """
    rows = frame[(frame.stage == "prune") & frame.layer.isna() & frame.step.isna()]
    facts: dict[str, dict[str, float]] = {}
    for row in records(rows[rows.metric.isin(["prune_seconds", "gpus", "energy"])]):
        facts.setdefault(row.trial, {})[row.metric] = row.value
    about = rows.drop_duplicates("trial").set_index("trial")
    gpus = {str(trial): gpu for trial, gpu in about.gpu.items() if isinstance(gpu, str)}
    prunings = {str(trial): definition["pruning"] for trial, definition in about.definition.items()}
    for trial in gpus:
        if not prunings[trial].get("learning") and "recovery" not in prunings[trial]:
            facts.setdefault(trial, {}).setdefault("gpus", 1.0)
    by_definition = {canonical(pruning): trial for trial, pruning in prunings.items()}

    def made_of(trial: str) -> str | None:
        pruning = prunings[trial]
        part = next((part for part in _DONE_AFTER if part in pruning), None)
        return part and by_definition.get(canonical({name: pruning[name] for name in pruning if name != part}))

    def stages(trial: str) -> list[str]:
        """A trial and those that it was made of, from the first of which it is known on."""
        if trial not in gpus or not {"prune_seconds", "gpus"} <= facts.get(trial, {}).keys():
            return []
        before = made_of(trial)
        return [*(stages(before) if before else []), trial]

    found = {}
    for point in points:
        chains = [chain for trial in point.trials if (chain := stages(trial))]
        if point.method != "dense" and chains:
            seconds = [sum(facts[t]["prune_seconds"] * facts[t]["gpus"] for t in chain) for chain in chains]
            joules = [sum(facts[t].get("energy", math.nan) for t in chain) for chain in chains]
            energy = sum(joules) / len(joules) / 1000
            tokens = sum(_tokens(prunings[trial]) for trial in chains[0])
            names = tuple(sorted({gpus[trial] for chain in chains for trial in chain}))
            hours = sum(seconds) / len(seconds) / 3600
            first = chains[0][0]
            alone = any(part in prunings[first] for part in _DONE_AFTER)
            found[point.trials] = Spent(
                hours, None if math.isnan(energy) else energy, tokens, names, made_of(chains[0][-1]), alone
            )
    return found


def _tokens(pruning: Mapping[str, Any]) -> int:
    if recovery := pruning.get("recovery"):
        recipe = recovery["recipe"]
        seen = recipe["steps"] * recipe["batch"] + recipe["block_epochs"] * recipe["block_windows"]
        return int(recipe["length"] * seen)
    if "refit" in pruning or not pruning.get("learning"):
        return 0
    recipe = pruning["learning"]["recipe"]
    return int(recipe["steps"] * recipe["batch"] * recipe["length"])
