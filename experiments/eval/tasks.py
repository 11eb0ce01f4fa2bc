"""Accuracy on the tasks of lm-evaluation-harness, with its own prompts, answers and metrics.

The eight tasks of the PATCH paper, LAMBADA, and a small one that comes with this package. Everything is zero-shot and
the primary metric is ``acc``: that is what gives the published dense mean of LLaMA-2-7B, 54.61 (``acc_norm`` would be
several points higher). Other metrics of a task, and MMLU's subjects, are reported beside it.

Data comes from the Hugging Face hub or, where a data directory is given, from its files. A local task is a YAML,
written when it is needed, that includes the official one and replaces only the rows; RACE is then called
``race_subset``, for its rows are not the test set.

lm-eval gives prompts, requests and metrics. Its model wrapper is not used: prompts and tokens are the same for every
pruned variant of a model, so they are made once per process and tokenizer, and log-probabilities are computed only
where answers are. In full, the nine tasks are 127,891 requests. On two CPU cores lm-eval takes 30 s to build them, 50 s
to tokenise them one by one, 139 s in its wrapper around a model that does next to nothing and 8 s on metrics, all that
for every variant; here it is 9 s and 16 s once, and for every variant 28 s in that model and 2 s on metrics. The tests
hold the results to those of lm-eval's own ``evaluate`` with its own wrapper.
"""

import base64
import functools
import hashlib
import importlib.util
import json
import logging
import lzma
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from experiments import embedded
from experiments.data.text import tokenizer_fingerprint
from experiments.eval import humaneval
from experiments.eval.names import EMBEDDED_TASK, HUMANEVAL
from experiments.eval.scoring import Encoded, encode, score
from patch import install
from patch.errors import UserError, check_name, one_line
from patch.files import from_json, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What lm-eval's groups take for a standard error that cannot be had.
_NO_STDERR = "N/A"

Row = dict[str, Any]


def _hellaswag_row(row: Row) -> Row:
    """Local rows are processed already (``query``, ``choices``); the official target reads ``label``, a string."""
    return row | {"label": str(row["gold"])}


def _race_row(row: Row) -> Row:
    """The official prompt reads an article's problems out of a printed list and asks the last one."""
    problem = {name: row[name] for name in ("question", "options", "answer")}
    return {"article": row["article"], "problems": repr([problem])}


@dataclass(frozen=True)
class TaskDefinition:
    """One task, on the hub and in a data directory.

    Attributes:
        name: the official lm-eval task or group.
        yaml: its definition, below lm-eval's task folder.
        local: for each split that is read, the file below a data directory.
        fields: what every local row must have.
        local_name: what results on the local rows are called, where they are not the official rows.
        adapt: local row to what the official prompt reads.
        overrides: fields of the official definition that do not apply to local rows.
        by: field of the local rows that tells the tasks of a group apart.
    """

    name: str
    yaml: str
    local: Mapping[str, str]
    fields: tuple[str, ...]
    local_name: str | None = None
    adapt: Callable[[Row], Row] = dict
    overrides: Mapping[str, Any] = field(default_factory=dict)
    by: str | None = None


_ARC_FIELDS = ("question", "choices", "answerKey")
_DEFINITIONS = (
    TaskDefinition(
        "mmlu",
        "mmlu/default/_mmlu.yaml",
        {"test": "tasks/mmlu_test.jsonl", "dev": "tasks/mmlu_dev.jsonl"},
        ("subject", "question", "choices", "answer"),
        by="subject",
    ),
    TaskDefinition(
        "piqa", "piqa/piqa.yaml", {"validation": "tasks/piqa_validation.jsonl"}, ("goal", "sol1", "sol2", "label")
    ),
    TaskDefinition("arc_easy", "arc/arc_easy.yaml", {"test": "tasks/arc_easy_test.jsonl"}, _ARC_FIELDS),
    TaskDefinition("arc_challenge", "arc/arc_challenge.yaml", {"test": "tasks/arc_challenge_test.jsonl"}, _ARC_FIELDS),
    TaskDefinition(
        "winogrande",
        "winogrande/default.yaml",
        {"validation": "tasks/winogrande_xl_validation.jsonl"},
        ("sentence", "option1", "option2", "answer"),
    ),
    TaskDefinition(
        "openbookqa",
        "openbookqa/openbookqa.yaml",
        {"test": "tasks/openbookqa_test.jsonl"},
        ("question_stem", "choices", "answerKey"),
    ),
    TaskDefinition(
        "race",
        "race/race.yaml",
        {"test": "tasks/race_subset.jsonl"},
        ("article", "question", "options", "answer"),
        local_name="race_subset",
        adapt=_race_row,
    ),
    TaskDefinition(
        "hellaswag",
        "hellaswag/hellaswag.yaml",
        {"validation": "tasks/hellaswag_validation.jsonl"},
        ("query", "choices", "gold"),
        adapt=_hellaswag_row,
        overrides={"process_docs": None},
    ),
    TaskDefinition(
        "lambada_openai", "lambada/lambada_openai.yaml", {"test": "tasks/lambada_openai_test.jsonl"}, ("text",)
    ),
)
TASKS = {definition.name: definition for definition in _DEFINITIONS}
PRIMARY_METRIC = "acc"
# What the fingerprints of tasks of the hub begin with; older ones are that alone.
FROM_HUB = "hub"
_ITEMS = "items"


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        task: name as reported; a group such as ``mmlu``, one of its tasks, or a task.
        metric: ``acc``, ``acc_norm`` or ``perplexity``.
        value: as lm-eval aggregates it; for a group weighted by the sizes of its tasks.
        stderr: standard error as lm-eval computes it (of a perplexity by the delta method); None for a single item.
        n: items evaluated.
        num_fewshot: examples in the prompt; always 0.
        primary: whether this is the number that counts for the task that was asked for.
        items: of `PRIMARY_METRIC` of a task (a group has none of its own), whether each item is right, in the order of
            the data: what two models are compared by, item by item. As `packed_items` writes it.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    num_fewshot: int
    primary: bool
    items: str | None = None


def packed_items(right: Sequence[float]) -> str:
    """Zeros and ones, eight a byte, the first in the highest bit, in base64."""
    return base64.b64encode(np.packbits(np.array(right, dtype=bool)).tobytes()).decode()


def share_of(task: str, metric: str, right: Sequence[bool]) -> TaskResult:
    """The share of items that are right, with the standard error of a mean as lm-eval has it."""
    share, count = sum(right) / len(right), len(right)
    stderr = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return TaskResult(task, metric, share, stderr, count, 0, True, packed_items(right))


@dataclass(frozen=True, eq=False)
class PreparedTasks:
    """Tasks with their data loaded and every prompt built; serves any number of models.

    Attributes:
        names: the task or group behind each name that was asked for, as reported.
        tasks: lm-eval's task objects by name.
        groups: lm-eval's groups by name, the innermost first.
        items: per task, each row and its (context, answer) requests.
        encoded: the tokens for the tokenizer used last, under its fingerprint.
    """

    names: tuple[str, ...]
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    items: Mapping[str, list[tuple[Row, list[tuple[str, str]]]]]
    encoded: dict[str, Encoded] = field(default_factory=dict)


def check_tasks(tasks: Sequence[str], data: Path | None) -> None:
    """Check names and local files, before hours are spent.

    Raises:
        UserError: for an unknown task (the nearest names are suggested), a file that the data directory lacks (its path
            is named), or lm-eval not being installed.
    """
    for name in tasks:
        check_name("task", name, [*TASKS, EMBEDDED_TASK, HUMANEVAL])
        if name in TASKS and data is not None:
            for file in TASKS[name].local.values():
                if not (data / file).is_file():
                    raise UserError(f"task {name}: the data directory has no file {data / file}")
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"tasks need lm-eval, which is not installed: {install.how('eval')}")


def fingerprint(task: str, data: Path | None, limit: int | None = None) -> str:
    """What tells the rows of one task from others under its name: SHA-256 of its local files.

    Of the hub's, which has them under names that move, ``hub``, the limit, and that of all that is asked of a model.

    Args:
        limit: only the first so many items are asked.

    Raises:
        UserError: as `check_tasks`; also where the hub cannot be reached.
    """
    return _local_fingerprint(task, data) or f"{FROM_HUB}:{limit or ''}:{_asked(task, limit)}"


def fingerprint_as(told: str, task: str, data: Path | None) -> str:
    """The fingerprint of now that compares with one of then: of as many items, read only if it tells of them."""
    source, _, rest = told.partition(":")
    if data is not None or task == EMBEDDED_TASK:
        return fingerprint(task, data)
    limit = rest.partition(":")[0]
    return fingerprint(task, None, int(limit) if limit else None) if source == FROM_HUB and rest else FROM_HUB


def require(task: str, data: Path | None, limit: int | None) -> Any:
    """What a task asks of a model, read and built as it will be asked.

    Raises:
        UserError: if it cannot be had, or a row is not one.
    """
    if task == HUMANEVAL:
        return humaneval.problems(data, limit)
    return prepare_tasks((task,), data, limit).items


def _local_fingerprint(task: str, data: Path | None) -> str | None:
    """SHA-256 of a task's files; None of one that is taken from the hub."""
    check_tasks([task], data)
    if task == EMBEDDED_TASK:
        return hashlib.sha256(hashlib.sha256(_embedded_text()).hexdigest().encode()).hexdigest()
    if data is None:
        return None
    if task == HUMANEVAL:
        humaneval.check_file(data)
        local = [data / humaneval.LOCAL]
    else:
        local = [data / file for file in TASKS[task].local.values()]
    return hashlib.sha256(" ".join(map(sha256, local)).encode()).hexdigest()


def _asked(task: str, limit: int | None) -> str:
    """SHA-256 of all that a task of the hub asks of a model: its rows, and the requests that are made of them."""
    asked = require(task, None, limit)
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def evaluate_tasks(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    data: Path | None,
    limit: int | None,
    batch: int | str,
    device: torch.device | str,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[TaskResult]:
    """Evaluate a model on tasks, zero-shot; calls with the same tasks share their preparation.

    Args:
        tasks: names out of `TASKS`, or `EMBEDDED_TASK`.
        data: data directory; None takes the tasks from the hub.
        limit: only the first so many items of each task (of each subject of MMLU).
        batch: sequences per forward pass, or "auto" for as many as fill the device.
        device: where the model is moved and run.
        on_batch: called with (sequences done, sequences in all).

    Raises:
        UserError: as `check_tasks` and `prepare_tasks`.
    """
    return evaluate_prepared(
        prepare_tasks(tuple(dict.fromkeys(tasks)), data, limit), model, tokenizer, batch, device, on_batch
    )


def prepare_tasks(tasks: tuple[str, ...], data: Path | None, limit: int | None) -> PreparedTasks:
    """Load data and build prompts; remembered for the life of the process, unless the files change.

    Raises:
        UserError: as `check_tasks`; also for rows that lack a field, and where the hub cannot be reached.
    """
    check_tasks(tasks, data)
    return prepare_content(tasks, data, limit, tuple(_local_fingerprint(task, data) or FROM_HUB for task in tasks))


@functools.lru_cache(maxsize=32)
def prepare_content(
    tasks: tuple[str, ...], data: Path | None, limit: int | None, content: tuple[str, ...]
) -> PreparedTasks:
    """As `prepare_tasks`, of tasks with these fingerprints."""
    if not tasks:
        raise UserError("no task named")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: evaluate at least one item per task")
    with _lm_eval_tamed():
        loaded = _load(tasks, data)
        items = {name: list(_items(task, limit)) for name, task in loaded["tasks"].items()}
    names = tuple(_reported_name(name, data) for name in tasks)
    inner_first = sorted(loaded["groups"].items(), key=lambda entry: len(entry[1].get_all_groups()))
    return PreparedTasks(names, loaded["tasks"], dict(inner_first), items)


def evaluate_prepared(
    prepared: PreparedTasks,
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    batch: int | str,
    device: torch.device | str,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[TaskResult]:
    """As `evaluate_tasks`, on tasks that are prepared."""
    model.to(device)
    requests = [pair for rows in prepared.items.values() for _, pairs in rows for pair in pairs]
    key = tokenizer_fingerprint(tokenizer)
    if key not in prepared.encoded:
        prepared.encoded.clear()
        prepared.encoded[key] = encode(requests, tokenizer)
    scores = iter(score(model, prepared.encoded[key], batch, device, on_batch))
    metrics = {}
    with _lm_eval_tamed():
        for name, rows in prepared.items.items():
            scored = [(row, [next(scores) for _ in pairs]) for row, pairs in rows]
            metrics[name] = _task_metrics(prepared.tasks[name], scored)
    for name, group in prepared.groups.items():
        metrics[name] = group.aggregate(metrics)
    return list(_results(metrics, prepared.names))


def _reported_name(name: str, data: Path | None) -> str:
    return (data is not None and name in TASKS and TASKS[name].local_name) or name


def _load(tasks: Sequence[str], data: Path | None) -> dict[str, Any]:
    """lm-eval's task and group objects, with their data."""
    from lm_eval.tasks import TaskManager

    official = Path(str(files("lm_eval"))) / "tasks"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Later folders override earlier ones. Without the default index, whose thousands of files take half a minute.
        paths = [official / TASKS[name].yaml.rpartition("/")[0] for name in tasks if name in TASKS]
        for name in tasks:
            if name == EMBEDDED_TASK:
                _write_embedded_task(folder)
            elif data is not None:
                _write_local_task(TASKS[name], data, official, folder)
        manager = TaskManager(include_path=[*dict.fromkeys(paths), folder], include_defaults=False)
        try:
            return dict(manager.load([_reported_name(name, data) for name in tasks]))
        except (OSError, ValueError) as error:
            if data is not None or all(name == EMBEDDED_TASK for name in tasks):
                raise
            raise UserError(
                f"tasks {', '.join(tasks)} cannot be fetched from the hub ({error}): name a data directory (--data)"
            ) from error


def local_dataset(file: str, splits: Sequence[str], **_: Any) -> dict[str, Any]:
    """What lm-eval calls for the rows of a local task, by the name in its YAML: splits of a JSON file."""
    from datasets import Dataset

    rows = json.loads(Path(file).read_text(encoding="utf-8"))
    return {split: Dataset.from_list(rows[split]) for split in splits}


def _write_local_task(definition: TaskDefinition, data: Path, official: Path, folder: Path) -> None:
    splits = {split: _read_rows(definition, data / file) for split, file in definition.local.items()}
    yaml = official / definition.yaml
    if definition.by is None:
        name = definition.local_name or definition.name
        absent = {f"{kind}_split": None for kind in ("training", "validation", "test") if kind not in splits}
        _write_task(folder, name, yaml, splits, {**absent, **definition.overrides})
        return
    members = sorted({row[definition.by] for rows in splits.values() for row in rows})
    for member in members:
        name = f"{definition.name}_{member}"
        if not (yaml.parent / f"{name}.yaml").is_file():
            raise UserError(f"task {definition.name}: lm-eval knows no {definition.by} '{member}'")
        of_member = {split: [row for row in rows if row[definition.by] == member] for split, rows in splits.items()}
        if not all(of_member.values()):
            raise UserError(f"task {definition.name}: {definition.by} '{member}' has no rows in one of its files")
        _write_task(folder, name, yaml.parent / f"{name}.yaml", of_member, definition.overrides)
    expected = {path.stem for path in yaml.parent.glob(f"{definition.name}_*.yaml")}
    if missing := sorted(expected - {f"{definition.name}_{member}" for member in members}):
        raise UserError(f"task {definition.name}: the data directory has no rows for {', '.join(missing)}")


def _embedded_text() -> bytes:
    """The rows of the embedded task as lines of JSON, whose hash is on record in rows of when they lay unpacked."""
    path = embedded.TASKS / f"{EMBEDDED_TASK}.jsonl.xz"
    try:
        return lzma.decompress(path.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise UserError(
            f"task {EMBEDDED_TASK}: {path} cannot be read ({one_line(error)}): reinstall the package"
        ) from error


def _write_embedded_task(folder: Path) -> None:
    # A suffix that the task index does not look at: this is only to be included.
    base = folder / f"{EMBEDDED_TASK}.base"
    base.write_bytes((embedded.TASKS / f"{EMBEDDED_TASK}.yaml").read_bytes())
    rows = [json.loads(line) for line in _embedded_text().splitlines()]
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    _write_task(folder, EMBEDDED_TASK, base, {"test": rows}, splits)


def _write_task(
    folder: Path, name: str, official: Path, splits: Mapping[str, Sequence[Row]], overrides: Mapping[str, Any]
) -> None:
    """A YAML that is the official one but for its name and rows (and what goes with them)."""
    rows = folder / f"{name}.json"
    rows.write_text(json.dumps(splits), encoding="utf-8")
    replaced = {
        "task": name,
        "dataset_path": None,
        "dataset_name": None,
        "dataset_kwargs": {"file": str(rows), "splits": list(splits)},
        **overrides,
    }
    # JSON is YAML, but for lm-eval's tag that names a function.
    lines = [f"include: {json.dumps(str(official))}", f"custom_dataset: !function {__name__}.local_dataset"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in replaced.items()]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(path: Path) -> Iterator[str]:
    with path.open("r", encoding="utf-8") as file:
        yield from file


def _read_rows(definition: TaskDefinition, path: Path) -> list[Row]:
    rows = []
    try:
        for number, line in enumerate(_lines(path), 1):
            row = from_json(line)
            if missing := [name for name in definition.fields if name not in row]:
                raise UserError(f"task {definition.name}: {path}, line {number}: no field {', '.join(missing)}")
            rows.append(row if definition.by in row else definition.adapt(row))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"task {definition.name}: cannot read {path}: {error}") from error
    if not rows:
        raise UserError(f"task {definition.name}: {path} has no rows")
    return rows


def _items(task: Any, limit: int | None) -> Iterator[tuple[Row, list[tuple[str, str]]]]:
    """Each row of a task with its zero-shot (context, answer) requests, as lm-eval builds them."""
    for number, row in task.doc_iterator(limit=limit):
        context = task.fewshot_context(row, num_fewshot=0, gen_prefix=task.doc_to_prefix(row))
        built = task.construct_requests(doc=row, ctx=context, metadata=(task.task_name, number, 1))
        yield row, [request.args for request in (built if isinstance(built, list) else [built])]


def _task_metrics(task: Any, scored: Sequence[tuple[Row, list[tuple[float, bool]]]]) -> dict[str, Any]:
    """A task's metrics in the form that lm-eval's groups aggregate: value and standard error under its keys."""
    from lm_eval.api.metrics import mean, mean_stderr, perplexity

    values: dict[str, list[float]] = {}
    for row, results in scored:
        for metric, value in task.process_results(row, results).items():
            values.setdefault(metric, []).append(value)
    metrics: dict[str, Any] = {"sample_len": len(scored)}
    for metric, items in values.items():
        aggregate = task.aggregation()[metric]
        try:
            value = aggregate(items)
        except OverflowError:
            value = math.inf
        stderr: float | str = _NO_STDERR
        if len(items) > 1 and aggregate in (mean, perplexity):
            # Delta method for the perplexity, where lm-eval would draw 100,000 bootstrap samples.
            stderr = mean_stderr(items) * (value if aggregate is perplexity else 1)
        metrics |= {f"{metric},none": value, f"{metric}_stderr,none": stderr}
    if PRIMARY_METRIC in values:
        metrics[_ITEMS] = packed_items(values[PRIMARY_METRIC])
    return metrics


def _results(metrics: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Iterator[TaskResult]:
    """Every metric, those of the tasks that were asked for first."""
    for task in [*names, *(task for task in metrics if task not in names)]:
        for entry, value in metrics[task].items():
            metric, _, kind = entry.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            stderr = metrics[task][f"{metric}_stderr,{kind}"]
            yield TaskResult(
                task=task,
                metric=metric,
                value=float(value),
                stderr=None if stderr == _NO_STDERR else float(stderr),
                n=metrics[task]["sample_len"],
                num_fewshot=0,
                primary=task in names and metric == PRIMARY_METRIC,
                items=metrics[task].get(_ITEMS) if metric == PRIMARY_METRIC else None,
            )


@contextmanager
def _lm_eval_tamed() -> Iterator[None]:
    """Until the block ends, lm-eval compiles each prompt template once, not for every row, and warns of nothing.

    Compiling took 22 of the 30 s in which all prompts are built. What it would warn of is that tasks override others,
    which is what local tasks are for.
    """
    from lm_eval.utils import env

    lm_eval_logger = logging.getLogger("lm_eval")
    level = lm_eval_logger.level
    lm_eval_logger.setLevel(logging.ERROR)
    env.from_string = functools.lru_cache(type(env).from_string.__get__(env))
    try:
        yield
    finally:
        del env.from_string
        lm_eval_logger.setLevel(level)
