"""HumanEval: lm-eval's task by its own definition, greedy completions, and programs that run only if asked for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.data.models import load_model
from experiments.eval import humaneval
from experiments.eval.humaneval import Definition
from experiments.run import pipeline
from experiments.run.runtime import Machine
from experiments.run.store import Store
from experiments.studies import build
from experiments.studies.trial import Evaluation, Trial
from patch.errors import UserError

PROBLEMS = [
    {
        "task_id": f"Made/{number}",
        "prompt": f"def add_{number}(a, b):\n",
        "entry_point": f"add_{number}",
        "test": f"def check(candidate):\n    assert candidate(1, 2) == {3 + number}\n",
    }
    for number in range(3)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "humaneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return tmp_path


def test_the_definition_is_lm_evals() -> None:
    about = humaneval.definition()
    assert about.prompt == "{{prompt}}" and about.tokens == 1024
    assert set(about.until) == {"\nclass", "\ndef", "\n#", "\nif", "\nprint"}
    (program,) = humaneval.programs(about, PROBLEMS[:1], ["    return a + b"])
    assert program == (
        "def add_0(a, b):\n    return a + b\ndef check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add_0)"
    )


def test_an_answer_ends_at_the_first_text_that_ends_it() -> None:
    until = humaneval.definition().until
    assert humaneval.cut("    return 1\n\nprint(2)\ndef g(): pass", until) == "    return 1\n"
    assert humaneval.cut("    return 1", until) == "    return 1"


def test_completions_are_greedy_whatever_their_batch() -> None:
    model, tokenizer = load_model("embedded")
    about = Definition("{{prompt}}", "", (".",), 12)
    prompts = ["The city of", "In the year 1990 the king of the north", "A river"]
    together = humaneval.complete(model, tokenizer, prompts, about, "cpu")
    for prompt, answer in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = []
        for _ in range(about.tokens):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
            written.append(int(ids[0, -1]))
        assert answer == humaneval.cut(tokenizer.decode(written), about.until)


def test_programs_are_run_only_where_that_is_said(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(build.dense("embedded"), Evaluation((), ("humaneval",), limit=3))
    with pytest.raises(UserError, match="say --run-generated-code to allow it"):
        pipeline.validate([trial], data)
    pipeline.validate([trial], data, kinds=["prune", "perplexity"])
    with pytest.raises(UserError, match="--run-generated-code"):
        pipeline.validate([trial], data, kinds=["task"])
    pipeline.validate([trial], data, runs_code=True)
    with pytest.raises(UserError, match=r"has no file .*code/humaneval.jsonl"):
        pipeline.validate([trial], data / "code", runs_code=True)

    def answers(model: Any, tokenizer: Any, prompts: Sequence[str], *_: Any) -> list[str]:
        assert list(prompts) == [row["prompt"] for row in PROBLEMS]
        return ["    return a + b", "    return a + b + 1\n", "    import os; os._exit(0)"]

    monkeypatch.setattr(humaneval, "complete", answers)
    store = Store(data / "runs")
    quiet = Machine("cpu", data, lambda *_: None)
    with pytest.raises(UserError, match="--run-generated-code"):
        pipeline.run_trial(trial, store, quiet)
    pipeline.run_trial(trial, store, Machine("cpu", data, lambda *_: None, runs_code=True))
    (row,) = store.read_rows(trial, "task:humaneval")
    assert (row["metric"], row["labels"]["task"], row["labels"]["n"]) == ("pass@1", "humaneval", 3)
    assert row["value"] == pytest.approx(2 / 3) and row["stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert row["labels"]["primary"] and row["labels"]["items"]


def test_rows_that_lack_a_field_are_named(data: Path) -> None:
    (data / "code" / "humaneval.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match="row 1 has no text in its field 'task_id'"):
        humaneval.problems(data, None)
    (data / "code" / "humaneval.jsonl").write_text("nothing\n")
    with pytest.raises(UserError, match="cannot be read"):
        humaneval.problems(data, None)


def test_the_command_says_what_to_say(hts: Any, data: Path) -> None:
    code, _, err = hts("eval", "embedded", "--task", "humaneval", "--data", data)
    assert code == 1 and "--run-generated-code" in err and len(err.strip().splitlines()) == 1
