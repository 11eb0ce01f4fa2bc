"""Files that are either there in full or not at all, whenever a process is killed or a disk is full.

`replacing` and `write_atomic` write one file, `new_directory` many. What has a hash on record has it from `sha256`.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patch.errors import UserError, one_line, written_for
from patch.leases import lease


@contextmanager
def replacing(path: Path, one_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, with another suffix, that becomes ``path`` if the block succeeds.

    Args:
        one_writer: no other process writes ``path`` at the same time: what one that was killed left half-written, which
            may be large, is overwritten by the next instead of piling up.

    Raises:
        OSError: if the disk is full or the place cannot be written; what was at ``path`` before is untouched then, and
            no partial file stays behind.
        UserError: as `check_file`.
    """
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{'partial' if one_writer else secrets.token_hex(4)}")
    try:
        with written_for(path, temporary):
            yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raise if a file cannot be written to a place, for something else is there.

    Raises:
        UserError: of a directory, and of a device or a pipe, whose place a file would take.
    """
    if path.exists() and not path.is_file():
        raise UserError(
            f"{path}: is {'a directory' if path.is_dir() else 'a device or a pipe'}, not a file: name a file"
        )


def check_inside(path: Path, folder: Path) -> None:
    """Raise if a file of a folder is none, but a link to one elsewhere.

    Whoever made the folder may mean a secret of its reader's, which goes wherever the folder's files are copied to. A
    snapshot of the hub's cache is a folder of links, to the ``blobs`` beside it.

    Raises:
        UserError: naming the link, and where it leads.
    """
    inside = folder.resolve()
    places = [inside, *([inside.parent.parent / "blobs"] if inside.parent.name == "snapshots" else [])]
    if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in places):
        leads = f"is a link to {path.readlink()}, outside of {folder}"
        raise UserError(f"{path}: {leads}: remove it, or copy what it means")


def write_atomic(path: Path, text: str) -> None:
    """Write a text file, or leave what is there.

    Raises:
        OSError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty hidden directory beside ``path`` that becomes ``path`` if the block succeeds.

    The files are on disk (fsync) before they appear under their name, so a process or machine that dies leaves either
    nothing or everything; what a killed process left is removed by the next one that writes the same ``path``.

    Raises:
        UserError: if ``path`` is already there, or it cannot be written (disk full, no permission).
    """
    target = Path(os.path.abspath(path))
    hidden = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lease(target.with_name(f".{target.name}.lock")):
            if target.exists():
                raise UserError(f"{target} is already there: choose another place, or remove it first")
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir()
            try:
                yield hidden
                _flush(hidden)
                os.rename(hidden, target)
                _fsync(target.parent)
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {target}: {reason}; nothing half-written was left") from error


def existing(folder: Path, name: str) -> Path:
    file = folder / name
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    if not file.is_file():
        raise UserError(f"{file}: is missing")
    return file


def from_json(text: str | bytes) -> Any:
    """What a text that others wrote says.

    Raises:
        ValueError: if it is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = from_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__} instead of an object")
    return content


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_SEAL = re.compile(rb"\nsha256:([0-9a-f]{64})\n")
_SEAL_BYTES = 73


def seal(path: Path) -> None:
    """Append the SHA-256 of a file to it, as a line that readers of PyTorch's and NumPy's files pass over."""
    digest = sha256(path)
    with open(path, "ab") as file:
        file.write(f"\nsha256:{digest}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def check_seal(path: Path) -> None:
    """Raise if a file that `seal` closed is not what it was; about a second per GiB. One without a seal is of before.

    Raises:
        UserError: if it was changed or damaged.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size - _SEAL_BYTES
    if size < 0:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(size)
        found = _SEAL.fullmatch(file.read())
        if found is None:
            return
        file.seek(0)
        while size:
            content = file.read(min(size, 2**20))
            digest.update(content)
            size -= len(content)
    if digest.hexdigest().encode() != found[1]:
        raise UserError(f"{path}: its SHA-256 is not the one at its end: changed or damaged")


def _disk_error(error: Exception) -> str | None:
    """What the operating system said, if ``error`` comes from there."""
    if isinstance(error, shutil.Error):
        # Of copying a folder: a list of source, target and reason.
        return str(error.args[0][0][2]).partition(": ")[0]
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # The Rust writers of safetensors and tokenizers raise errors of their own, with the system's in the text.
    found = re.search(r"([^:]+) \(os error \d+\)", str(error))
    return found[1].strip() if found else None


def _flush(folder: Path) -> None:
    # safetensors writes files that only their owner can read, whatever the umask.
    mode = folder.stat().st_mode & 0o666
    for item in folder.rglob("*"):
        if item.is_file():
            item.chmod(mode)
        _fsync(item)
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
