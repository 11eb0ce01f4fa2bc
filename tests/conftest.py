"""A model, a text and a study small enough to run whole in seconds."""

import json
import random
from pathlib import Path

import pytest

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

    from experiments.models import EMBEDDED

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
    with open(path, "w") as file:
        for _ in range(40):
            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=80))}) + "\n")
    return path
