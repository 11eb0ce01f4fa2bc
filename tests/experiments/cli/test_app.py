"""The ``hts`` command: what it prints, and that bad input gets one clear line and leaves nothing half-written."""

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from decoder_families import make
from forked import Torchrun
from transformers import AutoTokenizer, MixtralConfig

from analysis.rows.format import SCHEMA
from experiments.cli import app
from experiments.cli.options import console
from experiments.embedded import MODEL
from experiments.run.store import Store
from experiments.studies import build
from experiments.studies.registry import STUDIES
from experiments.studies.trial import describe, key
from patch.audit import audit
from patch.checkpoint import load_info
from patch.learn.recipe import GUIDED, GUIDED_PATTERNS


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def assert_refused(outcome: tuple[int, str, str], message: str) -> None:
    code, _, err = outcome
    line = [line for line in err.splitlines() if "error" in line.lower()]
    assert code != 0 and len(line) == 1 and message in line[0], (code, err)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "dem"], "did you mean demo"),
        (["run", "demo", "--where", "methd=wanda"], "did you mean method"),
        (["run", "demo", "--where", "method=wand"], "no trial of demo has method=wand"),
        (["run", "demo", "--stage", "perplexty"], "unknown stage 'perplexty': did you mean perplexity"),
        (["run", "demo", "--stage", "task:piqa"], "did you mean task"),
        (
            ["run", "demo", "--stage", "task", "--stage", "speed"],
            "has a stage 'speed': there are prune, perplexity, task",
        ),
        (["run", "demo", "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["eval", "embeded"], "did you mean embedded"),
        (["eval", "no/such/model"], "no such model directory"),
        (["eval", "masked"], "unknown model or directory 'masked': known: embedded"),
        (["report", "--out", "nosuch/dir/page.html"], "there is no directory nosuch/dir: make it"),
        (["eval", "embedded", "--task", "piqua"], "did you mean piqa"),
        (["eval", "embedded", "--perplexity", "wikitext2/tst"], "did you mean wikitext2/test"),
        (["eval", "embedded", "--perplexity", "embedded/test@1024"], "max_position_embeddings is 512"),
        (["eval", "embedded", "--perplexity", "embedded/test@abc"], "'abc' is no length of windows"),
        (["eval", "embedded", "--data", "/nowhere"], "/nowhere"),
        (["prune", "embedded", "--method", "wandas"], "did you mean wanda"),
        (["prune", "embedded", "--method", "magnitude", "--tile", "64x66"], "multiple of 4"),
        (["prune", "embedded", "--method", "magnitude", "--tile", "64"], "rows x columns"),
        (["prune", "embedded", "--method", "magnitude", "--tile", "256x64"], "larger than the weight 128x256"),
        (["prune", "embedded", "--method", "magnitude", "--structure", "hybrid", "--sparsity", "0.6"], "sparsity 0.6"),
        (["learn", "embedded", "--sparsity", "-0.1"], "target sparsity -0.1"),
        (["learn", "embedded", "--tile", "128x512"], "larger than the weight"),
        (["learn", "embedded", "--recipe", "guide"], "did you mean guided"),
        (["learn", "embedded", "--set", "tile_ranking=model", "--method", "maskllm"], "maskllm has no dense tiles"),
        (["learn", "embedded", "--set", "stpes=5"], "did you mean steps"),
        (["learn", "embedded", "--set", "steps"], "give NAME=VALUE, such as steps=2000"),
        (["learn", "embedded", "--set", "steps=2.5"], "steps '2.5': give a whole number"),
        (["learn", "embedded", "--set", "lr=fast"], "lr 'fast': give a positive number"),
        (["learn", "embedded", "--set", "tau=4"], "give two numbers"),
        (["learn", "embedded", "--set", "logit_dtype=float16"], "give one of float32, bfloat16"),
        (["learn", "embedded", "--set", "activation_checkpointing=maybe"], "give true or false"),
        (["learn", "embedded", "--set", "mode=tile"], "recipe of mode joint"),
        (["run", "demo", "--device", "gpu"], "give cpu, cuda"),
        (["prune", "embedded", "--method", "drop-blocks", "--structure", "2:4"], "drops whole blocks: leave out --str"),
        (["prune", "embedded", "--method", "drop-blocks", "--tile", "64x64"], "drops whole blocks: leave out --tile"),
        (["prune", "embedded", "--method", "wanda", "--structure", "unstructured", "--tile", "64x64"], "has no tiles"),
        (["prune", "embedded", "--method", "magnitude", "--structure", "2:8"], "did you mean 2:4"),
        (["prune", "embedded", "--method", "magnitude", "--calibration", "c4"], "looks at no text: leave out --cal"),
        (["prune", "embedded", "--method", "magnitude", "--precision", "fp8", "--windows", "4"], "leave out --windows"),
        (["quantise", "embedded", "--seed", "1"], "fp8 looks at no text: leave out --seed"),
        (["learn", "embedded", "--method", "wanda"], "take `hts prune --method wanda`"),
        (["pack", "embedded", "out"], "embedded is a model, and this takes a checkpoint"),
        (["export", "embedded", "out"], "embedded is a model, and this takes a checkpoint"),
        (["audit", "embedded"], "embedded is a model, and this takes a checkpoint"),
        (["recover", "embedded"], "embedded is a model, and this takes a checkpoint"),
        (["table", "demo", "--results", "/dev/null"], "results directory /dev/null: is a file"),
        (["prune", "embedded", "--method", "magnitude", "--results", "/proc/1/x"], "/proc/1/x: cannot be made"),
        (["prune", __file__, "--method", "magnitude"], "test_app.py: is a file, not a model: name the directory of"),
        (["restore", "/nowhere"], "/nowhere: no such file"),
        (["quantise", "embedded", "--precision", "fp16"], "did you mean fp8"),
        (["learn", "embedded", "--set", "length=100000"], r"choose 512 or fewer (--set length=512)"),
        (["eval", "[/x]"], "[/x]"),
        (["audit", "/nowhere"], "/nowhere"),
        (["table", "demo"], "run a study first"),
    ],
    ids=lambda value: "-".join([*value[:2], value[-1]]).replace("/", ".") if isinstance(value, list) else None,
)
def test_bad_input_gets_one_line(hts, tmp_path: Path, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    assert_refused(hts(*arguments), message)
    assert files(tmp_path) == []


def test_a_data_directory_without_the_file_is_named(hts, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "data").mkdir()
    assert_refused(hts("eval", "embedded", "--data", tmp_path / "data"), "wiki.test.raw")
    assert_refused(hts("eval", "embedded", "--data", tmp_path / "data", "--task", "piqa"), "piqa_validation.jsonl")


def test_a_study_runs_to_its_table_and_figures(hts, tiny: tuple, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = hts("run", "tiny", "--where", "method=magnitude")
    assert code == 0, err
    assert "done" in out
    report = tmp_path / "runs" / "reports" / "tiny"
    assert {"accuracy.md", "accuracy.csv", "frontier.png"} <= set(os.listdir(report))
    assert "Magnitude" in (report / "accuracy.md").read_text()
    assert_refused(hts("plot", "tiny", "--format", "svg"), "svg")
    code, out, err = hts("plot", "tiny", "--where", "method=magnitude", "--format", "pdf")
    assert code == 0 and "frontier.pdf" in out, err
    assert (report / "frontier.pdf").read_bytes().startswith(b"%PDF")
    code, out, _ = hts("status", "tiny")
    assert code == 0 and "1 done" in out and "2 missing" in out
    code, out, _ = hts("table", "tiny", "--where", "method=magnitude")
    assert code == 0 and "Magnitude" in out
    assert "Without rows" not in out
    code, out, _ = hts("table", "tiny")
    assert code == 0 and "Without rows, so not shown: " in out and "patch-joint hybrid 35% 16x16" in out
    assert_refused(hts("table", "tiny", "--where", "method=magnitude", "--format", "html"), "html")
    assert_refused(hts("table", "tiny", "--format", "foo"), "known: terminal, md, csv, latex")
    assert_refused(hts("table", "tiny", "--about", "cost"), "for a table 'cost': there is accuracy")
    code, out, _ = hts("run", "tiny", "--dry-run")
    assert code == 0 and "complete" in out and "prune" in out


def test_stages_of_one_kind_are_run_now_and_the_others_later(hts, tiny: tuple, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def perplexities() -> list[str]:
        return [path.name for path in (tmp_path / "runs").glob("rows/*/perplexity*")]

    one_shot = ("--where", "method=magnitude")
    code, out, err = hts("run", "tiny", "--stage", "prune", *one_shot)
    assert code == 0, err
    assert "done   " in out and "accuracy.md" in out and not perplexities()
    assert "left for the same command without --stage: 1 stages of 1 trials" in out
    code, out, err = hts("plot", "tiny", *one_shot)
    assert code == 0 and "no figure: the rows in" in out and "hts status tiny" in out, err
    code, out, _ = hts("run", "tiny", "--stage", "perplexity", "--dry-run")
    assert code == 0 and out.count("perplexity:") == 3 and "prune" not in out
    code, out, _ = hts("run", "tiny", "--stage", "prune", "--dry-run", *one_shot)
    assert code == 0 and out.endswith(": complete\n")
    code, out, err = hts("run", "tiny", "--stage", "perplexity", "--stage", "prune", *one_shot)
    assert code == 0, err
    assert len(perplexities()) == 1 and "left for" not in out


def test_rows_of_a_newer_schema_are_refused(hts, tiny: tuple, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = Store(tmp_path / "runs").rows_path(tiny[0], "prune")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": SCHEMA + 1, "trial": key(tiny[0])}) + "\n")
    assert_refused(hts("table", "tiny"), "schema")


def test_a_full_disk_is_one_line_and_leaves_no_checkpoint(  # type: ignore[no-untyped-def]
    hts, tiny: tuple, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    outcome = hts("prune", tiny_model, "--method", "magnitude", "--tile", "16x16")
    assert_refused(outcome, "space")
    assert files(tmp_path / "runs") == []


@pytest.fixture
def pruned(hts, tiny_model: Path, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    out = tmp_path / "pruned"
    code, printed, err = hts("prune", tiny_model, "--method", "magnitude", "--tile", "16x16", "--out", out)
    assert code == 0, err
    assert "sparsity 0.500000" in printed
    return out


def test_a_checkpoint_passes_its_audit_and_is_not_overwritten(hts, tiny_model: Path, pruned: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = hts("audit", pruned)
    assert code == 0 and "0 violating tiles" in out
    assert_refused(hts("prune", tiny_model, "--method", "magnitude", "--tile", "16x16", "--out", pruned), "already")


def test_a_pruned_model_is_not_pruned_again(hts, pruned: Path, tiny_model: Path, tiny_text: Path) -> None:  # type: ignore[no-untyped-def]
    """Zeros of its mask would count as kept: audits would find more of them than is said."""
    short = ["--set=steps=2", "--set=batch=2", "--set=microbatch=1", "--set=length=16"]
    seen = ["--text", tiny_text, "--calibration", tiny_text, "--calibration-windows", 8, "--calibration-length", 16]
    for command in (["prune", pruned, "--method", "magnitude"], ["learn", pruned, *seen, *short]):
        wanted = f"pruned already (magnitude, 2:4): prune or learn on {tiny_model}"
        assert_refused(hts(*command, "--tile", "16x16"), wanted)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (("learn", "--tile", "16x16"), "learning"),
        (("quantise",), "quantising"),
        (("prune", "--method", "magnitude", "--tile", "16x16", "--precision", "fp8"), "quantising"),
        (
            ("prune", "--method", "wanda", "--structure", "hybrid", "--tile", "16x16", "--tile-ranking", "model"),
            "ranking tiles over the model",
        ),
    ],
    ids=["learned", "quantised", "pruned-and-quantised", "ranked"],
)
def test_what_experts_cannot_be_is_said_before_anything_is_made(  # type: ignore[no-untyped-def]
    command: tuple[str, ...], what: str, hts, tmp_path: Path
) -> None:
    about = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    MixtralConfig(**about, num_key_value_heads=2, num_local_experts=2, vocab_size=64).save_pretrained(tmp_path / "made")
    outcome = hts(*command, tmp_path / "made")
    assert_refused(outcome, f"{what} covers Linear weights alone, not experts")
    assert "made " not in outcome[1] and files(tmp_path) == ["config.json"]


def test_tiles_of_a_hybrid_mask_are_ranked_over_the_model(
    hts, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    seen = ["--calibration", tiny_text, "--windows", 8, "--length", 16, "--tile", "16x16"]
    asked = ["--structure", "hybrid", "--sparsity", 0.35, "--tile-ranking", "model", "--out", tmp_path / "made"]
    code, _, err = hts("prune", tiny_model, "--method", "wanda", *seen, *asked)
    assert code == 0, err
    assert load_info(tmp_path / "made")["definition"]["tile_ranking"] == "model"


@pytest.mark.parametrize("refit", [[], ["--refit"]], ids=["as-is", "refit"])
def test_a_model_is_pruned_and_audited(  # type: ignore[no-untyped-def]
    hts, tiny_model: Path, tiny_text: Path, tmp_path: Path, refit: list[str]
) -> None:
    seen = ["--calibration", tiny_text, "--windows", 8, "--length", 16, "--tile", "16x16", *refit]
    out = tmp_path / "made"
    code, _, err = hts("prune", tiny_model, "--method", "wanda", *seen, "--out", out)
    assert code == 0, err
    assert bool(load_info(out)["definition"].get("refit")) == bool(refit)
    code, printed, _ = hts("audit", out)
    assert code == 0 and "sparsity 0.500000" in printed


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("patch-joint", []),
        ("patch-joint", ["--recipe", "guided", "--set", "tile_prior=10"]),
        ("patch-tile", []),
        ("maskllm", []),
        ("maskllm", ["--refit"]),
        ("maskllm", ["--recipe", "guided"]),
    ],
    ids=["patch-joint", "patch-joint-guided", "patch-tile", "maskllm", "maskllm-refit", "maskllm-guided"],
)
def test_masks_are_learned_evaluated_and_audited(  # type: ignore[no-untyped-def]
    hts, tiny_model: Path, tiny_text: Path, tmp_path: Path, method: str, options: list[object]
) -> None:
    sparsity = 0.5 if method == "maskllm" else 0.25
    recipe = ("steps=2", "batch=2", "microbatch=1", "length=16")
    small = [*(part for each in recipe for part in ("--set", each)), "--tile", "16x16"]
    # Of 2:4 masks there is one sparsity, which need not be asked for.
    small += [] if method == "maskllm" else ["--sparsity", sparsity]
    prior = ["--calibration", tiny_text, "--calibration-windows", 8, "--calibration-length", 16, *options]
    out = tmp_path / "learned"
    code, printed, err = hts("learn", tiny_model, "--method", method, "--text", tiny_text, *small, *prior, "--out", out)
    assert code == 0, err
    assert f"(target {sparsity})" in printed and "tokens, about" in printed
    assert re.search(r"steps +2 +2000", printed) and re.search(r"logit_dtype +float32", printed)
    code, printed, _ = hts("audit", out)
    assert code == 0 and f"sparsity {sparsity:.6f}" in printed
    recipe = load_info(out)["definition"]["learning"]["recipe"]
    if "guided" in options and method == "maskllm":
        assert {name: recipe[name] for name in GUIDED_PATTERNS} == GUIDED_PATTERNS
        assert recipe.get("tile_ranking", "weight") == "weight", "there are no tiles to rank"
    elif "guided" in options:
        assert {name: recipe[name] for name in GUIDED} == GUIDED | {"tile_prior": 10.0}, "options come first"
    code, printed, err = hts("eval", out, "--perplexity", f"{tiny_text}@32")
    assert code == 0 and "perplexity" in printed and "@32" in printed, err


def test_what_can_be_pruned_of_a_family_is_learned(hts, tiny_text: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = tmp_path / "jetmoe"
    make("jetmoe", vocab_size=4096).save_pretrained(model)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(model)
    recipe = ("steps=1", "batch=1", "microbatch=1", "length=16")
    given = [*(part for each in recipe for part in ("--set", each)), "--tile", "16x16", "--sparsity", 0.25]
    given += ["--text", tiny_text, "--calibration", tiny_text, "--calibration-windows", 8, "--calibration-length", 16]
    assert_refused(hts("learn", model, *given), "ask for partial pruning (--partial)")
    code, _, err = hts("learn", model, *given, "--partial", "--out", tmp_path / "learned")
    assert code == 0, err
    assert [row.sparsity for row in audit(tmp_path / "learned")] == [0.25, 0.25]


def test_dropped_blocks_are_told_by_the_audit(hts, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    seen = ["--calibration", tiny_text, "--windows", 2, "--length", 16]
    code, out, err = hts("prune", tiny_model, "--method", "drop-blocks", *seen, "--out", tmp_path / "fewer")
    assert code == 0 and "sparsity 0.5: --sparsity sets another" in out, err
    code, out, _ = hts("audit", tmp_path / "fewer")
    assert code == 0 and "1 decoder blocks are gone and not counted here: sparsity 0.500000 with them" in out


def test_a_narrow_terminal_shows_every_number_of_an_audit(hts, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(console, "_width", 58)
    _, out, _ = hts("audit", pruned)
    assert "violating" in out.splitlines()[0] and out.count("  0.5000\n") == 14


def test_a_checkpoint_is_not_called_dense_while_it_is_evaluated() -> None:
    assert describe(dataclasses.replace(build.dense("embedded"), model="runs/pruned")) == "runs/pruned"
    assert describe(build.dense("embedded")) == "embedded dense"


def test_a_truncated_checkpoint_is_refused(hts, pruned: Path) -> None:  # type: ignore[no-untyped-def]
    weights = pruned / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(hts("audit", pruned), "model.safetensors")
    assert_refused(hts("eval", pruned, "--perplexity", f"{pruned / 'config.json'}@8"), "text source")


def test_a_hybrid_mask_without_a_sparsity_says_what_it_took(hts, tiny_model: Path) -> None:  # type: ignore[no-untyped-def]
    code, printed, err = hts("prune", tiny_model, "--method", "magnitude", "--structure", "hybrid", "--tile", "16x16")
    assert code == 0, err
    assert "sparsity 0.5, which makes every tile 2:4" in printed


def test_tampered_weights_fail_the_audit(hts, pruned: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    tensors = load_file(pruned / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].masked_fill(tensors[name] == 0, 1.0)
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = hts("audit", pruned)
    assert code == 1 and "8 violating tiles" in out
    assert sum(layer.violating for layer in audit(pruned)) == 8


def test_a_foreign_checkpoint_is_read_by_its_zeros(hts, pruned: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("hybrid.json", "hybrid.masks"):
        (pruned / name).unlink()
    code, out, _ = hts("audit", pruned, "--tile", "16x16")
    assert code == 0 and "sparsity 0.500000" in out


@pytest.mark.parametrize("study", list(STUDIES))
def test_every_study_is_well_formed(study: str) -> None:
    trials = STUDIES[study].trials()
    assert len({key(trial) for trial in trials}) == len(trials)
    # A label is of one trial alone, and leaves out on what and for how long it learns, which few studies vary.
    learned = [trial.pruning.learning for trial in trials]
    sizes = ("steps", "batch", "microbatch")
    told = [(each.source, *(getattr(each.recipe, size) for size in sizes)) if each else () for each in learned]
    assert len({(trial.label, *more) for trial, more in zip(trials, told, strict=True)}) == len(trials)
    for model in {trial.pruning.model for trial in trials}:
        assert any(trial.pruning.method == "dense" for trial in trials if trial.pruning.model == model)


def test_the_demo_and_smollm2_studies_have_the_points_that_are_reported() -> None:
    assert [trial.label.removeprefix("embedded ") for trial in STUDIES["demo"].trials()] == [
        "dense",
        "magnitude 2:4 50%",
        "wanda 2:4 50%",
        "sparsegpt 2:4 50%",
        "maskllm 2:4 50% earlier lr 0.002",
        "patch-joint hybrid 45% 64x64 earlier lr 0.003",
        "patch-joint hybrid 35% 64x64 earlier lr 0.003",
        "patch-joint hybrid 25% 64x64 earlier lr 0.003",
        "sparsegpt 2:4 50% FP8",
    ]
    assert len(STUDIES["smollm2-oneshot"].trials()) == 19


@pytest.mark.parametrize("command", ["studies", "models", "doctor"])
def test_overviews_print(hts, command: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = hts(command)
    assert code == 0, err
    assert {"studies": "smollm2-oneshot", "models": "llama-2-7b", "doctor": "torch"}[command] in out


def test_what_a_terminal_cannot_print_is_escaped(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "experiments", "table", f"{tmp_path}/\u6a21\u578b"],
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "\\u6a21" in run.stderr and "Traceback" not in run.stderr


def test_what_the_hubs_client_says_of_each_try_is_one_line() -> None:
    said = [f"'{try_}' thrown while requesting HEAD {url}" for try_, url in enumerate(("a", "b"))]
    said += ["Retrying in 1s [Retry 1/5].", "another thing"]
    once = app.OnceUnanswered()
    records = [logging.LogRecord("http", logging.WARNING, "", 0, each, (), None) for each in said]
    shown = [record.getMessage() for record in records if once.filter(record)]
    assert shown == ["the Hugging Face hub does not answer: trying again for up to half a minute", "another thing"]


def test_ctrl_c_says_what_to_run_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(study: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["hts", "run", "my study"])
    with pytest.raises(SystemExit) as end:
        app.answer(app.build({"": {"run": run, "other": lambda: None}}))
    assert end.value.code == 130
    assert "the same command goes on: hts run 'my study'" in capsys.readouterr().err


def test_the_installed_command_answers() -> None:
    command = shutil.which("hts", path=os.path.dirname(sys.executable))
    assert command, "the package is not installed in this environment"
    found = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "prune" in found.stdout and "Hybrid tile sparsity" in found.stdout


def forked(command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit status, output and errors of what torchrun would start, without its agent."""
    started = Torchrun(command, environment)
    code = started.wait(240)
    return code, *("".join(getattr(each, name) for each in started.processes) for name in ("stdout", "stderr"))


def launched(command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Of torchrun itself, whose processes import everything anew: three quarters of a minute of a core."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])} | environment
    ran = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize("run", [forked, pytest.param(launched, marks=pytest.mark.thorough)])
def test_several_processes_learn_one_mask(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """The prior is made once, the mask by all, the checkpoint and the last line come from one."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "experiments", "learn"]
    model = ["embedded", "--sparsity", "0.35", "--tile", "64x64", "--text", "embedded/train"]
    prior = ["--calibration", "embedded/train", "--calibration-windows", "4", "--calibration-length", "64"]
    size = ["--set=steps=2", "--set=batch=4", "--set=microbatch=2", "--set=length=32", "--device", "cpu"]
    learning = [*command, *model, *prior, *size, "--results", str(tmp_path)]
    code, out, err = run(learning, {"OMP_NUM_THREADS": "1"})
    assert code == 0, err[-6000:]
    assert out.count("sparsity 0.35") == 1
    checkpoints = [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
    assert len(checkpoints) == 3, "a SparseGPT prior, the unstructured mask that ranks tiles, and the learned mask"
    assert not list(tmp_path.glob("work/*/learner.pt"))
