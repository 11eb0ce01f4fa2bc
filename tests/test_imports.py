"""Imports run one way: between packages, between the rooms of a package, and between modules."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("patch", "stoicc", "analysis", "experiments", "slurm")

# What a room may import beside itself. A module belongs to the longest name here that it starts with.
ARROWS: dict[str, set[str]] = {
    "patch.errors": set(),
    "patch.contexts": set(),
    "patch.quantise": {"patch.contexts"},
    "patch": {"patch.contexts", "patch.quantise"},
    "patch.oneshot": {"patch", "patch.methods", "patch.quantise"},
    "patch.learn": {"patch", "patch.quantise"},
    "patch.recover": {"patch", "patch.learn", "patch.oneshot", "patch.quantise"},
    "patch.methods": {"patch", "patch.learn"},
    "stoicc.compat": {"patch"},
    "stoicc.format": {"patch", "patch.quantise"},
    "stoicc.lowering": {"patch"},
    "stoicc.language": {"patch", "stoicc.format", "stoicc.lowering"},
    "stoicc.kernels": {"patch", "patch.quantise", "stoicc.compat", "stoicc.format", "stoicc.language"},
    "stoicc": {
        "patch",
        "patch.quantise",
        "stoicc.compat",
        "stoicc.format",
        "stoicc.kernels",
        "stoicc.language",
        "stoicc.lowering",
    },
    "stoicc.vllm": {"patch", "patch.quantise", "stoicc", "stoicc.format"},
    "analysis": set(),
    "analysis.rows": {"analysis", "patch", "patch.learn", "patch.methods", "patch.quantise"},
    "analysis.tables": {"analysis", "analysis.rows", "patch", "patch.methods"},
    "analysis.figures": {"analysis", "analysis.rows", "analysis.tables", "patch", "patch.methods"},
    "analysis.page": {"analysis", "analysis.figures", "analysis.rows", "analysis.tables", "patch", "patch.methods"},
    "experiments.embedded": {"patch"},
    "experiments.data": {"experiments.embedded", "patch", "stoicc"},
    "experiments.eval": {"experiments.data", "experiments.embedded", "patch"},
    "experiments.studies": {"analysis", "analysis.rows", "experiments.data", "experiments.eval"}
    | {"patch", "patch.learn", "patch.methods", "patch.oneshot", "patch.quantise", "patch.recover"},
    "experiments.run.provenance": {"patch"},
    "experiments.bench": {
        "analysis",
        "analysis.rows",
        "analysis.tables",
        "experiments.data",
        "experiments.embedded",
        "experiments.run.provenance",
    }
    | {"experiments.run.provenance", "experiments.studies", "patch", "patch.learn", "patch.methods", "patch.oneshot"}
    | {"patch.quantise", "stoicc", "stoicc.format"},
    "experiments.run": {"analysis.rows", "experiments.bench", "experiments.data", "experiments.eval"}
    | {"experiments.run.provenance", "experiments.studies", "patch", "patch.learn", "patch.methods", "patch.oneshot"}
    | {"patch.quantise", "patch.recover", "stoicc", "stoicc.format", "stoicc.kernels"},
    "experiments.publish": {"analysis", "analysis.figures", "analysis.page", "analysis.rows", "analysis.tables"}
    | {"experiments.data", "experiments.eval", "experiments.run", "experiments.run.provenance", "experiments.studies"}
    | {"patch", "patch.learn", "patch.methods", "patch.quantise", "stoicc"},
}
# Rooms of commands: they may use all that stands below them.
ARROWS["experiments.cli"] = set(ARROWS)
ARROWS["experiments"] = {"experiments.cli"}
ARROWS["slurm"] = set(ARROWS)
# Errors that users can cause are raised everywhere.
for name, others in ARROWS.items():
    others |= {"patch.errors"} - {name}
    others |= {"patch.contexts"} if "patch" in others else set()


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            found[".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


def imports(text: str, known: dict[str, Path]) -> set[str]:
    """The modules of these packages that a source text names in import statements, inside functions too."""
    named = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                named.add(submodule if submodule in known else str(node.module))
    return named & set(known)


KNOWN = modules()
IMPORTS = {name: imports(file.read_text(encoding="utf-8"), KNOWN) - {name} for name, file in KNOWN.items()}


def room(module: str) -> str:
    return max((name for name in ARROWS if module == name or module.startswith(name + ".")), key=len)


def test_every_import_follows_an_arrow() -> None:
    wrong = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room(other) != room(module) and room(other) not in ARROWS[room(module)]
    }
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_is_a_room(package: str) -> None:
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / package).rglob("__init__.py")}
    assert folders <= set(ARROWS)


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_arrows_go_round_nowhere() -> None:
    TopologicalSorter(ARROWS).prepare()


def test_an_import_inside_a_function_is_seen() -> None:
    text = "def f():\n    from patch import mask\n    import stoicc.format\n    from patch.mask import HybridMask"
    assert imports(text, KNOWN) == {"patch.mask", "stoicc.format"}


def test_what_reads_rows_and_defines_studies_needs_no_torch() -> None:
    names = [name for name in KNOWN if name.split(".")[0] == "analysis"]
    names += ["experiments.publish.reports", "experiments.studies.registry"]
    code = (
        f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
