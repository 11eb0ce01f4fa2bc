"""A study small enough to run whole in seconds, for tests and for the processes that they start."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.studies import build
from experiments.studies.trial import Calibration, Evaluation, Perplexity, Trial
from patch.learn.recipe import PATCH_JOINT


def tiny_trials(model: Path, text: Path, **recipe: Any) -> tuple[Trial, ...]:
    """Dense, magnitude, and a mask learned from a SparseGPT prior."""
    calibration = Calibration(str(text), windows=8, length=16)
    short: dict[str, Any] = {"steps": 12, "batch": 2, "microbatch": 2, "length": 16}
    short |= {"checkpoint_every": 2, "log_every": 3} | recipe
    learned = build.learned(
        str(model),
        "patch-joint",
        0.35,
        (16, 16),
        str(text),
        calibration,
        recipe=dataclasses.replace(PATCH_JOINT, **short),
        earlier=True,
    )
    prunings = [
        build.dense(str(model)),
        build.one_shot(str(model), "magnitude", "2:4", 0.5, (16, 16), calibration),
        learned,
    ]
    evaluation = Evaluation((Perplexity(str(text), 32),))
    return tuple(Trial(pruning, evaluation) for pruning in prunings)
