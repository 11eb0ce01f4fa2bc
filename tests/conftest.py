"""A model, a text and a study small enough to run whole in seconds, and the command that runs them."""

import json
import os
import random
import sys
from pathlib import Path

import hypothesis
import pytest

# How fast a machine is decides no test: neither that of an example, nor that of making one.
hypothesis.settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-machine")

# As many processes as cores run tests: threads of their own, which wait for each other spinning, would only slow them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

WORDS = (
    "the",
    "of",
    "and",
    "city",
    "river",
    "king",
    "war",
    "music",
    "year",
    "first",
    "north",
    "film",
    "won",
    "born",
    "line",
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA of two blocks, with the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from experiments.data.registry import EMBEDDED

    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(40):
            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=80))}) + "\n")
    return path


@pytest.fixture
def hts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run the command in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("HTS_RESULTS", str(tmp_path / "runs"))
    monkeypatch.delenv("HTS_DATA", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        from slurm import cli

        monkeypatch.setattr(sys, "argv", ["hts", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_text: Path) -> tuple:
    """A study of the name ``tiny``."""
    from tiny_study import tiny_trials

    from experiments.studies.build import Study
    from experiments.studies.registry import STUDIES

    trials = tiny_trials(tiny_model, tiny_text)
    monkeypatch.setitem(STUDIES, "tiny", Study("a test", lambda: trials))
    return trials
