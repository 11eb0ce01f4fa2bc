"""The packed half of a trial: its stages, what they measure of a small model on a CPU, and one artefact throughout."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_study import tiny_trials
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from analysis.rows.format import OUTCOMES, Fact
from analysis.rows.jsonl import to_lines
from analysis.rows.load import load_rows
from analysis.rows.points import gather
from analysis.rows.published import stages
from experiments.bench import model as bench
from experiments.bench.harness import Reading
from experiments.bench.model import Speed
from experiments.data import models
from experiments.data.registry import REGISTRY
from experiments.run import packed, pipeline
from experiments.run.packed import agrees
from experiments.run.projected import at_depth, dense_shares, projected_shares, projected_tile
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies import build, registry
from experiments.studies.trial import (
    WORKLOADS,
    Calibration,
    Evaluation,
    Packed,
    Perplexity,
    Trial,
    Workload,
    definition,
    key,
)
from patch.checkpoint import MASKS_FILE, content_hash
from patch.errors import UserError
from patch.layers import prunable_linears
from patch.mask import HybridMask
from stoicc.linear import packed_modules
from stoicc.timing import Timing

CPU = Machine("cpu", None, lambda *_: None)
RESULTS = Path(__file__).parents[3] / "results"
SPEEDS = ["speed:decode@1x1", "speed:decode@16x1", "speed:prefill@1x2048", "speed:prefill@8x2048"]


def joined_trials(model: Path, text: Path) -> list[Trial]:
    """Dense, magnitude 2:4, learned hybrid, magnitude unstructured, each with packed stages."""
    plain = tiny_trials(model, text)
    calibration = Calibration(str(text), windows=8, length=16)
    prunings = [trial.pruning for trial in plain]
    prunings.append(build.one_shot(str(model), "magnitude", "unstructured", 0.5, None, calibration))
    evaluation = dataclasses.replace(plain[0].evaluation, packed=Packed(carried=("llama-2-7b",)))
    return [Trial(pruning, evaluation) for pruning in prunings]


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trial], Store]:
    store = Store(tmp_path_factory.mktemp("joined"))
    trials = joined_trials(tiny_model, tiny_text)
    for trial in trials:
        pipeline.run_trial(trial, store, CPU)
    return trials, store


def rows(trial: Trial, store: Store, stage: str) -> dict[str, dict[str, Any]]:
    lines = store.read_rows(trial, stage)
    return {line["metric"]: line for line in lines}


# Definitions and stages


def test_trials_of_published_rows_keep_their_names() -> None:
    published = set(stages(RESULTS))
    for study in ("demo", "smollm2-oneshot"):
        assert {key(trial) for trial in registry.STUDIES[study].trials()} <= published
    evaluation = Evaluation()
    assert "packed" not in definition(evaluation)
    assert key(evaluation) != key(dataclasses.replace(evaluation, packed=Packed()))


def test_packed_stages_follow_the_others(tiny_model: Path, tiny_text: Path) -> None:
    dense, two_four, hybrid, unstructured = joined_trials(tiny_model, tiny_text)
    text = f"{tiny_text}@32"
    assert pipeline.stages(dense) == ["prune", f"perplexity:{text}", "pack", *SPEEDS]
    once_pruned = ["prune", f"perplexity:{text}", "pack", f"packed:{text}", *SPEEDS]
    assert pipeline.stages(two_four) == pipeline.stages(unstructured) == once_pruned
    assert pipeline.stages(hybrid) == [*once_pruned, "carried:llama-2-7b"]
    without = Trial(hybrid.pruning, dataclasses.replace(hybrid.evaluation, packed=None))
    assert pipeline.stages(without) == ["prune", f"perplexity:{text}"]


def test_the_frontier_stands_on_the_checkpoints_of_the_demo() -> None:
    frontier, demo = (
        {key(trial.pruning) for trial in registry.STUDIES[name].trials() if not trial.pruning.quantisation}
        for name in ("frontier", "demo")
    )
    assert demo < frontier
    learned, joined = (
        {key(trial.pruning) for trial in registry.STUDIES[name].trials() if trial.pruning.learning}
        for name in ("smollm2-learned", "frontier-smollm2")
    )
    assert joined and joined < learned


# What is measured on a CPU


def test_packed_is_unpacked(ran: tuple[list[Trial], Store]) -> None:
    trials, store = ran
    for trial in trials[1:]:
        pack = rows(trial, store, "pack")
        assert pack["packed_agreement"]["value"] == 1 and pack["packed_agreement"]["labels"]["agrees"] is True
        assert pack["packed_bytes"]["value"] > 0 and pack["disk_bytes"]["value"] > pack["packed_bytes"]["value"]
        assert pack["masked_bytes"]["value"] == 2 * 2 * (4 * 32 * 32 + 3 * 32 * 64)
        item = trial.evaluation.perplexity[0]
        again = rows(trial, store, f"packed:{item.source}@{item.length}")
        assert again["packed_perplexity"]["labels"]["agrees"] is True
        assert again["packed_perplexity"]["unit"] == "ppl"
        assert again["packed_perplexity"]["value"] == pytest.approx(again["unpacked_perplexity"]["value"], rel=1e-3)
        assert again["logit_disagreement"]["value"] <= 2 * again["logit_rounding"]["value"]
        assert again["greedy_agreement"]["value"] == 1 and again["greedy_same"]["value"] > 0.5
        before = rows(trial, store, f"perplexity:{item.source}@{item.length}")["perplexity"]
        assert before["value"] == pytest.approx(again["packed_perplexity"]["value"], rel=0.02)
        about = {name: label for name, label in before["labels"].items() if name not in OUTCOMES}
        assert about.items() <= again["packed_perplexity"]["labels"].items()


def test_a_packed_weight_that_is_not_the_checkpoints_is_told(
    ran: tuple[list[Trial], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed model of the 2:4 trial, with one element of one weight changed after packing."""
    trials, store = ran
    trial, moved = trials[1], Store(tmp_path)
    source = str(store.checkpoint_path(trial.pruning))
    artefact = packed.Artefact(trial.pruning, source, content_hash(source), moved, CPU)
    module = next(module for module in artefact.packed.modules() if hasattr(module, "records"))
    half = module.records.view(torch.bfloat16)
    half[0, (half[0] != 0).nonzero()[0]] += 1
    facts = {fact.metric: fact for fact in packed.measurements(trial)["pack"](artefact)[0]}
    assert facts["packed_agreement"].value < 1 and facts["packed_agreement"].labels["agrees"] is False


def test_rounding_is_of_the_arithmetic_not_of_the_weights(ran: tuple[list[Trial], Store]) -> None:
    """A checkpoint that was made on a CPU holds float32: rounding its weights is no excuse for a kernel."""
    trials, store = ran
    source = str(store.checkpoint_path(trials[1].pruning))
    artefact = packed.Artefact(trials[1].pruning, source, content_hash(source), store, CPU)
    stored = dict(artefact.load(None)[0].named_parameters())
    for name, weight in artefact.exact().named_parameters():
        assert weight.dtype == torch.float32 and torch.equal(weight, stored[name].bfloat16().float())


def test_what_rounding_explains_agrees_and_more_does_not() -> None:
    assert agrees(100.4, 100.0, 0.019, 0.01)
    assert not agrees(100.6, 100.0, 0.019, 0.01)
    assert not agrees(100.0, 100.0, 0.021, 0.01)
    assert agrees(float("inf"), float("inf"), 0.0, 0.0)
    assert not agrees(float("nan"), 100.0, 0.0, 0.01)


def test_speed_is_skipped_with_a_reason_and_wanted_again_on_a_gpu(ran: tuple[list[Trial], Store]) -> None:
    trials, store = ran
    hybrid = trials[2]
    timed = [*SPEEDS, "carried:llama-2-7b"]
    for stage in timed:
        [row] = rows(hybrid, store, stage).values()
        assert (row["metric"], row["value"]) == ("skipped", None)
        assert "CUDA" in row["labels"]["reason"] and row["labels"]["device"] == "cpu"
    assert pipeline.missing_stages(hybrid, store) == []
    assert pipeline.missing_stages(hybrid, store, can_time=True) == timed


class Timer(Machine):
    """A machine that says it can time; what it measures is made up."""

    can_time = True


def test_dense_fp8_is_timed_with_single_scales_too(
    ran: tuple[list[Trial], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(named: dict[str, Any], work: Workload, rounds: int, eight: Sequence[str] = ()) -> dict[str, Speed]:
        assert set(eight) == {"packed", "fp8_tensorwise"} and not prunable_linears(named["fp8_tensorwise"])
        return {name: Speed(Reading(Timing(20.0, 19.0, 22.0, rounds)), 1) for name in named}

    monkeypatch.setattr(bench, "measure", measure)
    work = Workload("decode", 2, 1)
    dense = dataclasses.replace(ran[0][0].evaluation, perplexity=(), packed=Packed((work,)))
    trial = Trial(build.quantised(ran[0][0].pruning, "fp8", Calibration("unused", 8, 16)), dense)
    store = Store(tmp_path)
    for machine in (CPU, Timer("cpu", None, lambda *_: None)):
        pipeline.run_trial(trial, store, machine)
    found = rows(trial, store, f"speed:{work}")
    assert {"dense_time", "packed_time", "fp8_tensorwise_time", "speedup"} <= set(found)


def test_the_rows_of_a_timed_trial(
    ran: tuple[list[Trial], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[set[str], Workload]] = []

    def measure(named: dict[str, Any], work: Workload, rounds: int, eight: Sequence[str] = ()) -> dict[str, Speed]:
        timed.append((set(named), work))
        made_up = {"dense": Timing(30.0, 29.0, 31.0, rounds), "packed": Timing(20.0, 19.0, 22.0, rounds)}
        return {name: Speed(Reading(made_up[name]), bench.tensor_bytes(model)) for name, model in named.items()}

    monkeypatch.setattr(bench, "measure", measure)
    small = dataclasses.replace(REGISTRY["llama-2-7b"], hidden=256, intermediate=512, blocks=4, heads=2, kv_heads=2)
    monkeypatch.setitem(REGISTRY, "llama-2-7b", dataclasses.replace(small, vocab=64))
    trials, store = ran
    shutil.copytree(store.root, tmp_path, dirs_exist_ok=True)
    moved, timer = Store(tmp_path), Timer("cpu", None, lambda *_: None)
    for trial in (trials[0], trials[2]):
        pipeline.run_trial(trial, moved, timer)
        assert pipeline.missing_stages(trial, moved, can_time=True) == []
    pairs = [{"dense"}] * 4 + [{"dense", "packed"}] * 8
    assert [names for names, _ in timed] == pairs and {work for _, work in timed} == set(WORKLOADS)

    row = rows(trials[2], moved, "speed:decode@16x1")
    labels = {"kind": "decode", "batch": 16, "length": 1}
    for metric, value, unit in (("dense_time", 30, "us"), ("packed_time", 20, "us"), ("speedup", 1.5, "1")):
        assert (row[metric]["value"], row[metric]["unit"]) == (value, unit)
        assert labels.items() <= row[metric]["labels"].items()
    assert {"p20": 19, "p80": 22, "runs": 10}.items() <= row["packed_time"].items()
    dense = rows(trials[0], moved, "speed:decode@16x1")
    assert dense["speedup"]["value"] == 1 and "packed_time" not in dense
    lines = moved.read_rows(trials[2], "speed:prefill@8x2048")
    memory = {line["labels"]["implementation"]: line["value"] for line in lines if line["metric"] == "peak_memory"}
    assert set(memory) == {"dense", "packed"}

    lines = moved.read_rows(trials[2], "carried:llama-2-7b")
    assert all(line["labels"]["carried"] is True for line in lines)
    # 16x16 divides every weight of the model.
    assert {(line["labels"]["shape"], *line["labels"]["tile"]) for line in lines} == {("llama-2-7b", 16, 16)}
    assert sum(line["metric"] == "speedup" for line in lines) == len(WORKLOADS)
    assert len(gather(load_rows(moved.root))) == len(trials)


def test_stages_may_be_run_by_kind_in_any_order(ran: tuple[list[Trial], Store], tmp_path: Path) -> None:
    """Each brings the checkpoint with it that it is measured of, and what that one is."""
    trial, store = ran[0][1], Store(tmp_path)
    done = ["prune"]
    for kinds in (["speed"], ["packed", "pack"], ["perplexity"], []):
        assert pipeline.with_stages(ran[0], kinds)
        pipeline.run_trial(trial, store, CPU, kinds)
        done += [stage for stage in pipeline.stages(trial, kinds) if stage not in done]
        assert set(pipeline.stages(trial)) - set(done) == set(pipeline.missing_stages(trial, store))
        assert pipeline.missing_stages(trial, store, kinds=kinds) == []

    def measured(store: Store) -> list[tuple[Any, ...]]:
        lines = [line for stage in pipeline.stages(trial) for line in store.read_rows(trial, stage)]
        return [(line["metric"], line["value"], line["labels"]) for line in lines if line["metric"] != "prune_seconds"]

    assert measured(store) == measured(ran[1])


def test_a_trial_without_stages_of_a_kind_is_left_out(ran: tuple[list[Trial], Store]) -> None:
    trials = ran[0]
    assert pipeline.with_stages(trials, []) == trials
    assert pipeline.with_stages(trials, ["carried"]) == [trials[2]]
    assert pipeline.with_stages(trials, ["carried", "packed"]) == trials[1:]


def test_every_row_names_the_checkpoint(ran: tuple[list[Trial], Store]) -> None:
    trials, store = ran
    for trial in trials:
        dense = trial.pruning.method == "dense"
        source = Path(trial.pruning.model) if dense else store.checkpoint_path(trial.pruning)
        found = {
            line["provenance"]["checkpoint"]
            for stage in pipeline.stages(trial)
            for line in store.read_rows(trial, stage)
        }
        assert found == {content_hash(source)}
    assert len(gather(load_rows(store.root))) == len(trials)


def test_what_was_measured_of_the_same_checkpoint_is_not_measured_again(
    ran: tuple[list[Trial], Store], tmp_path: Path
) -> None:
    """From the rows of the same trial without packed stages, but not where they are of another checkpoint."""
    trial = ran[0][0]
    plain = Trial(trial.pruning, dataclasses.replace(trial.evaluation, packed=None))
    stage = pipeline.stages(plain)[1]
    content = content_hash(trial.pruning.model)
    for known, taken in ((content, True), ("0" * 64, False), (None, False)):
        moved = Store(tmp_path / str(known))
        moved.write_rows(plain, stage, [Fact("perplexity", 7.5, "ppl", {"length": 32}, 0.5)], {"checkpoint": known})
        pipeline.run_trial(trial, moved, CPU)
        row = rows(trial, moved, stage)["perplexity"]
        assert (row["value"] == 7.5) is taken
        assert row["trial"] == key(trial) and row["definition"] == definition(trial)
        assert row["provenance"]["checkpoint"] == content


def test_a_point_of_a_changed_checkpoint_is_not_drawn(ran: tuple[list[Trial], Store], tmp_path: Path) -> None:
    trials, store = ran
    trial = trials[1]
    for stage in pipeline.stages(trial):
        lines = store.read_rows(trial, stage)
        if stage == "pack":
            for line in lines:
                line["provenance"]["checkpoint"] = "0" * 64
        (tmp_path / store.rows_path(trial, stage).name).write_text(to_lines(lines))
    with pytest.raises(UserError, match="different checkpoints"):
        gather(load_rows(tmp_path))


# Content hashes


def test_the_content_hash_is_of_tensors_not_of_files(ran: tuple[list[Trial], Store], tmp_path: Path) -> None:
    trials, store = ran
    path = store.checkpoint_path(trials[1].pruning)
    model, _ = models.load_model(str(path))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    save_file(load_file(path / MASKS_FILE), tmp_path / MASKS_FILE, metadata={"other": "header"})
    assert content_hash(tmp_path) == content_hash(path) == models.content(str(path))


@pytest.mark.parametrize("part", ["dense", "patterns", "weight"])
def test_one_flipped_element_changes_the_content_hash(
    ran: tuple[list[Trial], Store], tmp_path: Path, part: str
) -> None:
    trials, store = ran
    path = store.checkpoint_path(trials[2].pruning)
    for name in ("model.safetensors", MASKS_FILE):
        tensors = load_file(path / name)
        changed = [key for key in tensors if key.endswith(f"q_proj.{part}")]
        if changed:
            tensor = tensors[changed[0]]
            tensor[0, 0] = ~tensor[0, 0] if tensor.dtype == torch.bool else tensor[0, 0] + 1
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    assert content_hash(tmp_path) != content_hash(path)


# Statistics projected onto other shapes


def mask(share: float, rows: int = 4) -> HybridMask:
    dense = torch.zeros(rows, 5, dtype=torch.bool)
    dense.view(-1)[: round(share * dense.numel())] = True
    return HybridMask((64 * rows, 320), (64, 64), dense, torch.zeros(64 * rows, 80, dtype=torch.uint8))


def learned_masks(blocks: int) -> dict[str, HybridMask]:
    """Shares that tell kind and block."""
    kinds = list(REGISTRY["llama-2-7b"].linear_shapes())
    return {
        f"model.layers.{block}.part.{kind}": mask((block + place) / 20)
        for block in range(blocks)
        for place, kind in enumerate(kinds)
    }


def test_shares_go_to_the_same_kind_at_the_nearest_depth() -> None:
    assert at_depth([0.0, 1.0], 4) == [0, 0, 1, 1]
    assert at_depth([0.0, 0.5, 1.0, 2.0], 2) == [0.5, 2.0]
    assert at_depth([3.0], 3) == [3, 3, 3]
    assert dense_shares(learned_masks(2))["k_proj"] == pytest.approx([0.05, 0.1])
    shares = projected_shares(learned_masks(4), REGISTRY["llama-2-7b"])
    assert len(shares) == 32 * 7
    for place, kind in enumerate(REGISTRY["llama-2-7b"].linear_shapes()):
        assert [shares[block, kind] for block in (0, 7, 8, 31)] == pytest.approx(
            [place / 20, place / 20, (1 + place) / 20, (3 + place) / 20]
        )


def test_masks_that_cannot_be_projected_are_refused() -> None:
    masks = learned_masks(2)
    del masks["model.layers.1.part.k_proj"]
    with pytest.raises(UserError, match="k_proj 1"):
        dense_shares(masks)
    without = {name: one for name, one in learned_masks(2).items() if not name.endswith("k_proj")}
    with pytest.raises(UserError, match="no masks for k_proj"):
        projected_shares(without, REGISTRY["llama-3.1-8b"])


def test_the_own_tile_is_carried_where_it_divides() -> None:
    assert projected_tile((64, 64), REGISTRY["llama-2-7b"]) == (64, 64)
    # 11008 is no multiple of 512.
    assert projected_tile((512, 512), REGISTRY["llama-2-7b"]) == (128, 128)


def test_a_model_of_random_weights_takes_the_carried_shares() -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config).bfloat16()
    names = list(prunable_linears(model))
    wanted = {name: place % 5 / 8 for place, name in enumerate(names)}
    sparsity = {name: (1 - share) / 2 for name, share in wanted.items()}
    bench.make_hybrid(model, sparsity, (64, 64))
    for module in packed_modules(model):
        dense = 1 - module.checked().sparse_share
        parts = [(wanted[name], rows) for name, rows in module.spec.parts]
        assert dense == pytest.approx(sum(share * rows for share, rows in parts) / sum(rows for _, rows in parts))


# What is timed is the model


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["dense", "two-four", "hybrid", "unstructured"])
def test_a_timed_pass_computes_the_models_last_logits(ran: tuple[list[Trial], Store], which: int) -> None:
    trials, store = ran
    pruning = trials[which].pruning
    source = pruning.model if which == 0 else str(store.checkpoint_path(pruning))
    artefact = packed.Artefact(pruning, source, content_hash(source), store, CPU)
    model = artefact.packed if which else artefact.unpacked
    torch.manual_seed(5)
    ids = torch.randint(model.config.vocab_size, (2, 24))
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
    bench.prepare(model)
    torch.manual_seed(5)
    found = bench.make_pass(model, Workload("prefill", 2, 24), lambda block: block)()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
    step = bench.make_pass(model, Workload("decode", 3, 1), lambda block: block)()
    assert step.shape == (3, 1, model.config.vocab_size) and bool(step.isfinite().all())


@pytest.mark.parametrize("kind", bench.MODEL_TYPES)
def test_every_form_that_is_timed_is_run_as_the_model_runs_it(kind: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, head_dim=16, vocab_size=50)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    torch.manual_seed(5)
    ids = torch.randint(50, (2, 24))
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
    bench.prepare(model)
    torch.manual_seed(5)
    found = bench.make_pass(model, Workload("prefill", 2, 24), lambda block: block)()
    assert torch.allclose(found, expected, atol=1e-5)
    step = bench.make_pass(model, Workload("decode", 3, 1), lambda block: block)()
    assert step.shape == (3, 1, 50)


def test_blocks_that_differ_only_in_what_they_keep_compile_once() -> None:
    from torch._dynamo.testing import CompileCounter

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    sparsity = {name: (0.125, 0.25, 0.375)[int(name.split(".")[2])] for name in prunable_linears(model)}
    bench.make_hybrid(model, sparsity, (64, 64))
    assert len({module.records.shape for module in packed_modules(model)}) > 4
    bench.prepare(model)
    counter = CompileCounter()
    torch._dynamo.reset()
    with bench.compiling(limit=8):
        bench.make_pass(
            model, Workload("decode", 1, 1), lambda block: torch.compile(block, backend=counter, dynamic=False)
        )()
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_a_model_of_another_form_is_not_timed() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = LlamaForCausalLM(config)
    model.config.model_type = "gemma3_text"
    with pytest.raises(UserError, match="gemma3_text model cannot be timed"):
        bench.prepare(model)


def test_perplexity_items_may_be_several(tiny_model: Path, tiny_text: Path) -> None:
    trial = joined_trials(tiny_model, tiny_text)[1]
    items = (Perplexity(str(tiny_text), 16), Perplexity(str(tiny_text), 32))
    both = Trial(trial.pruning, dataclasses.replace(trial.evaluation, perplexity=items))
    assert [stage for stage in pipeline.stages(both) if stage.startswith("packed:")] == [
        f"packed:{tiny_text}@16",
        f"packed:{tiny_text}@32",
    ]
