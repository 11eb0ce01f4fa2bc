"""Text by name: documents, calibration windows, a stream of tokens to learn from, and windows to evaluate on.

A source is a name, such as ``wikitext2/test`` or ``c4``; a file, ``.txt`` (one document) or ``.jsonl`` (one document
per line, field ``text``), either also as ``.gz`` or ``.xz``; a directory, or a pattern such as ``src/**/*.py``, each
file of which is a document; or several of these joined by ``+``: one after the other or, each with a weight, mixed by
share of the windows that are drawn. Named sources come from the Hugging Face hub or, where a data directory is given,
from its files, so that a machine without a network reads the same rows.

    >>> documents = load_documents("novels+wiki_leads", Path("data"))
    >>> documents = load_documents("0.5*novels+0.2*wiki_leads+0.3*python", Path("data"))
    >>> windows = calibration_windows(documents, tokenizer, windows=128, length=2048, seed=0)
"""

import gzip
import hashlib
import itertools
import json
import logging
import lzma
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.embedded import TEXT
from patch.errors import UserError, check_name
from patch.files import check_seal, from_json, replacing, seal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Enough for 128 calibration windows of 2048 tokens, which about one C4 document in thirty can hold.
C4_DOCUMENTS = 50_000

# More characters than almost any window of a given number of tokens covers: English text has 4 to 5 a token.
_CHARACTERS_PER_TOKEN = 8

# Characters handed to the tokenizer at a time: its result takes some hundred bytes per token until it is packed.
_TOKENIZER_CHARACTERS = 8_000_000


class Unreachable(UserError):
    """The hub, which has a text, cannot be reached."""


@dataclass(frozen=True)
class Documents:
    """What a source holds.

    Attributes:
        texts: the documents, or the rows of a data set that counts lines, in order.
        sha256: digest of the texts and of where each ends, whatever file they came from; of a mixture, of its parts.
        parts: of a mixture, the share of each source, 1 in all, and what it holds; else empty.
    """

    texts: tuple[str, ...]
    sha256: str
    parts: "tuple[tuple[float, Documents], ...]" = ()


@dataclass(frozen=True)
class _Source:
    """A named source: where it lies in a data directory, how that file reads, and how the hub gives it."""

    local: str
    read: Callable[[IO[str]], Iterator[str]]
    hub: Callable[[], Iterable[str]] | None = None


def _wikitext_rows(file: IO[str]) -> Iterator[str]:
    """Rows as the hub's data set has them: each line with its newline, a blank line as the empty string."""
    for line in file:
        yield line if line.strip() else ""


def _lines(file: IO[str]) -> Iterator[str]:
    for line in file:
        if line.strip():
            yield line.rstrip("\n")


def _json_texts(file: IO[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            row = from_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'line {number} is not an object with a string field "text"')
        if not _is_text(row["text"]):
            raise ValueError(f"line {number} has half of a surrogate pair, which is no character")
        yield row["text"]


def _is_text(said: str) -> bool:
    """Whether it can be written: JSON can say halves of surrogate pairs, which no tokenizer takes."""
    try:
        said.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(file: IO[str]) -> Iterator[str]:
    yield file.read()


def _hub_wikitext(split: str) -> Callable[[], Iterable[str]]:
    def rows() -> Iterable[str]:
        from datasets import load_dataset

        return load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]

    return rows


def _hub_c4() -> Iterable[str]:
    from datasets import load_dataset

    shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
    rows = load_dataset("allenai/c4", data_files=shard, split="train", streaming=True)
    return (row["text"] for row in rows.take(C4_DOCUMENTS))


_KNOWN = {
    "wikitext2/test": _Source("wikitext2/wiki.test.raw", _wikitext_rows, _hub_wikitext("test")),
    "wikitext2/validation": _Source("wikitext2/wiki.valid.raw", _wikitext_rows, _hub_wikitext("validation")),
    "c4": _Source("train/c4_sample.txt", _lines, _hub_c4),
    "novels": _Source("train/novels96.jsonl.xz", _json_texts),
    "wiki_docs": _Source("train/wiki_docs.jsonl", _json_texts),
    "wiki_leads": _Source("train/wiki_leads.jsonl", _json_texts),
    # What a model wrote itself, by `experiments.data.written`.
    "written": _Source("train/written.jsonl", _json_texts),
    # Source code, as `experiments.data.python_source` collects it.
    "python": _Source("train/python.jsonl.xz", _json_texts),
    "python/test": _Source("code/python_test.jsonl", _json_texts),
}
SOURCES = tuple(_KNOWN)
_EMBEDDED = {f"embedded/{split}": TEXT / f"{split}.jsonl.xz" for split in ("train", "validation", "test")}
_FILE = re.compile(r"\.(txt|jsonl)(\.gz|\.xz)?$")
_WEIGHTED = re.compile(r"(\d+\.?\d*|\.\d+)\*(.+)")
# Larger files of a directory are data, not text.
_MOST_BYTES = 2_000_000


def _open(path: Path) -> IO[str]:
    """A text file, decompressed according to its name."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open("r", encoding="utf-8")


def _reader(path: Path, read: Callable[[IO[str]], Iterator[str]], missing: str) -> Callable[[], list[str]]:
    if not path.is_file():
        raise UserError(missing)

    def texts() -> list[str]:
        try:
            with _open(path) as file:
                return list(read(file))
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise UserError(f"cannot read text from {path}: {error}") from error

    return texts


def _directory(name: str) -> Callable[[], list[str]] | None:
    """How to read the files of a directory or a pattern, in the order of their paths; None if the name is neither."""
    place = Path(name).expanduser()
    if place.is_dir():
        root, pattern = place, "**/*"
    elif "*" in name:
        fixed = list(itertools.takewhile(lambda part: "*" not in part, place.parts))
        root, pattern = Path(*fixed), str(Path(*place.parts[len(fixed) :]))
    else:
        return None
    if next(_files(root, pattern), None) is None:
        raise UserError(f"text source {name}: there is no file")
    return lambda: list(dict.fromkeys(filter(None, map(_text_of, sorted(_files(root, pattern))))))


def _files(root: Path, pattern: str) -> Iterator[Path]:
    """The files that a pattern means below a directory, but for hidden ones."""
    for path in root.glob(pattern):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.is_file() and path.stat().st_size <= _MOST_BYTES:
            yield path


def _text_of(path: Path) -> str | None:
    """A file's text; None of one that is no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _locate(name: str, data: Path | None) -> Callable[[], Iterable[str]]:
    """How to read one source, once it is known to be there."""
    if (match := _FILE.search(name)) and not Path(name).expanduser().is_dir():
        read = _json_texts if match[1] == "jsonl" else _whole
        return _reader(Path(name), read, f"text source {name}: no such file")
    if files := _directory(name):
        return files
    check_name("text source", name, [*_KNOWN, *_EMBEDDED])
    if name in _EMBEDDED:
        path = _EMBEDDED[name]
        return _reader(path, _json_texts, f"text source {name}: {path} is missing: reinstall the package")
    source = _KNOWN[name]
    if data is not None:
        path = data / source.local
        return _reader(path, source.read, f"text source {name}: the data directory has no file {path}")
    if source.hub is None:
        raise UserError(f"text source {name} is not on the hub: name a data directory (--data) with {source.local}")
    return source.hub


def _parts(source: str, data: Path | None) -> dict[str, Callable[[], Iterable[str]]]:
    whole = Path(source).expanduser()
    alone = whole.is_dir() or (_FILE.search(source) and whole.is_file())
    names = [source] if alone and source else source.split("+")
    if not all(map(str.strip, names)):
        # Of paths, nothing is the directory that one is in.
        raise UserError(f"text source {source!r}: a part of it has no name: leave it out, or say . for this directory")
    if len(set(names)) < len(names):
        raise UserError(f"text source {source}: a part of it is named twice, and would count once: name it once")
    return {name: _locate(name, data) for name in names}


def shares_of(source: str) -> dict[str, float]:
    """The share of each source of a mixture, 1 in all; {} of one that has no weights.

    Raises:
        UserError: if only some have a weight, one is named twice, or the weights are nothing.
    """
    if Path(source).expanduser().exists():
        return {}
    names = source.split("+")
    weighted = {found[2]: float(found[1]) for name in names if (found := _WEIGHTED.fullmatch(name))}
    if not weighted:
        return {}
    if len(weighted) < len(names):
        raise UserError(f"text source {source}: give every part a weight, once each, or none: 0.7*novels+0.3*python")
    total = sum(weighted.values())
    if not all(weighted.values()):
        raise UserError(f"text source {source}: a weight of 0 leaves its part out: name it no more")
    return {name: weight / total for name, weight in weighted.items()}


def check_source(source: str, data: Path | None) -> None:
    """Check that a source can be read, as far as that shows without reading it.

    Raises:
        UserError: for an unknown name (the nearest are suggested), a file that is not there (its path is named), or
            weights that make no sense.
    """
    for name in shares_of(source) or [source]:
        _parts(name, data)


def load_documents(source: str, data: Path | None) -> Documents:
    """Read a source, from the data directory where one is given, otherwise from the hub.

    Raises:
        UserError: as `check_source`; also where a file cannot be read, the hub cannot be reached, or there is no text.
    """
    if shares := shares_of(source):
        parts = tuple((share, load_documents(name, data)) for name, share in shares.items())
        said = json.dumps([[share, part.sha256] for share, part in parts])
        texts_of_all = tuple(text for _, part in parts for text in part.texts)
        return Documents(texts_of_all, hashlib.sha256(said.encode()).hexdigest(), parts)
    texts: list[str] = []
    for name, read in _parts(source, data).items():
        try:
            texts.extend(read())
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise Unreachable(
                f"text source {name} cannot be fetched from the hub ({error}): name a data directory (--data)"
            ) from error
    if not any(texts):
        raise UserError(f"text source {source} holds no text")
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return Documents(tuple(texts), digest.hexdigest())


def _check_fast(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Only the tokenizers of the Rust library say what they consist of, and where in the text a token stands."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__}: does not say where in the text its tokens stand, which calibration and "
            "learning need: convert it to a tokenizer.json beside the model"
        )


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of everything that decides how a fast tokenizer turns text into tokens; padding does not.

    Raises:
        UserError: for any other tokenizer.
    """
    _check_fast(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):
        state.pop(passing, None)
    return hashlib.sha256(json.dumps([state, tokenizer.eos_token_id]).encode()).hexdigest()


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: str | Sequence[str], **options: Any) -> Any:
    # verbose=False: texts longer than the model's context are meant; they are cut into windows.
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)


def perplexity_windows(documents: Documents, tokenizer: "PreTrainedTokenizerBase", length: int) -> Tensor:
    """Consecutive full windows of the whole text, int64 ``[windows, length]``; the tail is dropped.

    The convention of the pruning literature: rows joined with two newlines, tokenised once, as ``tokenizer(text)``
    does it. A tokenizer that begins every text with a BOS token (LLaMA, Gemma) therefore puts one at the start of the
    first window and none at the others.

    Raises:
        UserError: if the text does not fill one window, or is a mixture, whose perplexity would be that of no text.
    """
    if documents.parts:
        raise UserError("perplexity is of a text, not of a mixture by weight: measure its parts, each by its name")
    tokens = torch.tensor(_encode(tokenizer, "\n\n".join(documents.texts))["input_ids"], dtype=torch.int64)
    if length < 2 or len(tokens) < length:
        raise UserError(f"perplexity needs a window of 2 to {len(tokens)} tokens (the text has no more), not {length}")
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def calibration_windows(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", windows: int, length: int, seed: int
) -> Tensor:
    """One random window from each of ``windows`` random documents that are long enough, int64 ``[windows, length]``.

    Where fewer documents are long enough, they are visited again for other windows, which never overlap. A window
    starts at a random place of its document and has no special tokens. The same seed gives the same windows.

    Only as much text as is needed is tokenised: a generous span of characters around each window. Of a mixture each
    source has its share of the windows, to the nearest one.

    Raises:
        UserError: if the text does not hold that many windows; says how many it holds. Or if the tokenizer does not say
            where in the text a token stands.
    """
    _check_fast(tokenizer)
    if documents.parts:
        counts = _apportioned([share for share, _ in documents.parts], windows)
        drawn = [
            calibration_windows(part, tokenizer, count, length, seed)
            for (_, part), count in zip(documents.parts, counts, strict=True)
            if count
        ]
        return torch.cat(drawn)
    # random.Random.random() is the generator whose numbers Python promises not to change.
    rng = random.Random(seed)
    free = {
        index: [(0, len(text))]
        for index, text in enumerate(documents.texts)
        if len(text.encode("utf-8", "surrogatepass")) >= length
    }
    found: list[list[int]] = []
    long_enough = None
    candidates = _shuffled(free, rng)
    while len(found) < windows and candidates:
        visited = []
        for index in itertools.takewhile(lambda _: len(found) < windows, candidates):
            window = _take_window(documents.texts[index], free[index], tokenizer, length, rng)
            if window is not None:
                found.append(window)
                visited.append(index)
        long_enough = len(visited) if long_enough is None else long_enough
        candidates = _shuffled(visited, rng)
    if len(found) < windows:
        raise UserError(
            f"calibration needs {windows} windows of {length} tokens, but of the {len(documents.texts)} documents "
            f"{long_enough or 0} are that long, and hold {len(found)}: ask for fewer or shorter windows "
            "(--calibration-length, of hts prune --length), or name a source with more text"
        )
    return torch.tensor(found, dtype=torch.int64)


def _apportioned(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to ``total``, nearest to its shares."""
    ends = [round(total * end) for end in itertools.accumulate(shares)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _shuffled(items: Iterable[int], rng: random.Random) -> list[int]:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def _take_window(
    text: str, free: list[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase", length: int, rng: random.Random
) -> list[int] | None:
    """A random window of ``length`` tokens of ``text`` within the ``free`` character ranges, from which it is cut.

    Ranges that turn out too short are removed; None when no range is left.
    """
    while free:
        begin, end = gap = max(free, key=lambda gap: gap[1] - gap[0])
        span = _CHARACTERS_PER_TOKEN * length
        while True:
            start, stop = _random_span(text, begin, end, span, rng)
            encoded = _encode(tokenizer, text[start:stop], add_special_tokens=False, return_offsets_mapping=True)
            tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
            if len(tokens) >= length or (start, stop) == (begin, end):
                break
            span *= 2
        free.remove(gap)
        if len(tokens) >= length:
            first = int(rng.random() * (len(tokens) - length + 1))
            taken = start + offsets[first][0], start + offsets[first + length - 1][1]
            free.extend((a, b) for a, b in ((begin, taken[0]), (taken[1], end)) if b > a)
            return tokens[first : first + length]
    return None


def _random_span(text: str, begin: int, end: int, span: int, rng: random.Random) -> tuple[int, int]:
    """About ``span`` characters at a random place of ``text[begin:end]``, without the words cut at its ends."""
    if end - begin <= span:
        return begin, end
    start = begin + int(rng.random() * (end - begin - span + 1))
    stop = start + span
    spaces = [match.start() for match in re.finditer(r"\s", text[start:stop])]
    return (start + spaces[0], start + spaces[-1]) if len(spaces) > 1 else (start, stop)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens in windows that are drawn in a new random order every epoch.

    A batch depends on nothing but the seed and the step, so a run that is resumed sees what an uninterrupted one would.

    Attributes:
        tokens: all documents, one after the other, each followed by the end-of-sequence token; unsigned ``[tokens]``.
        length: tokens in a window.
        seed: of the order.
    """

    tokens: np.ndarray
    length: int
    seed: int

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return len(self.tokens) // self.length

    def batch(self, step: int, batch: int) -> Tensor:
        """The windows of one step, int64 ``[batch, length]``."""
        return torch.from_numpy(self.at(np.arange(step * batch, (step + 1) * batch)))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The windows at some places of the order, which goes on for ever, int64 ``[places, length]``."""
        chosen = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(positions // self.windows):
            here = positions // self.windows == epoch
            # The raw output of a bit generator is what numpy promises not to change; its permutations may.
            order = np.random.PCG64([self.seed, int(epoch)]).random_raw(self.windows).argsort(kind="stable")
            chosen[here] = order[positions[here] % self.windows]
        rows = self.tokens[: self.windows * self.length].reshape(self.windows, self.length)
        windows: np.ndarray = rows[chosen].astype(np.int64)
        return windows


# Its multiples fill the unit interval evenly, however many there are.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class MixedStream:
    """Windows of several streams, each of which has its share of any stretch, however small it is: it begins anew.

    Attributes:
        streams: what is mixed.
        shares: of each, 1 in all.
    """

    streams: tuple[TokenStream, ...]
    shares: tuple[float, ...]

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return self.streams[0].length

    @property
    def windows(self) -> int:
        """Windows until the first stream begins anew."""
        return int(min(each.windows / share for each, share in zip(self.streams, self.shares, strict=True)))

    def batch(self, step: int, batch: int) -> Tensor:
        """The windows of one step, int64 ``[batch, length]``; which they are does not depend on ``batch``."""
        places = np.arange(1, (step + 1) * batch + 1) * _GOLDEN % 1
        # Rounding must leave no place beyond the last stream.
        of = np.searchsorted(np.cumsum(self.shares)[:-1], places, side="right")
        windows = np.empty((batch, self.length), dtype=np.int64)
        for index, stream in enumerate(self.streams):
            mine = of == index
            own = np.cumsum(mine)[step * batch :] - 1
            here = mine[step * batch :]
            windows[here] = stream.at(own[here])
        return torch.from_numpy(windows)


def first_windows(stream: TokenStream | MixedStream, windows: int, what: str, source: str) -> Tensor:
    """The first windows of a stream, int64 ``[windows, length]``, of which it has as many.

    Args:
        what: needs them; ``source`` is the name of the text.

    Raises:
        UserError: if it has fewer.
    """
    if stream.windows < windows:
        raise UserError(
            f"{what} needs {windows} windows of {stream.length} tokens, but {source} holds {stream.windows}: ask for "
            "fewer or shorter windows, or name a source with more text"
        )
    return stream.batch(0, windows)


def token_stream(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", length: int, seed: int, cache: Path
) -> TokenStream | MixedStream:
    """Tokenise all documents, or find them in the folder ``cache``, where each text and tokenizer is kept once.

    Raises:
        UserError: if the text does not fill one window.
        OSError: if the cache cannot be written.
    """
    if documents.parts:
        streams = [_token_stream(part, tokenizer, length, seed, cache) for _, part in documents.parts]
        return MixedStream(tuple(streams), tuple(share for share, _ in documents.parts))
    return _token_stream(documents, tokenizer, length, seed, cache)


def _token_stream(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", length: int, seed: int, cache: Path
) -> TokenStream:
    path = cache / f"{documents.sha256[:16]}-{tokenizer_fingerprint(tokenizer)[:16]}.npy"
    if not _is_whole(path):
        tokens = _tokenise(documents, tokenizer)
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                np.save(file, tokens)
            seal(temporary)
    tokens = np.load(path, mmap_mode="r")
    if len(tokens) < length:
        raise UserError(f"learning needs windows of {length} tokens, but the text has {len(tokens)} tokens in all")
    return TokenStream(tokens, length, seed)


def _is_whole(path: Path) -> bool:
    """Whether a token cache is there and undamaged; what is not is made again."""
    if not path.exists():
        return False
    try:
        check_seal(path)
        np.load(path, mmap_mode="r")
    except (UserError, ValueError, EOFError) as error:
        logger.warning("%s; the text is tokenised again", error)
        return False
    return True


def _tokenise(documents: Documents, tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts = []
    for texts in _portions(documents.texts, _TOKENIZER_CHARACTERS):
        for tokens in _encode(tokenizer, texts, add_special_tokens=False)["input_ids"]:
            parts.append(np.array(tokens + end, dtype=kind))
    return np.concatenate(parts)


def _portions(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= characters:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
