"""Recovering checkpoints of any method: masks unchanged, origin on record, and what cannot be recovered."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_trials

from experiments.data import models
from experiments.run import checkpoints, mask_archive, pipeline, recovered
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies import build
from experiments.studies.trial import Calibration, Evaluation, Pruning, Recovery, Trial, definition, describe, key
from patch.audit import audit
from patch.checkpoint import content_hash, load_info, load_masks, masks_file
from patch.errors import UserError
from patch.files import sha256
from patch.recover.recipe import RecoveryRecipe
from patch.weights import prunable_weights

SHORT = RecoveryRecipe(
    steps=4, batch=2, microbatch=2, length=16, lr=1e-3, block_epochs=1, block_windows=8, block_batch=4, log_every=2
)
CPU = Machine("cpu", None, lambda *_: None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("runs"))


def prunings(model: Path, text: Path) -> dict[str, Pruning]:
    calibration = Calibration(str(text), windows=8, length=16)
    of: tuple[Any, ...] = ((16, 16), calibration)
    learned = tiny_trials(model, text, steps=2)[2].pruning
    return {
        "magnitude": build.one_shot(str(model), "magnitude", "2:4", 0.5, *of),
        "sparsegpt": build.one_shot(str(model), "sparsegpt", "hybrid", 0.35, *of),
        "unstructured": build.one_shot(str(model), "wanda", "unstructured", 0.5, *of),
        "patch-joint": learned,
    }


def recovering(pruning: Pruning, text: Path, **changes: Any) -> Pruning:
    return dataclasses.replace(pruning, recovery=Recovery(str(text), dataclasses.replace(SHORT, **changes)))


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "unstructured", "patch-joint"])
def test_every_method_is_recovered_with_its_own_mask(
    method: str, store: Store, tiny_model: Path, tiny_text: Path
) -> None:
    plain = prunings(tiny_model, tiny_text)[method]
    pruning = recovering(plain, tiny_text)
    path = checkpoints.ensure_checkpoint(pruning, store, CPU)
    before = store.checkpoint_path(plain)
    assert path is not None and before.exists(), "what it stands on is made first"
    info, ours = load_info(path, verify=True), dict(prunable_weights(path))
    dropped = {name: mask.keep() for name, mask in load_masks(before).items()}
    dropped = dropped or {name: weight != 0 for name, weight in prunable_weights(before)}
    assert not any(ours[name][~keep].any() for name, keep in dropped.items())
    if method != "unstructured":
        assert sha256(masks_file(path)) == sha256(masks_file(before))
        assert not any(layer.violating for layer in audit(path))
    assert content_hash(path) != content_hash(before)
    assert info["sparsity"] == pytest.approx(load_info(before)["sparsity"])
    assert info["recovered_from"]["checkpoint"] == content_hash(before)
    assert info["recovered_from"]["tokens"] == SHORT.tokens and info["definition"] == json.loads(
        json.dumps(definition(pruning))
    )
    metrics = {fact["metric"] for fact in info["facts"]}
    assert {"recovery_loss", "recovery_cross_entropy", "recovery_tokens", "prune_seconds"} <= metrics
    assert not list((store.work_path(pruning)).glob("*.pt")), "the state has served"
    with pytest.raises(UserError, match="recovery changes the weights that survive"):
        mask_archive.export(path, store.root / "masks.tar.xz")


def test_a_trial_of_recovered_weights_has_rows_of_its_own(store: Store, tiny_model: Path, tiny_text: Path) -> None:
    plain = prunings(tiny_model, tiny_text)["magnitude"]
    trial = Trial(recovering(plain, tiny_text), Evaluation(perplexity=()))
    assert key(trial) != key(Trial(plain, trial.evaluation)) and "recovery" not in definition(plain)
    assert describe(trial.pruning).startswith(describe(plain)) and "recovered on" in describe(trial.pruning)
    pipeline.run_trial(trial, store, CPU)
    assert any(row["metric"] == "recovery_loss" for row in store.read_rows(trial, "prune"))


def test_steps_of_how_it_runs_are_no_other_trial(tiny_model: Path, tiny_text: Path) -> None:
    plain = prunings(tiny_model, tiny_text)["magnitude"]
    assert key(recovering(plain, tiny_text)) == key(recovering(plain, tiny_text, checkpoint_every=1, log_every=7))
    assert key(recovering(plain, tiny_text)) != key(recovering(plain, tiny_text, lr=1e-5))


def test_the_command_recovers_what_lies_anywhere(
    hts, store: Store, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    plain = prunings(tiny_model, tiny_text)["magnitude"]
    checkpoints.ensure_checkpoint(plain, store, CPU)
    copy = shutil.copytree(store.checkpoint_path(plain), tmp_path / "mine")
    names = ("steps", "batch", "microbatch", "length", "block_epochs", "block_windows")
    short = [f"{name}={getattr(SHORT, name)}" for name in names]
    words = [word for setting in short for word in ("--set", setting)]
    code, out, err = hts("recover", copy, "--text", tiny_text, *words, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    assert "14 weights recovered, their masks unchanged" in out
    assert "block_lr" in out and "recovery takes 256 tokens" in out and "GiB" in out
    assert sha256(masks_file(tmp_path / "out")) == sha256(masks_file(copy))
    # In the results directory it is where a study's trial of it would be.
    recipe = dataclasses.replace(RecoveryRecipe(), **{n.split("=")[0]: int(n.split("=")[1]) for n in short})
    trial = dataclasses.replace(plain, recovery=Recovery(str(tiny_text), recipe))
    assert (tmp_path / "runs" / "checkpoints" / key(trial)).exists()
    for again, message in (
        (tmp_path / "out", "is recovered already"),
        (tiny_model, "no mask to keep"),
        (tmp_path / "nowhere", "no such directory"),
    ):
        code, _, err = hts("recover", again, "--text", tiny_text)
        assert code == 1 and message in err and len(err.strip().splitlines()) == 1
    code, _, err = hts("recover", copy, "--text", tiny_text, "--set", "stpes=1")
    assert code == 1 and "did you mean steps" in err
    code, _, err = hts("recover", copy, "--text", tiny_text, "--set", "length=4096")
    assert code == 1 and "recovery sequences of 4096 tokens" in err


def test_packed_and_quantised_checkpoints_are_refused(store: Store, tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "packed")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="packed or quantised, which cannot be trained"):
        recovered.opened(copy)


def test_another_dense_model_is_refused(store: Store, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    plain = prunings(tiny_model, tiny_text)["magnitude"]
    path = checkpoints.ensure_checkpoint(plain, store, CPU)
    assert path is not None
    source = recovered.opened(path, "embedded")
    recovery = Recovery(str(tiny_text), SHORT)
    with pytest.raises(UserError, match="its mask is for a weight of"):
        recovered.recover_checkpoint(source, recovery, {"a": 1}, "it", tmp_path / "out", Store(tmp_path), CPU)
    assert not (tmp_path / "out").exists()


def test_a_recovered_model_is_nearer_the_dense_one(tmp_path: Path) -> None:
    """The embedded model, whose weights know a language: the loss falls within few steps."""
    recipe = dataclasses.replace(
        SHORT, steps=6, batch=4, microbatch=4, length=32, lr=1e-3, warmup=1, block_epochs=2, block_lr=5e-4
    )
    calibration = Calibration("embedded/train", 8, 64)
    plain = build.one_shot("embedded", "magnitude", "2:4", 0.5, (64, 64), calibration)
    pruning = dataclasses.replace(plain, recovery=Recovery("embedded/train", recipe))
    store = Store(tmp_path)
    path = checkpoints.ensure_checkpoint(pruning, store, CPU)
    assert path is not None
    facts = load_info(path)["facts"]
    whole = [f["value"] for f in facts if f["metric"] == "recovery_loss" and "block" not in f["labels"]]
    first = [f["value"] for f in facts if f["metric"] == "recovery_loss" and f["labels"].get("block") == 0]
    assert first[-1] < first[0] and whole[-1] < 0.9 * whole[0]
    tokens = torch.arange(64)[None] + 100
    dense, before, after = (
        models.load_model(str(each))[0](input_ids=tokens).logits.log_softmax(-1)
        for each in ("embedded", store.checkpoint_path(plain), path)
    )
    assert (after - dense).square().mean() < (before - dense).square().mean()
