"""README and docs: tables, numbers, links and figures are what the committed rows say."""

import dataclasses
import re
from pathlib import Path

import pytest

from analysis.tables.render import Table
from analysis.tables.study import WARNING
from experiments.publish import figures, pages
from patch.errors import UserError

ROOT = Path(__file__).parents[3]
LINKED = [*pages.pages(), ROOT / "CONTRIBUTING.md"]
EVERYTHING = "".join(page.read_text(encoding="utf-8") for page in pages.pages())


def named(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("page", pages.pages(), ids=named)
def test_pages_show_what_was_measured(page: Path) -> None:
    assert pages.fill(page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8"), (
        "run python -m experiments.publish.pages"
    )


@pytest.mark.parametrize("page", pages.pages(), ids=named)
def test_no_number_begins_a_line(page: Path) -> None:
    # A comment that begins a line is a block of its own, and ends the paragraph.
    assert not re.findall(r"^ *<!-- (?:value|cell) .*", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_warnings_stay_with_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes are left to the text of a page, but not that rows cannot be traced to a revision."""
    made = pages.TABLES["demo"]()
    assert isinstance(made, Table) and made.notes
    warning = f"{WARNING} measured with changes that no revision has: one."
    monkeypatch.setitem(pages.TABLES, "changed", lambda: dataclasses.replace(made, notes=(*made.notes, warning)))
    assert pages.table("changed") == f"{pages.table('demo')}\n\n{warning}"


def test_what_can_be_shown_is_shown() -> None:
    assert set(re.findall(r"<!-- table ([\w-]+) -->", EVERYTHING)) == set(pages.TABLES)
    assert set(re.findall(r"<!-- value ([\w-]+) -->", EVERYTHING)) == set(pages.VALUES)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("<!-- table fronts -->\n<!-- end -->", "did you mean front"),
        ("<!-- value pin --><!-- end -->", "did you mean pins"),
        ("<!-- cell demos accuracy perplexity at method=dense --><!-- end -->", "did you mean demo"),
        ("<!-- cell demo accuracies perplexity at method=dense --><!-- end -->", "did you mean accuracy"),
        ("<!-- cell demo accuracy hours at method=dense --><!-- end -->", "'hours' means 0 columns"),
        ("<!-- cell demo accuracy perplexity at method=sparsgpt --><!-- end -->", "did you mean sparsegpt"),
    ],
    ids=["table", "value", "study", "table of a study", "column", "point"],
)
def test_a_marker_of_nothing_is_refused(marker: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pages.fill(marker)


def test_a_cell_is_what_its_table_shows() -> None:
    table = pages.table("demo")
    shown = pages.cell("demo", "accuracy", "perplexity", "method=patch-joint,target=0.45")
    assert re.search(rf"PATCH joint +\| hybrid +\| +— +\| +44.99 \| +{re.escape(shown)} ", table)


def test_the_readme_can_be_read() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    commands = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    ours = [line for line in commands if line.startswith(("make", "hts"))]
    assert ours[:3] == ["make demo", "make demo", "make test"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs spell them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(
        r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_the_docs_is_in_its_navigation() -> None:
    listed = re.findall(r"[\w-]+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_figures_that_are_shown_are_those_that_are_drawn() -> None:
    shown = {Path(name).stem for name in re.findall(r"""(?:!\[[^]]*\]\(|<img src=")([^)"]+)""", EVERYTHING)}
    assert shown == set(figures.SHOWN) == {path.stem for path in figures.FOLDER.iterdir()}
    assert sum(path.stat().st_size for path in figures.FOLDER.iterdir()) < 2**20
