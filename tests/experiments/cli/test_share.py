"""`hts pack` and `hts push`: what others run of a checkpoint, and the card that goes with it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments.cli import share
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
    for said in ("license: mit", "Wanda", "16x16", "4 windows of 16 tokens", "| perplexity |", "windows of 32"):
        assert said in text
    assert "vllm serve me/tiny-pruned --quantization stoicc" in text
    AutoModelForCausalLM.from_pretrained(tmp_path / "sent")

    code, out, err = hts("pack", pruned, tmp_path / "packed")
    assert code == 0 and "14 linears packed" in out, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dtype == torch.bfloat16
    code, out, err = hts("push", tmp_path / "packed", "me/tiny-packed", "--out", tmp_path / "sent packed")
    assert code == 0 and "licence is not known" in out, err
    text = (tmp_path / "sent packed" / "README.md").read_text()
    for said in ("license: other", "bfloat16, packed", "trust_remote_code=True", "| perplexity |", "0.4000"):
        assert said in text
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
        (("push", ".", "me/tiny"), "is missing|neither a hybrid checkpoint"),
        (("pack", "masked", "masked"), "is already there"),
        (("pack", "masked", "new", "--dtype", "int4"), "float8_e4m3fn or int8"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_refused_in_one_line(
    hts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "masked").mkdir()
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


def test_licences_of_models_that_are_here() -> None:
    assert card.licence_of("experiments.embedded", offline=True) == "apache-2.0"
    assert card.licence_of("meta-llama/Llama-2-7b-hf", offline=True) is None
