"""The README's accuracy tables, and the committed reports, are what the committed rows say."""

import re
from pathlib import Path

import pytest

from analysis.tables import Table, accuracy_table, render, shown_cells
from experiments import reports
from experiments.store import Store
from experiments.studies import STUDIES

ROOT = Path(__file__).parents[2]
STORE = Store(ROOT / "results")
REPORTED = ("demo", "smollm2-oneshot", "smollm2-learned", "recipe-ablation")


def table_of(study: str) -> Table:
    return accuracy_table(reports.frame(STUDIES[study].trials(), STORE))


def readme_tables() -> list[list[list[str]]]:
    """Every Markdown table of the README, as lines of cells, without the rule."""
    found: list[list[list[str]]] = [[]]
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


@pytest.mark.parametrize("study", ["demo", "smollm2-oneshot", "smollm2-learned"])
def test_the_readme_shows_what_was_measured(study: str) -> None:
    table = table_of(study)
    headings, lines = [column.heading for column in table.columns], shown_cells(table)
    for head, *rows in readme_tables():
        if "Method" not in head or not set(head) <= set(headings):
            continue
        chosen = [[line[headings.index(name)] for name in head] for line in lines]
        if len(chosen) == len(rows) and [row[0] for row in rows] == [line[0] for line in chosen]:
            assert rows == chosen
            return
    raise AssertionError(f"no table of {study} in the README")


def test_the_ablation_in_the_readme_is_what_was_measured() -> None:
    frame = reports.frame(STUDIES["recipe-ablation"].trials(), STORE)
    measured = set()
    for row in frame[(frame.metric == "perplexity") & (frame.method == "patch-joint")].itertuples():
        recipe = row.definition["pruning"]["learning"]["recipe"]
        measured.add((f"{recipe['lr']:g}", f"{recipe.get('distillation', 0):g}", f"{row.value:.2f}"))
    ablation = next(table for table in readme_tables() if "Validation PPL @2048" in table[0])
    assert {tuple(re.sub(r" \(.*\)", "", cell) for cell in row) for row in ablation[1:]} == measured


@pytest.mark.parametrize("study", REPORTED)
def test_committed_tables_are_those_of_the_rows(study: str) -> None:
    for kind in ("md", "csv"):
        text = (ROOT / "results" / "reports" / study / f"table.{kind}").read_text()
        assert text == render(table_of(study), kind) + "\n"
