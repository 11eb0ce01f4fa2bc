"""The bench of learning steps: every way to run is a file of its own, and nothing is timed that learns otherwise."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from analysis.rows.format import digest
from analysis.rows.jsonl import from_lines
from analysis.rows.load import stored_rows
from experiments.bench import harness, learning, rows
from experiments.bench.harness import Lab
from experiments.bench.learning import BENCH, PART, WARMUP, Bench, bench_of, facts_of
from patch.errors import UserError
from patch.learn.recipe import PATCH_JOINT

COMMITTED = Path(__file__).parents[3] / "results" / "bench" / "nvidia-h200"


def entry(seconds: float, tokens: int) -> dict[str, float]:
    numbers = {"step": 1.0, "loss": 1.0, "cross_entropy": 1.0, "density": 0.5, "grad_norm": 0.1}
    return numbers | {"tokens_per_second": tokens / seconds}


def test_ways_to_run_are_different_benches(tmp_path: Path) -> None:
    for checkpointing in (False, True):
        recipe = dataclasses.replace(PATCH_JOINT, activation_checkpointing=checkpointing)
        bench = Bench("llama-3.2-1b", 16, recipe, 1)
        tokens = recipe.batch * recipe.length
        seen = [entry(seconds, tokens) for seconds in (*[9.0] * WARMUP, 0.5, 0.25, 0.25)]
        path = rows.path_of(BENCH, bench, PART, tmp_path, "A GPU")
        rows.write(BENCH, bench, PART, facts_of(bench, seen, 2**30), 0.0, path)
    paths = sorted((tmp_path / "bench" / "a-gpu" / "learning").iterdir())
    assert len(paths) == 2
    found = [from_lines(path.read_text())[0] for path in paths]
    assert {row["definition"]["recipe"]["activation_checkpointing"] for row in found} == {False, True}
    assert all(row["value"] == 250 and row["trial"] in path.stem for row, path in zip(found, paths, strict=True))


def test_committed_rows_are_named_by_what_was_measured() -> None:
    rows_ = [row for row in stored_rows(COMMITTED) if row["stage"] == "bench:learning"]
    assert rows_
    assert all(row["trial"] == digest(row["definition"]) for row in rows_)


@pytest.mark.parametrize("loss", [2.0, 3.0, float("nan")], ids=["right", "wrong", "nan"])
def test_steps_are_timed_if_they_learn_as_eager_ones(loss: float, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of("llama-3.2-1b", None, 8, 2, 64, "float32", False)
    assert (bench.blocks, bench.processes, bench.recipe.microbatch) == (16, 1, 2)

    def steps(case: Any, blocks: int, count: int, implementation: Any = None) -> list[dict[str, float]]:
        own = 2.0 if implementation else loss
        return [entry(0.5, 8 * 64) | {"cross_entropy": own}] * count

    monkeypatch.setattr(learning, "steps", steps)
    measured = harness.measure(BENCH, bench, [PART], lab)
    if loss != 2.0:
        with pytest.raises(UserError, match="eager masks 2: not timed"):
            list(measured)
        return
    ((part, facts, _),) = measured
    assert part == PART and [fact.value for fact in facts if fact.metric == "step"] == [500]


def test_models_that_are_not_of_the_registry_are_refused() -> None:
    with pytest.raises(UserError, match="unknown model"):
        bench_of("llama-9", None, 8, 2, 64, "float32", False)
