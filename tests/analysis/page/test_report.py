"""The report as a reader meets it: in a browser where there is one, and as a tree of elements where there is none."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from analysis.page.report import Speed, Study, report
from analysis.page.tables import anchor
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


def made(frame: pd.DataFrame, processes: int) -> str:
    study = Study("demo", "a <study> & its table", frame, missing=("a model that is not there",))
    # Another study that shares all trials: rows and definitions stand once.
    again = Study("demo-again", "the same rows", frame[frame.method != "wanda"])
    return report([study, again], [Speed("nvidia-h200", (("kernels", TABLE),), ())], "Made today", processes)


@pytest.fixture(scope="module")
def page(frame: pd.DataFrame) -> str:
    return made(frame, 1)


class Elements(html.parser.HTMLParser):
    """Counts elements, and what they refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.walk: list[tuple[str, dict[str, str | None], bool]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.walk.append((tag, dict(attrs), False))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.walk.append((tag, {}, True))
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_it_is_one_whole_page_that_needs_no_other_file(page: str) -> None:
    elements = Elements(page)
    assert not elements.open, f"never closed: {elements.open}"
    sources = [attributes.get("src") or "" for _, attributes in elements.found if "src" in attributes]
    kinds = ("data:image/svg+xml;base64,", "data:image/png;base64,")
    assert sources and all(source.startswith(kinds) for source in sources)
    assert not any(tag in ("link", "iframe") for tag, _ in elements.found)
    assert "http" not in "".join(attributes.get("href") or "" for _, attributes in elements.found)


def test_several_processes_make_the_same_page(page: str, frame: pd.DataFrame) -> None:
    assert made(frame, 2) == page


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


def test_rows_and_definitions_stand_once(page: str, frame: pd.DataFrame) -> None:
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids)), "links are to one place"
    assert {anchor(origin) for origin in frame[frame.metric == "perplexity"].origin} - {None} <= set(ids)
    assert page.count("<pre>") == frame.trial.nunique()


def test_it_opens_with_findings(page: str) -> None:
    before, _, after = page.partition('id="findings"')
    assert "<table" not in before and "<img" not in before
    opening = " ".join(after.partition("</section>")[0].split())
    assert "A &lt;study&gt; &amp; its table" in opening
    # Of MaskLLM's 42.3 and SparseGPT's 55.4, whose errors are a hundredth of each.
    assert "MaskLLM 2:4 has the lowest Held-out text perplexity of 3, 42.30 ± 0.42 (dense 30.10)" in opening
    assert "SparseGPT 2:4 is next, 13.10 ± 0.70 above" in opening
    assert "the rows lack what each window gave" in opening


def test_studies_stand_under_what_they_ask(page: str) -> None:
    ids = [str(attributes.get("id")) for tag, attributes in Elements(page).found if tag == "section"]
    assert ids == ["findings", "methods", "demo", "demo-again", "kernels", "speed-nvidia-h200", "rows"]


def test_columns_that_never_change_are_said_once(page: str) -> None:
    heads = re.findall(r"<th scope=.col. class=.*?>(?:<button[^>]*>)?(.*?)<", page)
    assert heads[0] == "Method" and not {"Model", "Tile", "Variant"} & set(heads)
    assert "Of all rows: Model embedded; Tile 64x64." in page
    assert "PATCH joint 45%<small>hybrid</small>" in page


def test_on_a_phone_nothing_wide_is_outside_of_a_frame_that_scrolls(page: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    wide: list[str] = []
    within: list[str] = []
    for tag, attributes, closing in Elements(page).walk:
        if tag in ("table", "img") and not closing:
            wide.append(tag)
            assert "frame" in within, f"<{tag}> is not in a frame"
        elif tag == "div" and closing:
            within.pop()
        elif tag == "div":
            within.append(attributes.get("class") or "")
    assert wide.count("table") > 3 and wide.count("img") > 2
    style = " ".join(page.partition("<style>")[2].partition("</style>")[0].split())
    rules = {selector.strip(): text for selector, text in re.findall(r"([^{}]+)\{([^{}]*)\}", style)}
    assert "overflow-x: auto" in rules[".frame"] and "max-width: 100%" in rules[".frame"]
    assert "overflow-x: auto" in rules["pre"]
    first = rules["th:first-child, td:first-child"]
    assert "position: sticky" in first and "left: 0" in first
    # Only what is inside of a frame may be wider than 390 pixels.
    widths = {selector: re.findall(r"(?<!max-)width: ([\d.]+)rem", text) for selector, text in rules.items()}
    too_wide = {selector for selector, found in widths.items() if any(16 * float(width) > 390 for width in found)}
    assert too_wide == {"figure.wide img"}


def test_rows_of_changed_code_say_so(frame: pd.DataFrame) -> None:
    dense = frame[frame.method.isin(["dense", "maskllm"])]
    page = report([Study("demo", "demo", dense.assign(dirty=True))], [], "Made today")
    assert "a4530ba with changes" in page


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
    numbers = [float(text.partition(" ")[0]) for text in seen["rising"] if text != "not measured"]
    assert len(numbers) > 2 and numbers == sorted(numbers)
    falling = [float(text.partition(" ")[0]) for text in seen["falling"] if text != "not measured"]
    assert falling == sorted(numbers, reverse=True)
    assert seen["rising"][len(numbers) :] == seen["falling"][len(numbers) :], "what was not measured comes last"
    assert seen["images"] and all(width > 100 and alt for width, alt in seen["images"])
