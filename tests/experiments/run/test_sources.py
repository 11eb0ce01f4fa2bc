"""Nothing is taken for what was asked for if the texts that it was made of hold something else by now."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from tiny_study import tiny_trials
from transformers import AutoModelForCausalLM

from analysis.rows.jsonl import from_lines, to_lines
from experiments.data import models, text
from experiments.eval import tasks
from experiments.eval.names import EMBEDDED_TASK
from experiments.run import checkpoints, pipeline, recovered
from experiments.run.runtime import Machine
from experiments.run.sources import TASK, Sources
from experiments.run.store import Store
from experiments.studies import build
from experiments.studies.trial import Calibration, Evaluation, Perplexity, Pruning, Recovery, Trial
from patch.checkpoint import INFO_FILE, content_hash
from patch.errors import UserError
from patch.learn.descent import Stopped
from patch.recover.recipe import RecoveryRecipe

RECOVERY = RecoveryRecipe(steps=4, batch=2, microbatch=2, length=16, block_epochs=0, log_every=2)


def machine(data: Path | None = None) -> Machine:
    """A new one, as each command has."""
    return Machine("cpu", data, lambda *_: None)


@pytest.fixture
def words(tiny_text: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_text, tmp_path / "words.jsonl"))


@contextmanager
def told(after: int) -> Iterator[Callable[[], bool]]:
    """What `deferred_signals` yields where a signal comes after so many questions."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > after

    yield stop


def change(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[1:] + lines[:1]) + "\n", encoding="utf-8")


def prunings(model: Path, words: Path) -> dict[str, Pruning]:
    seen = Calibration(str(words), windows=8, length=16)
    wanda = build.one_shot(str(model), "wanda", "2:4", 0.5, (16, 16), seen)
    magnitude = build.one_shot(str(model), "magnitude", "2:4", 0.5, (16, 16), seen)
    return {
        "calibrated": wanda,
        "refitted": build.refitted(magnitude, seen),
        "quantised": build.quantised(magnitude, "int4", seen),
        "fewer blocks": build.fewer_blocks(str(model), 0.5, seen),
        "learned": tiny_trials(model, words, steps=2)[2].pruning,
        "recovered": dataclasses.replace(magnitude, recovery=Recovery(str(words), RECOVERY)),
        "on a base of it": build.quantised(wanda, "int8", seen),
    }


@pytest.mark.parametrize(
    "kind", ["calibrated", "refitted", "quantised", "fewer blocks", "learned", "recovered", "on a base of it"]
)
def test_a_checkpoint_of_a_text_that_changed_is_refused(
    kind: str, tiny_model: Path, words: Path, tmp_path: Path
) -> None:
    pruning, store = prunings(tiny_model, words)[kind], Store(tmp_path / "runs")
    path = checkpoints.ensure_checkpoint(pruning, store, machine())
    assert path is not None and checkpoints.ensure_checkpoint(pruning, store, machine()) == path
    before = (path / INFO_FILE).read_bytes()
    change(words)
    with pytest.raises(UserError) as refused:
        checkpoints.ensure_checkpoint(pruning, store, machine())
    assert str(words) in str(refused.value) and f"remove {path} to make it anew" in str(refused.value)
    assert "\n" not in str(refused.value) and (path / INFO_FILE).read_bytes() == before
    shutil.rmtree(store.root)
    assert checkpoints.ensure_checkpoint(pruning, store, machine()) == path


def test_what_older_checkpoints_stand_on_is_compared_where_it_is_there(
    tiny_model: Path, words: Path, tmp_path: Path
) -> None:
    pruning, store = prunings(tiny_model, words)["on a base of it"], Store(tmp_path / "runs")
    path = checkpoints.ensure_checkpoint(pruning, store, machine())
    assert path is not None
    info = json.loads((path / INFO_FILE).read_text())
    assert info["provenance"].pop("sources").keys() == {str(words)}
    del info["digest"]
    (path / INFO_FILE).write_text(json.dumps(info))
    assert checkpoints.ensure_checkpoint(pruning, store, machine()) == path
    change(words)
    assert pruning.base is not None
    with pytest.raises(UserError, match=f"checkpoint {store.checkpoint_path(pruning.base)} is of"):
        checkpoints.ensure_checkpoint(pruning, store, machine())
    shutil.rmtree(store.checkpoint_path(pruning.base))
    assert checkpoints.ensure_checkpoint(pruning, store, machine()) == path, "of before there were hashes"


@pytest.mark.parametrize("kind", ["refitted", "quantised", "recovered"])
def test_a_checkpoint_of_another_checkpoint_of_its_mask_is_refused(
    kind: str, tiny_model: Path, words: Path, tmp_path: Path
) -> None:
    pruning, store = prunings(tiny_model, words)[kind], Store(tmp_path / "runs")
    path = checkpoints.ensure_checkpoint(pruning, store, machine())
    assert path is not None and pruning.masked_as is not None
    base = store.checkpoint_path(pruning.masked_as)
    assert checkpoints.facts_of(pruning, store)[1]["base"] == content_hash(base)
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"^{path} was made of checkpoint .*, {base} is now .* or remove the former"):
        checkpoints.ensure_checkpoint(pruning, store, machine())
    shutil.rmtree(base)
    assert checkpoints.ensure_checkpoint(pruning, store, machine()) == path, "nothing is there to compare with"


def test_rows_of_a_text_that_changed_are_refused(tiny_model: Path, words: Path, tmp_path: Path) -> None:
    store, trial = Store(tmp_path / "runs"), tiny_trials(tiny_model, words)[0]
    pipeline.run_trial(trial, store, machine())
    pipeline.run_trial(trial, store, machine())
    stage = pipeline.stages(trial)[-1]
    path = store.rows_path(trial, stage)
    before = path.read_bytes()
    content = words.read_bytes()
    change(words)
    with pytest.raises(UserError, match=f"{stage} is of .* with other content .* or remove {path.parent}"):
        pipeline.run_trial(trial, store, machine())
    assert path.read_bytes() == before
    other = Store(tmp_path / "others")
    pipeline.run_trial(trial, other, machine())
    value, changed = (rows.read_rows(trial, stage)[0]["value"] for rows in (store, other))
    assert value != changed
    words.write_bytes(content)
    pipeline.run_trial(trial, store, machine())
    shutil.rmtree(path.parent)
    change(words)
    pipeline.run_trial(trial, store, machine())
    assert store.read_rows(trial, stage)[0]["value"] == changed


def test_rows_without_a_hash_are_taken_as_they_are(tiny_model: Path, words: Path, tmp_path: Path) -> None:
    store, trial = Store(tmp_path / "runs"), tiny_trials(tiny_model, words)[0]
    pipeline.run_trial(trial, store, machine())
    for stage in pipeline.stages(trial):
        path = store.rows_path(trial, stage)
        rows = from_lines(path.read_text())
        for row in rows:
            row["provenance"] = {name: part for name, part in row["provenance"].items() if name != "sources"}
        path.write_text(to_lines(rows))
    change(words)
    pipeline.run_trial(trial, store, machine())


def test_a_named_text_of_another_data_directory_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, word in zip(folders, ("river ", "king "), strict=True):
        (folder / "wikitext2").mkdir(parents=True)
        (folder / "wikitext2" / "wiki.test.raw").write_text(word * 200 + "\n")
    trial = Trial(build.dense(str(tiny_model)), Evaluation((Perplexity("wikitext2/test", 16),)))
    store = Store(tmp_path / "runs")
    pipeline.run_trial(trial, store, machine(folders[0]))
    with pytest.raises(UserError, match="perplexity:wikitext2/test@16 is of wikitext2/test with other content"):
        pipeline.run_trial(trial, store, machine(folders[1]))
    pipeline.run_trial(trial, store, machine(folders[0]))


def test_a_text_of_the_hub_that_cannot_be_reached_is_taken_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any) -> None:
        raise text.Unreachable("c4 cannot be fetched")

    monkeypatch.setattr(text, "load_documents", away)
    Sources(None).check_same({"sources": {"c4": "a" * 64}}, "rows", tmp_path)
    assert "c4 cannot be fetched: what was made of it is taken as it is" in caplog.text


def test_a_complete_trial_needs_no_text(
    tiny_model: Path, words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "runs")
    evaluation = Evaluation((Perplexity(str(words), 16),))
    pruned = prunings(tiny_model, words)["calibrated"]
    trials = [Trial(pruning, evaluation) for pruning in (build.dense(str(tiny_model)), pruned)]
    for trial in trials:
        pipeline.run_trial(trial, store, machine())
    content = words.read_bytes()
    words.unlink()
    ended: list[Exception | None] = []
    pipeline.run_trials(trials, store, machine(), lambda _, error: ended.append(error))
    assert ended == [None, None]
    assert [record.message for record in caplog.records if "taken as it is" in record.message] == [
        f"text source {words}: no such file: what was made of it is taken as it is"
    ]
    words.write_bytes(content)
    change(words)
    pipeline.run_trials(trials, store, machine(), lambda _, error: ended.append(error))
    assert all(isinstance(error, UserError) for error in ended[2:])


@pytest.mark.parametrize("name", ["novels", "a/folder", "src/*.py", TASK + "piqa", TASK + "humaneval"])
def test_what_is_not_there_has_not_changed(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = Sources(tmp_path)
    for _ in range(2):
        sources.check_same({"sources": {name: "a" * 64}}, "rows", tmp_path)
    assert caplog.text.count("what was made of it is taken as it is") == 1


def test_a_text_that_is_there_and_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text("{")
    with pytest.raises(UserError, match="cannot read text from"):
        Sources(None).check_same({"sources": {str(tmp_path / "words.jsonl"): "a" * 64}}, "rows", tmp_path)


def test_items_that_are_edited_while_they_are_evaluated_are_not_recorded_as_measured(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tmp_path / "data" / "tasks" / "piqa_validation.jsonl"
    items.parent.mkdir(parents=True)
    items.write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n')
    before = tasks.fingerprint("piqa", tmp_path / "data")

    def evaluated(*_: Any, **__: Any) -> list[tasks.TaskResult]:
        items.write_text("{}\n")
        return [tasks.share_of("piqa", "acc", [True])]

    monkeypatch.setattr(tasks, "evaluate_tasks", evaluated)
    trial, store = Trial(build.dense(str(tiny_model)), Evaluation((), ("piqa",))), Store(tmp_path / "runs")
    pipeline.run_trial(trial, store, machine(tmp_path / "data"))
    assert store.read_rows(trial, TASK + "piqa")[0]["provenance"]["sources"] == {TASK + "piqa": before}
    with pytest.raises(UserError, match="is of task:piqa with other content"):
        pipeline.run_trial(trial, store, machine(tmp_path / "data"))


@pytest.mark.parametrize(
    "other",
    [lambda folder: folder.joinpath("tasks/piqa_validation.jsonl").write_text("{}\n") and folder, lambda folder: None],
    ids=["another directory", "the hub"],
)
def test_rows_of_a_task_whose_items_changed_are_refused(other: Callable[[Path], Path | None], tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa_validation.jsonl").write_text('{"goal": "a"}\n')
    recorded = {"sources": {TASK + "piqa": tasks.fingerprint("piqa", tmp_path)}}
    Sources(tmp_path).check_same(recorded, "task:piqa", tmp_path)
    with pytest.raises(UserError, match="is of task:piqa with other content"):
        Sources(other(tmp_path)).check_same(recorded, "task:piqa", tmp_path)


def test_rows_of_tasks_say_what_they_were_measured_on(tiny_model: Path, tmp_path: Path) -> None:
    trial = Trial(build.dense(str(tiny_model)), Evaluation((), (EMBEDDED_TASK,), limit=2))
    store = Store(tmp_path)
    pipeline.run_trial(trial, store, machine())
    rows = store.read_rows(trial, TASK + EMBEDDED_TASK)
    assert rows[0]["provenance"]["sources"] == {TASK + EMBEDDED_TASK: tasks.fingerprint(EMBEDDED_TASK, None)}


@pytest.mark.parametrize("kind", ["learned", "recovered"])
def test_a_run_goes_on_with_its_own_text_alone(
    kind: str, tiny_model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Magnitude is its prior, so that the text of the run is all that changes."""
    pruning, store = prunings(tiny_model, words)[kind], Store(tmp_path / "runs")
    if kind == "learned":
        assert pruning.prior is not None
        magnitude = dataclasses.replace(pruning.prior, method="magnitude", calibration=None)
        pruning = dataclasses.replace(pruning, prior=magnitude)
    for module in (checkpoints, recovered):
        monkeypatch.setattr(module, "deferred_signals", lambda: told(after=1))
    with pytest.raises(Stopped):
        checkpoints.ensure_checkpoint(pruning, store, machine())
    content = words.read_bytes()
    change(words)
    with pytest.raises(UserError, match=rf"learner.pt belongs to another run \(content of {words} differ"):
        checkpoints.ensure_checkpoint(pruning, store, machine())
    words.write_bytes(content)
    monkeypatch.undo()
    assert checkpoints.ensure_checkpoint(pruning, store, machine()) is not None


def test_recovering_another_checkpoint_of_the_same_definition_is_refused(
    hts: Callable[..., tuple[int, str, str]], tiny_model: Path, words: Path, tmp_path: Path
) -> None:
    pruning = prunings(tiny_model, words)["calibrated"]
    paths = []
    for name in ("one", "two"):
        paths.append(checkpoints.ensure_checkpoint(pruning, Store(tmp_path / name), machine()))
        change(words)
    given = ["--text", "embedded/test", "--set", "steps=1", "--set", "batch=1", "--set", "microbatch=1"]
    given += ["--set", "length=16", "--set", "block_epochs=0", "--device", "cpu"]
    words.unlink()  # what a checkpoint that is named was made of need not be there
    for _ in range(2):
        code, _, err = hts("recover", paths[0], *given)
        assert code == 0, err
    code, _, err = hts("recover", paths[1], *given)
    assert code == 1 and "was made of checkpoint" in err.replace("\n", " ")


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the cache of the hub one that has the model ``some/model`` at a commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--some--model"

    def at(commit: str) -> None:
        shutil.copytree(tiny_model, folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)

    return at


def of_hub(kind: str, words: Path) -> Pruning:
    """A pruning of ``some/model``, or that model as it is."""
    magnitude = build.one_shot("some/model", "magnitude", "2:4", 0.5, (16, 16), Calibration(str(words), 8, 16))
    return {
        "dense": build.dense("some/model"),
        "pruned": magnitude,
        "learned": dataclasses.replace(tiny_trials(Path("some/model"), words, steps=2)[2].pruning, prior=magnitude),
        "recovered": dataclasses.replace(magnitude, recovery=Recovery(str(words), RECOVERY)),
    }[kind]


def commit_of(pruning: Pruning, words: Path, store: Store) -> str:
    """The commit that is noted of ``some/model`` where it is pruned, or measured as it is."""
    path = checkpoints.ensure_checkpoint(pruning, store, here := machine())
    if path is not None:
        return json.loads((path / INFO_FILE).read_text())["provenance"]["sources"]["model:some/model"]
    trial = Trial(pruning, Evaluation((Perplexity(str(words), 16),)))
    pipeline.run_trial(trial, store, here)
    (commit,) = {store.read_rows(trial, each)[0]["provenance"]["checkpoint"] for each in pipeline.stages(trial)}
    return commit


KINDS = pytest.mark.parametrize("kind", ["dense", "pruned", "learned", "recovered"])


@KINDS
def test_what_is_of_a_hub_model_whose_commit_moved_is_refused(
    kind: str, hub: Callable[[str], None], words: Path, tmp_path: Path
) -> None:
    pruning, store = of_hub(kind, words), Store(tmp_path / "runs")
    first, second = "a" * 40, "b" * 40
    hub(first)
    assert commit_of(pruning, words, store) == commit_of(pruning, words, store) == first
    hub(second)
    with pytest.raises(UserError, match=f"is of model:some/model at another commit .{first[:12]}, now {second[:12]}"):
        commit_of(pruning, words, store)
    shutil.rmtree(tmp_path / "cache")
    assert commit_of(pruning, words, store) == first, "what is absent has not changed"


@KINDS
def test_the_commit_that_is_noted_is_the_one_that_was_loaded(
    kind: str, hub: Callable[[str], None], words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the model's commit moves whenever the hub is asked for it."""
    commits = (each * 40 for each in "abcdefghijklmnop")
    hub(next(commits))
    download, load, loaded = huggingface_hub.hf_hub_download, AutoModelForCausalLM.from_pretrained, set()

    def moves(*given: Any, **options: Any) -> Any:
        found = download(*given, **options)
        hub(next(commits))
        return found

    def noted(path: str, **options: Any) -> Any:
        if path == "some/model":
            loaded.add(options["revision"])
        return load(path, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", moves)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    assert {commit_of(of_hub(kind, words), words, Store(tmp_path / "runs"))} == loaded == {"a" * 40}


def test_a_quantised_model_of_the_hub_is_refused_by_its_configuration_alone(
    hub: Callable[[str], None], words: Path, tmp_path: Path
) -> None:
    """Of its other files, which may be hundreds of gigabytes, none is there, and no hub to fetch them from."""
    hub("a" * 40)
    folder = tmp_path / "cache" / "models--some--model" / "snapshots" / ("a" * 40)
    config = json.loads((folder / "config.json").read_text())
    for file in folder.iterdir():
        file.unlink()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"some/model: its weights are quantised .*gptq"):
        commit_of(of_hub("pruned", words), words, Store(tmp_path / "runs"))


def test_processors_are_those_of_the_commit_that_was_loaded(hub: Callable[[str], None], tmp_path: Path) -> None:
    for commit in ("a" * 40, "b" * 40):
        hub(commit)
        folder = tmp_path / "cache" / "models--some--model" / "snapshots" / commit
        (folder / "config.json").write_text('{"text_config": {"model_type": "llama"}}')
        (folder / "preprocessor_config.json").write_text("{}")
    assert models.processor_files("some/model", None, "a" * 40) == [
        tmp_path / "cache" / "models--some--model" / "snapshots" / ("a" * 40) / "preprocessor_config.json"
    ]


PIQA = [
    {"goal": "cut", "sol1": "knife", "sol2": "spoon", "label": 0},
    {"goal": "a", "sol1": "b", "sol2": "c", "label": 1},
]


@pytest.fixture
def rows_of_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[dict[str, Any]] | None], None]]:
    """Makes these the rows of every task of the hub; None makes it unreachable."""

    def have(rows: list[dict[str, Any]] | None) -> None:
        def load(*_: Any, **__: Any) -> Any:
            if rows is None:
                raise ConnectionError("no route to the hub")
            return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "validation")})

        monkeypatch.setattr(datasets, "load_dataset", load)
        tasks.prepare_content.cache_clear()

    yield have
    tasks.prepare_content.cache_clear()


def test_rows_of_a_task_of_the_hub_are_held_to_what_was_asked(
    rows_of_hub: Callable[[list[dict[str, Any]] | None], None], tmp_path: Path
) -> None:
    rows_of_hub(PIQA)
    whole, one = tasks.fingerprint("piqa", None), tasks.fingerprint("piqa", None, 1)
    assert whole != one
    same = [{"sources": {TASK + "piqa": told}} for told in (whole, one, "hub")]
    for recorded in same:
        Sources(None).check_same(recorded, "task:piqa", tmp_path)
    rows_of_hub([PIQA[0], PIQA[1] | {"label": 0}])
    Sources(None).check_same(same[1], "task:piqa", tmp_path)
    Sources(None).check_same(same[2], "task:piqa", tmp_path)
    with pytest.raises(UserError, match=r"is of task:piqa with other content .SHA-256 hub::\w{12}, now hub::\w{12}\)"):
        Sources(None).check_same(same[0], "task:piqa", tmp_path)
    rows_of_hub(None)
    Sources(None).check_same(same[0], "task:piqa", tmp_path)


def test_a_task_that_cannot_be_had_is_told_before_anything_is_measured(
    rows_of_hub: Callable[[list[dict[str, Any]] | None], None], tiny_model: Path, words: Path, tmp_path: Path
) -> None:
    rows_of_hub(None)
    trial, store = tiny_trials(tiny_model, words)[1], Store(tmp_path / "runs")
    trial = dataclasses.replace(trial, evaluation=dataclasses.replace(trial.evaluation, tasks=("piqa",)))
    with pytest.raises(UserError, match="tasks piqa cannot be fetched from the hub"):
        pipeline.run_trial(trial, store, machine())
    assert not store.checkpoint_path(trial.pruning).exists() and store.read_rows(trial, "prune") == []
