"""A learned method is one entry and its recipe: help, definitions, tables and figures know it from there."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis.figures.frontier import draw_frontier
from analysis.figures.style import style_of
from experiments.publish import measured
from experiments.run.store import Store
from experiments.studies import build
from experiments.studies.build import Study
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Calibration, Evaluation, Perplexity, Trial
from patch.learn.recipe import PATCH_JOINT
from patch.methods import METHODS, Method, members
from patch.oneshot import METHODS as ONE_SHOT

SHORT = dataclasses.replace(PATCH_JOINT, steps=2, batch=2, microbatch=2, length=16, sparsity_penalty=3.0)
SCRATCH = Method("scratch", "From scratch", "#123456", "X", SHORT, "magnitude")


def test_the_one_shot_methods_are_those_that_are_written() -> None:
    assert set(members("one-shot")) == set(ONE_SHOT)
    for name, written in ONE_SHOT.items():
        about = METHODS[name]
        assert (about.calibrated, about.rounds) == (written.statistic is not None, written.quantised is not None)
        assert about.changes_weights == (written.frozen is not None)


def test_help_names_it() -> None:
    script = """
from patch.learn.recipe import PATCH_JOINT
from patch.methods import METHODS, Method
METHODS["scratch"] = Method("scratch", "From scratch", "#123456", "X", PATCH_JOINT)
import sys
from slurm import cli
sys.argv = ["hts", "learn", "--help"]
try:
    cli.main()
finally:
    assert "torch" not in sys.modules, "help takes seconds where torch is imported"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "scratch" in done.stdout


def test_a_study_runs_it_to_its_table_and_figure(  # type: ignore[no-untyped-def]
    hts, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(METHODS, "scratch", SCRATCH)
    model, text, tile = str(tiny_model), str(tiny_text), (16, 16)
    prunings = [
        build.dense(model),
        build.learned(model, "scratch", 0.25, tile, text, Calibration(text, 8, 16)),
        build.learned(model, "scratch", 0.35, tile, text, Calibration(text, 8, 16)),
    ]
    trials = tuple(Trial(pruning, Evaluation((Perplexity(text, 32),))) for pruning in prunings)
    monkeypatch.setitem(STUDIES, "scratch", Study("a test", lambda: trials))
    assert [trial.label.removeprefix(model) for trial in trials] == [
        "",
        " scratch hybrid 25% 16x16",
        " scratch hybrid 35% 16x16",
    ]
    code, printed, err = hts("run", "scratch")
    assert code == 0, err
    assert "From scratch" in printed
    report = tmp_path / "runs" / "reports" / "scratch"
    # On a narrow terminal some columns are left out, in a file none.
    assert re.search(r"From scratch +\| hybrid +\|.* 16x16 \| +25 \|", (report / "accuracy.md").read_text())
    assert (report / "frontier.png").is_file()
    frame: pd.DataFrame = measured.frame(trials, Store(tmp_path / "runs"))
    drawn = [line for axis in draw_frontier(frame).axes for line in axis.lines]
    assert any((line.get_color(), line.get_marker()) == (SCRATCH.color, SCRATCH.marker) for line in drawn)
    assert style_of("scratch").color != style_of("unheard of").color
    assert "did you mean scratch" in hts("learn", model, "--method", "scrtch")[2]
