"""Speed grids as trials: what they run, what they leave where nothing can be timed, and the tables of their rows."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.figures.study import plot_study
from analysis.rows.format import Fact
from analysis.tables.render import MISSING, shown_cells
from analysis.tables.study import study_tables, title
from experiments.bench import kernels, model
from experiments.bench.harness import Verified
from experiments.publish import measured
from experiments.run import pipeline
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies import build, speed
from experiments.studies.trial import DENSE_PART, LINEARS, Evaluation, KernelGrid, ModelGrid, Trial, definition, key
from patch.errors import UserError

CPU = Machine("cpu", None, lambda *_: None)
KERNELS = speed.kernels()
MODELS = speed.models()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose times are made up: cuBLAS takes 12 us, a library 10, a hybrid linear 8."""

    def time(labels: dict[str, Any], implementation: str, value: float, **more: Any) -> Fact:
        return Fact("time", value, "us", labels | {"implementation": implementation} | more)

    def products(trial: Trial, parts: Any, lab: Any) -> Iterator[tuple[str, Iterator[list[Fact]]]]:
        grid = trial.evaluation.grid
        assert isinstance(grid, KernelGrid)
        for linear in kernels.fused_linears(trial.pruning.model):
            facts = [Fact("copy_roof", 4.0, "TB/s", {}), Fact("matmul_roof", 700.0, "TFLOP/s", {})]
            for count in grid.tokens:
                cell = {"model": linear.model, "linear": linear.name, "n": linear.n, "k": linear.k, "tokens": count}
                facts.append(time(cell, "cublas", 12.0))
                for tile in grid.tiles:
                    about = {"tile": list(tile), "tiles": "even"}
                    facts.append(time(cell | about | {"sparsity": 0.5}, "cusparselt", 10.0))
                    facts += [time(cell | about | {"sparsity": s}, "hybrid", 8.0, bytes=9) for s in grid.sparsities]
            yield f"kernels:{linear.name}", iter([facts])

    def passes(trial: Trial, parts: Any, lab: Any) -> Iterator[tuple[str, Iterator[list[Fact]]]]:
        grid = trial.evaluation.grid
        assert isinstance(grid, ModelGrid)
        for part in parts:
            facts = []
            for work in grid.workloads:
                cell = {"model": trial.pruning.model} | dataclasses.asdict(work)
                facts.append(time(cell, "fused", 30.0, bytes=100))
                if part == DENSE_PART:
                    facts += [time(cell, "dense", 33.0), time(cell, "fp8_rowwise", 15.0, precision="fp8")]
                else:
                    sparsity = grid.sparsities[grid.parts.index(part) - 1]
                    labels = {"sparsity": sparsity, "tile": list(grid.tile), "tiles": "uneven", "bytes": 61}
                    facts.append(time(cell, "hybrid", 20.0, **labels))
            yield part, iter([facts])

    for module, cases in ((kernels, products), (model, passes)):
        made_up = dataclasses.replace(
            module.BENCH, cases=cases, verify=lambda facts: Verified(facts), time=lambda *_: [], roof=False
        )
        monkeypatch.setattr(module, "BENCH", made_up)
    return Machine("cuda", None, lambda *_: None)


def test_stages_are_linears_or_sparsities() -> None:
    assert pipeline.stages(KERNELS[0]) == ["kernels:qkv", "kernels:o", "kernels:gate_up", "kernels:down"]
    assert {linear.name for linear in kernels.fused_linears("llama-2-7b")} == set(LINEARS)
    assert pipeline.stages(MODELS[0]) == ["model:dense", "model:0%", "model:25%", "model:35%", "model:45%", "model:50%"]
    assert [trial.label for trial in (KERNELS[0], MODELS[1])] == [
        "llama-2-7b kernel speed",
        "llama-3.1-8b end-to-end speed",
    ]
    assert "grid" not in definition(Evaluation()) and len({key(trial) for trial in (*KERNELS, *MODELS)}) == 6


@pytest.mark.parametrize("trial", [KERNELS[3], MODELS[0]], ids=["kernels", "model"])
def test_where_nothing_can_be_timed_it_says_so(trial: Trial, tmp_path: Path) -> None:
    store = Store(tmp_path)
    pipeline.run_trial(trial, store, CPU)
    assert pipeline.missing_stages(trial, store) == []
    assert pipeline.missing_stages(trial, store, can_time=True) == pipeline.stages(trial)
    (row,) = store.read_rows(trial, pipeline.stages(trial)[0])
    assert row["metric"] == "skipped" and "CUDA" in row["labels"]["reason"]
    assert study_tables(measured.frame([trial], store)) == {}
    with pytest.raises(UserError, match="nothing was timed"):
        measured.table([trial], store)


def test_kernels_of_several_models_are_tables_and_figures(tmp_path: Path, gpu: Machine) -> None:
    store, trials = Store(tmp_path), KERNELS[:2]
    pipeline.run_trial(trials[0], store, CPU)  # what was skipped is measured by a GPU
    for trial in trials:
        pipeline.run_trial(trial, store, gpu)
    frame = measured.frame(trials, store)
    tables = study_tables(frame)
    assert list(tables) == ["kernels-llama-2-7b", "kernels-llama-3.1-8b"]
    for name, table in tables.items():
        lines = shown_cells(table)
        assert [line[0] for line in lines] == [str(count) for count in KernelGrid().tokens]
        assert all(line[1:] == ["1.50"] * 5 + ["1.20"] for line in lines)
        assert "linears" in title(name)
    written = {path.stem for path in plot_study(frame, tmp_path / "figures")}
    assert written == {"speedup-llama-2-7b", "speedup-llama-3.1-8b", "roof"}


def test_whole_models_are_tables(tmp_path: Path, gpu: Machine) -> None:
    store = Store(tmp_path)
    pipeline.run_trial(MODELS[0], store, gpu)
    (table,) = study_tables(measured.frame(MODELS[:1], store)).values()
    assert shown_cells(table)[0] == ["Decoding, batch 1", *["1.50"] * 5, "0.91", "2.00"]
    assert shown_cells(table)[-1] == ["Bytes of the masked weights (x dense)", *["0.61"] * 5, MISSING, MISSING]


def test_models_of_unknown_shapes_are_refused(tiny_model: Path) -> None:
    trial = Trial(build.dense(str(tiny_model)), Evaluation((), grid=ModelGrid()))
    with pytest.raises(UserError, match="models of the registry"):
        pipeline.validate([trial], None)


def test_a_grid_has_its_stages_alone() -> None:
    assert pipeline.stages(MODELS[0], ["model"]) == pipeline.stages(MODELS[0])
    assert pipeline.stages(MODELS[0], ["perplexity", "prune", "kernels"]) == []
    assert pipeline.with_stages([*KERNELS, *MODELS], ["kernels"]) == list(KERNELS)
