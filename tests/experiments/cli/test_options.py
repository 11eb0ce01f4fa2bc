"""The machine that commands run on."""

from collections.abc import Iterator

import pytest
import torch

from experiments.cli.options import machine_on
from experiments.run.runtime import THREADS_BESIDE_GPU


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is done to this process's threads ends with the test, which has a GPU by name alone."""
    before, zeros = torch.get_num_threads(), torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "had", "told", "has"),
    [
        ("cuda", 16, None, THREADS_BESIDE_GPU),
        ("cuda:1", 16, None, THREADS_BESIDE_GPU),
        ("cuda", 1, None, 1),
        ("cuda", 16, "16", 16),
        ("cpu", 16, None, 16),
    ],
    ids=["gpu", "second-gpu", "given-fewer", "told-by-environment", "cpu"],
)
def test_a_process_leaves_the_cpu_to_others_only_beside_a_gpu(
    threads: None, monkeypatch: pytest.MonkeyPatch, device: str, had: int, told: str | None, has: int
) -> None:
    torch.set_num_threads(had)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    with machine_on(device, None) as machine:
        assert machine.device == device and torch.get_num_threads() == has
