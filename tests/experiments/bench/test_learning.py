"""The bench of learning steps: every way to run is a file of its own."""

import dataclasses
from pathlib import Path

from analysis.rows.jsonl import from_lines
from experiments.bench.learning import Bench, write
from experiments.studies.trial import digest
from patch.learn.recipe import PATCH_JOINT

COMMITTED = Path(__file__).parents[3] / "results" / "bench" / "nvidia-h200" / "learning"


def test_ways_to_run_are_different_benches(tmp_path: Path) -> None:
    entry = {"step": 1.0, "loss": 1.0, "cross_entropy": 1.0, "density": 0.5, "grad_norm": 0.1}
    for checkpointing in (False, True):
        recipe = dataclasses.replace(PATCH_JOINT, activation_checkpointing=checkpointing)
        write(Bench("llama-3.2-1b", 16, recipe, 1), [0.5, 0.25, 0.25], [entry], 2**30, "A GPU", tmp_path, 0.0)
    paths = sorted((tmp_path / "bench" / "a-gpu" / "learning").iterdir())
    assert len(paths) == 2
    found = [from_lines(path.read_text())[0] for path in paths]
    assert {row["definition"]["recipe"]["activation_checkpointing"] for row in found} == {False, True}
    assert all(row["value"] == 250 and row["trial"] in path.stem for row, path in zip(found, paths, strict=True))


def test_committed_files_are_named_by_what_is_in_them() -> None:
    paths = list(COMMITTED.glob("*.jsonl"))
    assert paths
    for path in paths:
        row = from_lines(path.read_text())[0]
        assert path.stem.endswith(row["trial"]) and row["trial"] == digest(row["definition"])
