"""The results directory: whole files or none, and locks that die with their process."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dev_cluster import wait_until
from forked import Python
from hypothesis import given
from hypothesis import strategies as st

from analysis.rows import layout
from analysis.rows.format import SCHEMA, Fact
from analysis.rows.jsonl import from_lines, to_lines
from experiments.publish import measured
from experiments.publish.committed import consolidate_into
from experiments.run.store import Store
from experiments.studies.trial import Calibration, Evaluation, Pruning, Trial, definition, key
from patch.errors import UserError

TRIAL = Trial(Pruning("embedded", "wanda", "2:4", 0.5, (64, 64), calibration=Calibration()), Evaluation())


def test_rows_carry_definition_and_provenance(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), "perplexity:wikitext2/test@2048"
    facts = [Fact("perplexity", 12.5, "ppl", {"length": 2048}, 0.1), Fact("tile_map", None, "1", {"layer": "q"})]
    assert not store.has_rows(TRIAL, stage)
    store.write_rows(TRIAL, stage, facts, {"git": "abc"})
    assert store.has_rows(TRIAL, stage)
    rows = store.read_rows(TRIAL, stage)
    assert [row["metric"] for row in rows] == ["perplexity", "tile_map"]
    for row in rows:
        assert row["schema"] == SCHEMA and row["trial"] == key(TRIAL) and row["stage"] == stage
        assert row["definition"] == definition(TRIAL) and row["provenance"] == {"git": "abc"}
    assert rows[0]["value"] == 12.5 and rows[0]["stderr"] == 0.1 and rows[1]["value"] is None
    assert json.loads((tmp_path / "rows" / key(TRIAL) / "definition.json").read_text()) == definition(TRIAL)


def test_a_directory_that_cannot_be_written_to_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Who runs the tests may be allowed everything.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="cannot be written to: name another with --results"):
        Store(tmp_path).make()
    Store(tmp_path / "new").make()
    assert (tmp_path / "new").is_dir()


def test_stages_have_files_of_their_own_inside_the_trial(tmp_path: Path) -> None:
    stages = ["prune", "task:piqa", "perplexity:wikitext2/test@2048", "perplexity:../../etc@5", "task:arc_easy"]
    paths = [Store(tmp_path).rows_path(TRIAL, stage) for stage in stages]
    assert len(set(paths)) == len(stages)
    assert {path.resolve().parent for path in paths} == {(tmp_path / "rows" / key(TRIAL)).resolve()}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    facts = [Fact("loss", 1.0 / step, "1", {"step": step}) for step in range(1, 5)]
    Store(tmp_path).write_rows(TRIAL, "prune", facts, {"git": "abc"})
    return Store(tmp_path).rows_path(TRIAL, "prune")


DAMAGES = {
    "empty": lambda data: b"",
    "cut at a line's end": lambda data: b"".join(data.splitlines(keepends=True)[:3]),
    "end cut off": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
    "cut within a line": lambda data: data[: len(data) // 2],
    "a row gone": lambda data: b"".join(data.splitlines(keepends=True)[i] for i in (0, 1, 3, 4)),
    "a digit changed": lambda data: data.replace(b'"value": 0.5', b'"value": 0.7'),
    "not utf-8": lambda data: data.replace(b"abc", b"a\xffc"),
    "written twice": lambda data: data + data,
    "schema -1": lambda data: data.replace(b'"schema": 3', b'"schema": -1'),
    "of another trial": lambda data: to_lines(row | {"trial": "0" * 12} for row in from_lines(data.decode())).encode(),
    "a field of another kind": lambda data: to_lines(
        row | {"labels": [1]} for row in from_lines(data.decode())
    ).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stage_is_not_complete_and_is_set_aside_when_measured_again(
    damage: str, stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, whole = Store(tmp_path), stored.read_bytes()
    broken = DAMAGES[damage](whole)
    assert broken != whole and store.has_rows(TRIAL, "prune")
    stored.write_bytes(broken)
    assert not store.has_rows(TRIAL, "prune") and store.read_rows(TRIAL, "prune") == []
    store.write_rows(TRIAL, "prune", [Fact("sparsity", 0.5, "1", {})], {"git": "def"})
    assert [row["value"] for row in store.read_rows(TRIAL, "prune")] == [0.5]
    assert stored.with_name("prune.jsonl.damaged").read_bytes() == broken
    assert "prune.jsonl" in caplog.text


def test_rows_of_a_newer_schema_are_neither_complete_nor_missing(stored: Path, tmp_path: Path) -> None:
    stored.write_bytes(stored.read_bytes().replace(b'"schema": 3', b'"schema": 4'))
    with pytest.raises(UserError, match="schema 4"):
        Store(tmp_path).has_rows(TRIAL, "prune")


def test_what_has_no_hash_but_its_name_is_held_to_that(stored: Path, tmp_path: Path) -> None:
    """Files of before they ended with a digest: tables would show them as of another sparsity, say."""
    text = stored.read_text(encoding="utf-8").replace('"schema": 3', '"schema": 2')
    stored.write_text("".join(text.splitlines(keepends=True)[:-1]), encoding="utf-8")
    assert len(measured.frame([TRIAL], Store(tmp_path))) == 4
    edited = stored.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1')
    assert edited != stored.read_text(encoding="utf-8")
    stored.write_text(edited, encoding="utf-8")
    with pytest.raises(UserError, match=rf"prune\.jsonl:1: the definition is not that of trial {key(TRIAL)}"):
        measured.frame([TRIAL], Store(tmp_path))


@pytest.mark.parametrize("schema", [1, 2])
def test_files_of_before_there_was_an_end_are_complete(schema: int, stored: Path, tmp_path: Path) -> None:
    text = stored.read_text(encoding="utf-8")
    old = text.replace('"schema": 3', f'"schema": {schema}').splitlines(keepends=True)[:-1]
    stored.write_text("".join(old), encoding="utf-8")
    assert Store(tmp_path).has_rows(TRIAL, "prune") and len(Store(tmp_path).read_rows(TRIAL, "prune")) == 4


@pytest.mark.parametrize("data", [b"", b"\xff", b"{}", b"[]\n"], ids=["empty", "not utf-8", "no row", "list"])
def test_a_failure_that_cannot_be_read_is_still_one(data: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_failure(TRIAL, "prune", ValueError("no"), {})
    assert (store.failure(TRIAL) or {})["error"] == "ValueError: no"
    store.rows_path(TRIAL, "failure").write_bytes(data)
    assert "failure.jsonl" in (store.failure(TRIAL) or {})["error"]


HOLDER = """
import sys, time
from pathlib import Path
from experiments.run.store import Store
with Store(Path(sys.argv[1])).lease("trial-x") as mine:
    print(mine, flush=True)
    time.sleep(120)
"""


@pytest.fixture
def owner(tmp_path: Path):  # type: ignore[no-untyped-def]
    process = Python(HOLDER, tmp_path)
    wait_until("it holds the lease", lambda: process.stdout == "True\n")
    yield process
    process.kill()


def test_a_lease_keeps_others_out_until_its_owner_dies(tmp_path: Path, owner: Python) -> None:
    store = Store(tmp_path)
    with store.lease("trial-x", wait=False) as mine:
        assert not mine
    assert set(store.leased()) == {"trial-x"}
    with store.lease("trial-y", wait=False) as mine:
        assert mine
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with store.lease("trial-x", wait=False) as mine:
        assert mine
    assert store.leased() == {}
    assert list((tmp_path / "locks").iterdir()) == []


def test_waiting_for_a_lease_ends_when_its_owner_does(tmp_path: Path, owner: Python) -> None:
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({owner.pid}, 9)"])
    started = time.monotonic()
    with Store(tmp_path).lease("trial-x") as mine:
        assert mine
    assert time.monotonic() - started >= 0.3
    killer.wait()


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
ROW = st.dictionaries(st.sampled_from(["metric", "value", "labels", "unit"]), VALUES)


@given(st.lists(ROW))
def test_rows_read_as_they_were_written(rows: list[dict[str, object]]) -> None:
    """Also values that are equal and not the same, such as 1 and True, and rows with other fields than that above."""
    whole = [{"schema": SCHEMA} | row for row in rows]
    found = from_lines(to_lines(whole))
    assert json.dumps(found, sort_keys=True) == json.dumps(whole, sort_keys=True)


def test_what_rows_share_is_written_once() -> None:
    shared = {"schema": SCHEMA, "definition": "d" * 1000, "labels": {}}
    text = to_lines([shared | {"value": value} for value in (1.0, 2.0, 2.0)])
    assert text.splitlines()[1:-1] == ['{"value": 2.0}', "{}"] and text.count("d" * 1000) == 1


def test_what_is_published_is_complete_without_reading_its_facts(stored: Path, tmp_path: Path) -> None:
    """A study's status would take seconds a trial, and one damaged table would stop the trials of others."""
    consolidate_into(tmp_path, tmp_path / "results", True)
    store = Store(tmp_path / "results")
    assert store.has_rows(TRIAL, "prune") and not store.has_rows(TRIAL, "speed")
    (tmp_path / "results" / layout.FACTS).write_text("cut off")
    assert Store(tmp_path / "results").has_rows(TRIAL, "prune")
    with pytest.raises(UserError, match=r"facts.csv: not a table"):
        Store(tmp_path / "results").read_rows(TRIAL, "prune")
