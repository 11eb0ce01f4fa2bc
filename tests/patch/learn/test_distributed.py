"""Learning with several processes is learning with one: the same curve, the same masks, one checkpoint for all."""

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Python
from tiny_learner import RAGGED, SHORT, magnitude_prior, tiny_model, words

from patch.errors import UserError
from patch.learn.descent import Stopped
from patch.learn.distributed import ALONE, Ranks, joined
from patch.learn.learner import learn
from patch.learn.saved import CHECKPOINT

MODES = ["joint", "tile", "maskllm"]
STEPS = 6

# What each process but a lone one runs.
CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import torch
torch.set_num_threads(1)
from test_distributed import learn_here
learn_here(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
"""


def learn_here(mode: str, work: Path, out: Path, stop_at: int, device: str) -> None:
    """Learn in this process, among those that its environment names, and write what came of it."""
    # Twelve sequences a step in micro-batches of six: for one, two and three processes.
    mode, _, wide = mode.partition("-")
    recipe = dataclasses.replace(SHORT[mode], batch=12, microbatch=6, activation_checkpointing=mode == "tile")
    # With tiles as high as most weights, the last of three processes holds no rows of any.
    tile = (64, 20) if wide else RAGGED
    model, seen = tiny_model(num_key_value_heads=4 if wide else 2), []
    with joined(device) as ranks:
        try:
            learned = learn(
                model.to(device),
                recipe,
                lambda step: words(step, 12),
                sparsity=0.5 if mode == "maskllm" else 0.35,
                tile=tile,
                seed=0,
                prior=magnitude_prior(model, tile),
                work=work,
                device=device,
                ranks=ranks,
                on_step=seen.append,
                # Only the last process is told to stop.
                stop=lambda: ranks.rank == ranks.size - 1 and 0 < stop_at == len(seen),
            )
        except Stopped as error:
            result: dict[str, Any] = {"stopped": str(error)}
        else:
            masks = {name: [mask.dense.tolist(), mask.patterns.tolist()] for name, mask in learned.masks.items()}
            result = {"history": learned.history, "masks": masks}
    (out / f"{ranks.rank}.json").write_text(json.dumps(result))


def start(source: str, size: int, *arguments: object) -> None:
    """Run ``source`` in so many processes that find each other, until all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    folders = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
    children = [
        Python(source, folders, *arguments, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        codes = [child.wait(600) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [0] * size, [child.stderr for child in children]


def learn_with(
    size: int, mode: str, work: Path, out: Path, stop_at: int = 0, device: str = "cpu"
) -> list[dict[str, Any]]:
    """What each of ``size`` processes ends with."""
    out.mkdir()
    if size == 1:
        learn_here(mode, work, out, stop_at, device)
        return [json.loads((out / "0.json").read_text())]
    start(CHILD, size, mode, work, out, stop_at, device)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


Learned = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """What some number of processes learn in a mode when nothing disturbs them; learned once."""

    @cache
    def found(size: int, mode: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("learned")
        return learn_with(size, mode, folder / "work", folder / "out")

    return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Where some number of processes were stopped after three steps of the joint mode; not to be written to."""

    @cache
    def found(size: int) -> Path:
        folder = tmp_path_factory.mktemp("stopped")
        results = learn_with(size, "joint", folder / "work", folder / "out", stop_at=3)
        assert all("stopped after step 3 of 6" in result["stopped"] for result in results)
        assert torch.load(folder / "work" / CHECKPOINT)["step"] == 3
        return folder / "work"

    return found


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Sums are taken in another order: equal but for rounding, and what is decided is the same."""
    assert len(found["history"]) == len(expected["history"]) == STEPS // 2
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert found["masks"] == expected["masks"]


@pytest.mark.parametrize("mode", MODES)
def test_two_and_three_processes_learn_what_one_learns(mode: str, learned: Learned) -> None:
    """Of two blocks' weights, with 1 to 5 rows of tiles, three processes leave some without rows of the smallest."""
    alone, *_ = learned(1, mode)
    together = learned(3 if mode == "joint" else 2, mode)
    assert all(result == together[0] for result in together), "the processes disagree"
    assert_alike(together[0], alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", MODES)
def test_two_gpus_learn_what_one_learns(mode: str, tmp_path: Path) -> None:
    alone, *_ = learn_with(1, mode, tmp_path / "1", tmp_path / "1-out", device="cuda")
    together = learn_with(2, mode, tmp_path / "2", tmp_path / "2-out", device="cuda")
    assert together[0] == together[1], "the processes disagree"
    assert_alike(together[0], alone)


def test_a_process_that_holds_no_rows_takes_part(learned: Learned) -> None:
    alone, *_ = learned(1, "joint-wide")
    together = learned(3, "joint-wide")
    assert all(result == together[0] for result in together), "the processes disagree"
    assert_alike(together[0], alone)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(
    before: int, after: int, learned: Learned, stopped: Callable[[int], Path], tmp_path: Path
) -> None:
    undisturbed, *_ = learned(before, "joint")
    shutil.copytree(stopped(before), tmp_path / "work")
    resumed = learn_with(after, "joint", tmp_path / "work", tmp_path / "resumed")
    if before == after:
        assert resumed[0] == undisturbed
    assert_alike(resumed[0], undisturbed)


@pytest.mark.parametrize(("rows", "tile_rows"), [(576, 64), (64, 64), (70, 16), (128, 128), (1, 1)])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_rows_are_divided_in_whole_tiles(rows: int, tile_rows: int, size: int) -> None:
    parts = [Ranks(rank, size).rows(rows, tile_rows) for rank in range(size)]
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert all(part.start % tile_rows == 0 for part in parts if part.start < rows)
    assert max(part.stop - part.start for part in parts) <= Ranks(0, size).share(rows, tile_rows)


def test_one_process_exchanges_nothing() -> None:
    weight = torch.ones(3, 4, requires_grad=True)
    assert ALONE.gather([weight], [3], 1)[0] is weight and ALONE.total(weight) is weight
    assert torch.equal(ALONE.mean(weight), weight) and ALONE.agree(True, weight.device)


def test_sequences_that_cannot_be_shared_are_named() -> None:
    with pytest.raises(UserError, match="microbatch 3 cannot be divided among 2 processes"):
        Ranks(0, 2).sequences(torch.zeros(3, 8))


TOLD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
from test_distributed import told_here
told_here(Path(sys.argv[2]))
"""


def told_here(out: Path) -> None:
    """Write what the first process says, and what it refuses."""
    with joined("cpu") as ranks:
        said = ranks.told(lambda: f"of {ranks.rank}")

        def refuse() -> None:
            raise UserError(f"no, says {ranks.rank}")

        with pytest.raises(UserError) as refused:
            ranks.told(refuse)
        (out / f"{ranks.rank}.json").write_text(json.dumps([said, str(refused.value)]))


def test_what_the_first_process_finds_or_refuses_is_told_to_all(tmp_path: Path) -> None:
    start(TOLD, 2, tmp_path)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [["of 0", "no, says 0"]] * 2
    assert ALONE.told(lambda: 3) == 3
