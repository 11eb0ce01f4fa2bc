"""The reproduction guide: its commands exist, its rate is the one that was measured."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.lines import from_lines
from experiments import cost, guide
from experiments.cli import app
from experiments.definitions import key
from experiments.studies import STUDIES

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "experiments" / "README.md").read_text()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`hts ([a-z]+)[ `]", GUIDE))))
def test_commands_exist(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_rate_is_what_a_committed_row_took() -> None:
    (trial,) = [
        trial
        for trial in STUDIES["smollm2-learned"].trials()
        if trial.label == "smollm2-135m patch-joint hybrid 45% 64x64"
    ]
    rows = from_lines((ROOT / "results" / "rows" / key(trial) / "prune.jsonl").read_text())
    (seconds,) = [row["value"] for row in rows if row["metric"] == "prune_seconds"]
    flops = cost.pruning_flops(trial.pruning)
    assert flops and guide.TFLOPS["H200"] == pytest.approx(flops / seconds / 1e12, rel=0.03)


def test_priors_are_counted_once() -> None:
    trials = STUDIES["smollm2-learned"].trials()
    alone = sum(cost.pruning_flops(trial.pruning) or 0 for trial in trials)
    assert guide.flops(trials) > alone
    assert guide.flops([*trials, *trials]) < 2 * guide.flops(trials)
