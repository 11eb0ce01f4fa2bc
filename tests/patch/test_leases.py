"""Leases: exclusive, kept alive, and taken over from the dead, on file systems where only hard links are exclusive."""

import dataclasses
import errno
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from patch import leases
from patch.errors import UserError
from patch.leases import TERM, Owner, here, lease, live, start_ticks

GONE = 2**22 + 1


def leave(path: Path, age: float = 0.0, **changes: object) -> Owner:
    """A lease that some process made and has not removed."""
    owner = Owner("feed", "node7", "another boot:another namespace", 1, 1, None)
    owner = dataclasses.replace(owner, **changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(owner)), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    return owner


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "trial-x.lock"


def test_a_lease_is_exclusive_and_leaves_nothing(path: Path) -> None:
    with lease(path, wait=False) as first:
        with lease(path, wait=False) as second:
            assert first and not second
        assert live(path.parent) == {"trial-x": leases._read(path)[0]}  # type: ignore[index]
    with lease(path, wait=False) as third:
        assert third
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_names_the_lease(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as raised, lease(path):
        pass
    assert raised.value.filename == str(path)


@pytest.mark.parametrize(
    ("age", "changes", "free"),
    [
        pytest.param(0.0, {}, False, id="alive-on-another-machine"),
        pytest.param(TERM + 60, {}, True, id="expired"),
        pytest.param(-TERM - 60, {}, True, id="renewed-in-the-future"),
        pytest.param(0.0, {"machine": here(), "pid": GONE}, True, id="dead-here"),
        pytest.param(0.0, {"machine": here(), "pid": os.getpid(), "started": 1}, True, id="pid-used-again"),
        pytest.param(
            0.0, {"machine": here(), "pid": os.getpid(), "started": start_ticks(os.getpid())}, False, id="alive-here"
        ),
        pytest.param(0.0, {"job": "12"}, True, id="earlier-run-of-this-job"),
        pytest.param(0.0, {"job": "13"}, False, id="another-job"),
    ],
)
def test_expired_leases_are_taken_over(
    path: Path, age: float, changes: dict, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    leave(path, age, **changes)
    assert (live(path.parent) == {}) == free
    with lease(path, wait=False) as mine:
        assert mine == free
    assert path.exists() != free
    assert len(list(path.parent.iterdir())) == (not free)


def test_a_lease_is_kept_alive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWAL", 0.05)
    with lease(path, wait=False):
        os.utime(path, (0, 0))
        limit = time.monotonic() + 30
        while path.stat().st_mtime == 0:
            assert time.monotonic() < limit, "the lease was not touched"
            time.sleep(0.02)


def test_a_lease_that_was_taken_away_is_neither_touched_nor_removed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEWAL", 0.02)
    with lease(path, wait=False):
        path.unlink()
        leave(path, token="beef", age=1000)
        touched = path.stat().st_mtime
        time.sleep(0.2)
    assert path.exists() and path.stat().st_mtime == touched


def test_a_remover_that_died_does_not_block(path: Path) -> None:
    expired = leave(path, TERM + 60)
    leave(path.with_name(f"trial-x.{expired.token}.lock"), machine=here(), pid=GONE, token="dead")
    with lease(path, wait=False) as mine:
        assert mine
    assert list(path.parent.iterdir()) == []


def _count(path: Path, counter: Path, rounds: int) -> None:
    for _ in range(rounds):
        with lease(path, wait=True):
            seen = int(counter.read_text(encoding="utf-8"))
            time.sleep(0.001)
            counter.write_text(str(seen + 1), encoding="utf-8")


def test_many_processes_after_an_expired_lease_never_own_it_together(path: Path, tmp_path: Path) -> None:
    leave(path, TERM + 60)
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(path, counter, 8)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert counter.read_text() == "32"
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("age", "free"), [(0.0, False), (TERM + 60, True)], ids=["just-made", "old"])
def test_a_lease_without_a_record_expires(age: float, free: bool, path: Path) -> None:
    leave(path, age)
    path.write_text("", encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    with lease(path, wait=False) as mine:
        assert mine == free


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.mkdir(), "Is a directory", id="a directory"),
        pytest.param(lambda path: path.symlink_to("/nowhere"), "a link to what is not there", id="a dangling link"),
        pytest.param(lambda path: path.write_bytes(b"\0" * 200), "not a lease of this version", id="zeros"),
        pytest.param(lambda path: leave(path, 2 * TERM, token="../../x"), "token '../../x'", id="a path as token"),
        pytest.param(lambda path: leave(path, 2 * TERM, token="a" * 300), "token 'aaa", id="an endless token"),
        pytest.param(lambda path: leave(path, 2 * TERM, token="a\0"), "token", id="a token with a zero"),
    ],
)
@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "once"])
def test_what_is_no_lease_is_named(damage: Callable[[Path], object], message: str, wait: bool, path: Path) -> None:
    path.parent.mkdir()
    damage(path)
    with pytest.raises(UserError) as refused, lease(path, wait):
        pass
    assert str(path) in str(refused.value) and message in str(refused.value) and "remove it" in str(refused.value)


def test_leases_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with lease(path, wait=False) as first, lease(path, wait=False) as second:
        assert first and not second
    leave(path, TERM + 60)
    with lease(path, wait=False) as third:
        assert third
    assert list(path.parent.iterdir()) == []


def test_a_lost_answer_of_the_file_server_is_no_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def answer_lost(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", answer_lost)
    with lease(path, wait=False) as mine:
        assert mine
