"""Builds the text, the tokenizer and the multiple-choice task of the embedded model from a data directory.

::

    python -m experiments.embedded.build_data --data DIR [--tokens-out FILE]

Reads ``DIR/train/wiki_leads.jsonl`` (Wikipedia lead sections), ``wiki_docs.jsonl`` (longer Wikipedia articles) and
``novels96.jsonl.xz`` (public-domain novels). Writes, beside this file:

* ``text/{train,validation,test}.jsonl.xz``: leads, split by a hash of the title, so that the split of an article
  does not depend on what else is in the file. Nothing is trained on `validation` and `test`; hyperparameters may look
  at `validation` only. `train` is an excerpt of what the model is trained on, for calibration and mask learning.
* ``model/tokenizer*.json``: a lossless byte-level BPE of 4096 tokens. ``<|endoftext|>`` begins and ends documents.
* ``tasks/wiki_continuation.jsonl.xz``: which of four sentences follows the opening of a lead of `test`?

``--tokens-out`` also writes all training text as token ids, which is what `experiments.embedded.train` reads. The
outcome is the same on every run.
"""

import argparse
import hashlib
import json
import lzma
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.embedded import MODEL, TASKS, TEXT
from patch.errors import UserError
from patch.files import replacing, sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 4096
END = "<|endoftext|>"
SEPARATOR = "\n\n"

VALIDATION_SHARE = 0.02
TEST_SHARE = 0.05
EXCERPT_SHARE = 0.48

# As in recent tokenizers: words with their leading space, numbers in threes, punctuation, and line breaks on their own,
# so that a document's last token does not depend on what is joined to it.
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Article:
    """One document of Wikipedia."""

    title: str
    text: str


@dataclass(frozen=True)
class Splits:
    """Leads by what they may be used for; ``train`` is everything that is neither of the others."""

    train: tuple[Article, ...]
    validation: tuple[Article, ...]
    test: tuple[Article, ...]


def read_articles(path: Path) -> list[Article]:
    """Articles of a JSON-lines file with fields ``title`` and ``text``, plain or ``.xz``.

    Raises:
        UserError: if the file is missing or a line is not such an article.
    """
    try:
        with lzma.open(path, "rt") if path.suffix == ".xz" else open(path, encoding="utf-8") as file:
            return [Article(row["title"], row["text"]) for row in map(json.loads, file)]
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: --data names a directory with train/{path.name}") from error
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} holds a line that is not an article with title and text: {error}") from error


def read_novels(path: Path) -> list[str]:
    """Texts of the novels, in the order of the file."""
    if not path.exists():
        raise UserError(f"{path} is not there: --data names a directory with train/{path.name}")
    with lzma.open(path, "rt") as file:
        return [json.loads(line)["text"] for line in file]


def position(title: str) -> float:
    """Where in [0, 1) the hash of a title falls."""
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:8]) / 2**64


def shingles(text: str, words: int = 8) -> set[tuple[str, ...]]:
    """All runs of ``words`` words, in lower case."""
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[start : start + words]) for start in range(len(found) - words + 1)}


def split(leads: Sequence[Article]) -> Splits:
    """Split leads by the hash of their titles.

    Leads of sister articles are at times nearly equal ("Brother", "Sister"), so a training lead that shares five runs
    of eight words with the held-out leads is dropped, and a validation lead that does so with the test leads.
    """
    test = [lead for lead in leads if position(lead.title) < TEST_SHARE]
    seen = {run for lead in test for run in shingles(lead.text)}
    validation = [
        lead
        for lead in leads
        if TEST_SHARE <= position(lead.title) < TEST_SHARE + VALIDATION_SHARE and len(seen & shingles(lead.text)) < 5
    ]
    seen |= {run for lead in validation for run in shingles(lead.text)}
    train = [
        lead
        for lead in leads
        if position(lead.title) >= TEST_SHARE + VALIDATION_SHARE and len(seen & shingles(lead.text)) < 5
    ]
    return Splits(tuple(train), tuple(validation), tuple(test))


def training_articles(splits: Splits, articles: Iterable[Article]) -> list[str]:
    """Training leads and the longer articles that are neither stubs nor overlap with held-out leads."""
    held_out = splits.validation + splits.test
    titles = {lead.title for lead in held_out}
    seen = {run for lead in held_out for run in shingles(lead.text)}
    longer = [
        article.text.strip()
        for article in articles
        if len(article.text) >= 200 and article.title not in titles and len(seen & shingles(article.text)) < 5
    ]
    return [lead.text for lead in splits.train] + longer


def write_packed(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write ``.jsonl.xz``, one JSON object a line."""
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in objects]
    with replacing(path) as temporary:
        temporary.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))


def train_tokenizer(texts: Iterable[str]) -> "Tokenizer":
    """A byte-level BPE: any text comes back exactly, since every byte is a token and nothing is normalised."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", directory: Path) -> None:
    """Save it so that ``transformers.AutoTokenizer`` loads it; no special token is added to a text unasked."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(directory)


def write_tokens(
    path: Path, tokenizer: "Tokenizer", splits: Splits, wiki: Sequence[str], novels: Sequence[str]
) -> None:
    """Write all text as token ids: compressed ``.npz`` of uint16 arrays.

    ``novels`` is one stream with the end token after each; ``wiki`` is the articles one after another without any
    separator and ``wiki_lengths`` their lengths, since training shuffles them anew in every epoch; ``validation`` and
    ``test`` are streams joined as perplexity is measured, by an empty line; ``tokenizer`` is the SHA-256 of its file.
    """
    ids = [encoding.ids for encoding in tokenizer.encode_batch([*wiki, *novels])]
    end = tokenizer.token_to_id(END)
    held_out = {
        name: tokenizer.encode(SEPARATOR.join(lead.text for lead in leads)).ids
        for name, leads in (("validation", splits.validation), ("test", splits.test))
    }
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            novels=np.concatenate([np.array([*novel, end], dtype=np.uint16) for novel in ids[len(wiki) :]]),
            wiki=np.concatenate([np.array(article, dtype=np.uint16) for article in ids[: len(wiki)]]),
            wiki_lengths=np.array([len(article) for article in ids[: len(wiki)]], dtype=np.uint32),
            validation=np.array(held_out["validation"], dtype=np.uint16),
            test=np.array(held_out["test"], dtype=np.uint16),
            tokenizer=np.array(sha256(MODEL / "tokenizer.json")),
        )


def sentences(text: str) -> list[str]:
    """Split at a full stop, question or exclamation mark before a capital, but not after initials and titles."""
    pieces: list[str] = []
    for piece in re.split(r"(?<=[.!?]) (?=[A-Z\"“])", text):
        if pieces and re.search(
            r"(\b[A-Z]|\b(Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|cf|ca|lit|approx|No|Mt|Lt|Gen|Col))\.$", pieces[-1]
        ):
            pieces[-1] += " " + piece
        else:
            pieces.append(piece)
    return pieces


def words(text: str) -> int:
    return len(text.split())


def continuation_items(leads: Sequence[Article], count: int = 250, seed: int = 0) -> list[dict[str, Any]]:
    """Multiple-choice items: the opening of a lead, its next sentence, and three sentences of other leads.

    Openings have 10 to 60 words and choices 6 to 25. The wrong choices are never the first sentence of their lead,
    since those say "X is a Y" and would give themselves away, and their lengths are within a third of the right one's.

    Returns:
        items with ``title``, ``context``, ``choices`` (four) and ``gold`` (index of the right one), in the
        order of ``leads``.
    """
    parts = {lead.title: sentences(lead.text) for lead in leads if "\n" not in lead.text and "  " not in lead.text}
    later = [
        (title, sentence)
        for title, pieces in parts.items()
        for sentence in pieces[1:]
        if 6 <= words(sentence) <= 25 and sentence[0].isalpha() and sentence.endswith(".")
    ]
    usable = set(later)
    random_state = random.Random(seed)
    items = []
    for title, pieces in parts.items():
        openings = [
            end
            for end in range(1, len(pieces))
            if 10 <= words(" ".join(pieces[:end])) <= 60 and (title, pieces[end]) in usable
        ]
        if not openings:
            continue
        end = openings[-1]
        right = pieces[end]
        similar = [
            sentence
            for other, sentence in later
            if other != title and abs(words(sentence) - words(right)) <= words(right) / 3 and sentence != right
        ]
        wrong = random_state.sample(similar, 3)
        gold = random_state.randrange(4)
        choices = [*wrong[:gold], right, *wrong[gold:]]
        items.append({"title": title, "context": " ".join(pieces[:end]), "choices": choices, "gold": gold})
    chosen = sorted(random_state.sample(range(len(items)), min(count, len(items))))
    return [items[index] for index in chosen]


def build(data: Path, tokens_out: Path | None) -> None:
    """Build everything; prints what was made."""
    splits = split(read_articles(data / "train" / "wiki_leads.jsonl"))
    wiki = training_articles(splits, read_articles(data / "train" / "wiki_docs.jsonl"))
    novels = read_novels(data / "train" / "novels96.jsonl.xz")
    excerpt = [lead for lead in splits.train if position(lead.title) >= 1 - EXCERPT_SHARE]
    for name, leads in (("train", excerpt), ("validation", splits.validation), ("test", splits.test)):
        path = TEXT / f"{name}.jsonl.xz"
        write_packed(path, ({"title": lead.title, "text": lead.text} for lead in leads))
        print(f"{path}: {len(leads)} leads, {sum(len(lead.text.encode()) for lead in leads)} bytes of text")
    # As much of the novels as there is of Wikipedia: 70 kB from inside each, past the front matter.
    tokenizer = train_tokenizer([*wiki, *(novel[10_000:80_000] for novel in novels)])
    save_tokenizer(tokenizer, MODEL)
    items = continuation_items(splits.test)
    path = TASKS / "wiki_continuation.jsonl.xz"
    write_packed(path, items)
    print(f"{path}: {len(items)} items")
    if tokens_out is not None:
        write_tokens(tokens_out, tokenizer, splits, wiki, novels)
        print(f"{tokens_out}: {tokens_out.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="data directory with train/wiki_leads.jsonl and others"
    )
    parser.add_argument("--tokens-out", type=Path, help="also write all training text as token ids to this .npz file")
    arguments = parser.parse_args()
    try:
        build(arguments.data, arguments.tokens_out)
    except (UserError, OSError) as error:
        parser.exit(1, f"build_data: {error}\n")


if __name__ == "__main__":
    main()
