"""Runs test files as scripts in Triton's interpreter, which Triton asks for once, when it is imported."""

import fcntl
import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
# What is run at once where all tests are: to import what they need takes longer than most of their kernels.
_TOGETHER = [
    str(TESTS / name)
    for name in (
        "patch/oneshot/test_sparsegpt_triton.py",
        "stoicc/test_portable.py",
        "stoicc/test_quantise.py",
        "stoicc/test_unstructured.py",
    )
]
_SCRIPT = """
import contextlib, io, json, runpy, sys
import interpreted, torch
interpreted.look_once()
found = {}
for file in sys.argv[1:]:
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(file, run_name="__main__")
    found[file] = json.loads(printed.getvalue())
print(json.dumps(found))
"""


def printed_by(file: str, temporary: pytest.TempPathFactory) -> Any:
    """The JSON that the test file ``file`` prints when it is run as a script, with its kernels interpreted."""
    if "PYTEST_XDIST_TESTRUNUID" not in os.environ or file not in _TOGETHER:
        return _printed_by([file])[file]
    # Of all processes that run tests.
    known = temporary.getbasetemp().parent / "interpreted.json"
    with open(known.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not known.exists():
            known.write_text(json.dumps(_printed_by(_TOGETHER)))
    return json.loads(known.read_text())[file]


def _printed_by(files: Sequence[str]) -> dict[str, Any]:
    if version("triton").startswith("3.6.") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4")
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", _SCRIPT, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def look_once() -> None:
    """Have the interpreter of Triton 3.6 look for what it replaces in its language once.

    It goes through all members of the language anew at every call of one kernel's function by another, which takes a
    third of the time that these kernels take.
    """
    from triton.language import core
    from triton.runtime import interpreter

    if not version("triton").startswith("3.6."):
        return

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            if core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch
