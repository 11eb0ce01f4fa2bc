"""A small model of the registry, and a made-up clock, for benches on a CPU."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from experiments.bench import kernels
from experiments.bench.harness import Lab, Reading
from experiments.bench.power import Steady
from experiments.data.registry import REGISTRY
from stoicc.timing import Call, Timing


def made_up(calls: Mapping[str, Sequence[Call]], rounds: int, flush: bool, seconds: float) -> dict[str, Reading]:
    """Each takes a microsecond more than the one before it."""
    steady = Steady(0.5, 700.0, 1900.0) if seconds else None
    return {
        name: Reading(Timing(place + 1.0, place + 0.9, place + 1.1, rounds), 1980.0, 650.04, steady)
        for place, name in enumerate(calls)
    }


@pytest.fixture
def lab() -> Lab:
    return Lab("cpu", measure=made_up, roof=lambda: {"copy": 4.0, "matmul": 700.0})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of two blocks, whose compiled functions are the functions."""
    spec = dataclasses.replace(
        REGISTRY["llama-2-7b"], name="tiny", hidden=256, intermediate=384, blocks=2, heads=4, kv_heads=4, head_dim=64,
        vocab=128,
    )  # fmt: skip
    monkeypatch.setitem(REGISTRY, "tiny", spec)

    def uncompiled(function: Any = None, **_: Any) -> Any:
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    # With a made-up clock no weight need be read past a cache: two of each, not hundreds.
    monkeypatch.setattr(kernels, "CACHE_BYTES", 1)
    return "tiny"
