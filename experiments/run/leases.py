"""Claims: which process works on what, as files that also hold between the machines of a cluster.

A claim is a file that one process owns. It appears by hard link, which is exclusive on every file system, NFS included,
where ``flock`` may be local to each node. Its owner touches it every `BEAT` seconds; one that has not been touched for
`LEASE` seconds is stale, and so is at once the claim of a process that is known to be gone: it ran on this machine, or
it was an earlier run of the batch job this process belongs to, which Slurm requeued.

Ages are differences between times that the file server gave, so the clocks of the machines need not agree. A process
that stands still for longer than its lease may lose its claim and go on when it wakes: two then do the same work, and
since results appear whole and under the hash of what they are, the second replaces the first by its like.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from patch.errors import UserError

BEAT = 15.0
LEASE = 120.0

_SUFFIX = ".lock"


@dataclass(frozen=True)
class Holder:
    """The process that owns a claim.

    Attributes:
        token: tells this claim from all others, past and future.
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


@contextmanager
def claim(path: Path, wait: bool) -> Iterator[bool]:
    """Own the claim ``path``; yields whether it is owned (always, when waiting).

    Raises:
        UserError: if the file system has no hard links.
    """
    holder = _me()
    pause = 0.05
    while not (mine := _acquire(path, holder)) and wait:
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
    if not mine:
        yield False
        return
    # Through a descriptor: should the claim be taken away, the next owner's file is not touched.
    descriptor = os.open(path, os.O_RDONLY)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(descriptor, stop), daemon=True)
    beating.start()
    try:
        yield True
    finally:
        stop.set()
        beating.join()
        os.close(descriptor)
        _remove(path, holder.token)


def live(folder: Path) -> dict[str, Holder]:
    """The claims in ``folder`` that are not stale, by name."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(_SUFFIX) and not name.startswith(".")]
    except FileNotFoundError:
        return {}
    found = {}
    now = time.time()
    for name in names:
        if (entry := _read(folder / name)) and not _is_stale(*entry, now, _me()):
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
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def here() -> str:
    """Where a pid means something: this boot of this machine's kernel, and this namespace of processes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + ":" + os.readlink("/proc/self/ns/pid")


def _me() -> Holder:
    pid = os.getpid()
    job = os.environ.get("SLURM_JOB_ID")
    return Holder(secrets.token_hex(8), socket.gethostname(), here(), pid, start_ticks(pid), job)


def _acquire(path: Path, holder: Holder) -> bool:
    """Try once to own ``path``, removing what is there if it is stale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{holder.token}")
    draft.write_text(json.dumps(asdict(holder)))
    try:
        if _link(draft, path):
            return True
        entry = _read(path)
        if entry and not _is_stale(*entry, draft.stat().st_mtime, holder):
            return False
    finally:
        draft.unlink(missing_ok=True)
    # Gone or stale: the next attempt, of this process or another, finds the place free.
    return _acquire(path, holder) if entry is None or _remove(path, entry[0].token) else False


def _link(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except PermissionError as error:
        raise UserError(f"{path.parent}: this file system has no hard links, which claims need") from error
    # An NFS server may do the work and lose the answer, so that the repeated request fails: the count tells.
    return os.stat(draft).st_nlink == 2


def _remove(path: Path, token: str) -> bool:
    """Remove the claim ``path`` if it is still the one with ``token``.

    There is no "unlink if it is still the same file": the right to remove one token's claim is therefore a claim
    itself. Without it, two processes that both saw a stale claim could remove each other's new one.

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


def _read(path: Path) -> tuple[Holder, float] | None:
    """The owner of a claim and when it last touched it; None if there is no claim."""
    try:
        # Opening makes NFS ask the server instead of its cache.
        with open(path) as file:
            return Holder(**json.loads(file.read())), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a claim of this version ({error}): remove it if nothing runs") from error


def _is_stale(holder: Holder, touched: float, now: float, me: Holder) -> bool:
    if holder.job is not None and holder.job == me.job and (holder.machine, holder.pid) != (me.machine, me.pid):
        return True
    if is_alive(holder.machine, holder.pid, holder.started) is False:
        return True
    return now - touched > LEASE


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        # A file server that does not answer now may answer at the next beat.
        with suppress(OSError):
            os.utime(descriptor)
