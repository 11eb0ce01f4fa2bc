"""Recovery with two processes is recovery with one, and one's checkpoint serves the other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_recovery import SHORT, dense_model, hybrid_masks, kept_by, linears, run, same

from patch.learn.descent import Stopped
from patch.learn.distributed import joined

CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import torch
torch.set_num_threads(1)
from test_distributed_recovery import recover_here
recover_here(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
"""


def recover_here(work: Path, out: Path, stop_at: int, device: str = "cpu") -> None:
    """Recover in this process, among those that its environment names, and write the weights that came of it."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        # Only the last process is told to stop.
        return ranks.rank == ranks.size - 1 and asked == stop_at

    with joined(device) as ranks:
        try:
            model, recovered = run(SHORT, work, dense_model().to(device), stop=stop, ranks=ranks, device=device)
        except Stopped:
            return
    torch.save({"weights": model.cpu().state_dict(), "history": recovered.history}, out / f"{ranks.rank}.pt")


def recover_with(size: int, work: Path, out: Path, stop_at: int = 0, device: str = "cpu") -> list[Path]:
    """The files that ``size`` processes end with; none if they were stopped."""
    out.mkdir()
    if size == 1:
        recover_here(work, out, stop_at, device)
        return sorted(out.iterdir())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    here = Path(__file__).parent
    folders = f"{here}:{Path(__file__).parents[2]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, folders, str(work), str(out), str(stop_at), device],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [child.communicate(timeout=600)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), errors
    return sorted(out.iterdir())


@pytest.mark.thorough
def test_two_processes_recover_what_one_recovers(tmp_path: Path) -> None:
    (alone,) = recover_with(1, tmp_path / "1", tmp_path / "1-out")
    together = [torch.load(path) for path in recover_with(2, tmp_path / "2", tmp_path / "2-out")]
    expected, models = torch.load(alone), []
    for found in (*together, expected):
        model = dense_model()
        model.load_state_dict(found["weights"])
        models.append(model)
    assert same(*models[:2]) and together[0]["history"] == together[1]["history"], "the processes disagree"
    for ours, theirs in zip(together[0]["history"], expected["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    keep = kept_by(hybrid_masks(dense_model()))
    for name, weight in linears(models[0]).items():
        # Sums are taken in another order, and Adam's first steps are signs.
        assert torch.allclose(weight, linears(models[2])[name], atol=5e-4)
        assert not weight[~keep[name]].any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_recover_what_one_recovers(tmp_path: Path) -> None:
    (alone,) = recover_with(1, tmp_path / "1", tmp_path / "1-out", device="cuda")
    first, second = (torch.load(p) for p in recover_with(2, tmp_path / "2", tmp_path / "2-out", device="cuda"))
    assert first["history"] == second["history"], "the processes disagree"
    for ours, theirs in zip(first["history"], torch.load(alone)["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("stop_at", [3, 8], ids=["within-a-block", "while-distilling"])
@pytest.mark.thorough
def test_a_stopped_run_goes_on_with_another_number_of_processes(stop_at: int, tmp_path: Path) -> None:
    (undisturbed,) = recover_with(1, tmp_path / "whole", tmp_path / "whole-out")
    assert recover_with(2, tmp_path / "work", tmp_path / "stopped", stop_at) == []
    (resumed,) = recover_with(1, tmp_path / "work", tmp_path / "resumed")
    ours, theirs = (torch.load(path)["history"] for path in (resumed, undisturbed))
    for entry, expected in zip(ours, theirs, strict=True):
        assert entry == pytest.approx(expected, rel=1e-3, abs=1e-6)
