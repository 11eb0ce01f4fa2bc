"""Leases: which process works on what, as files that also hold between the machines of a cluster.

A lease is a file that one process owns. It appears by hard link, which is exclusive on every file system, NFS included,
where ``flock`` may be local to each node. Its owner renews it every `RENEWAL` seconds, by
touching it; one that has not been renewed for `TERM` seconds has expired, and so has at once that of a process that is
known to be gone: it ran on this machine, or it was an earlier run of the batch job this process belongs to, which Slurm
requeued.

Ages are differences between times that the file server gave, so the clocks of the machines need not agree. A process
that stands still for longer than the term may lose its lease and go on when it wakes: two then do the same work, and
since results appear whole and under the hash of what they are, the second replaces the first by its like.
"""

import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from patch.errors import UserError, written_for

RENEWAL = 15.0
TERM = 120.0

_SUFFIX = ".lock"
# How a file system says that it has no hard links.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True)
class Owner:
    """The process that owns a lease.

    Attributes:
        token: tells this lease from all others, past and future.
        host: name of its machine, for people.
        machine: where its ``pid`` means something: boot of the kernel, and process namespace.
        pid: its process.
        started: when that process started, in ticks since the boot; a pid may be used again.
        job: the Slurm job it runs in, or None.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: int | None
    job: str | None


# Who owns a lease whose record is empty: just created where there are no hard links, or cut off by a full disk.
_UNKNOWN = Owner("", "unknown", "unknown", 0, None, None)


@contextmanager
def lease(path: Path, wait: bool = True) -> Iterator[bool]:
    """Own the lease ``path``; yields whether it is owned (always, when waiting).

    Raises:
        UserError: if ``path`` holds something else.
        OSError: if it cannot be written.
    """
    owner = _me()
    pause = 0.05
    while not (mine := _acquire(path, owner)) and wait:
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
    if not mine:
        yield False
        return
    # Through a descriptor: should the lease be taken away, the next owner's file is not touched.
    descriptor = os.open(path, os.O_RDONLY)
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(descriptor, stop), daemon=True)
    renewing.start()
    try:
        yield True
    finally:
        stop.set()
        renewing.join()
        os.close(descriptor)
        _remove(path, owner.token)


def live(folder: Path) -> dict[str, Owner]:
    """The leases in ``folder`` that have not expired, by name."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(_SUFFIX) and not name.startswith(".")]
    except FileNotFoundError:
        return {}
    found = {}
    now = time.time()
    for name in names:
        if (entry := _read(folder / name)) and not _has_expired(*entry, now, _me()):
            found[name.removesuffix(_SUFFIX)] = entry[0]
    return found


def is_alive(machine: str, pid: int, started: int | None) -> bool | None:
    """Whether a process still runs; None if it is on another machine."""
    if machine != here():
        return None
    now = start_ticks(pid)
    return now is not None and now == started


def start_ticks(pid: int) -> int | None:
    """When a process of this machine started, in ticks since the boot; None if it is gone, or dead and not reaped."""
    try:
        # The name in parentheses may hold anything; what follows it does not.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def here() -> str:
    """Where a pid means something: this boot of this machine's kernel, and this namespace of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"


def _me() -> Owner:
    pid = os.getpid()
    job = os.environ.get("SLURM_JOB_ID")
    return Owner(secrets.token_hex(8), socket.gethostname(), here(), pid, start_ticks(pid), job)


def _acquire(path: Path, owner: Owner) -> bool:
    """Try once to own ``path``, removing what is there if it has expired."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{owner.token}")
    try:
        with written_for(path, draft):
            draft.write_text(json.dumps(asdict(owner)))
        if _link(draft, path):
            return True
        entry = _read(path)
        if entry and not _has_expired(*entry, draft.stat().st_mtime, owner):
            return False
    finally:
        draft.unlink(missing_ok=True)
    # Gone or expired: the next attempt, of this process or another, finds the place free.
    return _acquire(path, owner) if entry is None or _remove(path, entry[0].token) else False


def _link(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create(path, draft.read_text(encoding="utf-8"))
    # An NFS server may do the work and lose the answer, so that the repeated request fails: the count tells.
    return os.stat(draft).st_nlink == 2


def _create(path: Path, record: str) -> bool:
    """What `_link` does, on disks without hard links; those are of one machine, where creating a file is exclusive."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(record)
    except FileExistsError:
        return False
    return True


def _remove(path: Path, token: str) -> bool:
    """Remove the lease ``path`` if it is still the one with ``token``.

    There is no "unlink if it is still the same file": the right to remove one token's lease is therefore a lease
    itself. Without it, two processes that both saw an expired lease could remove each other's new one.

    Returns:
        False if another process is removing it.
    """
    right = path.with_name(f"{path.name.removesuffix(_SUFFIX)}.{token}{_SUFFIX}")
    remover = _me()
    if not _acquire(right, remover):
        return False
    entry = _read(path)
    if entry and entry[0].token == token:
        path.unlink(missing_ok=True)
    right.unlink(missing_ok=True)
    return True


def _read(path: Path) -> tuple[Owner, float] | None:
    """The owner of a lease and when it last touched it; None if there is no lease."""
    try:
        # Opening makes NFS ask the server instead of its cache.
        with open(path, encoding="utf-8") as file:
            record, touched = file.read(), os.fstat(file.fileno()).st_mtime
            return _owner(record) if record else _UNKNOWN, touched
    except FileNotFoundError as error:
        if path.is_symlink():
            # It keeps the place that nothing is in.
            raise UserError(f"{path}: not a lease but a link to what is not there: remove it") from error
        return None
    except (IsADirectoryError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a lease of this version ({error}): remove it if nothing runs") from error


def _owner(record: str) -> Owner:
    """The owner that a record tells of; its token becomes part of a file's name."""
    owner = Owner(**json.loads(record))
    if not isinstance(owner.token, str) or not re.fullmatch("[0-9a-z]{1,64}", owner.token):
        raise ValueError(f"token {str(owner.token)[:32]!r}")
    return owner


def _has_expired(owner: Owner, touched: float, now: float, me: Owner) -> bool:
    if owner.job is not None and owner.job == me.job and (owner.machine, owner.pid) != (me.machine, me.pid):
        return True
    if is_alive(owner.machine, owner.pid, owner.started) is False:
        return True
    # A time in the future is no renewal: the clock that gave it was wrong, and would be believed for ever.
    return abs(now - touched) > TERM


def _renew(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(RENEWAL):
        # A file server that does not answer now may answer next time.
        with suppress(OSError):
            os.utime(descriptor)
