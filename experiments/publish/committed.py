"""Rows as the tables that are committed (`hts publish`)."""

from pathlib import Path

from analysis.rows import consolidate, layout
from analysis.rows.load import journal_rows
from patch.errors import UserError


def consolidate_into(runs: Path, results: Path, allow_dirty: bool = False) -> list[Path]:
    """Publish the rows of a results directory and its benches as tables of another, or its own; returns what changed.

    Raises:
        UserError: if there are none, one is damaged or contradicts what is published, or was measured in a working tree
            with changes, unless that is allowed.
    """
    bench = runs / layout.BENCH
    folders = [Path(), *(path.relative_to(runs) for path in sorted(bench.glob("*")) if path.is_dir())]
    changed, found = [], False
    for folder in folders:
        if not (runs / folder).is_dir():
            continue
        theirs = consolidate.published_stages(runs / folder)
        new = consolidate.merged(theirs, consolidate.stages_of(journal_rows(runs / folder)), allow_dirty=True)
        if new:
            found = True
            ours = consolidate.published_stages(results / folder)
            changed += consolidate.write(results / folder, consolidate.merged(ours, new, allow_dirty))
    if not found:
        raise UserError(f"{runs} has no rows: run a study first, or name another results directory")
    return changed
