"""What the docs say of hours and memory: the rate is the one that was measured, and nothing is counted twice."""

from pathlib import Path

import pytest

from experiments.data.registry import REGISTRY
from experiments.publish import reproduction
from experiments.run.store import Store
from experiments.studies import cost
from experiments.studies.registry import STUDIES

ROOT = Path(__file__).parents[3]


def test_the_rate_is_what_a_committed_row_took() -> None:
    (trial,) = [
        trial
        for trial in STUDIES["smollm2-learned"].trials()
        if trial.label == "smollm2-135m patch-joint hybrid 45% 64x64 earlier"
    ]
    rows = Store(ROOT / "results").read_rows(trial, "prune")
    (seconds,) = [row["value"] for row in rows if row["metric"] == "prune_seconds"]
    flops = cost.pruning_flops(trial.pruning)
    assert flops and reproduction.TFLOPS["H200"] == pytest.approx(flops / seconds / 1e12, rel=0.03)


def test_priors_are_counted_once() -> None:
    trials = STUDIES["smollm2-learned"].trials()
    alone = sum(cost.pruning_flops(trial.pruning) or 0 for trial in trials)
    assert reproduction.flops(trials) > alone
    assert reproduction.flops([*trials, *trials]) < 2 * reproduction.flops(trials)


# As qwen2.5-0.5b.
_SAME_SHAPE = "qwen2.5-coder-0.5b"


def test_what_learning_takes_is_said_of_every_model_but_the_embedded_one() -> None:
    _, _, *lines = reproduction.needs().splitlines()
    cells = {line.split("`")[1]: line.split("|")[3:-1] for line in lines}
    assert list(cells) == reproduction.first_of_each_shape()
    assert {"qwen2.5-0.5b", "llama-2-7b"} <= set(cells) and set(REGISTRY) - set(cells) == {"embedded", _SAME_SHAPE}
    for joint, halved, tiles, short, published in (map(float, row) for row in cells.values()):
        assert joint > halved > tiles > 0
        # 64 times the tokens.
        assert published == pytest.approx(64 * short, rel=0.1)
