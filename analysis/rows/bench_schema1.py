"""Bench files of before benches wrote rows: a first line about all others, then a line for each cell that was timed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.rows.format import SCHEMA, SPREAD, Damaged, Row, digest
from patch.files import from_json

_ROOFS = {"copy": "TB/s", "matmul": "TFLOP/s"}
_COUNTS = {"passed": "1", "failed": "1", "skipped": "1", "seconds": "s"}


def is_one(data: bytes) -> bool:
    """Whether a file's first line is about all others."""
    first = data.partition(b"\n")[0]
    return first.startswith(b'{"schema": 1, "') and b'"trial"' not in first


def numbered(data: bytes, path: Path) -> list[tuple[int, Row]]:
    """The rows of such a file with their line numbers.

    Raises:
        Damaged: naming the file, if it is not as it was written.
    """
    try:
        header, *lines = map(from_json, data.splitlines())
        made = _tests(header, lines) if "gpus" in header else _timed(header, lines, path.parent.name)
        return [
            (number, {"schema": SCHEMA, "stderr": None, "provenance": header["provenance"]} | row)
            for number, row in made
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: not a bench file of schema 1 ({error}): measure it again") from error


def _timed(header: dict[str, Any], lines: list[dict[str, Any]], kind: str) -> Iterator[tuple[int, Row]]:
    cell = lines[0]["cell"]
    about = {"bench": kind, "model": cell["model"]}
    stage = f"{kind}:{cell['linear']}" if "linear" in cell else kind
    common = {"trial": digest(about), "definition": about, "stage": stage}
    for number, line in enumerate(lines, 2):
        measured = {name: line[name] for name in ("metric", "value", "unit")}
        spread = {"p20": line.get("p20"), "p80": line.get("p80"), "runs": line.get("runs", 1)}
        others = {name: value for name, value in line.items() if name not in (*measured, *SPREAD, "cell")}
        yield number, common | measured | spread | {"labels": line["cell"] | others}
    for name, unit in _ROOFS.items():
        fact = {"metric": f"{name}_roof", "value": header["roof"][name], "unit": unit, "labels": {}}
        yield 1, common | fact | {"p20": None, "p80": None, "runs": 1}


def _tests(header: dict[str, Any], lines: list[dict[str, Any]]) -> Iterator[tuple[int, Row]]:
    about = {"bench": "tests", "gpus": header["gpus"]}
    common = {"trial": digest(about), "definition": about, "stage": "tests", "p20": None, "p80": None, "runs": 1}
    for number, line in enumerate(lines, 2):
        for metric, unit in _COUNTS.items():
            yield (
                number,
                common | {"metric": metric, "value": line[metric], "unit": unit, "labels": {"file": line["file"]}},
            )
