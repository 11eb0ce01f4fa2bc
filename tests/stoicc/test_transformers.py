"""Packed checkpoints as users of transformers meet them: without our package, generating, offloaded, trained."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stoicc_hybrids import random_mask
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import stoicc
from experiments.data.models import load_model
from patch import install
from patch.errors import UserError
from patch.layers import prunable_linears
from stoicc.quantizer import _digest
from stoicc.spec import AUTO_MAP, CODE_FILE, FORMER_NEEDED, NEEDED

ROOT = Path(__file__).parents[2]
PROMPT = torch.arange(2, 10)[None]

# One process, since each takes seconds to import transformers: first as one that has not our package.
FROM_OUTSIDE = f"""
import sys
from transformers import AutoModelForCausalLM, LlamaConfig
path = sys.argv[1]
for options in ({{"trust_remote_code": True}}, {{}}):
    blocked = {{name: sys.modules.get(name) for name in ("stoicc", "stoicc.remote")}}
    sys.modules.update(dict.fromkeys(blocked))
    try:
        AutoModelForCausalLM.from_pretrained(path, **options)
    except Exception as error:
        print(str(error).splitlines()[-1])
    for name in blocked:
        del sys.modules[name]
assert "stoicc" not in sys.modules
import torch
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
print(model.generate(torch.tensor({PROMPT.tolist()}), max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
print(AutoModelForCausalLM._model_mapping[LlamaConfig].__module__)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Tensor]:
    """A packed checkpoint, the model that it was saved from, and its greedy text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=128, bos_token_id=0, eos_token_id=1))
    model = model.to(torch.bfloat16).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # no near ties
    linears = prunable_linears(model).items()
    stoicc.compile_model(model, {name: random_mask(*linear.weight.shape, (32, 32), 0.6) for name, linear in linears})
    path = tmp_path_factory.mktemp("packed") / "checkpoint"
    stoicc.save_packed(path, model)
    return path, model, text(model)


def text(model: Any, **options: Any) -> Tensor:
    return model.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


def test_it_says_what_it_needs_and_loads_without_importing_us(checkpoint: Any, tmp_path: Path) -> None:
    path, _, greedy = checkpoint
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", FROM_OUTSIDE, str(path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    with_code, without, tokens, module = ran.stdout.splitlines()
    assert with_code == f"the weights of this checkpoint are packed: {install.how()}"
    assert without.startswith("No such file") and without.endswith(NEEDED)
    assert json.loads(tokens) == greedy.tolist()
    # Plain models of the kind are loaded as ever.
    assert module == "transformers.models.llama.modeling_llama"


def test_a_loaded_model_saves_nothing_that_only_the_checkpoint_has(checkpoint: Any, tmp_path: Path) -> None:
    path = checkpoint[0]
    assert (path / CODE_FILE).exists() and json.loads((path / "config.json").read_text())["auto_map"] == AUTO_MAP
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "again")
    assert (
        not {"auto_map", "transformers_weights"} & json.loads((tmp_path / "again" / "config.json").read_text()).keys()
    )
    assert torch.equal(text(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), checkpoint[2])


def test_checkpoints_that_name_the_former_file_load(checkpoint: Any, tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint[0], tmp_path / "copy")
    content = json.loads((path / "config.json").read_text()) | {"transformers_weights": FORMER_NEEDED}
    content["quantization_config"]["digest"] = _digest(content)
    (path / "config.json").write_text(json.dumps(content))
    assert torch.equal(text(AutoModelForCausalLM.from_pretrained(path)), checkpoint[2])


@pytest.mark.parametrize(
    "entry", ["hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "a module"]
)
def test_a_damaged_configuration_is_told_as_damage(entry: str, checkpoint: Any, tmp_path: Path) -> None:
    """Before a model is made of it: what does not fit then would be told instead, or nothing."""
    path = shutil.copytree(checkpoint[0], tmp_path / "copy")
    content = json.loads((path / "config.json").read_text())
    if entry == "a module":
        content["quantization_config"]["modules"][0]["band"] ^= 1
    else:
        content[entry] *= 2
    (path / "config.json").write_text(json.dumps(content))
    for load in (AutoModelForCausalLM.from_pretrained, partial(load_model, quantised=True)):
        with pytest.raises(UserError, match=r"config\.json: its digest is not that of what it says"):
            load(str(path))


def test_parts_that_have_no_place_are_refused_though_all_hashes_are_right(checkpoint: Any, tmp_path: Path) -> None:
    """Names on disk may be others, but a linear that nothing is packed for would start from random weights."""
    path = shutil.copytree(checkpoint[0], tmp_path / "copy")
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"]["modules"].pop()
    content["quantization_config"]["digest"] = _digest(content)
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tensor .*\.weight is missing: incomplete or damaged"):
        AutoModelForCausalLM.from_pretrained(path)


def test_the_configuration_of_another_directory_is_not_looked_at(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = LlamaConfig.from_dict(json.loads((checkpoint[0] / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], config=config)
    assert torch.equal(text(model), checkpoint[2])


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": True}],
    ids=lambda options: next(iter(options)),
)
def test_greedy_text_is_the_same_however_it_is_made(checkpoint: Any, options: dict[str, Any]) -> None:
    _, model, greedy = checkpoint
    assert torch.equal(text(model, **({"assistant_model": model} if "assistant_model" in options else options)), greedy)


def test_beams_are_searched(checkpoint: Any) -> None:
    path, model, _ = checkpoint
    assert torch.equal(text(AutoModelForCausalLM.from_pretrained(path), num_beams=3), text(model, num_beams=3))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_blocks_may_lie_elsewhere(checkpoint: Any, tmp_path: Path, place: str) -> None:
    path, _, greedy = checkpoint
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": place}
    model = AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=tmp_path)
    assert torch.equal(text(model), greedy)


@pytest.mark.parametrize("target", ["o_proj", "q_proj", "k_proj"])
def test_adapters_are_refused_by_name(checkpoint: Any, target: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    with pytest.raises(ValueError, match=r"Target module Hybrid(Linear|Part)\(.*is not supported"):
        get_peft_model(model, LoraConfig(target_modules=[target]))


@pytest.mark.parametrize("dtype", [None, torch.int8], ids=str)
def test_gradients_are_refused(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    stoicc.compile_model(model, {"0": random_mask(64, 64, (64, 64), 1.0)}, dtype=dtype)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(UserError, match="packed weights are for inference and have no gradient"):
        model(x).sum().backward()
