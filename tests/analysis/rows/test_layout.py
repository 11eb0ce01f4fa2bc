"""The names of what lies in a results directory are spelled in one module."""

import ast
from pathlib import Path

from analysis.rows import layout

ROOT = Path(layout.__file__).parents[2]
NAMES = {value for name, value in vars(layout).items() if name.isupper()}


def spelled(text: str) -> set[str]:
    """Those of `NAMES` that are joined to a path, or listed, as they stand in a source text."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        parts = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "listed":
            parts = list(node.args)
        found |= {part.value for part in parts if isinstance(part, ast.Constant) and part.value in NAMES}
    return found


def test_no_other_module_spells_them() -> None:
    files = [file for package in ("analysis", "experiments", "slurm") for file in (ROOT / package).rglob("*.py")]
    places = {str(file.relative_to(ROOT)): spelled(file.read_text(encoding="utf-8")) for file in files}
    assert {place: names for place, names in places.items() if names} == {}


def test_a_name_in_a_path_is_seen() -> None:
    assert spelled('store.root / "rows" / key') == {"rows"}
    assert spelled('store.listed("checkpoints") or frame["rows"]') == {"checkpoints"}
