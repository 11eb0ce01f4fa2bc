"""What is committed: little, and nothing that commands write."""

import subprocess
from pathlib import Path

import pytest

from analysis.rows import layout

WRITTEN = [layout.ROWS, layout.CHECKPOINTS, layout.PACKED, layout.WORK, layout.TOKENS, layout.SWEEPS, layout.LOCKS]

ROOT = Path(__file__).parent.parent


def git(*arguments: str) -> list[str]:
    try:
        found = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a clone, or no git here")
    return found.stdout.splitlines()


def test_a_clone_is_at_most_20_megabytes() -> None:
    assert sum((ROOT / name).stat().st_size for name in git("ls-files") if (ROOT / name).is_file()) <= 20e6


def test_nothing_that_is_ignored_is_committed() -> None:
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []


@pytest.mark.parametrize("folder", WRITTEN)
def test_what_commands_write_beside_results_is_ignored(folder: str) -> None:
    assert git("check-ignore", f"results/{folder}/file") == [f"results/{folder}/file"]
