"""Runs a test file as a script in Triton's interpreter, which Triton asks for once, when it is imported."""

import functools
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def printed_by(file: str) -> Any:
    """The JSON that the test file ``file`` prints when it is run as a script, with its kernels interpreted."""
    if version("triton").startswith("3.6.") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4")
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    script = f"import interpreted, runpy; interpreted.look_once(); runpy.run_path({file!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


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
