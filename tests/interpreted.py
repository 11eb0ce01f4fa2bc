"""Runs a test file as a script in Triton's interpreter, which Triton asks for once, when it is imported."""

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
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
