"""Forty trials of the embedded model, minutes in all: shared priors, a long learning, and one trial that fails.

``python forty_study.py RESULTS TEXT run`` runs them all in this process, without a cluster; any other arguments after
TEXT are those of the ``hts`` command, which knows the study as ``forty``.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from experiments.studies import build
from experiments.studies.trial import Calibration, Evaluation, Perplexity, Pruning, Trial

TILE = (64, 64)
# Seconds of learning on one core: longer than the test's time limit of a job.
LONG_STEPS = 200
# Tokens of a window that the model has positions for, and the short text does not fill: that is found when it is read.
IMPOSSIBLE = 511


def forty_trials(text: Path) -> tuple[Trial, ...]:
    """One text serves for calibration, learning and evaluation; the last trial evaluates on one that is too short."""
    calibration = Calibration(str(text), windows=8, length=16)
    short: dict[str, Any] = {
        "steps": 10,
        "batch": 2,
        "microbatch": 2,
        "length": 16,
        "checkpoint_every": 5,
        "log_every": 5,
    }

    def one_shot(method: str, structure: str, sparsity: float) -> Pruning:
        return build.one_shot("embedded", method, structure, sparsity, TILE, calibration)

    def learned(method: str, sparsity: float, **changes: Any) -> Pruning:
        return build.learned(
            "embedded", method, sparsity, TILE, str(text), calibration, earlier=True, **(short | changes)
        )

    prunings = [
        build.dense("embedded"),
        *(one_shot("magnitude", "hybrid", step / 100) for step in range(2, 26, 2)),
        *(one_shot("wanda", "hybrid", step / 100) for step in range(3, 27, 2)),
        *(one_shot("sparsegpt", "hybrid", step / 100) for step in range(10, 40, 5)),
        learned("maskllm", 0.5),
        *(learned("patch-joint", target) for target in (0.45, 0.35, 0.25)),
        learned("patch-joint", 0.15, steps=LONG_STEPS),
        *(learned("patch-tile", target) for target in (0.45, 0.35)),
    ]
    evaluation = Evaluation((Perplexity(str(text), 32),))
    impossible = Evaluation((Perplexity(str(text.with_name("short.jsonl")), IMPOSSIBLE),))
    return (
        *(Trial(pruning, evaluation) for pruning in prunings),
        Trial(prunings[1], dataclasses.replace(evaluation, batch=4)),
        Trial(prunings[2], impossible),
    )


def main() -> None:
    import torch

    from experiments.run import pipeline
    from experiments.run.runtime import Machine
    from experiments.run.store import Store
    from experiments.studies.build import Study
    from experiments.studies.registry import STUDIES
    from slurm import cli

    results, text, *arguments = sys.argv[1:]
    trials = forty_trials(Path(text))
    if arguments == ["run"]:
        torch.set_num_threads(1)
        machine = Machine("cpu", None, lambda *_: None)
        pipeline.run_trials(trials, Store(Path(results)), machine, lambda trial, error: print(trial.label, error))
        return
    STUDIES["forty"] = Study("a test", lambda: trials)
    sys.argv = ["hts", *arguments, "--results", results]
    cli.main()


if __name__ == "__main__":
    main()
