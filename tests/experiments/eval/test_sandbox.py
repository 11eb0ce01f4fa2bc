"""Hostile programs: whatever they try, nothing outside them changes, and they end."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.eval import sandbox
from experiments.eval.sandbox import MIB, Limits, passes
from patch.errors import UserError

QUICK = Limits(cpu=1, wall=10.0)
linux = pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="Linux on x86-64 alone")
pytestmark = linux


@pytest.mark.parametrize(
    ("program", "ends"),
    [
        pytest.param("assert 1 + 1 == 2", True, id="right"),
        pytest.param("assert 1 + 1 == 3", False, id="wrong"),
        pytest.param("import math, re, hashlib, random, datetime, typing\nrandom.random()", True, id="modules"),
        pytest.param("print('x' * 10**7)", True, id="prints-a-lot"),
        pytest.param("assert input() == 'x'", False, id="reads-input"),
        pytest.param("def f(:", False, id="no-python"),
        pytest.param("raise SystemExit(0)", False, id="exits"),
        pytest.param("import os; os._exit(0)", False, id="exits-at-once"),
        pytest.param("import os; os.abort()", False, id="aborts"),
        pytest.param("def f(): return f()\nf()", False, id="recursion"),
        pytest.param("import numpy", False, id="packages"),
        pytest.param(
            "import os; assert {*os.environ} <= {'LC_CTYPE'} and not os.listdir('.')", True, id="sees-nothing"
        ),
        pytest.param("'\ud800'", False, id="surrogate"),
    ],
)
def test_a_program_passes_if_it_ends_without_an_error(program: str, ends: bool) -> None:
    assert passes(program) is ends


def test_endless_loops_and_sleeps_end() -> None:
    started = time.monotonic()
    assert not passes("while True: pass", QUICK)
    assert not passes("try:\n    while True: pass\nexcept BaseException:\n    pass\nwhile True: pass", QUICK)
    assert not passes("import time; time.sleep(1000)", Limits(wall=1.0))
    assert not passes("import signal; signal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass", QUICK)
    assert time.monotonic() - started < 60


def test_memory_is_bounded() -> None:
    assert passes(f"x = bytearray({64 * MIB})")
    assert not passes(f"x = bytearray({2048 * MIB})")
    assert not passes("x = []\nwhile True: x.append('x' * 10**6)", QUICK)
    assert not passes("import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))")


@pytest.mark.parametrize(
    "start",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['touch', {target!r}])",
        "import os; os.system('touch {target}')",
        "import os; os.posix_spawn('/usr/bin/touch', ['touch', {target!r}], {{}})",
        "import os; os.execv('/usr/bin/touch', ['touch', {target!r}])",
        "import threading\nfor _ in range(100): threading.Thread(target=lambda: None).start()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
    ],
    ids=["fork-bomb", "subprocess", "system", "spawn", "exec", "threads", "multiprocessing"],
)
def test_no_process_and_no_thread_is_started(start: str, tmp_path: Path) -> None:
    target = tmp_path / "made"
    program = start.format(target=str(target))
    # What only asks the system is told no, and goes on.
    assert passes(program, QUICK) is ("os.system" in program) and not target.exists()


@pytest.mark.parametrize(
    "attempt",
    [
        "open({kept!r}, 'w').write('x')",
        "open({kept!r}, 'r+').write('x')",
        "open({new!r}, 'x')",
        "open('here', 'w')",
        "os.truncate({kept!r}, 0)",
        "os.remove({kept!r})",
        "os.rename({kept!r}, {new!r})",
        "os.link({kept!r}, {new!r})",
        "os.symlink({kept!r}, {new!r})",
        "os.chmod({kept!r}, 0)",
        "os.mkdir({new!r})",
        "os.utime({kept!r}, (0, 0))",
        "__import__('shutil').rmtree(os.path.dirname({kept!r}))",
        "__import__('sqlite3').connect({new!r}).execute('create table t (x)')",
        "ctypes.CDLL(None).unlink({kept!r}.encode())",
        "ctypes.CDLL(None).syscall(437, -100, {kept!r}.encode(), b'\\x02' + bytes(23), 24)",
    ],
)
def test_no_file_is_written_or_changed(attempt: str, tmp_path: Path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("as it was")
    before = kept.stat()
    program = f"import ctypes, os\ntry:\n    {attempt.format(kept=str(kept), new=str(new))}\nexcept BaseException: pass"
    passes(program)
    after = kept.stat()
    assert kept.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]
    assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        assert not passes(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
        assert not passes(f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)")
        assert not passes("import socket; socket.socketpair()")
        assert not passes("import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0")
        with pytest.raises(TimeoutError):
            server.accept()


def test_other_processes_are_left_alone() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for how in (f"os.kill({other.pid}, 9)", f"ctypes.CDLL(None).syscall(101, 16, {other.pid}, 0, 0)"):
            passes(f"import ctypes, os\n{how}")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_filter_stays() -> None:
    off = "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.prctl(22, 0, 0, 0, 0)\nlibc.prctl(38, 0, 0, 0, 0)\n"
    assert not passes(off + "import socket; socket.socket()")
    # The numbers of 32 bits would go by another table.
    assert not passes("import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0)")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    for program in ("assert True", "while True: pass", "import os; os.fork()"):
        passes(program, QUICK)
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == descriptors


def test_where_nothing_can_be_confined_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.check_available()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match="x86-64 alone, not linux on riscv64"):
        sandbox.check_available()
