"""The report as a reader meets it: in a browser where there is one, and as a tree of elements where there is none."""

import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from analysis.page.report import Speed, Study, report
from analysis.rows.points import Measured
from analysis.tables.render import Column, Table

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TABLE = Table(
    (Column("workload", "Workload", "text"), Column("speedup", "25%", "ratio")),
    (("one", Measured(1.26)), ("<many>", Measured(1.13))),
    ("", ""),
    frozenset(),
    (),
)

# Looks at the page as a reader would, clicks, and leaves what it saw in the page.
WATCH = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
window.addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const place = [...table.tHead.rows[0].cells].findIndex(head => head.textContent.includes("PPL"));
  const head = table.tHead.rows[0].cells[place];
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[place].textContent);
  head.querySelector("button").click();
  const rising = column(), first = head.getAttribute("aria-sort");
  head.querySelector("button").click();
  const images = [...document.images].map(image => [image.naturalWidth, image.alt]);
  const seen = {errors, rising, first, falling: column(), second: head.getAttribute("aria-sort"), images};
  document.body.dataset.seen = JSON.stringify(seen);
});
</script>
"""


@pytest.fixture(scope="module")
def frame(demo: pd.DataFrame) -> pd.DataFrame:
    """The demo, of which one perplexity was not measured."""
    return demo[(demo.method != "magnitude") | (demo.metric != "perplexity")]


@pytest.fixture(scope="module")
def page(frame: pd.DataFrame) -> str:
    study = Study("demo", "a <study> & its table", frame, missing=("a model that is not there",))
    return report([study], [Speed("nvidia-h200", (("kernels", TABLE),), ())], "Made today")


class Elements(html.parser.HTMLParser):
    """Counts elements, and what they refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_it_is_one_whole_page_that_needs_no_other_file(page: str) -> None:
    elements = Elements(page)
    assert not elements.open, f"never closed: {elements.open}"
    sources = [attributes.get("src") or "" for _, attributes in elements.found if "src" in attributes]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any(tag in ("link", "iframe") for tag, _ in elements.found)
    assert "http" not in "".join(attributes.get("href") or "" for _, attributes in elements.found)


def test_names_cannot_break_it(page: str) -> None:
    assert "A &lt;study&gt; &amp; its table" in page and "&lt;many&gt;" in page


def test_every_measured_number_names_its_row(page: str, frame: pd.DataFrame) -> None:
    measured = frame[frame.metric == "perplexity"]
    assert len(measured) and all(f'title="{origin}"' in page for origin in measured.origin)
    assert "not measured" in page and "a model that is not there" in page


def test_definitions_and_machines_are_there(page: str, frame: pd.DataFrame) -> None:
    for row in frame.drop_duplicates("trial").itertuples():
        assert page.count(str(row.trial)) >= 2
    assert "hts run demo" in page and "Made today" in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
def test_in_a_browser_it_sorts_and_shows_its_figures(page: str, frame: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page.replace("<head>", "<head>" + WATCH))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [str(BROWSER), *options, "--virtual-time-budget=5000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    body = next(attributes for tag, attributes in Elements(done.stdout).found if tag == "body")
    seen = json.loads(body["data-seen"] or "")
    assert seen["errors"] == []
    assert seen["first"] == "ascending" and seen["second"] == "descending"
    numbers = [float(text) for text in seen["rising"] if text != "not measured"]
    assert len(numbers) > 2 and numbers == sorted(numbers)
    assert [float(text) for text in seen["falling"] if text != "not measured"] == sorted(numbers, reverse=True)
    assert seen["rising"][len(numbers) :] == seen["falling"][len(numbers) :], "what was not measured comes last"
    assert seen["images"] and all(width > 100 and alt for width, alt in seen["images"])
