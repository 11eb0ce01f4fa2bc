"""Published rows: nothing that was recorded is lost, anyone opens them, and damage is noticed."""

import csv
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_facts import canonical, digests

from analysis.rows import consolidate
from analysis.rows.format import Damaged, Fact, as_rows, name_of
from analysis.rows.jsonl import to_lines
from analysis.rows.layout import DETAILS, FACTS, TRIALS
from analysis.rows.load import load_rows, stored_rows
from analysis.rows.published import read, read_table, stages, table
from analysis.rows.same_checkpoint import masked_as
from experiments.studies.registry import STUDIES
from experiments.studies.trial import key
from patch.errors import UserError
from patch.learn.recipe import HOW_IT_RUNS

Row = dict[str, Any]
RESULTS = Path(__file__).parents[3] / "results"
RECORDED = [line.split() for line in (Path(__file__).parents[2] / "recorded_facts.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def committed() -> list[Row]:
    """All rows under ``results/``."""
    return list(stored_rows(RESULTS))


@pytest.mark.parametrize("folder", sorted({line[0] for line in RECORDED}))
def test_nothing_that_was_recorded_is_lost(folder: str, committed: list[Row]) -> None:
    found = digests(committed if folder == "." else stored_rows(RESULTS / folder))
    wanted = {(trial, stage): (int(count), digest) for at, trial, stage, count, digest in RECORDED if at == folder}
    assert len(wanted) >= 16 and {about: found.get(about) for about in wanted} == wanted


# Trained or fitted within masks that were made again for it and are not those beside, as pages say: ranking and
# learning choose other tiles in each run. What is rounded is always of the mask beside.
MADE_AGAIN = {
    "embedded-refit": {"3b0972ba1014", "e72ef0267521", "e881be5201e6"},
    "smollm2-refit": {"da6dc33efc82"},
    "smollm2-recovered": {"46fd53be072c", "3da6515c9eea", "d25a270e758d"},
    "smollm2-recovered-mixture": {"2b8172130535"},
    "qwen-coder-0.5b-recovered": {"76f3994b7c95", "1a162eacaf54"},
}


def test_what_is_done_within_a_mask_has_the_tiles_of_the_mask_beside_it(committed: list[Row]) -> None:
    """Rows that are older than ``base`` tell by tiles alone."""
    tiles: dict[str, dict[str, Any]] = {}
    definitions: dict[str, Row] = {}
    for row in committed:
        if row["metric"] == "tile_map":
            tiles.setdefault(row["trial"], {})[row["labels"]["layer"]] = row["labels"]["tile_map"]
            definitions[row["trial"]] = row["definition"]["pruning"]
    others: dict[str, set[str]] = {}
    compared = 0
    for name, study in STUDIES.items():
        mine = {trial: definitions[trial] for trial in map(key, study.trials()) if trial in tiles}
        masks = {canonical(pruning): trial for trial, pruning in mine.items()}
        for trial, pruning in mine.items():
            if plain := masks.get(canonical(masked_as(pruning))):
                compared += 1
                if tiles[plain] != tiles[trial]:
                    others.setdefault(name, set()).add(trial)
    assert others == MADE_AGAIN and compared > 100


def test_facts_are_one_line_of_pandas() -> None:
    facts = pd.read_csv(RESULTS / FACTS)
    frame = load_rows(RESULTS, parts=False)
    for metric in ("perplexity", "sparsity", "speedup"):
        mine = facts[facts.metric == metric].sort_values(["trial", "stage", "on", "value"])
        theirs = frame[(frame.metric == metric) & frame.labels.map(lambda labels: labels.get("carried") is not True)]
        mine = mine[mine.carried.ne(True)]
        assert sorted(mine.value) == pytest.approx(sorted(theirs.value)) and len(mine) > 100
    assert {"trial", "model", "tile", "achieved", "seed", "stderr", "gpu", "revision", "time"} <= set(facts.columns)
    guided = facts[(facts.method == "patch-joint") & (facts.target == 0.45) & (facts.on == "wikitext2/test@2048")]
    guided = guided[(guided.metric == "perplexity") & (guided.variant == "guided")]
    assert guided.value.min() == pytest.approx(31.66, abs=0.005)
    assert facts.spread.notna().sum() > 50 and facts.seeds.max() > 1


def test_publishing_what_is_published_changes_nothing(committed: list[Row], tmp_path: Path) -> None:
    for name in (FACTS, TRIALS):
        shutil.copy(RESULTS / name, tmp_path / name)
    shutil.copytree(RESULTS / DETAILS, tmp_path / DETAILS)
    known = stages(RESULTS)
    published = consolidate.stages_of(row for row in committed if row["trial"] in known)
    assert {trial: set(mine) for trial, mine in published.items()} == {
        trial: set(told) for trial, told in known.items()
    }
    assert consolidate.write(tmp_path, consolidate.merged(published, published)) == []


# Made up


def definition(sparsity: float = 0.5, seed: int = 0) -> Row:
    pruning = {"model": "m", "method": "wanda", "structure": "hybrid", "sparsity": sparsity, "tile": [4, 4]}
    return {"pruning": pruning | {"seed": seed}, "evaluation": {"limit": None}}


def rows_of(about: Row, value: float = 20.0, dirty: bool | None = False) -> list[Row]:
    provenance = {"git": "abc", "dirty": dirty, "gpu": None, "time": "2026-01-01T00:00:00Z"}
    pruned = [
        Fact("loss", 0.1 + 0.2, "1", {"step": 1}),
        Fact("tile_map", None, "1", {"layer": "q", "tile_map": ["01", "10"]}),
        Fact("sparsity", about["pruning"]["sparsity"], "1", {}),
    ]
    losses = {"window_losses": [1.5, 2.5]}
    text = [Fact("perplexity", value, "ppl", {"source": "a/b", "length": 8} | losses, 0.25)]
    timed = [Fact("dense_time", 7, "us", {"tile": [4, 4], "note": "0.5"}, None, 6.5, 7.5, 11)]
    by_stage = {"prune": pruned, "perplexity:a/b@8": text, "speed:decode@1x1": timed}
    name = name_of(about)
    return [row for stage, facts in by_stage.items() for row in as_rows(name, about, stage, facts, provenance)]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    rows = [*rows_of(definition()), *rows_of(definition(seed=1), 22.0), *rows_of(definition(0.25), 10.0)]
    consolidate.write(tmp_path, consolidate.stages_of(rows))
    return tmp_path


def test_rows_are_the_same_after_publishing(published: Path) -> None:
    rows = rows_of(definition(0.25), 10.0)
    ((trial, found),) = read(published, [name_of(definition(0.25))])
    assert not isinstance(found, Damaged) and trial == rows[0]["trial"]
    assert sorted(map(canonical, rows)) == sorted(canonical(row) for _, row in found)


def test_what_a_reader_asks_first_is_in_columns(published: Path) -> None:
    facts = pd.read_csv(published / FACTS)
    assert list(facts.columns[:9]) == [
        "trial", "model", "method", "structure", "variant", "tile", "target", "achieved", "seed",
    ]  # fmt: skip
    text = facts[facts.metric == "perplexity"].set_index(["target", "seed"])
    assert (text.on == "a/b@8").all() and text.value.to_dict() == {(0.5, 0): 20, (0.5, 1): 22, (0.25, 0): 10}
    assert text.spread[0.5, 0] == pytest.approx(2**0.5, rel=1e-5) and pd.isna(text.spread[0.25, 0])
    assert text.seeds.tolist() == [2, 2, 1] and text.stderr.tolist() == [0.25] * 3
    details = pd.read_csv(published / DETAILS / f"{name_of(definition())}.csv.xz")
    assert details.metric.tolist() == ["perplexity", "loss", "tile_map"] and details.step[1] == 1
    assert details.window_losses[0] == "[1.5, 2.5]" and "window_losses" not in facts.columns


def test_journal_and_tables_are_read_as_one(published: Path) -> None:
    rows = rows_of(definition(0.35), 15.0)
    path = published / "rows" / rows[0]["trial"] / "prune.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(to_lines(row for row in rows if row["stage"] == "prune"))
    frame = load_rows(published)
    assert set(frame.sparsity) == {0.5, 0.25, 0.35} and len(frame) == 3 * 5 + 3
    line = frame[(frame.metric == "loss") & (frame.sparsity == 0.35)].origin.iloc[0]
    assert line == f"rows/{path.parent.name}/prune.jsonl:1"
    # What stands in both is one fact.
    again = rows_of(definition())
    other = published / "rows" / again[0]["trial"] / "prune.jsonl"
    other.parent.mkdir()
    other.write_text(to_lines(row for row in again if row["stage"] == "prune"))
    assert len(load_rows(published)) == len(frame)


def test_without_parts_the_first_of_each_metric_stands_for_layers_and_steps(tmp_path: Path) -> None:
    about, facts = definition(), [Fact("loss", step / 3, "1", {"step": step}) for step in range(1, 4)]
    facts += [Fact("share", 0.5, "1", {"layer": layer}) for layer in "qk"] + [Fact("sparsity", 0.5, "1", {})]
    rows = as_rows(name_of(about), about, "prune", facts, {"git": "abc", "dirty": False, "gpu": None, "time": "2026"})
    journal = tmp_path / "journal" / "rows" / name_of(about) / "prune.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text(to_lines(rows))
    consolidate.write(tmp_path, consolidate.stages_of(rows))
    for root in (tmp_path, journal.parents[2]):
        kept = load_rows(root, {name_of(about)}, parts=False)
        assert set(zip(kept.metric, kept.value, strict=True)) == {("loss", 1 / 3), ("share", 0.5), ("sparsity", 0.5)}
        assert len(kept) == 3 and len(load_rows(root, {name_of(about)})) == 6


@pytest.mark.parametrize("form", ["facts", "order", "file order"])
def test_publishing_does_not_depend_on_order(published: Path, form: str, tmp_path: Path) -> None:
    rows = [row for at in (definition(), definition(0.25), definition(seed=1)) for row in rows_of(at, 1.0)]
    one, two = (tmp_path / name for name in ("one", "two"))
    consolidate.write(one, consolidate.stages_of(rows))
    by_trial = sorted(rows, key=lambda row: row["trial"]) if form == "order" else rows
    first = [row for row in by_trial if row["stage"] == "prune"] if form == "facts" else by_trial
    consolidate.write(two, consolidate.stages_of(first))
    consolidate.write(two, consolidate.merged(consolidate.published_stages(two), consolidate.stages_of(by_trial)))
    for path in sorted(one.rglob("*.*")):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()


def test_other_facts_of_what_is_published_are_refused(published: Path) -> None:
    old = consolidate.published_stages(published)
    with pytest.raises(UserError, match="published with other facts"):
        consolidate.merged(old, consolidate.stages_of(rows_of(definition(), 20.5)))


@pytest.mark.parametrize("dirty", [True, False, None])
def test_rows_of_a_changed_tree_are_refused_unless_asked_for(dirty: bool | None) -> None:
    new = consolidate.stages_of(rows_of(definition(), dirty=dirty))
    assert consolidate.merged({}, new, allow_dirty=True) == new
    if dirty:
        with pytest.raises(UserError, match="--dirty"):
            consolidate.merged({}, new)
    else:
        assert consolidate.merged({}, new) == new


def test_a_definition_of_another_name_is_refused() -> None:
    rows = [row | {"trial": "0" * 12} for row in rows_of(definition())]
    with pytest.raises(UserError, match="hash"):
        consolidate.merged({}, consolidate.stages_of(rows))


@pytest.mark.parametrize("published", [True, False], ids=["published-before", "at-once"])
def test_stages_of_a_recipe_that_ran_in_two_ways_are_refused(published: bool) -> None:
    one, other = definition(), definition()
    one["pruning"]["recipe"], other["pruning"]["recipe"] = ({"steps": 5, next(iter(HOW_IT_RUNS)): n} for n in (1, 2))
    assert name_of(one) == name_of(other) and one != other
    before = consolidate.stages_of(row for row in rows_of(one) if row["stage"] == "prune")
    rows = [row for row in rows_of(other) if row["stage"] != "prune"]
    if not published:
        rows += next(iter(before.values()))["prune"]
    with pytest.raises(UserError, match="two definitions"):
        consolidate.merged(before if published else {}, consolidate.stages_of(rows))


def test_what_was_not_measured_is_not_published() -> None:
    about = definition()
    nothing = [Fact("failure", None, "1", {"error": "no"}), Fact("skipped", None, "1", {"reason": "no GPU"})]
    counted = [Fact("skipped", 3, "1", {"file": "test.py"})]
    for facts, kept in ((nothing, 0), (counted, 1)):
        assert len(consolidate.stages_of(as_rows(name_of(about), about, "x", facts, {}))) == kept


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(change(lzma.decompress(data))))
    else:
        path.write_bytes(change(data))
    assert path.read_bytes() != data


DAMAGES = {
    "facts cut at a line's end": (FACTS, lambda data: b"".join(data.splitlines(keepends=True)[:-1])),
    "facts empty": (FACTS, lambda data: b""),
    "a number changed": (FACTS, lambda data: data.replace(b",20.0,", b",20.5,")),
    "a label changed": (FACTS, lambda data: data.replace(b'"[4, 4]"', b'"[4, 8]"')),
    "facts not utf-8": (FACTS, lambda data: data.replace(b"wanda", b"w\xffnda")),
    "a cell too many": (FACTS, lambda data: data.replace(b",20.0,", b",20.0,,")),
    "trials cut within a line": (TRIALS, lambda data: data[:-30]),
    "a definition changed": (TRIALS, lambda data: data.replace(b'"method":"wanda"', b'"method":"wandb"')),
    "a stage's name changed": (TRIALS, lambda data: data.replace(b'"prune"', b'"prone"')),
    "details cut at a line's end": (DETAILS, lambda data: b"".join(data.splitlines(keepends=True)[:-1])),
    "details not a table": (DETAILS, lambda data: b"\xff" + data),
}


@pytest.mark.parametrize("parts", [True, False], ids=["whole", "without-parts"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(damage: str, parts: bool, published: Path) -> None:
    name, change = DAMAGES[damage]
    edit(published / DETAILS / f"{name_of(definition())}.csv.xz" if name == DETAILS else published / name, change)
    with pytest.raises(UserError, match=rf"{name}|{TRIALS}"):
        load_rows(published, parts=parts)


def test_one_damaged_trial_is_told_and_the_others_are_read(published: Path) -> None:
    bad = name_of(definition())
    (published / DETAILS / f"{bad}.csv.xz").write_bytes(b"no")
    told: list[str] = []
    frame = load_rows(published, on_damage=told.append)
    assert len(told) == 1 and bad in told[0]
    assert set(frame.trial) == {name_of(definition(seed=1)), name_of(definition(0.25))}


def test_stages_are_listed(published: Path) -> None:
    assert set(stages(published)) == {name_of(definition(*of)) for of in ((0.5, 0), (0.5, 1), (0.25, 0))}
    assert set(stages(published)[name_of(definition())]) == {"prune", "perplexity:a/b@8", "speed:decode@1x1"}
    assert stages(published / "elsewhere") == {}


NAMES = st.sampled_from(["tile", "metric", "step", "a b", "gpu", "labels", "seeds", "trial"])
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers())
TRICKY = st.sampled_from(["", "1", "true", "null", "NaN", " 1", '"', "a,b", "a\nb", "\r\n", "é", "[1]", "-0", "\u2028"])
NUMBERS = st.none() | st.integers() | st.floats(allow_nan=False)


@given(facts=st.lists(st.tuples(st.dictionaries(NAMES, VALUES | TRICKY), NUMBERS), max_size=4))
def test_any_fact_reads_as_it_was_written(facts: list[tuple[Row, float | None]], tmp_path_factory: Any) -> None:
    rows = [
        {"trial": "t", "stage": "s:a:b", "metric": "m", "unit": "1", "value": value, "stderr": None}
        | {"p20": value, "p80": None, "runs": 1, "labels": labels}
        for labels, value in facts
    ]
    path = tmp_path_factory.mktemp("table") / "facts.csv"
    path.write_bytes(table(rows, ("trial",)).encode())
    found = [row for _, row in read_table(path, path.name)]
    assert list(map(repr, (sorted(row.items()) for row in found))) == [
        repr(sorted((row | {"labels": {n: row["labels"][n] for n in sorted(row["labels"])}}).items())) for row in rows
    ]
    columns, *lines = csv.reader(path.open(newline=""))
    assert all(len(line) == len(columns) for line in lines)
