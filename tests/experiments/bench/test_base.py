"""Times against another revision: its work tree, what both measured, and how far this one drifts."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.tables.render import shown_cells
from experiments.bench import base
from experiments.bench.harness import Lab
from experiments.cli import bench as commands
from patch.errors import UserError


def git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)


# Stands for ``python -m experiments bench ... --results DIRECTORY``: writes how long everything took.
PROGRAM = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--results") + 1]) / "bench" / "gpu" / "kernels"
folder.mkdir(parents=True)
row = {{"schema": 2, "trial": "t", "definition": {{}}, "stage": "kernels:o", "metric": "time", "unit": "us"}}
row |= {{"provenance": {{}}, "value": {time}}}
row["labels"] = {{"model": "m", "linear": "o", "tokens": 1, "implementation": "hybrid", "status": sys.argv[2:4]}}
(folder / "m-o.jsonl").write_text(json.dumps(row))
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose first revision takes 12 us and whose second takes 8."""
    root = tmp_path / "repository"
    (root / "experiments").mkdir(parents=True)
    git(root, "init", "-q")
    (root / "experiments" / "__init__.py").touch()
    for number, time in enumerate((12.0, 8.0)):
        (root / "experiments" / "__main__.py").write_text(PROGRAM.format(time=time))
        git(root, "add", "-A")
        git(root, "commit", "-qm", f"revision {number}")
    monkeypatch.setattr(base, "ROOT", root)
    return root


def test_another_revision_runs_between_two_runs_of_this_one(repository: Path) -> None:
    table = base.compare("HEAD~1", ["kernels", "--quick"])
    assert shown_cells(table) == [["m o 1 hybrid bf16", "12.00", "8.000", "1.50", "1.00"]]
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1


def test_a_revision_that_cannot_run_says_why(repository: Path) -> None:
    (repository / "experiments" / "__main__.py").write_text("raise SystemExit('no option --quick')")
    git(repository, "commit", "-qam", "broken")
    with pytest.raises(UserError, match=r"kernels --quick failed in .*: it said no option --quick"):
        base.compare("HEAD", ["kernels", "--quick"])


@pytest.mark.parametrize("revision", ["nowhere", ""], ids=["unknown", "empty"])
def test_a_revision_that_git_does_not_know_is_named(repository: Path, revision: str) -> None:
    with pytest.raises(UserError, match="--base: git worktree add"):
        base.compare(revision, ["kernels"])


def test_what_only_one_measured_is_left_out() -> None:
    first, other = {"a": 1.0, "b": 2.0}, {"a": 2.0, "c": 1.0}
    assert [row[0] for row in base.table(first, other, first, "old").rows] == ["a"]
    with pytest.raises(UserError, match="nothing in common"):
        base.table(first, {"c": 1.0}, first, "old")


def test_the_other_revision_is_given_what_this_one_was(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compare(revision: str, arguments: list[str]) -> Any:
        asked.append((revision, arguments))
        return base.table({"a": 1.0}, {"a": 2.0}, {"a": 1.0}, revision)

    monkeypatch.setattr(base, "compare", compare)
    monkeypatch.setattr(commands, "_gpu", lambda: None)
    runner = CliRunner()
    options = ["--tokens", "1", "--tokens", "16", "--quick", "--base", "v1", "--results", "somewhere"]
    for arguments in (["kernels", *options], ["learning", "llama-3.2-1b", "--batch", "4", "--base", "v1"]):
        done = runner.invoke(commands.bench, arguments)
        assert done.exit_code == 0, done.output
    assert asked[0] == ("v1", ["kernels", "--tokens", "1", "--tokens", "16", "--quick"])
    assert asked[1][1][:2] == ["learning", "llama-3.2-1b"] and "--batch 4" in " ".join(asked[1][1])


def test_a_bench_writes_its_rows_once_and_prints_their_table(
    tmp_path: Path, tiny: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.bench import harness

    monkeypatch.setattr(commands, "_gpu", lambda: None)
    monkeypatch.setattr(commands, "_gpu_name", lambda: "A GPU")
    monkeypatch.setattr(harness, "Lab", lambda device, progress: lab)
    monkeypatch.setenv("HTS_RESULTS", str(tmp_path))
    options = ["kernels", "--model", tiny, "--tokens", "1", "--sparsity", "0.5", "--rounds", "3"]
    for _ in range(2):
        done = CliRunner().invoke(commands.bench, options)
        assert done.exit_code == 0, done.output
        assert "| Tokens |  50% |" in done.output and "Dense FP8" in done.output
    paths = sorted(tmp_path.rglob("*.jsonl"))
    assert [path.relative_to(tmp_path).as_posix().rpartition("-")[0] for path in paths] == [
        f"bench/a-gpu/kernels/tiny-{name}" for name in ("down", "gate_up", "o", "qkv")
    ]
    assert json.loads(paths[0].read_text().splitlines()[0])["stage"] == "kernels:down"
