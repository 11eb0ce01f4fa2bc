import importlib.util
import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from analysis.names import PAPER_TASKS
from experiments.eval.names import EMBEDDED_TASK
from experiments.eval.tasks import (
    TASKS,
    TaskResult,
    check_tasks,
    evaluate_tasks,
    prepare_content,
    prepare_tasks,
)
from patch.errors import UserError

ALL = tuple(TASKS)
WORDS = ["river", "stone", "lamp", "under", "walks", "green", "seven", "quiet", "door", "before", "sings", "winter"]
Row = dict[str, Any]


def phrase(random_: random.Random, words: int) -> str:
    return " ".join(random_.choices(WORDS, k=words))


def lettered(choices: list[str]) -> Row:
    return {"text": choices, "label": ["A", "B", "C", "D"][: len(choices)]}


def subjects() -> list[str]:
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.origin
    names = Path(spec.origin).parent.joinpath("tasks", "mmlu", "default").glob("mmlu_*.yaml")
    return sorted(path.stem.removeprefix("mmlu_") for path in names)


def made_up_rows() -> dict[str, list[Row]]:
    """Rows as the files of a data directory have them, with what prompts stumble over: spaces, no context, accents."""
    r = random.Random(0)
    rows: dict[str, list[Row]] = {file: [] for task in TASKS.values() for file in task.local.values()}
    for number in range(7):
        options = [phrase(r, r.randint(1, 4)) for _ in range(4)]
        letter = "ABCD"[number % 4]
        rows["tasks/piqa_validation.jsonl"].append(
            {"goal": phrase(r, 6), "sol1": phrase(r, 5) + " café", "sol2": phrase(r, 3), "label": number % 2}
        )
        for name in ("easy", "challenge"):
            question = phrase(r, 7) + "?"
            row = {"id": str(number), "question": question, "choices": lettered(options), "answerKey": letter}
            rows[f"tasks/arc_{name}_test.jsonl"].append(row)
        stem = phrase(r, 5) + (" " if number == 2 else "")
        rows["tasks/openbookqa_test.jsonl"].append(
            {"id": str(number), "question_stem": stem, "choices": lettered(options), "answerKey": letter}
        )
        rows["tasks/winogrande_xl_validation.jsonl"].append(
            {
                "sentence": "_ sings before winter ." if number == 1 else f"{phrase(r, 3)} _ {phrase(r, 3)}.",
                "option1": "Ann",
            }
            | {"option2": "Bobby", "answer": str(1 + number % 2)}
        )
        rows["tasks/hellaswag_validation.jsonl"].append(
            {"ind": number, "ctx": "x", "query": phrase(r, 8), "choices": options, "gold": number % 4}
        )
        rows["tasks/race_subset.jsonl"].append(
            {"example_id": f"high{number}.txt", "question_id": 1, "article": phrase(r, 50) + "\n" + phrase(r, 9) + '."'}
            | {"question": "They walk to  _  .", "options": options, "answer": letter, " question_type": "x"}
        )
        # A single word has nothing before it to condition on.
        rows["tasks/lambada_openai_test.jsonl"].append({"text": phrase(r, 1 if number == 3 else 12)})
    for subject in subjects():
        for split, count in (("dev", 1), ("test", 3 if subject.startswith("high") else 2)):
            for _ in range(count):
                question = {"question": phrase(r, 6) + " ", "choices": [phrase(r, 2) for _ in range(4)]}
                row = {"subject": subject, **question, "answer": r.randrange(4)}
                rows[f"tasks/mmlu_{split}.jsonl"].append(row)
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for file, rows in made_up_rows().items():
        write_rows(folder / file, rows)
    return folder


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="</s>"
    )


def make_model(context: int = 2048) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, names: tuple[str, ...], data: Path | None, **other: Any
) -> list[TaskResult]:
    return evaluate_tasks(
        model, tokenizer, names, **({"data": data, "limit": None, "batch": 8, "device": "cpu"} | other)
    )


@pytest.mark.parametrize("context", [2048, 40], ids=["fits", "truncated"])
@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_results_are_those_of_lm_eval_with_its_own_wrapper(context: int, bos: bool, data: Path) -> None:
    from lm_eval.evaluator import evaluate as official_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = make_model(context), make_tokenizer(bos)
    results = evaluate(model, tokenizer, ALL, data)
    prepared = prepare_tasks(ALL, data, None)
    official = official_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        {"tasks": dict(prepared.tasks), "groups": dict(prepared.groups)},
        log_samples=False,
        bootstrap_iters=2,
    )
    assert {result.task for result in results} == set(official["results"])
    for result in results:
        theirs = official["results"][result.task]
        assert result.value == pytest.approx(theirs[f"{result.metric},none"], rel=1e-4), result
        assert result.n == theirs["sample_len"]
        if result.metric != "perplexity":
            assert result.stderr == pytest.approx(theirs[f"{result.metric}_stderr,none"]), result


def log_likelihood(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, context: str, answer: str
) -> tuple[float, bool]:
    """Naive: one request at a time, whole float64 logits, one token after the other."""
    whole, start = tokenizer.encode(context + answer), len(tokenizer.encode(context))
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    steps = range(start, len(whole))
    greedy = all(int(log_probs[at - 1].argmax()) == whole[at] for at in steps)
    return sum(float(log_probs[at - 1, whole[at]]) for at in steps), greedy


def test_piqa_by_hand(model: nn.Module, tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    rows = made_up_rows()["tasks/piqa_validation.jsonl"]
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in rows:
        context = f"Question: {row['goal']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, f" {row[name]}")[0] for name in ("sol1", "sol2")]
        lengths = [len(row[name]) for name in ("sol1", "sol2")]
        right["acc"].append(float((scores[1] > scores[0]) == row["label"]))
        normal = [score / length for score, length in zip(scores, lengths, strict=True)]
        right["acc_norm"].append(float((normal[1] > normal[0]) == row["label"]))
    results = {result.metric: result for result in evaluate(model, tokenizer, ("piqa",), data)}
    assert set(results) == set(right)
    for metric, items in right.items():
        share = sum(items) / len(items)
        assert 0 < share < 1
        spread = math.sqrt(share * (1 - share) / (len(items) - 1))
        assert results[metric].value == pytest.approx(share)
        assert results[metric].stderr == pytest.approx(spread)
        assert results[metric].n == len(items)
        assert results[metric].primary == (metric == "acc")


def test_lambada_by_hand(model: nn.Module, tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    scores = []
    for row in made_up_rows()["tasks/lambada_openai_test.jsonl"]:
        context, _, last = row["text"].rpartition(" ")
        scores.append(log_likelihood(model, tokenizer, context, f" {last}")[0] if context else None)
    # The row of a single word follows the end-of-text token, as nothing else precedes it.
    alone = next(row["text"] for row in made_up_rows()["tasks/lambada_openai_test.jsonl"] if " " not in row["text"])
    start = [tokenizer.eos_token_id, *tokenizer.encode(f" {alone}")]
    with torch.no_grad():
        log_probs = model(torch.tensor([start])).logits[0].double().log_softmax(-1)
    single = sum(float(log_probs[at - 1, start[at]]) for at in range(1, len(start)))
    filled = [single if score is None else score for score in scores]
    mean = sum(filled) / len(filled)
    spread = math.sqrt(sum((score - mean) ** 2 for score in filled) / (len(filled) - 1) / len(filled))
    results = {result.metric: result for result in evaluate(model, tokenizer, ("lambada_openai",), data)}
    assert results["perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-4)
    assert results["perplexity"].stderr == pytest.approx(math.exp(-mean) * spread, rel=1e-4)
    assert results["acc"].primary
    assert not results["perplexity"].primary


class Bigram(nn.Module):
    """Predicts one given token after each token."""

    def __init__(self, follows: dict[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(320, 320))
        for token, following in follows.items():
            self.table.data[token, following] = 5.0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_lambada_counts_a_word_only_if_all_its_tokens_are_predicted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = ["river @#&", "stone +*="]
    write_rows(tmp_path / "tasks/lambada_openai_test.jsonl", [{"text": text} for text in texts])
    right, wrong = (tokenizer.encode(text) for text in texts)
    follows = dict(pairwise(right)) | {wrong[-2]: wrong[-1]}
    results = evaluate(Bigram(follows), tokenizer, ("lambada_openai",), tmp_path)
    assert [result.value for result in results if result.metric == "acc"] == [0.5]


def test_mmlu_is_weighted_by_the_sizes_of_its_subjects(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, data: Path
) -> None:
    results = evaluate(model, tokenizer, ("mmlu",), data)
    whole = results[0]
    parts = [result for result in results if result.task.removeprefix("mmlu_") in subjects()]
    assert (whole.task, whole.metric, whole.primary) == ("mmlu", "acc", True)
    assert len(parts) == 57
    assert (
        whole.n == sum(part.n for part in parts) == 2 * 57 + sum(subject.startswith("high") for subject in subjects())
    )
    assert whole.value == pytest.approx(sum(part.value * part.n for part in parts) / whole.n)
    assert whole.stderr is not None and 0 < whole.stderr < 0.5
    assert {result.task for result in results} >= {"mmlu_stem", "mmlu_other", "mmlu_humanities", "mmlu_social_sciences"}
    assert sum(result.primary for result in results) == 1


PROMPTS: dict[str, Callable[[Row], tuple[list[tuple[str, str]], Any]]] = {
    "piqa": lambda row: (
        [(f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for name in ("sol1", "sol2")],
        row["label"],
    ),
    "arc_easy": lambda row: (
        [(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]["text"]],
        "ABCD".index(row["answerKey"]),
    ),
    "arc_challenge": lambda row: (
        [(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]["text"]],
        "ABCD".index(row["answerKey"]),
    ),
    "winogrande": lambda row: (
        [
            (row["sentence"].partition("_")[0] + row[option], " " + row["sentence"].partition("_")[2].strip())
            for option in ("option1", "option2")
        ],
        row["sentence"].partition("_")[2].strip(),
    ),
    "openbookqa": lambda row: (
        [(row["question_stem"], f" {choice}") for choice in row["choices"]["text"]],
        "ABCD".index(row["answerKey"]),
    ),
    "race": lambda row: (
        [(f"Article: {row['article']}\n\n{row['question']}", f" {option}") for option in row["options"]],
        "ABCD".index(row["answer"]),
    ),
    "hellaswag": lambda row: ([(row["query"], f" {choice}") for choice in row["choices"]], row["gold"]),
    "lambada_openai": lambda row: (
        [(row["text"].rpartition(" ")[0], " " + row["text"].rpartition(" ")[2])],
        " " + row["text"].rpartition(" ")[2],
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_local_rows(name: str, data: Path) -> None:
    prepared = prepare_tasks((name,), data, None)
    ((task, items),) = prepared.items.items()
    rows = made_up_rows()[next(iter(TASKS[name].local.values()))]
    assert len(items) == len(rows)
    for row, (document, requests) in zip(rows, items, strict=True):
        expected, target = PROMPTS[name](row)
        assert requests == expected
        assert prepared.tasks[task].doc_to_target(document) == target


def test_prompts_of_mmlu(data: Path) -> None:
    prepared = prepare_tasks(("mmlu",), data, None)
    first = next(row for row in made_up_rows()["tasks/mmlu_test.jsonl"] if row["subject"] == "high_school_us_history")
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", first["choices"], strict=True))
    about = "The following are multiple choice questions (with answers) about high school us history.\n\n"
    context = f"{about}{first['question'].strip()}\n{options}Answer:"
    document, requests = prepared.items["mmlu_high_school_us_history"][0]
    assert requests == [(context, f" {letter}") for letter in "ABCD"]
    assert prepared.tasks["mmlu_high_school_us_history"].doc_to_target(document) == first["answer"]


def hub_rows(path: str, name: str | None) -> dict[str, list[Row]]:
    """The made-up rows as the hub has them."""
    local = made_up_rows()
    file = {
        ("baber/piqa", None): "piqa_validation",
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy_test",
        ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge_test",
        ("allenai/winogrande", "winogrande_xl"): "winogrande_xl_validation",
        ("allenai/openbookqa", "main"): "openbookqa_test",
        ("EleutherAI/lambada_openai", "default"): "lambada_openai_test",
    }.get((path, name))
    if file:
        rows = local[f"tasks/{file}.jsonl"]
    elif path == "Rowan/hellaswag":
        rows = []
        for row in local["tasks/hellaswag_validation.jsonl"]:
            activity, _, rest = row["query"].partition(" ")
            row = {"activity_label": activity, "ctx_a": rest, "ctx_b": "door", "endings": row["choices"]}
            rows.append(row | {"label": str(len(rows) % 4)})
    elif path == "EleutherAI/race":
        rows = []
        for row in local["tasks/race_subset.jsonl"]:
            problems = [{field: row[field] for field in ("question", "options", "answer")}]
            rows.append({"article": row["article"], "problems": str(problems)})
    else:
        assert path == "cais/mmlu"
        splits = {split: local[f"tasks/mmlu_{split}.jsonl"] for split in ("dev", "test")}
        return {split: [row for row in rows if row["subject"] == name] for split, rows in splits.items()}
    return {split: rows for split in ("train", "validation", "test")}


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None = None, **_: Any) -> Any:
        splits = hub_rows(path, name)
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("hub")
def test_hub_and_data_directory_ask_the_same(data: Path) -> None:
    prepare_content.cache_clear()
    from_hub, from_files = prepare_tasks(ALL, None, None), prepare_tasks(ALL, data, None)
    prepare_content.cache_clear()
    assert from_hub.names == ALL
    assert from_files.names == tuple("race_subset" if name == "race" else name for name in ALL)
    assert list(from_hub.groups) == list(from_files.groups)
    for name, items in from_files.items.items():
        if name == "hellaswag":
            continue
        theirs = from_hub.items["race" if name == "race_subset" else name]
        assert [requests for _, requests in theirs] == [requests for _, requests in items], name


@pytest.mark.usefixtures("hub")
def test_hub_rows_of_hellaswag_are_processed_as_the_official_task_does() -> None:
    prepare_content.cache_clear()
    prepared = prepare_tasks(("hellaswag",), None, None)
    prepare_content.cache_clear()
    row = made_up_rows()["tasks/hellaswag_validation.jsonl"][0]
    activity, _, rest = row["query"].partition(" ")
    document, requests = prepared.items["hellaswag"][0]
    assert requests == [(f"{activity}: {rest} Door", f" {choice}") for choice in row["choices"]]
    assert prepared.tasks["hellaswag"].doc_to_target(document) == 0


@pytest.mark.parametrize("name", ALL)
def test_data_is_all_that_a_local_task_replaces(name: str, data: Path) -> None:
    """Held against the installed official definition, so that a new version of lm-eval shows."""
    prepared = prepare_tasks((name,), data, None)
    replaced = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "task", "metadata", "process_docs"}
    replaced |= {"training_split", "validation_split", "test_split", "fewshot_config"}
    folder = Path(str(importlib.util.find_spec("lm_eval").origin)).parent / "tasks"  # type: ignore[union-attr]
    manager = TaskManager(include_path=folder / TASKS[name].yaml.rpartition("/")[0], include_defaults=False)
    for task in prepared.tasks.values():
        official = manager.task_index["race" if task.task_name == "race_subset" else task.task_name].cfg
        assert official is not None
        ours = task.config.to_dict(keep_callable=True)
        for key, value in official.items():
            if key not in {*replaced, "tag", "include"} and "!function" not in str(value) and ".py" not in str(value):
                assert key in ours, (task.task_name, key)
                assert callable(ours[key]) or ours[key] == value, (task.task_name, key)


@pytest.mark.parametrize("batch", [1, 3, 64, "auto"])
def test_batch_does_not_matter(
    batch: int | str, model: nn.Module, tokenizer: PreTrainedTokenizerFast, data: Path
) -> None:
    names = ("race", "lambada_openai", "winogrande")
    expected = evaluate(model, tokenizer, names, data, batch=8)
    for one, other in zip(expected, evaluate(model, tokenizer, names, data, batch=batch), strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5)


def test_limit(model: nn.Module, tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    for result in evaluate(model, tokenizer, ("piqa", "mmlu"), data, limit=1):
        subtasks = {"piqa": 1, "mmlu": 57}
        assert result.n == subtasks.get(result.task, result.n)
        assert result.stderr is None


def test_models_share_preparation_and_tokenizers_do_not_mix(model: nn.Module, data: Path) -> None:
    names = ("openbookqa", "lambada_openai")
    plain, with_bos = make_tokenizer(False), make_tokenizer(True)
    first = evaluate(model, plain, names, data)
    encoded = prepare_tasks(names, data, None).encoded
    tokens = next(iter(encoded.values()))
    assert evaluate(model, make_tokenizer(False), names, data) == first
    assert next(iter(encoded.values())) is tokens
    assert evaluate(model, with_bos, names, data) != first
    assert evaluate(model, plain, names, data) == first
    assert len(encoded) == 1


def test_requests_that_share_an_input_run_once(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, data: Path
) -> None:
    seen = []
    evaluate(model, tokenizer, ("mmlu",), data, on_batch=lambda done, total: seen.append((done, total)))
    items = sum(map(len, prepare_tasks(("mmlu",), data, None).items.values()))
    # The four answers are single tokens after one and the same prompt.
    assert seen[-1] == (items, items)


@pytest.mark.parametrize("directory", [True, False], ids=["data", "no-data"])
def test_embedded_task_needs_nothing_but_the_package(
    directory: bool, data: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    results = evaluate(model, tokenizer, (EMBEDDED_TASK,), data if directory else None, limit=20)
    assert {(result.task, result.metric, result.n) for result in results} == {
        (EMBEDDED_TASK, "acc", 20),
        (EMBEDDED_TASK, "acc_norm", 20),
    }
    assert [result.metric for result in results if result.primary] == ["acc"]


def test_embedded_task_beside_others(data: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    results = evaluate(model, tokenizer, (EMBEDDED_TASK, "race", "race"), data, limit=2)
    assert [result.task for result in results if result.primary] == [EMBEDDED_TASK, "race_subset"]


def test_items_are_read_anew_when_their_file_changes(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "tasks" / "piqa_validation.jsonl"
    file.parent.mkdir()
    lines = (data / "tasks" / file.name).read_text().splitlines(keepends=True)
    file.write_text("".join(lines))
    first = prepare_tasks(("piqa",), tmp_path, None)
    assert prepare_tasks(("piqa",), tmp_path, None) is first
    file.write_text("".join(lines[1:]))
    assert [len(rows) for rows in prepare_tasks(("piqa",), tmp_path, None).items.values()] == [len(lines) - 1]


def test_broken_model_does_not_crash(tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    results = {(result.task, result.metric): result for result in evaluate(model, tokenizer, ALL, data)}
    assert math.isnan(results["lambada_openai", "perplexity"].value)
    assert 0 <= results["mmlu", "acc"].value <= 1
    with torch.no_grad():
        model = make_model()
        model.lm_head.weight.mul_(1e6)
    results = {(result.task, result.metric): result for result in evaluate(model, tokenizer, ("lambada_openai",), data)}
    assert math.isinf(results["lambada_openai", "perplexity"].value)


def test_nothing_is_written_where_it_runs(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HF_HOME", "HF_DATASETS_CACHE", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prepare_content.cache_clear()
    evaluate(model, tokenizer, ALL, data)
    assert list(tmp_path.iterdir()) == []


def test_progress_output_is_left_to_the_caller(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    data: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepare_content.cache_clear()
    evaluate(model, tokenizer, ("mmlu", "piqa"), data)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_paper_tasks_are_known() -> None:
    assert len(PAPER_TASKS) == 8
    assert set(ALL) == {*PAPER_TASKS, "lambada_openai"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pica", "unknown task 'pica': did you mean piqa"),
        ("arc", "did you mean .*arc_easy"),
        ("wiki_continuatoin", "did you mean wiki_continuation"),
    ],
)
def test_unknown_task_suggests_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tasks(["piqa", name], None)


@pytest.mark.parametrize("file", [file for task in TASKS.values() for file in task.local.values()])
def test_missing_file_is_named(file: str, data: Path, tmp_path: Path) -> None:
    for other in data.rglob("*.jsonl"):
        target = tmp_path / other.relative_to(data)
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(other)
    check_tasks(ALL, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError) as caught:
        check_tasks(ALL, tmp_path)
    assert str(tmp_path / file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n{"goal": "g", "sol1": "a"}\n',
            "line 2: no field sol2, label",
        ),
        ("", "has no rows"),
        ("{", "cannot read"),
        ("[]\n", "line 1: no field goal"),
    ],
    ids=["field", "empty", "json", "list"],
)
def test_malformed_rows_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks" / "piqa_validation.jsonl"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare_tasks(("piqa",), tmp_path, None)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [row for row in rows if row["subject"] != "virology"], "virology"),
        (lambda rows: [*rows, rows[0] | {"subject": "juggling"}], "knows no subject 'juggling'"),
    ],
    ids=["missing", "unknown"],
)
def test_mmlu_must_be_whole(change: Callable[[list[Row]], list[Row]], message: str, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        write_rows(tmp_path / f"tasks/mmlu_{split}.jsonl", change(made_up_rows()[f"tasks/mmlu_{split}.jsonl"]))
    with pytest.raises(UserError, match=message):
        prepare_tasks(("mmlu",), tmp_path, None)


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_must_be_positive(limit: int, data: Path) -> None:
    with pytest.raises(UserError, match=f"limit {limit}"):
        prepare_tasks(("piqa",), data, limit)


def test_hub_out_of_reach_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare_content.cache_clear()
    with pytest.raises(UserError, match=r"tasks piqa cannot be fetched .*Couldn't reach.*--data"):
        prepare_tasks(("piqa",), None, None)


def test_lm_eval_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*\[eval\]"):
        check_tasks(["piqa"], None)
    check_tasks([], None)


def test_answer_longer_than_the_model_sees(tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    with pytest.raises(UserError, match="longer than the 4 tokens"):
        evaluate(make_model(4), tokenizer, ("piqa",), data)
