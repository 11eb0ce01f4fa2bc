"""Tables show what was measured, in the order and to the digits of the literature."""

import csv
import io
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from analysis.rows.points import trial_labels
from analysis.tables import published
from analysis.tables.accuracy import accuracy_table
from analysis.tables.render import Table, render, rich_table, rows_of, significant
from analysis.tables.study import WARNING, study_tables
from patch.errors import UserError

Row = dict[str, Any]
Study = Callable[[dict[str, list[Row]]], pd.DataFrame]
Make = Callable[..., Any]


def cells(text: str) -> list[dict[str, str]]:
    """A markdown table as one dictionary per row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(heading, row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (12.0845, "12.08"),
        (9.0, "9.000"),
        (99.996, "100.0"),
        (563.44, "563.4"),
        (1234.5678, "1235"),
        (9999.6, "10000"),
        (12345.6, "12350"),
        (1234567.0, "1.235e6"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_perplexities_have_four_significant_digits(number: float, shown: str) -> None:
    assert significant(number) == shown


def test_the_demo_table(demo: pd.DataFrame) -> None:
    rows = cells(render(accuracy_table(demo), "md"))
    assert [row["Method"] for row in rows] == [
        *("Dense", "Magnitude", "Wanda", "SparseGPT", "MaskLLM"),
        *["PATCH joint"] * 3,
    ]
    assert rows[5] == {
        "Model": "embedded",
        "Method": "PATCH joint",
        "Structure": "hybrid",
        "Tile": "64x64",
        "Target (%)": "45",
        "Achieved (%)": "45.01",
        "Held-out text PPL @512": "39.80 ± 0.40",
        "Continuation (first 400) (%)": "55.0 ± 2.5",
    }
    assert rows[0]["Structure"] == rows[0]["Tile"] == rows[2]["Tile"] == "—"


def test_the_mean_and_the_tasks_it_is_over(smollm: pd.DataFrame) -> None:
    text = render(accuracy_table(smollm), "md")
    headings = list(cells(text)[0])
    assert headings[6:] == [
        "WikiText-2 PPL @2048",
        *("MMLU (%)", "PIQA (%)", "ARC-e (%)", "ARC-c (%)", "WinoGrande (%)", "OBQA (%)", "RACE subset (%)"),
        *("HellaSwag (%)", "LAMBADA (%)", "Mean of 8 (%)"),
    ]
    assert "over the 8 tasks of the PATCH paper, without LAMBADA" in text
    assert re.fullmatch(r"39\.95 ± 0\.4\d", cells(text)[0]["Mean of 8 (%)"])


def test_what_was_not_measured_is_a_dash(study: Study, make_pruning: Make, make_trial: Make) -> None:
    half_done = make_trial("b", make_pruning("m", "magnitude", "2:4", 0.5), 30.0)
    frame = study(
        {
            "a": make_trial("a", make_pruning("m", "dense", "dense", 0.0), 20.0, {"piqa": (0.6, 100)}),
            "b": [row for row in half_done if row["stage"] == "prune"],
        }
    )
    table = accuracy_table(frame)
    assert cells(render(table, "md"))[1]["WikiText-2 PPL @2048"] == "—"
    assert cells(render(table, "md"))[1]["PIQA (%)"] == "—"
    assert "--- & ---" in render(table, "latex")
    assert render(table, "csv").splitlines()[2].endswith(",,,,,,")


def test_rows_that_no_revision_made_are_warned_of(smollm: pd.DataFrame) -> None:
    clean = study_tables(smollm)
    assert not any("Warning" in note for table in clean.values() for note in table.notes)
    changed = smollm.trial == smollm.trial.iloc[0]
    tables = study_tables(smollm.assign(dirty=changed))
    assert tables.keys() == clean.keys()
    assert all(table.notes[-1].startswith("Warning: measured with changes") for table in tables.values())


@pytest.mark.parametrize(("stage", "begins"), [("prune", "The text"), ("evaluated", f"{WARNING} the text")])
def test_rows_of_a_text_of_other_content_are_told(smollm: pd.DataFrame, stage: str, begins: str) -> None:
    first, *others = smollm.trial.unique()
    assert len(others) > 1
    reads = (smollm.stage == "prune") == (stage == "prune")

    def read(digest_of_first: str) -> dict[str, Table]:
        content = smollm.trial.map({first: digest_of_first}).fillna("a" * 64)
        sources = [{"novels": digest} if here else None for digest, here in zip(content, reads, strict=True)]
        return study_tables(smollm.assign(sources=sources))

    contents = f"{'b' * 12}, in other rows {'a' * 12}"
    said = f"{begins} novels had other content ({contents}) for {trial_labels(smollm)[first]}."
    assert all(said in table.notes for table in read("b" * 64).values())
    assert not any("other content" in note for table in read("a" * 64).values() for note in table.notes)


def test_the_best_at_equal_sparsity_is_bold(smollm: pd.DataFrame) -> None:
    rows = cells(render(accuracy_table(smollm), "md"))
    bold = [
        (row["Method"], row["Structure"], row["Target (%)"])
        for row in rows
        if row["WikiText-2 PPL @2048"].startswith("**")
    ]
    assert bold == [
        ("SparseGPT", "unstructured", "50"),
        ("SparseGPT", "2:4", "50"),
        *[("SparseGPT", "hybrid", target) for target in ("45", "35", "25")],
    ]


def test_what_is_best_stays_bold_among_fewer_rows(smollm: pd.DataFrame) -> None:
    table = accuracy_table(smollm)
    row, column = min(table.best)
    few = rows_of(table, [row])
    assert (few.rows, few.trials, few.sections) == ((table.rows[row],), (table.trials[row],), (table.sections[row],))
    assert (0, column) in few.best and len(few.best) == sum(place == row for place, _ in table.best)


def test_what_is_best_within_noise_is_not_bold(study: Study, make_pruning: Make, make_trial: Make) -> None:
    # The error of each is a hundredth of its value.
    near = {"wanda": 60.0, "sparsegpt": 61.3, "maskllm": 90.0}
    frame = study({method: make_trial(method, make_pruning("m", method, "2:4", 0.5), v) for method, v in near.items()})
    table = accuracy_table(frame)
    assert not table.best and "**" not in render(table, "md")
    assert "as if each had been measured on a text of its own" in " ".join(table.notes)
    alone = accuracy_table(frame[frame.method != "sparsegpt"])
    assert [alone.rows[row][0:2] for row, _ in alone.best] == [("m", "Wanda")]


def test_window_by_window_a_small_difference_counts(study: Study, make_pruning: Make, make_trial: Make) -> None:
    hard = [3.0, 4.0, 5.0, 4.5]
    trials = {}
    for method, value, better in (("wanda", 60.0, 0.0), ("sparsegpt", 59.5, 0.01)):
        rows = make_trial(method, make_pruning("m", method, "2:4", 0.5), value)
        losses = [loss - better * (1 + place / 10) for place, loss in enumerate(hard)]
        for row in rows:
            if row["metric"] == "perplexity":
                row["labels"] = row["labels"] | {"window_losses": losses}
        trials[method] = rows
    table = accuracy_table(study(trials))
    assert [table.rows[row][1] for row, _ in table.best] == ["SparseGPT"]
    assert "window by window and item by item." in " ".join(table.notes)


def test_divergence_is_shown_and_never_best(study: Study, make_pruning: Make, make_trial: Make) -> None:
    perplexities = {"magnitude": math.inf, "wanda": math.nan, "sparsegpt": 60.0}
    frame = study(
        {
            method: make_trial(method, make_pruning("m", method, "2:4", 0.5), value)
            for method, value in perplexities.items()
        }
    )
    table = accuracy_table(frame)
    assert [row["WikiText-2 PPL @2048"] for row in cells(render(table, "md"))] == ["inf", "nan", "60.00 ± 0.60"]
    assert r"$\infty$" in render(table, "latex")
    assert [row[5] for row in csv.reader(io.StringIO(render(table, "csv")))][1:] == ["inf", "nan", "60.0"]


def test_several_seeds_show_mean_spread_and_number(seeded: pd.DataFrame) -> None:
    text = render(accuracy_table(seeded), "md")
    row = cells(text)[5]
    assert (row["Seeds"], row["Held-out text PPL @512"]) == ("3", "40.20 ± 0.40")
    assert row["Continuation (first 400) (%)"] == "56.0 ± 1.0"
    assert cells(text)[2]["Seeds"] == "1" and "standard deviation over seeds" in text


def test_variants_get_a_column(study: Study, make_pruning: Make, make_trial: Make) -> None:
    recipes = [{"source": "train", "recipe": {"mode": "joint", "steps": steps}} for steps in (50, 60)]
    about = [make_pruning("m", "patch-joint", "hybrid", 0.25, learning=recipe) for recipe in recipes]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("ab", about, strict=True)})
    assert [row["Variant"] for row in cells(render(accuracy_table(frame), "md"))] == [
        "steps=50",
        "steps=60",
    ]


def test_csv_has_every_digit(smollm: pd.DataFrame) -> None:
    table = accuracy_table(smollm)
    read = pd.read_csv(io.StringIO(render(table, "csv")), float_precision="round_trip", keep_default_na=False)
    assert len(read) == len(table.rows) == 13
    names = [column.name for column in table.columns]
    place = names.index("accuracy piqa")
    for row, values in zip(read.to_dict("records"), table.rows, strict=True):
        measured = values[place]
        assert measured is not None and not isinstance(measured, str)
        assert row["accuracy piqa"] == measured.value and row["accuracy piqa_stderr"] == measured.stderr
        assert row["accuracy piqa_std_over_seeds"] == ""
    assert read["target_sparsity"].tolist()[:3] == [0.0, 0.5, 0.5]
    assert read["achieved_sparsity"][5] == 0.45012


def test_latex_is_booktabs_with_every_special_character_escaped(
    study: Study, make_pruning: Make, make_trial: Make
) -> None:
    names = [r"a_b&c%d#e$f{g}h~i^j\k", "plain"]
    frame = study(
        {
            str(place): make_trial(str(place), make_pruning(name, "dense", "dense", 0.0), 20.0 + place)
            for place, name in enumerate(names)
        }
    )
    lines = render(accuracy_table(frame), "latex").splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert body[0] == r"\begin{tabular}{lllrrr}" and body[-1] == r"\end{tabular}"
    assert body[1] == r"\toprule" and body[-2] == r"\bottomrule" and body.count(r"\midrule") == 2
    assert r"a\_b\&c\%d\#e\$f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k & Dense & ---" in body[4]
    assert r"Target (\%)" in body[2] and "±" not in "".join(body)
    for line in body:
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == 5


def test_latex_bold_and_plus_minus(seeded: pd.DataFrame) -> None:
    text = render(accuracy_table(seeded), "latex")
    assert r"\textbf{42.70 $\pm$ 0.40}" in text


def test_markdown_escapes_what_would_be_markup(study: Study, make_pruning: Make, make_trial: Make) -> None:
    frame = study({"a": make_trial("a", make_pruning("a|b_c*d", "dense", "dense", 0.0), 20.0)})
    assert r"a\|b\_c\*d" in render(accuracy_table(frame), "md")


def terminal(table: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table(table, width))
    return console.export_text()


def test_the_demo_fits_a_terminal_of_eighty_characters(demo: pd.DataFrame) -> None:
    text = terminal(accuracy_table(demo), 80)
    assert "PATCH joint" in text and "55.0 ± 2.5" in text and "lower is better" in text and "…" not in text
    assert text.splitlines()[0].strip() == "embedded" and text.count("embedded") == 1


def test_a_narrow_terminal_shows_the_mean_of_the_tasks(smollm: pd.DataFrame) -> None:
    wide, narrow = (terminal(accuracy_table(smollm), width) for width in (160, 80))
    for text in (wide, narrow):
        assert "unstructured" in text and "39.95 ± 0.43" in text and "…" not in text
    (dense,) = [line.split() for line in wide.splitlines() if line.strip().startswith("Dense")]
    assert dense[5:10] == ["21.46", "±", "0.21", "24.3", "68.1"] and "HellaSwag" in wide
    assert "HellaSwag" not in narrow and "too narrow" in narrow and "too narrow" not in wide


def test_unknown_formats_and_empty_studies_are_refused(demo: pd.DataFrame) -> None:
    with pytest.raises(UserError, match=r"'html'.*md, csv, latex"):
        render(accuracy_table(demo), "html")
    with pytest.raises(UserError, match="no rows"):
        accuracy_table(demo[:0])


def test_published_numbers() -> None:
    results = [result for result in published.RESULTS if result.model == "LLaMA-2-7B"]
    assert len(published.RESULTS) == 59 and len(results) == 10
    by_method = {(result.method, result.sparsity): result for result in published.RESULTS if "13B" in result.model}
    assert by_method["proxsparse", 0.5].perplexity == 7.11 and ("maskllm", 0.5) not in by_method
    for result in published.RESULTS:
        assert len(result.accuracy) == 8
        assert result.mean_accuracy == pytest.approx(sum(result.accuracy.values()) / 8, abs=1.5e-4)
    shown = [(result.method, result.perplexity, round(result.mean_accuracy, 4)) for result in results]
    assert shown[0] == ("dense", 5.12, 0.5461) and shown[1] == ("magnitude", 54.39, 0.4344)
    assert shown[-1] == ("patch-tile", 5.86, 0.5158)


@pytest.mark.parametrize(
    ("model", "method", "perplexity"),
    [
        ("meta-llama/Llama-2-7b-hf", "patch-tile", 6.55),
        ("meta-llama/Meta-Llama-3.1-8B", "patch-tile", 8.20),
        ("qwen2.5-0.5b", "patch-joint", 14.57),
        ("google/gemma-3-1b-pt", "patch-joint", 11.96),
        ("LLaMA-3.2-1B", "patch-tile", None),
        ("LLaMA-3.2-3B", "patch-joint", None),
    ],
)
def test_published_points_are_found_by_any_name_of_the_model(model: str, method: str, perplexity: float | None) -> None:
    found = published.find(model, method, "hybrid", 0.45)
    assert (found.perplexity if found else None) == perplexity


def test_published_numbers_beside_ours_are_labelled(study: Study, make_pruning: Make, make_trial: Make) -> None:
    frame = study(
        {
            "a": make_trial("a", make_pruning("llama-2-7b", "wanda", "2:4", 0.5), 12.0),
            "b": make_trial("b", make_pruning("llama-2-7b", "wanda", "hybrid", 0.45), 9.0),
        }
    )
    text = render(accuracy_table(frame, beside_published=True), "md")
    rows = cells(text)
    assert rows[0]["Published: WikiText-2 PPL @4096"] == "11.15" and rows[0]["Published: mean of 8 (%)"] == "44.30"
    assert rows[1]["Published: WikiText-2 PPL @4096"] == "—"
    assert "arXiv:2509.23410" in text and "Not measured here" in text
    assert "Published" not in render(accuracy_table(frame), "md")


def test_the_published_order_is_that_of_each_model() -> None:
    for model in published.MODELS:
        of_model = [result for result in published.RESULTS if result.model == model]
        by_perplexity = sorted(of_model, key=lambda result: -result.perplexity)
        here = [result for result in by_perplexity if result.method not in ("thanos", "proxsparse")]
        order = [(result.method.partition("-")[0], result.structure, result.sparsity) for result in here]
        assert tuple(about for about in order if about[0] != "dense") == published.ORDER


@pytest.mark.parametrize(("worst", "verdict"), [(30.0, "not as published"), (60.0, "as published")])
def test_models_that_nothing_is_published_of_are_compared_by_order(
    worst: float, verdict: str, study: Study, make_pruning: Make, make_trial: Make
) -> None:
    plain, distilled = ({"source": "train", "recipe": {"steps": 9} | part} for part in ({}, {"distillation": 1.0}))
    about = {
        "dense": (make_pruning("m", "dense", "dense", 0.0), 20.0),
        "sparsegpt": (make_pruning("m", "sparsegpt", "2:4", 0.5), worst),
        "patch": (make_pruning("m", "patch-joint", "hybrid", 0.45, learning=plain), 40.0),
        "distilled": (make_pruning("m", "patch-joint", "hybrid", 0.45, learning=distilled), 25.0),
        "wanda": (make_pruning("m", "wanda", "hybrid", 0.45), 50.0),
    }
    text = render(accuracy_table(study({k: make_trial(k, *v) for k, v in about.items()}), beside_published=True), "md")
    factor, reported = "WikiText-2 PPL @2048 (x dense)", "Published, other models (x dense)"
    rows = {(row["Method"], row["Variant"]): (row[factor], row[reported]) for row in cells(text)}
    assert rows == {
        ("Dense", "—"): ("1.00", "—"),
        ("SparseGPT", "—"): (f"{worst / 20:.2f}", "1.98 to 3.82"),
        ("Wanda", "—"): ("2.50", "—"),
        ("PATCH joint", "—"): ("2.00", "1.02 to 1.35"),
        ("PATCH joint", "distillation=1"): ("1.25", "1.02 to 1.35"),
    }
    assert "Of other models, Qwen2.5-0.5B" in text and "MaskLLM > PATCH 45% > PATCH 35%" in text
    chain = ["SparseGPT", "PATCH joint 45%"] if worst > 40 else ["PATCH joint 45%", "SparseGPT"]
    assert f"Of m, by the published recipes: {' > '.join(chain)}, {verdict}." in text


def has_latex() -> bool:
    if not shutil.which("pdflatex") or not shutil.which("kpsewhich"):
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_latex(), reason="no pdflatex with booktabs on this machine")
def test_latex_compiles(demo: pd.DataFrame, smollm: pd.DataFrame, tmp_path: Path) -> None:
    head = r"\documentclass{article}\usepackage{booktabs}\begin{document}\tiny"
    tables = [render(accuracy_table(frame), "latex") for frame in (demo, smollm)]
    committed = sorted((Path(__file__).parents[3] / "results" / "reports").glob("*/*.tex"))
    assert committed
    tables += [path.read_text() for path in committed]
    (tmp_path / "table.tex").write_text("\n\n".join([head, *tables, r"\end{document}"]))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "table.pdf").exists(), done.stdout[-2000:]
