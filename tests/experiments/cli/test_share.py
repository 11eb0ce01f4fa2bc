"""`hts pack` and `hts push`: what others run of a checkpoint, and the card that goes with it."""

import html
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from experiments.cli import share
from experiments.eval import humaneval
from experiments.publish import card
from patch.errors import UserError


@pytest.fixture
def pruned(hts: Any, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> Path:
    """A masked checkpoint whose perplexity was measured."""
    out = tmp_path / "masked"
    options = ("--method", "wanda", "--structure", "hybrid", "--sparsity", 0.4, "--tile", "16x16")
    seen = ("--calibration", tiny_text, "--windows", 4, "--length", 16)
    code, _, err = hts("prune", tiny_model, *options, *seen, "--out", out, "--device", "cpu")
    assert code == 0, err
    code, _, err = hts("eval", out, "--perplexity", f"{tiny_text}@32", "--device", "cpu")
    assert code == 0, err
    return out


def test_a_checkpoint_is_packed_and_both_are_pushed_with_a_card(
    hts: Any, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = hts("push", pruned, "me/tiny-pruned", "--out", tmp_path / "sent", "--licence", "mit")
    assert code == 0 and "nothing was sent" in out, err
    text = (tmp_path / "sent" / "README.md").read_text()
    for said in ('license: "mit"', "Wanda", "16x16", "4 windows of 16 tokens", "| perplexity |", "windows of 32"):
        assert said in text
    assert "vllm serve me/tiny-pruned --quantization stoicc" in text
    AutoModelForCausalLM.from_pretrained(tmp_path / "sent")

    code, out, err = hts("pack", pruned, tmp_path / "packed")
    assert code == 0 and "14 linears packed" in out and not err, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dtype == torch.bfloat16
    code, _, err = hts("pack", tmp_path / "packed", tmp_path / "packed again")
    assert code == 1 and "packed already" in err
    code, _, err = hts("learn", tmp_path / "packed")
    assert code == 1 and "packed: a packed checkpoint, which can be evaluated but not pruned" in err
    code, _, err = hts("export", tmp_path / "packed", tmp_path / "masks.tar.xz")
    assert code == 1 and "packed" in err and "export the checkpoint that it was made of" in err
    code, _, err = hts("audit", pruned / "config.json")
    assert code == 1 and "config.json is a file, and this takes the directory of a checkpoint" in err
    code, _, err = hts("audit", tmp_path / "packed")
    assert code == 1 and "quantization_config: stoicc" in err and "take the checkpoint that it was made of" in err
    code, out, err = hts("push", tmp_path / "packed", "me/tiny-packed", "--out", tmp_path / "sent packed")
    assert code == 0 and "licence is not known" in out, err
    text = (tmp_path / "sent packed" / "README.md").read_text()
    for said in ('license: "other"', "bfloat16, packed", "import stoicc", "| perplexity |", "0.4000"):
        assert said in text
    # They were measured in float32, which no packed weight is.
    assert text.index("## Measured of the unpacked checkpoint") < text.index("| perplexity |")
    config = (tmp_path / "sent packed" / "config.json").read_text()
    origin = json.loads(config)["quantization_config"]["origin"]
    assert (origin["dtype"], origin["packed"]) == ("float32", "bfloat16")
    assert str(tmp_path) not in text + config
    for kind, whole in (("masked", pruned), ("packed", tmp_path / "packed")):
        damaged = shutil.copytree(whole, tmp_path / f"damaged {kind}")
        content = bytearray((damaged / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (damaged / "model.safetensors").write_bytes(content)
        code, _, err = hts("push", damaged, "me/tiny", "--out", tmp_path / "never")
        assert code == 1 and f"{damaged}/model.safetensors: its SHA-256 is not the one in" in err
    # A card beside it does not make it another checkpoint.
    AutoModelForCausalLM.from_pretrained(tmp_path / "sent packed")

    # Offline the folder is written in any case.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    code, out, err = hts("push", pruned, "me/tiny", "--licence", "mit")
    assert code == 0 and "nothing was sent" in out and (tmp_path / "tiny" / "README.md").exists(), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("push", "masked", "tiny"), "a repository is named organisation/name"),
        (("push", "masked", "me/a`b"), "me/a`b: no repository can be named so"),
        (("push", "masked", "me/tiny", "--out", "masked/new"), "masked/new: lies in masked, which it is made of"),
        (("push", "odd", "me/tiny"), "odd: what it says of itself cannot be read"),
        (("push", ".", "me/tiny"), "not a model directory, it has no config.json: name one of those in"),
        (("pack", "masked", "masked"), "is already there"),
        (("pack", "masked", "masked/new"), "masked/new: lies in masked, which it is made of"),
        (("push", "linked", "me/tiny"), "linked/weights.safetensors: is a link to .*, outside of linked"),
        (("pack", "masked", "new", "--dtype", "int4"), "float8_e4m3fn or int8"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_refused_in_one_line(
    hts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    for folder in ("masked", "linked"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    odd = {"quantization_config": {"origin": {"definition": [1]}}}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(odd))
    (tmp_path / "linked" / "weights.safetensors").symlink_to("/etc/hostname")
    (tmp_path / "linked" / "inside").symlink_to("config.json")
    monkeypatch.chdir(tmp_path)
    code, _, err = hts(*arguments)
    assert code == 1 and len(err.strip().splitlines()) == 1
    assert re.search(message, err)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_told_in_one_line(tmp_path: Path, monkeypatch: Any, status: int) -> None:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    response = httpx.Response(status, request=httpx.Request("POST", "http://localhost"))

    def refuse(*_: object, **__: object) -> None:
        raise HfHubHTTPError("refused", response=response)

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match="me/tiny: the hub does not let you write there: `hf auth login`"):
        share._send(tmp_path, "me/tiny", "card", False)


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    import httpx
    from huggingface_hub import HfApi

    def fail(*_: object, **__: object) -> None:
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(UserError, match=r"the hub cannot be reached \(.*not known\): --out writes the folder"):
        share._send(tmp_path, "me/tiny", "card", False)


def test_licences_of_models_that_are_here() -> None:
    assert card.licence_of("experiments.embedded", offline=True) == "apache-2.0"
    assert card.licence_of("meta-llama/Llama-2-7b-hf", offline=True) is None


def written(
    folder: Path,
    about: Mapping[str, Any],
    packed: str | None = None,
    measured: pd.DataFrame | None = None,
    licence: str | None = "mit",
) -> str:
    """The card of a packed checkpoint, or of a masked one, of which these things are known."""
    origin = {"method": "wanda", "structure": "hybrid", "sparsity": 0.4, "dtype": "bfloat16", "content": "c"} | about
    config: dict[str, Any] = {"dtype": "bfloat16", "quantization_config": {"origin": origin}}
    if packed:
        config["quantization_config"] |= {"quant_method": "stoicc", "modules": [{"dtype": packed}]}
    (folder / "config.json").write_text(json.dumps(config))
    return card.card(folder, card.origin(folder), "me/tiny", pd.DataFrame() if measured is None else measured, licence)


def row(stage: str, metric: str, value: float, **labels: object) -> dict[str, Any]:
    about = {"source": labels.get("source"), "length": labels.get("length"), "task": labels.get("task")}
    told = {"stage": stage, "metric": metric, "value": value, "stderr": None, "limit": None, "gpu": None}
    return about | told | {"labels": labels, "checkpoint": "c"}


ROWS = pd.DataFrame(
    [
        row("perplexity:t@32", "perplexity", 11.0, source="/home/me/t", length=32),
        row("packed:t@32", "packed_perplexity", 12.0, source="t", length=32, dtype="bfloat16"),
        row("task:humaneval", humaneval.METRIC, 0.25, task="humaneval", primary=True),
    ]
).astype({"length": "Int64"})


@pytest.mark.parametrize("packed", ["int8", "float8_e4m3fn"])
def test_numbers_of_16_bits_are_not_those_of_weights_packed_in_8(tmp_path: Path, packed: str) -> None:
    own, _, others = written(tmp_path, {}, packed, ROWS).partition("## Measured of the unpacked checkpoint")
    assert "Nothing was measured" in own and "perplexity |" not in own
    assert "| perplexity | t, windows of 32 | 11.0000 |" in others and packed in others
    # Neither of these weights nor of the unpacked ones.
    assert "packed_perplexity" not in others


def test_what_was_quantised_in_float32_is_packed_and_evaluated(
    hts: Any, pruned: Path, tiny_model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    for command in (
        ("quantise", pruned, "--precision", "int8", "--out", tmp_path / "int8"),
        ("pack", tmp_path / "int8", tmp_path / "packed"),
        ("eval", tmp_path / "packed", "--perplexity", f"{tiny_text}@32"),
    ):
        code, _, err = hts(*command)
        assert code == 0, err
    code, _, err = hts("pack", tmp_path / "int8", tmp_path / "again", "--dtype", "float8_e4m3fn")
    assert code == 1 and "its weights are INT8 already, and packed so: leave out --dtype" in err
    # The card is of all that was done to the dense model.
    code, _, err = hts("push", tmp_path / "packed", "me/tiny", "--out", tmp_path / "sent", "--licence", "mit")
    assert code == 0, err
    text = (tmp_path / "sent" / "README.md").read_text()
    assert "| Base model | tiny" in text and "4 windows of 16 tokens of " in text
    made = re.search(r"\| Made by \| (.*) \|", text)
    assert made and re.search("prune .*--method wanda.* && .*quantise .*--precision int8", html.unescape(made[1]))
    code, _, err = hts("prune", tmp_path / "int8", "--method", "magnitude", "--structure", "2:4")
    assert code == 1 and f"prune or learn on {tiny_model}" in err
    code, out, _ = hts("audit", tmp_path / "int8")
    assert code == 0 and out.count("8 bits, a scale for each output feature") == 1
    code, _, err = hts("export", pruned, tmp_path / "masks.zip")
    assert code == 1 and "masks are written as .tar.xz: name it " in err and not (tmp_path / "masks.zip").exists()


def test_a_checkpoint_without_rows_among_others_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, {})
    monkeypatch.setattr(card, "load_rows", lambda _: ROWS.assign(checkpoint="another"))
    assert card.measured_of(card.origin(tmp_path)["content"], tmp_path).empty


def test_numbers_of_the_packed_dtype_are_its_own(tmp_path: Path) -> None:
    quantised = [{"dtype": name, "precision": name} for name in ("int8", "int4")]
    for about, packed in (({}, "bfloat16"), *((about, about["dtype"]) for about in quantised)):
        text = written(tmp_path, about, packed, ROWS)
        assert "11.0000" in text and "12.0000" in text and "of the unpacked" not in text


def test_pass_at_1_is_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, {})
    monkeypatch.setattr(card, "load_rows", lambda _: ROWS)
    text = written(tmp_path, {}, None, card.measured_of(card.origin(tmp_path)["content"], tmp_path))
    assert "| pass@1 | humaneval | 0.2500 |" in text


def test_recovered_weights_are_said_to_be_trained(tmp_path: Path) -> None:
    recovery = {"source": "c4", "recipe": {"steps": 20, "lr": 0.1, "log_every": 5}, "seed": 0}
    came = {"path": "/home/me/pruned", "checkpoint": "beef", "tokens": 12345}
    text = written(tmp_path, {"definition": {"recovery": recovery}, "recovered_from": came})
    for said in (
        "then trained towards",
        "| steps 20, lr 0.1 |",
        "| Recovered on | c4 |",
        "12,345",
        "| pruned, content beef",
    ):
        assert said in text
    assert "then trained" not in written(tmp_path, {})
    assert "recovered_from" in card.KEPT


def test_a_card_says_every_step_from_the_dense_model_on(tmp_path: Path) -> None:
    seen = {"source": "c4", "windows": 8, "length": 64}
    pruned = {"definition": {"model": "/home/me/base", "calibration": seen}, "command": "hts prune /home/me/base"}
    came = {"path": "/home/me/pruned", "checkpoint": "beef", "tokens": 12345}
    recovery = {"source": "novels", "recipe": {"steps": 20}}
    recovered = {**pruned, "definition": {**pruned["definition"], "recovery": recovery}, "recovered_from": came}
    rounding = {"precision": "int4", "calibration": {**seen, "windows": 2}}
    definition = {"model": "/home/me/recovered", "calibration": None, "quantisation": rounding}
    about = {"definition": definition, "made_from": recovered, "command": "hts quantise /home/me/recovered"}
    text = written(tmp_path, about)
    for said in (
        "| Base model | base |",
        "| Calibration | 8 windows of 64",
        "| Rounded on | 2 windows of 64",
        "| Recovered on | novels |",
        "12,345",
        "| hts prune base && hts quantise recovered |".replace("&", "&amp;"),
    ):
        assert said in text
    assert "/home/me" not in text
    assert card.base_of({"imported": {"base": "me/base"}}) == "me/base"


def test_the_flag_that_runs_a_repositorys_code_is_not_the_way_to_load(tmp_path: Path) -> None:
    text = written(tmp_path, {}, "bfloat16")
    code = text.partition("```python")[2].partition("```")[0]
    assert code.strip().startswith("import stoicc") and "trust_remote_code" not in code
    assert "only if you trust the repository" in text and "`revision`" in text


@pytest.mark.parametrize(
    ("about", "said", "unsaid"),
    [
        ({}, "dense or 2:4 sparse", "compressed-tensors"),
        ({"structure": "2:4"}, "two at most are kept", "tile of"),
        ({"structure": "unstructured"}, "anywhere", "2:4"),
        ({"structure": "shallow"}, "of fewer blocks", "2:4"),
        ({"structure": "dense", "precision": "int4"}, "quantised to INT4", "2:4"),
        ({"precision": "fp8"}, "pip install compressed-tensors", "An ordinary checkpoint"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_is_said_fits_structure_and_precision(
    tmp_path: Path, about: dict[str, str], said: str, unsaid: str
) -> None:
    text = written(tmp_path, about)
    assert said in text and unsaid not in text


def test_nothing_that_is_quoted_becomes_markup(tmp_path: Path) -> None:
    definition = {
        "model": "/home/me/a|b<script>",
        "calibration": {"windows": 1, "length": 2, "source": "x|y\n## z`"},
    }
    command = "hts prune /home/me/a --out=/home/me/b --perplexity wikitext2/test,/home/me/t@32 '`|`'"
    text = written(tmp_path, {"definition": definition, "command": command}, licence="mit\nextra: yes")
    assert "[x](" not in written(tmp_path, {"structure": "[x](y)", "method": "[x](y)"})
    about = yaml.safe_load(text.split("---\n")[1])
    assert about["license"] == "mit\nextra: yes" and "extra" not in about and "2:4" in about["tags"]
    assert "<script>" not in text and "\n## z" not in text and "/home/me" not in text
    assert "| hts prune a --out=b --perplexity wikitext2/test,t@32 '&#96;&#124;&#96;' |" in text
    assert all(line.count("|") == 3 for line in text.partition("## Measured")[0].splitlines() if line.startswith("|"))


def test_a_folder_named_as_a_model_of_the_registry_is_not_that_model() -> None:
    assert card.base_of(card.public_origin({"definition": {"model": "/home/me/llama-2-7b"}})) == "llama-2-7b"
