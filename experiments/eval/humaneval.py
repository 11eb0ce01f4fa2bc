"""HumanEval: programs that a model completes, greedily, and the share of them that pass their tests (pass@1).

Prompts, where an answer ends, how long it may be and what tests it are those of lm-evaluation-harness's ``humaneval``.
Its own code is not used: importing it fetches a metric from the hub that runs programs unconfined. Here they run in
`experiments.eval.sandbox`, and only where whoever started this has said so (``--run-generated-code``).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.eval import sandbox
from experiments.eval.names import HUMANEVAL
from patch.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRIC = "pass@1"
OPTION = "--run-generated-code"
LOCAL = "code/humaneval.jsonl"
_DATASET = "openai/openai_humaneval"
_FIELDS = ("task_id", "prompt", "test", "entry_point")
# A step of a small model takes as long for many programs as for one.
_AT_ONCE = 64


@dataclass(frozen=True)
class Definition:
    """The task as lm-eval has it: templates of prompt and test, what ends an answer, and its most tokens."""

    prompt: str
    test: str
    until: tuple[str, ...]
    tokens: int


def check(data: Path | None, allowed: bool) -> None:
    """Check that programs may be run here and that the local file is there.

    Raises:
        UserError: if not.
    """
    if not allowed:
        raise UserError(f"task {HUMANEVAL} runs programs that the model writes, in a sandbox: say {OPTION} to allow it")
    sandbox.check_available()
    check_file(data)


def check_file(data: Path | None) -> None:
    """Raise if a data directory lacks the file of the rows."""
    if data is not None and not (data / LOCAL).is_file():
        raise UserError(f"task {HUMANEVAL}: the data directory has no file {data / LOCAL}")


def definition() -> Definition:
    """The task's definition, out of lm-eval's file; its functions are not loaded."""
    import yaml

    class Plain(yaml.SafeLoader):
        pass

    Plain.add_constructor("!function", lambda loader, node: node.value)
    text = (Path(str(files("lm_eval"))) / "tasks" / HUMANEVAL / f"{HUMANEVAL}.yaml").read_text(encoding="utf-8")
    about = yaml.load(text, Loader=Plain)
    how = about["generation_kwargs"]
    assert not how["do_sample"], "greedy"
    return Definition(about["doc_to_text"], about["doc_to_target"], tuple(how["until"]), how["max_gen_toks"])


def problems(data: Path | None, limit: int | None) -> list[Mapping[str, str]]:
    """The rows, from the data directory or the hub; the first ``limit``.

    Raises:
        UserError: if they cannot be had, or one lacks a field.
    """
    if data is not None:
        try:
            lines = (data / LOCAL).read_text(encoding="utf-8").splitlines()
            rows: list[Any] = [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{data / LOCAL}: cannot be read: {error}") from error
    else:
        from datasets import load_dataset

        try:
            rows = list(load_dataset(_DATASET, split="test"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"task {HUMANEVAL} cannot be fetched from the hub ({error}): name a data directory (--data)"
            ) from error
    for place, row in enumerate(rows):
        if missing := next((name for name in _FIELDS if not isinstance(row.get(name), str)), None):
            raise UserError(f"task {HUMANEVAL}: row {place + 1} has no text in its field '{missing}'")
    return rows[:limit]


def programs(about: Definition, rows: Sequence[Mapping[str, str]], answers: Sequence[str]) -> list[str]:
    """What is run of each answer: prompt, answer, and the test of both."""
    from jinja2 import Template

    prompts, tests = (Template(template, keep_trailing_newline=True) for template in (about.prompt, about.test))
    return [f"{prompts.render(row)}{answer}\n{tests.render(row)}" for row, answer in zip(rows, answers, strict=True)]


def cut(answer: str, until: Sequence[str]) -> str:
    """An answer up to the first text that ends it."""
    ends = [place for text in until if (place := answer.find(text)) >= 0]
    return answer[: min(ends)] if ends else answer


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    about: Definition,
    device: torch.device | str,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy completions, in the order of the prompts; a batch ends when each of its answers has."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Ended(StoppingCriteria):
        """Which answers have ended: looked at now and then, since it takes the text."""

        def __init__(self, start: int) -> None:
            self.start, self.done, self.asked = start, torch.zeros(0, dtype=torch.bool), 0

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            if not len(self.done):
                self.done = torch.zeros(len(input_ids), dtype=torch.bool)
            self.asked += 1
            if self.asked % 8 == 0:
                texts = tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
                self.done |= torch.tensor([cut(text, about.until) != text for text in texts])
            return self.done.to(input_ids.device)

    model.to(device)
    chosen: Any = model
    pad = next(each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if each is not None)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), _AT_ONCE):
        places = order[start : start + _AT_ONCE]
        encoded = [tokenizer(prompts[place])["input_ids"] for place in places]
        longest = max(map(len, encoded))
        ids = torch.tensor([[pad] * (longest - len(each)) + each for each in encoded], device=device)
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in encoded], device=device)
        written = chosen.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            # What a configuration of generation brings is for sampling, and would be warned of.
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=about.tokens,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([Ended(longest)]),
        )
        texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            answers[place] = cut(text, about.until)
        if on_batch:
            on_batch(min(start + _AT_ONCE, len(order)), len(order))
    return answers


def passed(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    data: Path | None,
    limit: int | None,
    device: torch.device | str,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[bool]:
    """Of each problem whether the model's program passes its test.

    Raises:
        UserError: if the problems cannot be had or programs cannot be confined.
    """
    sandbox.check_available()
    about, rows = definition(), problems(data, limit)
    from jinja2 import Template

    prompt = Template(about.prompt, keep_trailing_newline=True)
    answers = complete(model, tokenizer, [prompt.render(row) for row in rows], about, device, on_batch)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(sandbox.passes, programs(about, rows, answers)))
