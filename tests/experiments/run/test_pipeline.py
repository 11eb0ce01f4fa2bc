"""The life of a trial: complete, skipped when complete, killed and resumed, shared between processes."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import make
from forked import Python
from safetensors.torch import load_file, save_file
from tiny_study import tiny_trials
from transformers import AutoTokenizer

from analysis.rows.format import STAGE_KINDS
from analysis.rows.jsonl import from_lines
from experiments.data import text
from experiments.data.models import load_model
from experiments.embedded import MODEL as EMBEDDED
from experiments.run import checkpoints, mask_archive, pipeline
from experiments.run.packed import Artefact
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies import build
from experiments.studies.registry import STUDIES
from experiments.studies.trial import Calibration, Evaluation, Packed, Perplexity, Trial
from patch.audit import audit
from patch.budget import cut_globally
from patch.checkpoint import content_hash, load_info, load_masks
from patch.errors import UserError
from patch.learn.sensitivity import tile_sensitivity
from patch.mask import tile_sizes

DRIVER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tiny_study import tiny_trials
from experiments.run import pipeline
from experiments.run.runtime import Machine
from experiments.run.store import Store
model, text, root = map(Path, sys.argv[1:4])
def done(trial, error):
    print(trial.label, error, flush=True)
    assert error is None, error
pipeline.run_trials(tiny_trials(model, text), Store(root), Machine("cpu", None, lambda *_: None), done)
"""


def start(model: Path, text: Path, root: Path) -> Python:
    return Python(DRIVER, model, text, root)


def finish(process: Python) -> None:
    assert process.wait() == 0, process.stderr


def measured(root: Path) -> dict[str, list[Any]]:
    """What the rows say but for provenance and durations."""
    facts: dict[str, list[Any]] = {}
    for path in sorted((root / "rows").rglob("*.jsonl")):
        rows = from_lines(path.read_text())
        facts[str(path.relative_to(root))] = [
            (row["metric"], row["value"], row["stderr"], row["labels"], row["definition"])
            for row in rows
            if row["metric"] != "prune_seconds"
        ]
    return facts


def litter(root: Path) -> list[str]:
    """Files that a finished run should not leave behind."""
    names = [path.name for path in root.rglob("*") if not path.name.endswith(".lock")]
    return [name for name in names if name.startswith(".") or "partial" in name or name == "learner.pt"]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    root = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    finish(start(tiny_model, tiny_text, root))
    return root, time.monotonic() - started


def load(root: Path, trials: tuple[Trial, ...]) -> dict[str, list[dict[str, Any]]]:
    store = Store(root)
    return {trial.pruning.method: store.read_rows(trial, "prune") for trial in trials}


def test_rows_are_complete_and_the_budget_is_met(undisturbed: tuple, tiny_model: Path, tiny_text: Path) -> None:
    root, store = undisturbed[0], Store(undisturbed[0])
    trials = tiny_trials(tiny_model, tiny_text)
    for trial in trials:
        assert pipeline.missing_stages(trial, store) == []
    rows = load(root, trials)
    sparsity = {method: next(r["value"] for r in rows[method] if r["metric"] == "sparsity") for method in rows}
    assert sparsity["dense"] == 0 and sparsity["magnitude"] == 0.5
    elements = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert abs(sparsity["patch-joint"] - 0.35) * elements <= 16 * 16 / 2
    steps = [row["labels"]["step"] for row in rows["patch-joint"] if row["metric"] == "cross_entropy"]
    assert steps == [3, 6, 9, 12]
    assert litter(root) == []


def test_the_evaluated_checkpoint_is_the_audited_one(undisturbed: tuple, tiny_model: Path, tiny_text: Path) -> None:
    learned = tiny_trials(tiny_model, tiny_text)[2].pruning
    path = Store(undisturbed[0]).checkpoint_path(learned)
    layers = audit(path)
    assert not any(layer.violating for layer in layers)
    zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in layers)
    info = load_info(path, verify=True)
    assert zeros == pytest.approx(info["sparsity"] * sum(la.shape[0] * la.shape[1] for la in layers))


def test_a_complete_study_is_not_touched_again(undisturbed: tuple, tiny_model: Path, tiny_text: Path) -> None:
    root = undisturbed[0]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix in (".jsonl", ".safetensors")}
    finish(start(tiny_model, tiny_text, root))
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_killed_at_ten_random_moments_the_rows_are_the_same(
    undisturbed: tuple, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    expected, seconds = measured(undisturbed[0]), undisturbed[1]
    rng = random.Random(0)
    # The first dies with its first rows, however fast the machine is by now.
    process = start(tiny_model, tiny_text, tmp_path)
    while process.poll() is None and not list(tmp_path.glob("rows/*/*.jsonl")):
        time.sleep(0.01)
    assert process.poll() is None, "no run was disturbed"
    process.kill()
    for _ in range(9):
        process = start(tiny_model, tiny_text, tmp_path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds * rng.uniform(0.1, 1.0))
        process.kill()
    finish(start(tiny_model, tiny_text, tmp_path))
    assert measured(tmp_path) == expected
    assert litter(tmp_path) == []


def test_two_processes_share_a_study(undisturbed: tuple, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    processes = [start(tiny_model, tiny_text, tmp_path) for _ in range(2)]
    for process in processes:
        finish(process)
    assert measured(tmp_path) == measured(undisturbed[0])
    assert sorted(os.listdir(tmp_path / "rows")) == sorted(os.listdir(undisturbed[0] / "rows"))
    assert litter(tmp_path) == []


def test_a_refit_keeps_the_masks_and_stands_on_their_checkpoint(
    undisturbed: tuple, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(undisturbed[0], root)
    store, machine = Store(root), Machine("cpu", None, lambda *_: None)
    learned = tiny_trials(tiny_model, tiny_text)[2]
    base = store.checkpoint_path(learned.pruning)
    made = base.stat().st_mtime_ns
    fitted = Trial(build.refitted(learned.pruning, Calibration(str(tiny_text), 8, 16)), learned.evaluation)
    pipeline.validate([fitted], None)
    pipeline.run_trial(fitted, store, machine)
    assert pipeline.missing_stages(fitted, store) == []
    path = store.checkpoint_path(fitted.pruning)
    assert base.stat().st_mtime_ns == made
    masks, before = load_masks(path), load_masks(base)
    assert all(masks[name].equal(before[name]) for name in before)
    assert not any(layer.violating for layer in audit(path))
    weights, kept = (load_file(folder / "model.safetensors") for folder in (path, base))
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(weights[f"{name}.weight"], kept[f"{name}.weight"])
    rows = {row["metric"]: row for row in store.read_rows(fitted, "prune") if row["labels"].get("layer") == name}
    assert rows["refitted_output_error"]["value"] < rows["masked_output_error"]["value"]
    assert litter(root) == []


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_dense_tiles_are_those_that_cost_the_model_most(
    method: str, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    store, told = Store(tmp_path), []
    seen = Calibration(str(tiny_text), 8, 16)
    pruning = build.one_shot(str(tiny_model), method, "hybrid", 0.35, (16, 16), seen, "model")
    pipeline.validate([Trial(pruning, Evaluation(()))], None)
    path = checkpoints.ensure_checkpoint(pruning, store, Machine("cpu", None, lambda label, *_: told.append(label)))
    assert path is not None and any("ranking tiles" in label for label in told)
    masks, two_four = load_masks(path), load_masks(store.checkpoint_path(pruning.base))
    model, tokenizer = load_model(str(tiny_model), device="cpu", dtype=torch.float32)
    windows = text.calibration_windows(text.load_documents(str(tiny_text), None), tokenizer, 8, 16, 0)
    patterns = {name: mask.patterns for name, mask in two_four.items()}
    cost = tile_sensitivity(model, patterns, (16, 16), windows, 0)
    sizes = {name: tile_sizes(mask.shape, (16, 16)) for name, mask in masks.items()}
    expected = cut_globally(cost, sizes, 0.35)
    assert all(torch.equal(mask.dense, expected[name]) for name, mask in masks.items())
    assert len({int(mask.dense.sum()) for mask in masks.values()}) > 2, "every weight has the same share"
    assert litter(tmp_path) == []


def test_a_trial_that_fails_does_not_stop_the_others(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    broken = tiny_trials(tiny_model, tmp_path / "absent.jsonl")[2]
    good = tiny_trials(tiny_model, tiny_text)[0]
    outcome: dict[str, Exception | None] = {}
    machine = Machine("cpu", None, lambda *_: None)
    pipeline.run_trials(
        [broken, good], Store(tmp_path), machine, lambda trial, error: outcome.update({trial.pruning.method: error})
    )
    assert "absent.jsonl" in str(outcome["patch-joint"]) and outcome["dense"] is None
    assert pipeline.missing_stages(good, Store(tmp_path)) == []
    assert pipeline.missing_stages(broken, Store(tmp_path)) == pipeline.stages(broken)


def test_stages_have_no_other_kinds_than_those_that_can_be_asked_for() -> None:
    named = {stage for study in STUDIES.values() for trial in study.trials() for stage in pipeline.stages(trial)}
    assert {name.partition(":")[0] for name in named} == set(STAGE_KINDS)


def test_a_failure_is_forgotten_only_where_something_is_tried_again(
    tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    store, machine = Store(tmp_path), Machine("cpu", None, lambda *_: None)
    trial = tiny_trials(tiny_model, tiny_text)[0]
    pipeline.run_trial(trial, store, machine, ["prune"])
    pipeline.record_failure(trial, "perplexity", UserError("no"), store)
    pipeline.run_trial(trial, store, machine, ["prune"])
    assert store.failure(trial)
    pipeline.run_trial(trial, store, machine, ["perplexity"])
    assert not store.failure(trial)


@pytest.mark.parametrize(
    "kinds", [["perplexity"], ["packed"], ["task", "perplexity"], []], ids=lambda kinds: "-".join(kinds) or "all"
)
def test_a_text_must_be_there_for_the_stages_that_read_it(
    kinds: list[str], tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    plain = tiny_trials(tiny_model, tiny_text)[1]
    absent = (Perplexity(str(tmp_path / "absent.jsonl"), 32), Perplexity(str(tiny_text), 1000))
    store, machine = Store(tmp_path / "runs"), Machine("cpu", None, lambda *_: None)
    for item, problem in zip(absent, ("absent.jsonl", "perplexity windows"), strict=True):
        trial = Trial(plain.pruning, Evaluation((item,), packed=Packed()))
        pipeline.validate([trial], None, kinds=["prune", "pack", "speed"])
        with pytest.raises(UserError, match=problem):
            pipeline.validate([trial], None, kinds=kinds)
    trial = Trial(plain.pruning, Evaluation(absent[:1], packed=Packed()))
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        pipeline.run_trial(trial, store, machine, kinds)
    assert not store.checkpoint_path(trial.pruning).exists()


def test_stages_of_two_checkpoints_are_not_mixed(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    store, machine = Store(tmp_path), Machine("cpu", None, lambda *_: None)
    trial = tiny_trials(tiny_model, tiny_text)[1]
    pipeline.run_trial(trial, store, machine)
    last = pipeline.stages(trial)[-1]
    store.rows_path(trial, last).unlink()
    file = store.checkpoint_path(trial.pruning) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1  # as if it had been made anew elsewhere
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="was measured of checkpoint"):
        pipeline.run_trial(trial, store, machine)
    assert not store.has_rows(trial, last)


def test_a_model_of_text_and_images_keeps_its_processor(tmp_path: Path) -> None:
    """And is audited, restored and packed, though its tensors have other names on disk than in memory."""
    make("gemma3", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "model")
    files = {"preprocessor_config.json": '{"do_resize": true}', "processor_config.json": '{"image_seq_length": 4}'}
    for name, content in files.items():
        (tmp_path / "model" / name).write_text(content)
    machine, store = Machine("cpu", None, lambda *_: None), Store(tmp_path / "runs")
    pruning = build.one_shot(str(tmp_path / "model"), "magnitude", "hybrid", 0.35, (16, 16), Calibration("none"))
    path = pipeline.ensure_checkpoint(pruning, store, machine)
    assert path is not None and len(audit(path)) == 14
    mask_archive.export(path, tmp_path / "masks.tar.xz")
    restored = mask_archive.restore(tmp_path / "masks.tar.xz", Store(tmp_path / "other"), machine)
    packed = Artefact(pruning, str(path), content_hash(path), store, machine)
    assert packed.packed.model.language_model.layers[0].mlp.up_proj.weight.shape == (64, 32)
    for folder in (path, restored, store.packed_path(packed.content)):
        assert {name: (folder / name).read_text() for name in files} == files
    assert content_hash(restored) == content_hash(path)
