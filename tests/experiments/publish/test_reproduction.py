"""The reproduction guide: its commands exist, its rate is the one that was measured."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.rows.jsonl import from_lines
from experiments.cli import app
from experiments.publish import reproduction
from experiments.studies import cost
from experiments.studies.registry import STUDIES
from experiments.studies.trial import key
from slurm import cli

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "experiments" / "publish" / "REPRODUCTION.md").read_text()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`hts ([a-z]+)[ `]", GUIDE))))
def test_commands_exist(command: str) -> None:
    assert CliRunner().invoke(app.build(cli.PANELS), [command, "--help"]).exit_code == 0


def test_the_rate_is_what_a_committed_row_took() -> None:
    (trial,) = [
        trial
        for trial in STUDIES["smollm2-learned"].trials()
        if trial.label == "smollm2-135m patch-joint hybrid 45% 64x64"
    ]
    rows = from_lines((ROOT / "results" / "rows" / key(trial) / "prune.jsonl").read_text())
    (seconds,) = [row["value"] for row in rows if row["metric"] == "prune_seconds"]
    flops = cost.pruning_flops(trial.pruning)
    assert flops and reproduction.TFLOPS["H200"] == pytest.approx(flops / seconds / 1e12, rel=0.03)


def test_priors_are_counted_once() -> None:
    trials = STUDIES["smollm2-learned"].trials()
    alone = sum(cost.pruning_flops(trial.pruning) or 0 for trial in trials)
    assert reproduction.flops(trials) > alone
    assert reproduction.flops([*trials, *trials]) < 2 * reproduction.flops(trials)
