"""What is committed: little, and nothing that commands write."""

import json
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


def test_every_row_is_of_a_commit_of_this_history() -> None:
    if git("rev-parse", "--is-shallow-repository") != ["false"]:
        pytest.skip("the history is not all here")
    history, strange = git("rev-list", "HEAD"), set()
    for published in git("ls-files", "results/trials.jsonl", "results/*/*/trials.jsonl"):
        for trial in map(json.loads, (ROOT / published).read_text(encoding="utf-8").splitlines()):
            for stage, about in trial["stages"].items():
                named = (trial["provenance"] | about["provenance"])["git"]
                if not any(commit.startswith(named) for commit in history):
                    strange.add(f"{trial['trial']} {stage}: {named}")
    assert not strange


@pytest.mark.parametrize("folder", WRITTEN)
def test_what_commands_write_beside_results_is_ignored(folder: str) -> None:
    assert git("check-ignore", f"results/{folder}/file") == [f"results/{folder}/file"]
