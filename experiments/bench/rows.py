"""Where the rows of benches lie, ``<results>/bench/<gpu>/...``, and which are still missing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.rows import layout
from analysis.rows.format import Fact, Row, as_rows
from analysis.rows.jsonl import from_lines, to_lines
from experiments.bench.harness import Bench
from experiments.run.provenance import provenance
from experiments.studies.trial import definition
from patch.errors import UserError
from patch.files import write_atomic
from stoicc.configs import gpu_slug


def path_of(bench: Bench, wanted: Any, part: str, results: Path, gpu: str) -> Path:
    """The file of a part's rows, of a GPU by its name."""
    return results / layout.BENCH / gpu_slug(gpu) / bench.file(wanted, part)


def rows_in(path: Path) -> list[Row]:
    """The rows of a file that a bench wrote; none if it is not there, or of an older format.

    Raises:
        UserError: if it is damaged.
    """
    try:
        rows = from_lines(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        raise UserError(f"{path}: not a file of rows: remove it, or measure it again") from None
    return [row for row in rows if isinstance(row, dict) and "stage" in row]


def write(bench: Bench, wanted: Any, part: str, facts: Sequence[Fact], seconds: float, path: Path) -> None:
    """Put the rows of a part into its file, beside those of the other parts of the same definition."""
    name = bench.identity(wanted)
    others = [row for row in rows_in(path) if row["trial"] == name and row["stage"] != part]
    write_atomic(path, to_lines([*others, *as_rows(name, definition(wanted), part, facts, provenance(seconds))]))


def missing(bench: Bench, wanted: Any, results: Path, gpu: str) -> list[str]:
    """The parts of a definition that are to be measured.

    A file that has rows of another definition, or of an older format, is left as it is.
    """
    return [part for part in bench.parts(wanted) if not _there(bench, wanted, part, results, gpu)]


def _there(bench: Bench, wanted: Any, part: str, results: Path, gpu: str) -> bool:
    path = path_of(bench, wanted, part, results, gpu)
    found = rows_in(path)
    own = [row for row in found if row["trial"] == bench.identity(wanted)]
    return any(row["stage"] == part for row in own) or (path.exists() and not own)
