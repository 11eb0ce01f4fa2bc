"""Speed grids as trials: what they run, what they leave where nothing can be timed, and the tables of their rows."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from analysis.figures.study import plot_study
from analysis.tables.render import shown_cells
from analysis.tables.study import study_tables, title
from experiments.bench import kernels, model
from experiments.publish import reports
from experiments.run import grids, pipeline
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies import build, speed
from experiments.studies.trial import Evaluation, KernelGrid, ModelGrid, Trial, definition, key
from patch.errors import UserError
from stoicc import timing
from stoicc.timing import Roof

CPU = Machine("cpu", None, lambda *_: None)
KERNELS = speed.kernels()
MODELS = speed.models()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose times are made up: cuBLAS takes 12 us, a library 10, a hybrid linear 8."""

    def time(cell: dict[str, Any], implementation: str, value: float, **more: Any) -> dict[str, Any]:
        return {"metric": "time", "unit": "us", "cell": cell, "implementation": implementation, "value": value} | more

    def bench_linear(linear: Any, tokens: Any, tiles: Any, sparsities: Any, *_: Any) -> list[dict[str, Any]]:
        rows = []
        for count in tokens:
            cell = {"model": linear.model, "linear": linear.name, "n": linear.n, "k": linear.k, "tokens": count}
            rows.append(time(cell, "cublas", 12.0))
            for tile in tiles:
                about = {"tile": list(tile), "tiles": "even"}
                rows.append(time(cell | about | {"sparsity": 0.5}, "cusparselt", 10.0))
                rows += [time(cell | about | {"sparsity": each}, "hybrid", 8.0, bytes=9) for each in sparsities]
        return rows

    def bench(name: str, sparsities: Any, tile: Any, workloads: Any, *_: Any) -> list[dict[str, Any]]:
        (sparsity,) = sparsities
        cell = {"model": name, "sparsity": sparsity, "tile": list(tile), "tiles": "uneven"}
        rows = [
            {"metric": "bytes", "unit": "B", "cell": cell, "implementation": which, "value": size}
            for which, size in (("dense", 100), ("hybrid", 61))
        ]
        for work in workloads:
            about = cell | dataclasses.asdict(work)
            rows += [time(about, "dense", 30.0), time(about, "hybrid", 20.0)]
        return rows

    monkeypatch.setattr(kernels, "bench_linear", bench_linear)
    monkeypatch.setattr(model, "bench_model", bench)
    monkeypatch.setattr(timing, "measure_roof", lambda: Roof(4.0, 700.0))
    return Machine("cuda", None, lambda *_: None)


def test_stages_are_linears_or_sparsities() -> None:
    assert pipeline.stages(KERNELS[0]) == ["kernels:qkv", "kernels:o", "kernels:gate_up", "kernels:down"]
    assert {linear.name for linear in kernels.fused_linears("llama-2-7b")} == set(grids.LINEARS)
    assert pipeline.stages(MODELS[0]) == ["model:25%", "model:35%", "model:45%"]
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
    assert study_tables(reports.frame([trial], store)) == {}
    with pytest.raises(UserError, match="nothing was timed"):
        reports.table([trial], store, "md")


def test_kernels_of_several_models_are_tables_and_figures(tmp_path: Path, gpu: Machine) -> None:
    store, trials = Store(tmp_path), KERNELS[:2]
    pipeline.run_trial(trials[0], store, CPU)  # what was skipped is measured by a GPU
    for trial in trials:
        pipeline.run_trial(trial, store, gpu)
    frame = reports.frame(trials, store)
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
    (table,) = study_tables(reports.frame(MODELS[:1], store)).values()
    assert shown_cells(table)[0] == ["Decoding, batch 1", "1.50", "1.50", "1.50"]
    assert shown_cells(table)[-1] == ["Bytes of the masked weights (x dense)", "0.61", "0.61", "0.61"]


def test_models_of_unknown_shapes_are_refused(tiny_model: Path) -> None:
    trial = Trial(build.dense(str(tiny_model)), Evaluation((), grid=ModelGrid()))
    with pytest.raises(UserError, match="models of the registry"):
        pipeline.validate([trial], None)
