"""The bench of kernels on a CPU: every dense implementation computes the product, and rows become tables."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.tables.kernels import DENSE, load_bench, speed_tables
from analysis.tables.render import shown_cells
from experiments.bench import baselines, harness, kernels, rows
from experiments.bench.harness import Lab
from experiments.cli import bench as commands
from experiments.studies.build import dense
from experiments.studies.trial import LINEARS, Evaluation, KernelGrid, ModelGrid, Trial, key
from patch.errors import UserError

GRID = KernelGrid(tokens=(1, 20), tiles=((64, 64),), sparsities=(0.0, 0.25, 0.5), rounds=4)


def trial(tiny: str) -> Trial:
    return Trial(dense(tiny), Evaluation((), grid=GRID))


def test_every_linear_is_compared_with_dense_of_every_precision(tiny: str, lab: Lab, tmp_path: Path) -> None:
    wanted = trial(tiny)
    assert kernels.BENCH.parts(wanted) == [f"kernels:{name}" for name in LINEARS]
    path = tmp_path / "rows.jsonl"
    paths = []
    for part, facts, _ in harness.measure(kernels.BENCH, wanted, ["kernels:qkv", "kernels:down"], lab):
        status = {(fact.labels["implementation"], fact.labels["status"]) for fact in facts if fact.metric == "error"}
        # Libraries and the kernel of four bits need a GPU.
        dense_ones = {"cublas", *DENSE["fp8"], *DENSE["fp8_precise"]}
        assert dense_ones | {"hybrid"} <= {name for name, how in status if how == "ok"}
        assert "wrong" not in {how for _, how in status}
        timed = [fact for fact in facts if fact.metric == "time" and fact.labels["implementation"] == "hybrid"]
        assert len(timed) == 2 * 4 * 4 and {fact.runs for fact in timed} == {4}
        path = tmp_path / f"{part[8:]}.jsonl"
        rows.write(kernels.BENCH, wanted, part, facts, 0.0, path)
        paths.append(path)
    frame = load_bench(paths, "kernels")
    assert set(frame.linear) == {"qkv", "down"} and set(frame.copy_roof) == {4.0}
    hybrid = frame[(frame.implementation == "hybrid") & (frame.precision == "bf16") & (frame.metric == "time")]
    assert (hybrid.speedup == hybrid.own_speedup).all()
    eight = frame[frame.implementation == "fp8_tensorwise"]
    assert (eight.own_speedup.dropna() < eight.speedup.dropna().max() + 1).all()
    table, of_eight_bits, precise, of_four = speed_tables(
        frame[frame.tile.isna() | True].assign(tile=frame.tile.replace("64x64", "128x128"))
    ).values()
    assert [line[0] for line in shown_cells(table)] == ["1", "20"]
    assert [column.heading for column in table.columns][-1] == "Dense FP8"
    assert [column.heading for column in of_eight_bits.columns][-1] == "Dense FP8 over bfloat16"
    assert [column.heading for column in precise.columns][-1] == "Dense FP8 with float32 sums over bfloat16"
    # On a CPU there is no dense product of four bits to be compared with.
    assert [line[0] for line in shown_cells(of_four)] == ["1", "20"]


def test_what_is_compiled_begins_early_with_few_tokens_and_either_way_with_many(tiny: str, lab: Lab) -> None:
    linear = kernels.Linear(tiny, "o", 64, 128)
    grid = dataclasses.replace(GRID, tokens=(1, kernels.FEW, kernels.FEW + 1))
    labels = [[entry.labels for entry in case.entries] for case in kernels.products(linear, grid, lab)]
    for name, more in {"fp8_rowwise": [], "fp8_precise_dense8": [None]}.items():
        early = [[about["early"] for about in case if about["implementation"] == name] for case in labels]
        assert early == [[True, *more], [True, *more], [False, True, *more]]


def test_a_wrong_product_is_left_out_of_the_times(tiny: str, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.matmul.linear
    monkeypatch.setattr(kernels.matmul, "linear", lambda x, weight, **how: right(x, weight, **how) * 1.02)
    ((_, facts, _),) = harness.measure(kernels.BENCH, trial(tiny), ["kernels:o"], lab)
    assert not [fact for fact in facts if fact.metric == "time" and fact.labels["implementation"] == "hybrid"]
    wrong = [fact for fact in facts if fact.labels.get("status") == "wrong"]
    assert {fact.labels["implementation"] for fact in wrong} == {"hybrid"} and len(wrong) == 8 * 4


@pytest.mark.parametrize("shape", [(16, 128), (48, 384)], ids=["one-group", "several"])
def test_four_bits_stand_for_their_weights(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.bfloat16)
    weight[0, :128] = 0
    values, scale = baselines.to_int4(weight)
    assert values.dtype == torch.uint8 and int(values.max()) <= 15 and scale.shape == (shape[0], shape[1] // 128)
    back = baselines.from_int4(values, scale)
    step = scale.double().repeat_interleave(128, dim=1)
    assert bool(((back - weight.double()).abs() <= 0.51 * step).all())


@pytest.mark.parametrize("dim", [None, 1], ids=["one-scale", "a-scale-a-row"])
def test_eight_bits_keep_the_largest(dim: int | None) -> None:
    values = torch.tensor([[0.0, -3.0], [200.0, 1.0], [0.0, 0.0]], dtype=torch.bfloat16)
    scale = baselines.fp8_scale(values, dim)
    back = baselines.to_fp8(values, scale).float() * scale
    assert torch.allclose(back, values.float(), rtol=2**-4, atol=1e-6)
    assert bool((baselines.to_fp8(2 * values, scale).float().abs() <= 448).all()), "what is larger saturates"


def test_cold_weights_exceed_the_cache() -> None:
    few, many = torch.zeros(1, 8), torch.zeros(kernels.LONG, 8)
    assert kernels.copies(few, 1 << 20) >= 384 and kernels.copies(few, 1 << 30) == 2 and kernels.copies(many, 1) == 1


def test_definitions_of_grids_name_their_rows() -> None:
    one, other = (Trial(dense("llama-2-7b"), Evaluation((), grid=KernelGrid(rounds=rounds))) for rounds in (4, 5))
    assert kernels.BENCH.identity(one) != kernels.BENCH.identity(other)
    name = kernels.BENCH.file(dataclasses.replace(one), "kernels:o")
    assert name == f"kernels/llama-2-7b-o-{key(one)}.jsonl"


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (KernelGrid, {"sparsities": (0.25, 0.6)}, "sparsity 0.6: hybrid tiles reach 0 to 0.5"),
        (ModelGrid, {"sparsities": (-0.1,)}, "sparsity -0.1: hybrid tiles reach 0 to 0.5"),
        (KernelGrid, {"tokens": (1, 0)}, "0 tokens: a product takes one or more"),
    ],
    ids=["kernels", "model", "tokens"],
)
def test_no_row_is_labelled_with_what_no_map_has(kind: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(**given)


def test_weights_are_taken_in_turns_until_none_is_left_in_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CACHE_BYTES", 60)
    few, many = torch.empty(8, 1), torch.empty(kernels.LONG, 1)
    for nbytes in (1, 7, 50, 89, 90):
        assert kernels.copies(few, nbytes) * nbytes >= 1.5 * 60
    assert kernels.copies(few, 1000) == 2 and kernels.copies(many, 1) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tokens": [1, 100]}, r"--tokens 100: tables are of 1, 8, 16, .*, 8192"),
        ({"tokens": [0]}, r"--tokens 0: tables are of 1,"),
        ({"dtype": ["float32"]}, r"--dtype float32: weights are bfloat16, float8_e4m3fn, int8, int4"),
        ({"model": ["llama-2-7c"]}, r"llama-2-7c.*llama-2-7b"),
        # 576 inputs, but of one linear 1536, which are whole groups.
        ({"dtype": ["int4"], "model": ["smollm2-135m"]}, r"needs a CUDA GPU"),
    ],
    ids=["between", "none", "dtype", "model", "no groups"],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_compiled(
    asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        commands.tune(**asked)
