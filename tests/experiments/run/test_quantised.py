"""Quantised trials, from a definition to rows: one artefact in few bits, evaluated, packed, refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.rows.load import load_rows
from analysis.rows.points import gather
from experiments.cli.options import new_console
from experiments.data import models
from experiments.run import mask_archive, pipeline
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies import build, cost
from experiments.studies.trial import (
    Calibration,
    Evaluation,
    Packed,
    Perplexity,
    Pruning,
    Quantisation,
    Trial,
    definition,
    describe,
    key,
    lineage,
)
from patch.checkpoint import load_info, load_masks
from patch.errors import UserError
from patch.layers import decoder_blocks
from patch.quantise.linear import QuantisedLinear
from patch.quantise.precisions import PRECISIONS
from patch.weights import quantised_weights
from stoicc.format import unpack
from stoicc.linear import packed_modules

CPU = Machine("cpu", None, lambda *_: None)
TILE = (16, 16)
PACKED = ("2:4 fp8", "hybrid int8", "dense int4", "shallow")


def prunings(model: Path, text: Path) -> dict[str, Pruning]:
    seen = Calibration(str(text), windows=8, length=16)
    name = str(model)
    plain = {
        "dense": build.dense(name),
        "2:4": build.one_shot(name, "magnitude", "2:4", 0.5, TILE, seen),
        "hybrid": build.one_shot(name, "sparsegpt", "hybrid", 0.25, TILE, seen, "model"),
        "unstructured": build.one_shot(name, "magnitude", "unstructured", 0.5, None, seen),
        "shallow": build.fewer_blocks(name, 0.5, seen),
    }
    rounded = {
        f"{structure} {precision}": build.quantised(pruning, precision, seen)
        for structure, pruning in plain.items()
        for precision in PRECISIONS
    }
    sink_aware = build.quantised(plain["hybrid"], "fp8", seen, sink_aware=True)
    return plain | rounded | {"joint": build.quantised(plain["hybrid"], "int4", seen, joint=True), "sinks": sink_aware}


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Trial], Store]:
    """Each of these evaluated, and packed where it can be."""
    store = Store(tmp_path_factory.mktemp("quantised"))
    found = prunings(tiny_model, tiny_text)
    chosen = ["dense", "2:4", "hybrid", "dense int4", "2:4 fp8", "hybrid int8", "joint", "unstructured int8"]
    chosen += ["shallow", "shallow int4", "sinks"]
    evaluation = Evaluation((Perplexity(str(tiny_text), 32),))
    trials = {
        name: Trial(
            found[name],
            dataclasses.replace(evaluation, packed=Packed()) if name in PACKED else evaluation,
        )
        for name in chosen
    }
    for trial in trials.values():
        pipeline.run_trial(trial, store, CPU)
    return trials, store


def value(trial: Trial, store: Store, stage: str, metric: str) -> Any:
    return next(row for row in store.read_rows(trial, stage) if row["metric"] == metric)


def test_a_quantised_pruning_stands_on_the_same_in_more_bits(tiny_model: Path, tiny_text: Path) -> None:
    found = prunings(tiny_model, tiny_text)
    assert "quantisation" not in definition(found["hybrid"])
    assert len({key(pruning) for pruning in found.values()}) == len(found)
    two_four = found["hybrid"].base
    assert lineage(found["hybrid int4"]) == [two_four, found["hybrid"], found["hybrid int4"]]
    assert lineage(found["joint"]) == [two_four, found["joint"]]
    assert lineage(found["dense int4"]) == [found["dense int4"]]
    fitted = build.refitted(found["2:4"], Calibration(str(tiny_text), 8, 16))
    rounded = build.quantised(fitted, "fp8", Calibration())
    assert lineage(rounded) == [found["2:4"], fitted, rounded]
    assert rounded.quantisation == Quantisation("fp8")
    name = str(tiny_model)
    assert describe(found["dense fp8"]) == f"{name} FP8"
    assert describe(found["2:4 int4"]) == f"{name} magnitude 2:4 50% INT4"
    assert "pruned and rounded in one sweep INT4" in describe(found["joint"])
    assert "FP8 sink-aware" in describe(found["sinks"])
    assert definition(found["hybrid fp8"])["quantisation"].keys() == {"precision", "calibration", "joint"}
    assert cost.pruning_flops(found["dense int4"]) > cost.pruning_flops(found["dense fp8"]) == 0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Quantisation("fp9"), "did you mean fp8", id="unknown"),
        pytest.param(lambda: Quantisation("int4"), "INT4 needs calibration text", id="uncalibrated"),
        pytest.param(lambda: Quantisation("fp8", Calibration()), "without calibration text", id="calibrated"),
        pytest.param(lambda: Quantisation("int8", joint=True), "in one sweep is for INT4", id="joint-8"),
        pytest.param(lambda: Quantisation("fp8", sink_aware=True), "FP8 needs calibration text", id="sinks-unseen"),
        pytest.param(
            lambda: Quantisation("int4", Calibration(), joint=True, sink_aware=True), "leave sink_aware out", id="both"
        ),
        pytest.param(
            lambda: build.quantised(build.dense("embedded"), "int4", Calibration(), joint=True),
            "does not prune and round in one sweep",
            id="joint-dense",
        ),
        pytest.param(
            lambda: Trial(
                build.quantised(
                    build.one_shot("embedded", "magnitude", "unstructured", 0.5, None, Calibration()),
                    "int4",
                    Calibration(),
                ),
                Evaluation(packed=Packed()),
            ),
            "no kernel takes packed weights of INT4",
            id="packed-unstructured-int4",
        ),
    ],
)
def test_definitions_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_masks_stay_and_sparsity_is_that_of_the_mask(ran: tuple[dict[str, Trial], Store]) -> None:
    trials, store = ran
    for name in ("2:4 fp8", "hybrid int8", "joint", "unstructured int8", "dense int4", "shallow int4", "sinks"):
        pruning = trials[name].pruning
        path = store.checkpoint_path(pruning)
        found = value(trials[name], store, "prune", "sparsity")["value"]
        assert found == pytest.approx(0.0 if name == "dense int4" else pruning.sparsity, abs=0.02)
        weights = dict(quantised_weights(path, PRECISIONS[load_info(path)["precision"]]))
        for layer, mask in load_masks(path).items():
            assert not bool(weights[layer].values.float()[~mask.keep()].any())
        if pruning.base and name != "joint":
            before = load_masks(store.checkpoint_path(pruning.base))
            after = load_masks(path)
            assert all(torch.equal(mask.keep(), after[layer].keep()) for layer, mask in before.items())


def test_a_smaller_model_has_fewer_blocks(ran: tuple[dict[str, Trial], Store]) -> None:
    trials, store = ran
    for name in ("shallow", "shallow int4"):
        path = store.checkpoint_path(trials[name].pruning)
        model, _ = models.load_model(str(path), quantised=True)
        assert len(decoder_blocks(model)) == model.config.num_hidden_layers == 1
        assert value(trials[name], store, "prune", "sparsity")["value"] == 0.5
    assert value(trials["shallow"], store, "prune", "block_divergence")["value"] >= 0


def test_dense_checkpoints_have_sizes_and_nothing_to_pack(ran: tuple[dict[str, Trial], Store]) -> None:
    trials, store = ran
    for name, share in (("dense int4", 0.25), ("shallow", 0.5)):
        left, whole = (value(trials[name], store, "pack", each)["value"] for each in ("packed_bytes", "masked_bytes"))
        assert left / whole == pytest.approx(share, rel=0.4)
        assert not any(stage.startswith("packed:") for stage in pipeline.stages(trials[name]))


def test_few_bits_cost_little_perplexity(ran: tuple[dict[str, Trial], Store]) -> None:
    trials, store = ran

    def perplexity(name: str) -> float:
        stage = next(stage for stage in pipeline.stages(trials[name]) if stage.startswith("perplexity:"))
        return float(value(trials[name], store, stage, "perplexity")["value"])

    for name, plain in (("dense int4", "dense"), ("2:4 fp8", "2:4"), ("hybrid int8", "hybrid"), ("joint", "hybrid")):
        assert perplexity(name) != perplexity(plain)
        assert perplexity(name) == pytest.approx(perplexity(plain), rel=0.02)


@pytest.mark.parametrize("name", ["2:4 fp8", "hybrid int8"])
def test_the_packed_checkpoint_has_the_values_that_were_evaluated(
    name: str, ran: tuple[dict[str, Trial], Store]
) -> None:
    trials, store = ran
    agreement = value(trials[name], store, "pack", "packed_agreement")
    assert agreement["value"] == 1.0 and agreement["labels"]["agrees"]
    stage = next(stage for stage in pipeline.stages(trials[name]) if stage.startswith("packed:"))
    assert value(trials[name], store, stage, "packed_perplexity")["labels"]["agrees"]
    path = store.checkpoint_path(trials[name].pruning)
    content = agreement["provenance"]["checkpoint"]
    packed, _ = models.load_model(str(store.packed_path(content)), quantised=True)
    weights = dict(quantised_weights(path, PRECISIONS[load_info(path)["precision"]]))
    for module in packed_modules(packed):
        values = torch.cat([weights[part].values.float() for part, _ in module.spec.parts])
        scales = torch.cat([weights[part].scales[:, 0] for part, _ in module.spec.parts])
        assert torch.equal(unpack(module.checked()).float(), values) and torch.equal(module.scales, scales)


def test_precisions_are_points_of_their_own(ran: tuple[dict[str, Trial], Store]) -> None:
    trials, store = ran
    points = gather(load_rows(store.root, {key(trial) for trial in trials.values()}))
    said = {(point.method, point.structure, point.variant) for point in points}
    assert {("dense", "dense", ""), ("dense", "dense", "INT4"), ("magnitude", "2:4", "FP8")} <= said
    assert len(points) == len(trials)


def test_a_quantised_checkpoint_is_evaluated_but_not_quantised_again(ran: tuple[dict[str, Trial], Store]) -> None:
    trials, store = ran
    path = store.checkpoint_path(trials["joint"].pruning)
    model, _ = models.load_model(str(path), quantised=True)
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), QuantisedLinear)
    with pytest.raises(UserError, match="can be evaluated but not pruned or quantised again"):
        models.load_model(str(path))
    with pytest.raises(UserError, match="quantisation changes the weights that survive"):
        mask_archive.export(path, path.parent / "masks.tar.xz")


def test_the_command_quantises_a_checkpoint_within_its_masks(
    hts: Any, tiny_model: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ["--calibration", tiny_text, "--windows", 8, "--length", 16]
    tiles = ["--structure", "hybrid", "--sparsity", 0.25, "--tile", "16x16"]
    code, out, err = hts("prune", tiny_model, "--method", "magnitude", *tiles, "--out", "masked")
    assert code == 0, err
    code, out, err = hts("quantise", "masked", "--precision", "int4", *seen, "--out", "rounded")
    assert code == 0 and "sparsity 0.25" in out and "INT4" in out, err
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("experiments.cli.model.console", new_console())
    code, out, err = hts("audit", "rounded")
    assert code == 0 and "4 bits, a scale for each 32 inputs" in out, err
    assert "sparsity 0.25" in out and "0 violating tiles" in out
    layers = [line.split() for line in out.splitlines() if "model.layers." in line]
    assert layers and all(len(line) == 9 for line in layers), "where no terminal is, nothing is folded"
    assert load_info("rounded")["structure"] == "hybrid" and load_info("rounded")["method"] == "magnitude"
    code, out, err = hts("quantise", "rounded")
    assert code == 1 and "not pruned or quantised again" in err
    code, out, err = hts("eval", "rounded", "--perplexity", f"{tiny_text}@32")
    assert code == 0 and "perplexity" in out, err
    code, out, err = hts("prune", tiny_model, "--method", "magnitude", *tiles, "--precision", "fp8")
    assert code == 0 and "FP8" in out, err


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
