"""Hostile programs: whatever they try, nothing outside them changes, and they end."""

import ctypes
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
        "ctypes.CDLL(None).syscall(437, -100, {kept!r}.encode(), b'\\x02\\x02' + bytes(22), 24)",
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


# Each fails unless the kernel did what it asks for.
TO_OTHERS = {
    "kill": "os.kill(other, 9)",
    "ptrace": "done(101, 16, other, 0, 0)",
    "setown": "read, write = os.pipe()\ndone(72, read, 8, other)\ndone(72, read, 10, 9)\ndone(72, read, 4, 0o20000)\n"
    "os.write(write, b'x')",
    "setown-ex": "read, write = os.pipe()\ndone(72, read, 15, struct.pack('ii', 1, other))\ndone(72, read, 10, 9)\n"
    "done(72, read, 4, 0o20000)\nos.write(write, b'x')",
    "setpriority": "done(141, 0, other, 5)",
    "sched_setscheduler": "done(144, other, 3, struct.pack('i', 0))",
    "sched_setaffinity": "done(203, other, 128, mask)",
    "ioprio_set": "done(251, 1, other, 3 << 13)",
    "prlimit64": "done(302, other, 7, struct.pack('QQ', 8, 8), None)",
    "msgctl": "done(71, queue, 0, None)",
}
PRELUDE = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def done(*call):
    if libc.syscall(*call) == -1:
        raise OSError(ctypes.get_errno(), str(call))
other, queue = {other}, {queue}
mask = (1 << min(os.sched_getaffinity(0))).to_bytes(128, 'little')
"""


@pytest.mark.parametrize("how", TO_OTHERS)
def test_other_processes_are_left_alone(how: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    queue = libc.msgget(0, 0o600)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    program = PRELUDE.format(other=other.pid, queue=queue) + TO_OTHERS[how]
    try:
        assert passes(PRELUDE.format(other=other.pid, queue=queue))
        assert not passes(program)
        time.sleep(0.1)
        assert other.poll() is None and os.getpriority(os.PRIO_PROCESS, other.pid) == os.getpriority(os.PRIO_PROCESS, 0)
        assert os.sched_getaffinity(other.pid) == os.sched_getaffinity(0)
        assert libc.msgctl(queue, 2, ctypes.create_string_buffer(256)) == 0
    finally:
        other.kill()
        other.wait()
        libc.msgctl(queue, 0, None)


@pytest.mark.parametrize("how", [how for how in TO_OTHERS if how != "ptrace"])  # Which many kernels refuse anyway.
def test_unconfined_they_are_not(how: str) -> None:
    queue = ctypes.CDLL(None).msgget(0, 0o600)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = PRELUDE.format(other=other.pid, queue=queue) + TO_OTHERS[how]
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
        if how in ("kill", "setown", "setown-ex"):
            assert other.wait(10) == -9
    finally:
        other.kill()
        other.wait()
        ctypes.CDLL(None).msgctl(queue, 0, None)


def test_calls_that_computing_does_not_need_are_refused() -> None:
    numbers = [
        16,
        29,
        30,
        31,
        *range(64, 72),
        73,
        141,
        142,
        144,
        *range(188, 200),
        203,
        220,
        *range(240, 246),
        251,
        256,
        279,
        302,
        314,
    ]
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in {[*numbers, *range(453, 1000)]}:
    assert libc.syscall(number, -1, -1, -1, -1, -1, -1) == -1 and ctypes.get_errno() == 1, number
for command in (4, 5, 6, 7, 8, 10, 15, 37, 1024, 1026, 1031, 1033):
    assert libc.syscall(72, 0, command, 0) == -1 and ctypes.get_errno() == 1, command
for command in (0x5412, 0x541b, 0x40086602, 0x8901):
    assert libc.syscall(16, 0, command, 0) == -1 and ctypes.get_errno() == 1, command
# To wake on memory that may be shared, and on memory that may not.
word = ctypes.create_string_buffer(8)
assert libc.syscall(202, word, 1, 1, None, None, 0) == -1 and ctypes.get_errno() == 1
assert libc.syscall(202, word, 129, 1, None, None, 0) == 0
"""
    assert passes(program)


def test_what_programs_use_is_allowed() -> None:
    assert passes("""
import array, bisect, collections, contextlib, copy, csv, dataclasses, datetime, decimal, enum, fractions, functools
import glob, hashlib, heapq, inspect, io, itertools, json, locale, logging, math, operator, os, pathlib, pickle, random
import re, secrets, select, shutil, signal, statistics, string, struct, tempfile, textwrap, threading, time, traceback
import typing, unicodedata, unittest, uuid, zlib
assert json.loads(json.dumps({'a': [1, 2.5, None]})) == {'a': [1, 2.5, None]}
assert re.sub(r'(\\d+)', lambda m: str(int(m[1]) + 1), 'a1') == 'a2' and math.isqrt(10) == 3
assert collections.Counter('aab').most_common(1) == [('a', 2)] and sum(itertools.islice(itertools.count(), 4)) == 6
random.seed(1); random.shuffle([1, 2, 3]); secrets.token_hex(); uuid.uuid4()
datetime.datetime.now().astimezone(); time.sleep(0.01); time.strftime('%Z'); time.process_time(); time.monotonic()
assert hashlib.sha256(b'').hexdigest().startswith('e3b0') and decimal.Decimal('0.1') * 3 == decimal.Decimal('0.3')
assert functools.lru_cache(lambda n: n)(3) == 3 and fractions.Fraction(1, 3) * 3 == 1
assert open(os.__file__).read() and os.path.realpath(os.__file__) and os.cpu_count() and not glob.glob('*')
assert sorted(pathlib.Path(os.path.dirname(json.__file__)).glob('*.py')) and inspect.getsource(json.dumps)
assert sum(sorted(random.random() for _ in range(10**6))) > 0 and len('x' * 10**8) == 10**8 and '\\N{BULLET}'
with threading.Lock(), contextlib.redirect_stdout(io.StringIO()) as out:
    print('x')
assert not threading.Event().wait(0.01) and out.getvalue() == 'x\\n'
signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
read, write = os.pipe(); os.write(write, b'x'); assert select.select([read], [], [], 1)[0] and os.read(read, 1) == b'x'
class Case(unittest.TestCase):
    def test(self): self.assertEqual(1, 1)
assert unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Case)).wasSuccessful()
""")


def test_compiling_is_bounded() -> None:
    # The compiler writes what follows `finally` twice: two to the power of the levels.
    def nested(levels: int) -> str:
        lines = [f"{' ' * level}try: pass\n{' ' * level}finally:" for level in range(levels)]
        return "\n".join([*lines, " " * levels + "x = 1"])

    assert passes(nested(5), Limits(memory=128 * MIB))
    started = time.monotonic()
    assert not passes(nested(20), Limits(cpu=1)) and not passes(nested(20), Limits(memory=128 * MIB))
    assert time.monotonic() - started < 20


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
