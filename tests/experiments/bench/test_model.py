"""The bench of whole models on a CPU: fused and quantised models are the model, and rows become tables."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analysis.tables.kernels import energy_table, load_bench, model_table, speed_tables
from analysis.tables.render import shown_cells
from experiments.bench import baselines, harness, model, rows
from experiments.bench.harness import Lab
from experiments.studies.build import dense
from experiments.studies.trial import Evaluation, ModelGrid, Trial, Workload
from patch.errors import UserError
from patch.layers import prunable_linears
from stoicc.linear import Fused, packed_modules

WORKLOADS = (Workload("decode", 2, 1), Workload("prefill", 1, 16))


def trial(tiny: str) -> Trial:
    grid = ModelGrid(sparsities=(0.0, 0.25), tile=(64, 64), workloads=WORKLOADS, rounds=3)
    return Trial(dense(tiny), Evaluation((), grid=grid))


@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def test_a_fused_model_computes_what_its_linears_do(tiny: str, work: Workload) -> None:
    torch.manual_seed(0)
    plain = model.build(tiny, "cpu")
    model.prepare(plain)
    expected = model.plain_pass(plain, work)()
    fused = baselines.sharing(plain)
    baselines.fused(fused)
    found = [module for module in fused.modules() if isinstance(module, Fused)]
    assert [len(module.parts) for module in found] == [3, 1, 2, 1] * 2
    assert len(prunable_linears(plain)) == 14 and not prunable_linears(fused)
    assert model.disagreement(model.plain_pass(fused, work), model.plain_pass(plain, work)) < 0.02
    assert torch.equal(model.plain_pass(plain, work)(), expected), "its weights are views of the fused ones now"
    storages = {part.untyped_storage().data_ptr() for part in fused.state_dict().values()}
    assert {part.untyped_storage().data_ptr() for part in plain.state_dict().values()} == storages


@pytest.mark.parametrize("way", ["fp8_rowwise", "fp8_tensorwise", "fp8_dense8"])
def test_a_quantised_model_is_close_to_the_model(tiny: str, way: str) -> None:
    torch.manual_seed(0)
    plain = model.build(tiny, "cpu")
    largest = model.largest_inputs(plain, WORKLOADS[1:])
    assert set(largest) == set(prunable_linears(plain))
    eight = baselines.sharing(plain)
    baselines.quantised(eight, way, largest)
    found, expected = (model.plain_pass(each, WORKLOADS[1]) for each in (eight, plain))
    assert 0.01 < model.disagreement(found, expected) < model.BOUNDS["fp8"]


def test_tiles_of_four_bits_are_close_to_the_masked_model(tiny: str) -> None:
    torch.manual_seed(0)
    plain = model.build(tiny, "cpu")
    model.prepare(plain)
    sixteen, four = baselines.sharing(plain), baselines.sharing(plain)
    model.make_hybrid(sixteen, 0.25, (64, 64), keep_dense=False)
    reports = model.make_hybrid_int4(four, 0.25, (64, 64))
    model.prepare(four)
    assert {str(module.spec.values) for module in packed_modules(four)} == {"torch.int4"}
    assert len(reports) == 2 and not prunable_linears(four) and len(prunable_linears(plain)) == 14
    expected = model.plain_pass(model.unpacked(sixteen), WORKLOADS[0])
    caches = model.make_caches(four, WORKLOADS[0])
    assert 0.01 < model.disagreement(model.plain_pass(four, WORKLOADS[0]), expected) < model.BOUNDS["int4"]
    found, expected = (model.plain_pass(each, WORKLOADS[0], caches) for each in (four, model.unpacked(sixteen)))
    assert 0.01 < model.disagreement(found, expected) < model.BOUNDS["int4"], "sharing what they keep of earlier tokens"


def test_a_block_of_another_model_is_told(tiny: str) -> None:
    plain = model.build(tiny, "cpu")
    model.prepare(plain)
    other = baselines.sharing(plain)
    last = other.model.layers[1].mlp.down_proj
    last.weight = torch.nn.Parameter(last.weight * 1.5, requires_grad=False)
    found, expected = (model.plain_pass(each, WORKLOADS[1]) for each in (other, plain))
    assert model.disagreement(expected, expected) == 0 and model.disagreement(found, expected) > 0.1
    last.weight[0, 0] = float("nan")
    assert not model.disagreement(found, expected) <= 1


def test_a_feature_of_the_states_that_is_huge_condemns_no_block() -> None:
    """As in Qwen2.5, whose blocks add less than the step in which bfloat16 counts such a feature."""
    torch.manual_seed(0)
    attention, mlp = (torch.randn(1, 4, 64, dtype=torch.bfloat16) for _ in range(2))
    states = torch.randn(1, 4, 64, dtype=torch.bfloat16)
    states[..., 0], attention[..., 0], mlp[..., 0] = 752, 1.9, 1.9

    def at_once(hidden: torch.Tensor) -> torch.Tensor:
        return (hidden.float() + attention.float() + mlp.float()).bfloat16()

    def one_after_the_other(hidden: torch.Tensor) -> torch.Tensor:
        return hidden + attention + mlp

    def passes(add: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return SimpleNamespace(blocks=[add], embedded=lambda: states, block=lambda _, hidden: add(hidden))

    found, expected = passes(at_once), passes(one_after_the_other)
    assert float((at_once(states) - one_after_the_other(states)).abs().max()) == 4
    assert model.disagreement(found, expected) < 0.01
    assert model.disagreement(passes(lambda hidden: hidden + attention), expected) > model.BOUNDS["bf16"]


def test_biases_are_fused_too() -> None:
    parent = torch.nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        parent.register_module(name, torch.nn.Linear(16, 32))
    for make in (lambda linears: baselines.DenseLinear([(str(n), 32) for n in range(3)], *joined(linears)),):
        x = torch.randn(2, 5, 16)
        module = make(list(parent.children()))
        expected = [child(x) for child in parent.children()]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.all_parts(x), expected, strict=True))


def joined(linears: list[torch.nn.Linear]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])


def test_whole_models_are_compared_with_the_fused_dense_one(tiny: str, lab: Lab, tmp_path: Path) -> None:
    wanted, path = trial(tiny), tmp_path / "model.jsonl"
    assert model.BENCH.parts(wanted) == ["model:dense", "model:0%", "model:25%"]
    for part, facts, _ in harness.measure(model.BENCH, wanted, model.BENCH.parts(wanted), lab):
        timed = {fact.labels["implementation"] for fact in facts if fact.metric == "time"}
        beside = {"fused", "fp8_rowwise", "fp8_tensorwise", "fp8_dense8"}
        assert timed == beside | ({"dense", "autotuned"} if part == "model:dense" else {"hybrid"})
        rows.write(model.BENCH, wanted, part, facts, 0.0, path)
    frame = load_bench([path], "model")
    table = model_table(frame)
    assert [column.heading for column in table.columns] == [
        "Workload", "0%", "25%", "Dense, separate projections", "Dense, max-autotune", "Dense FP8",
    ]  # fmt: skip
    # The made-up clock gives 1 us to what stands first, 2 us to what is next: beside packed models fused, FP8 in
    # three ways, packed, packed FP8; beside other dense ones "dense" is in front of them, and max-autotune, which is
    # for decoding, behind fused.
    decode, prefill = (line[1:] for line in shown_cells(table)[:2])
    assert decode == ["0.20", "0.20", "2.00", "0.67", "0.50"] and prefill == ["0.20", "0.20", "2.00", "—", "0.50"]
    assert table.notes == ()
    assert float(shown_cells(table)[2][1]) == pytest.approx(1, abs=0.1)
    eight = model_table(frame, "fp8")
    assert [column.heading for column in eight.columns] == [
        "Workload", "0%", "25%", "Dense FP8 over bfloat16", "25% over bfloat16",
    ]  # fmt: skip
    assert [line[1:] for line in shown_cells(eight)[:2]] == [["0.33", "0.33", "0.50", "0.17"]] * 2
    assert float(shown_cells(eight)[2][1]) == pytest.approx(0.5, abs=0.1)
    energy = energy_table(frame)
    assert energy is not None and shown_cells(energy)[0] == ["Dense", "0.2500", "0.03125"]
    assert shown_cells(energy)[-1][0] == "25% FP8"
    assert set(speed_tables(frame)) == {"model-tiny", "model fp8-tiny", "energy-tiny"}


@pytest.mark.parametrize("text", ["decode@1x2", "decode@0x1", "prefill@8", "chat@1x1", ""])
def test_workloads_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="such as decode@16x1"):
        Workload.named(text)


def test_workloads_read_as_they_are_written() -> None:
    assert [Workload.named(str(work)) for work in WORKLOADS] == list(WORKLOADS)


def test_of_two_models_that_are_timed_each_is_held_to_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where activations are rounded to 8 bits, one bit more or less of what comes before moves them by a whole step."""
    asked: dict[Any, float] = {}

    def ready(each: Any, work: Workload, reference: Any, bound: float) -> harness.Ready:
        asked[each] = bound
        return harness.Ready([lambda: None], lambda _: (0.2, bound))

    monkeypatch.setattr(model, "prepare", lambda each: None)
    monkeypatch.setattr(model, "ready", ready)
    monkeypatch.setattr(model, "read_gpu", lambda calls, *_: pytest.fail("timed"))
    models: Any = {"packed": "eight", "dense": "sixteen"}
    with pytest.raises(UserError, match="the dense model's compiled pass is wrong"):
        model.measure(models, WORKLOADS[0], 3, ["packed"])
    assert asked == {"eight": model.BOUNDS["fp8"], "sixteen": model.BOUNDS["bf16"]}
