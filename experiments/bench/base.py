"""The same bench of another revision, on the same machine: this one, the other, this one again (A-B-A).

Each runs in a process of its own, and the two runs of this revision tell how much of a difference is drift.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from analysis.rows.points import Measured
from analysis.tables.kernels import measurements
from analysis.tables.render import Column, Table, Value
from patch.errors import UserError

ROOT = Path(__file__).parents[2]
# What tells one time from another; the rest of a row is what was found of it.
CELL = (
    "model", "linear", "tokens", "kind", "batch", "length", "implementation", "precision", "sparsity", "tile", "tiles",
    "mode", "logits", "compiled", "captured", "activation_checkpointing",
)  # fmt: skip


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A work tree of a revision in a temporary directory.

    Raises:
        UserError: if this code is in no git repository, or git does not know the revision.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "base"
        _git("worktree", "add", "--detach", str(place), revision)
        try:
            yield place
        finally:
            _git("worktree", "remove", "--force", str(place))


def compare(revision: str, arguments: Sequence[str]) -> Table:
    """Time this revision, another, and this one again, and compare the medians.

    Args:
        arguments: of ``hts bench``, without a results directory.

    Raises:
        UserError: as `checkout`, or if one of them fails.
    """
    with checkout(revision) as other, tempfile.TemporaryDirectory() as folder:
        first, base, again = (
            run(tree, arguments, Path(folder) / str(place)) for place, tree in enumerate((ROOT, other, ROOT))
        )
    return table(first, base, again, revision)


def run(tree: Path, arguments: Sequence[str], results: Path) -> dict[str, float]:
    """The times that ``hts bench`` of a work tree measures, by their cells.

    Raises:
        UserError: if it fails, with its last line.
    """
    command = [sys.executable, "-m", "experiments", "bench", *arguments, "--results", str(results)]
    done = subprocess.run(
        command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise UserError(f"hts bench {' '.join(arguments)} failed in {tree}: it said {said}")
    return times(results)


def times(results: Path) -> dict[str, float]:
    """The median times below a results directory, by their cells in words."""
    return {
        _cell(row): row["value"]
        for path in sorted(results.rglob("*.jsonl"))
        for row in measurements(path)
        if row["metric"] in ("time", "step") and row["value"] is not None
    }


def table(first: Mapping[str, float], base: Mapping[str, float], again: Mapping[str, float], revision: str) -> Table:
    """The speedup of this revision over another, and how far its two runs are apart, of all that both measure."""
    columns = (
        Column("cell", "What", "text"),
        Column("base", f"{revision} (us)", "number"),
        Column("now", "Now (us)", "number"),
        Column("speedup", "Speedup (x)", "ratio"),
        Column("drift", "Second run over first (x)", "ratio"),
    )
    rows: list[tuple[Value, ...]] = []
    for cell in first:
        if cell in base and cell in again:
            now = (first[cell] + again[cell]) / 2
            numbers = (base[cell], now, base[cell] / now, again[cell] / first[cell])
            rows.append((cell, *map(Measured, numbers)))
    if not rows:
        raise UserError(f"{revision} and this revision measure nothing in common")
    return Table(
        columns, tuple(rows), ("",) * len(rows), frozenset(), ("Medians; this revision ran before and after.",)
    )


def _cell(row: Mapping[str, Any]) -> str:
    # Rows of before precisions were named are of bfloat16.
    labels = {"precision": "bf16"} | {name: value for name, value in row["labels"].items() if value is not None}
    return " ".join(f"{labels[name]}" for name in CELL if name in labels)


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--base: git {arguments[0]} {arguments[1]}: {done.stderr.strip().splitlines()[-1]}")
