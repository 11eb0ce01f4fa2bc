"""Files are there in full or not at all."""

import errno
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from patch.errors import UserError
from patch.files import check_inside, from_json, new_directory, replacing, write_atomic


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows" / "a.jsonl"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.jsonl"]


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: .*masks.tar.xz"), replacing(tmp_path / "masks.tar.xz"):
        no_space()


@pytest.mark.parametrize("kind", ["a device or a pipe", "a directory"])
def test_what_is_no_file_is_not_replaced_by_one(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    os.mkfifo(place) if kind.endswith("pipe") else place.mkdir()
    with pytest.raises(UserError, match=f"place: is {kind}, not a file"):
        write_atomic(place, "text")
    assert not place.is_file() and os.listdir(tmp_path) == ["place"]


def test_a_link_out_of_a_folder_is_named_but_for_those_of_the_hub_s_cache(tmp_path: Path) -> None:
    for place in ("made", "hub/blobs", "hub/snapshots/1"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "secret").touch()
    (tmp_path / "hub/blobs/a").touch()
    (tmp_path / "hub/blobs/b").symlink_to(tmp_path / "secret")
    links = {"made/in": "file", "made/out": "../secret", "made/in-hub": "../hub/blobs/a"}
    links |= {"hub/snapshots/1/a": "../../blobs/a", "hub/snapshots/1/b": "../../blobs/b"}
    strange = set()
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
        try:
            check_inside(tmp_path / name, (tmp_path / name).parent)
        except UserError as error:
            assert re.search(rf"{name}: is a link to .*{target}, outside of", str(error))
            strange.add(name)
    assert strange == {"made/out", "made/in-hub", "hub/snapshots/1/b"}


def test_a_folder_that_cannot_be_copied_is_a_short_line(tmp_path: Path) -> None:
    def copy() -> None:
        failed = [(f"from/{name}" * 9, f"to/{name}" * 9, "[Errno 28] No space left on device") for name in range(40)]
        raise shutil.Error(failed)

    with pytest.raises(UserError) as caught, new_directory(tmp_path / "out"):
        copy()
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'out'}: [Errno 28] No space left on device; nothing half-written was left"
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{"], ids=["lists", "objects", "cut"])
def test_json_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)


def _write_many(path: Path, letter: str) -> None:
    for _ in range(50):
        write_atomic(path, letter * 10_000)


def test_concurrent_writers_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, letter)) for letter in "xyz"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert path.read_text() in {letter * 10_000 for letter in "xyz"}
    assert os.listdir(tmp_path) == ["a"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        assert list(tmp_path.glob("*.txt")) == [path], "whoever looks for such files finds half of one"
        raise RuntimeError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("one_writer", [True, False], ids=["one-writer", "many"])
def test_what_a_killed_writer_left_piles_up_only_where_there_are_many(one_writer: bool, tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from patch.files import replacing
with replacing(Path({str(tmp_path / "state")!r}), {one_writer}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert len(list(tmp_path.iterdir())) == (1 if one_writer else 2)
    with replacing(tmp_path / "state", one_writer) as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "state").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == (1 if one_writer else 3)
