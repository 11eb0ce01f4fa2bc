"""The README's tables, and the committed reports, are what the committed rows say."""

import re
from pathlib import Path

import pytest

from analysis.tables.render import render
from analysis.tables.study import study_tables
from experiments.publish import readme, reports
from experiments.run.store import Store
from experiments.studies.registry import STUDIES

ROOT = Path(__file__).parents[3]
STORE = Store(ROOT / "results")
REPORTED = (
    "demo",
    "smollm2-oneshot",
    "smollm2-learned",
    "recipe-ablation",
    "frontier",
    "frontier-smollm2",
    "embedded-tiles",
)


def test_the_readmes_show_what_was_measured() -> None:
    for path, (tables, numbers) in readme.contents().items():
        text = path.read_text()
        assert set(re.findall(r"<!-- table ([\w-]+) -->", text)) == set(tables)
        assert set(re.findall(r"<!-- value ([\w-]+) -->", text)) == set(numbers)
        assert readme.fill(text, tables, numbers) == text, "run python -m experiments.publish.readme"


@pytest.mark.parametrize("study", REPORTED)
def test_committed_tables_are_those_of_the_rows(study: str) -> None:
    for name, table in study_tables(reports.frame(STUDIES[study].trials(), STORE)).items():
        for format, suffix in (("md", "md"), ("csv", "csv"), ("latex", "tex")):
            text = (ROOT / "results" / "reports" / study / f"{name}.{suffix}").read_text()
            assert text == render(table, format) + "\n"
