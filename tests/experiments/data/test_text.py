import gzip
import hashlib
import json
import lzma
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from experiments.data import python_source, text
from experiments.data.text import (
    Documents,
    TokenStream,
    calibration_windows,
    check_source,
    load_documents,
    perplexity_windows,
    token_stream,
    tokenizer_fingerprint,
)
from patch.errors import UserError

WORDS = [f"{a}{b}" for a in ("ba", "ke", "lo", "mi", "tu", "zo") for b in ("nd", "rk", "ss", "lt", "é")]


def make_tokenizer(bos: bool = False, vocabulary: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def prose(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def documents(*texts: str) -> Documents:
    return Documents(texts, hashlib.sha256(repr(texts).encode()).hexdigest())


def plain(tokenizer: PreTrainedTokenizerFast, texts: str | Sequence[str]) -> Any:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


class Counting:
    """A tokenizer that counts what it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.characters = 0

    def __call__(self, texts: str | Sequence[str], **options: Any) -> Any:
        self.characters += len(texts) if isinstance(texts, str) else sum(map(len, texts))
        return self.tokenizer(texts, **options)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


def jsonl(texts: Iterable[str]) -> str:
    return "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts))


LOCAL = {
    "wikitext2/test": (
        "wikitext2/wiki.test.raw",
        " \n = Title = \n \n A line . \n",
        ("", " = Title = \n", "", " A line . \n"),
    ),
    "wikitext2/validation": ("wikitext2/wiki.valid.raw", "a\x85b c\n", ("a\x85b c\n",)),
    "c4": ("train/c4_sample.txt", "one page\nanother page\n", ("one page", "another page")),
    "novels": ("train/novels96.jsonl.xz", jsonl(["Chapter I.\nIt was", "II"]), ("Chapter I.\nIt was", "II")),
    "wiki_docs": ("train/wiki_docs.jsonl", jsonl(["An article"]), ("An article",)),
    "wiki_leads": ("train/wiki_leads.jsonl", jsonl(["A lead", "Another"]), ("A lead", "Another")),
}


@pytest.mark.parametrize("source", LOCAL)
def test_named_source_reads_its_file_of_the_data_directory(source: str, tmp_path: Path) -> None:
    file, content, expected = LOCAL[source]
    write(tmp_path / file, content)
    check_source(source, tmp_path)
    assert load_documents(source, tmp_path).texts == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("book.txt", "one\n\ntwo\n", ("one\n\ntwo\n",)),
        ("book.txt.gz", "one\n", ("one\n",)),
        ("a+b.jsonl", jsonl(["x", "y"]), ("x", "y")),
        ("rows.jsonl.gz", jsonl(["x", "y"]), ("x", "y")),
        ("rows.jsonl.xz", jsonl(["x", "y"]), ("x", "y")),
    ],
)
def test_path_source(name: str, content: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    assert load_documents(str(path), None).texts == expected


def test_mixture_concatenates_its_parts_in_order(tmp_path: Path) -> None:
    for source in ("wiki_leads", "wiki_docs"):
        write(tmp_path / LOCAL[source][0], LOCAL[source][1])
    extra = write(tmp_path / "extra.txt", "more")
    assert load_documents(f"wiki_docs+wiki_leads+{extra}", tmp_path).texts == (
        "An article",
        "A lead",
        "Another",
        "more",
    )


def test_digest_is_of_the_documents_and_not_of_the_file(tmp_path: Path) -> None:
    def digest(name: str, texts: Sequence[str]) -> str:
        return load_documents(str(write(tmp_path / name, jsonl(texts))), None).sha256

    assert digest("a.jsonl", ["ab", "c"]) == digest("b.jsonl.xz", ["ab", "c"])
    assert digest("a.jsonl", ["ab", "c"]) != digest("c.jsonl", ["a", "bc"])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_embedded_text_needs_no_data_directory(split: str) -> None:
    found = load_documents(f"embedded/{split}", None)
    assert len(found.texts) > 10
    assert all(found.texts)


@pytest.mark.parametrize(
    ("source", "rows", "expected"),
    [
        ("wikitext2/test", {"text": ["", " = T = \n"]}, ("", " = T = \n")),
        ("wikitext2/validation", {"text": [" = V = \n"]}, (" = V = \n",)),
    ],
)
def test_wikitext_comes_from_the_hub_without_a_data_directory(
    source: str, rows: dict[str, list[str]], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options["split"]))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_documents(source, None).texts == expected
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", source.rpartition("/")[2])]


def test_c4_comes_from_the_first_shard_of_the_hub_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "C4_DOCUMENTS", 3)

    def load(name: str, *, data_files: dict[str, str], split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("allenai/c4", "train", True)
        assert data_files == {"train": "en/c4-train.00000-of-01024.json.gz"}
        return datasets.Dataset.from_dict({"text": [f"page {n}" for n in range(9)]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_documents("c4", None).texts == ("page 0", "page 1", "page 2")


def test_hub_out_of_reach_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"wikitext2/test cannot be fetched .*reach it.*--data"):
        load_documents("wikitext2/test", None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitext2/tset", "did you mean wikitext2/test"),
        ("novel", "did you mean novels"),
        ("c4+novle", "unknown text source 'novle'"),
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("novels", "--data.*train/novels96.jsonl.xz"),
    ],
)
def test_bad_source_without_a_data_directory(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_source(source, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", LOCAL)
def test_missing_file_of_the_data_directory_is_named(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_source(source, tmp_path)
    assert str(tmp_path / LOCAL[source][0]) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"title": "y"}\n', "line 2 .*text"),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y \\ud800"}\n', "line 2 has half of a surrogate pair"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\xff", "cannot read text from .*a.txt"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 99)[:-20], "cannot read text from .*a.jsonl.xz"),
        ("a.jsonl.gz", b"not gzip", "cannot read text from .*a.jsonl.gz"),
        ("a.txt.gz", gzip.compress(bytes(range(256)) * 9)[:40] + b"\xff" * 99, "cannot read text from .*a.txt.gz"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "line 1 is not JSON: nested too deeply"),
    ],
)
def test_unreadable_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_documents(str(path), None)


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_perplexity_windows_are_the_whole_text_cut_and_the_tail_dropped(bos: bool) -> None:
    tokenizer = make_tokenizer(bos)
    rows = ["", " = Title = \n", "", prose(200, 1) + "\n", prose(100, 2)]
    expected = tokenizer("\n\n".join(rows))["input_ids"]
    windows = perplexity_windows(documents(*rows), tokenizer, 32)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(expected) // 32, 32)
    assert windows.flatten().tolist() == expected[: windows.numel()]
    assert (windows == tokenizer.bos_token_id).sum() == (1 if bos else 0)


@pytest.mark.parametrize("length", [1, 1000])
def test_perplexity_window_that_does_not_fit(length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=f"not {length}"):
        perplexity_windows(documents("ba ke"), tokenizer, length)


def test_calibration_takes_one_window_per_long_enough_document(tokenizer: PreTrainedTokenizerFast) -> None:
    # Every document repeats a word of its own, so that a window shows where it is from.
    texts = [" ".join([word] * (400 if number % 3 else 5)) for number, word in enumerate(WORDS)]
    windows = calibration_windows(documents(*texts), tokenizer, 12, 64, seed=3)
    assert windows.shape == (12, 64)
    assert windows.dtype == torch.int64
    sources = [word for window in windows for word in WORDS if word * 5 in tokenizer.decode(window).replace(" ", "")]
    assert len(sources) == len(set(sources)) == 12
    assert all(WORDS.index(word) % 3 for word in sources)


def test_calibration_depends_on_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    source = documents(*(prose(300, seed) for seed in range(20)))
    first = calibration_windows(source, tokenizer, 8, 32, seed=0)
    assert torch.equal(first, calibration_windows(source, tokenizer, 8, 32, seed=0))
    assert not torch.equal(first, calibration_windows(source, tokenizer, 8, 32, seed=1))


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_calibration_windows_are_stretches_of_text_without_special_tokens(bos: bool) -> None:
    tokenizer = make_tokenizer(bos)
    texts = [prose(500, seed) for seed in range(3)]
    for window in calibration_windows(documents(*texts), tokenizer, 9, 40, seed=5):
        assert not set(window.tolist()) & {0, 1}
        assert any(tokenizer.decode(window).strip("�") in text for text in texts)


def test_documents_are_visited_again_without_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [f"{number:04d}" for number in range(3000)]
    windows = calibration_windows(documents(" ".join(words[:1500]), " ".join(words[1500:])), tokenizer, 40, 64, seed=0)
    assert len(windows) == 40
    # Only words that are whole: a window may begin or end inside one.
    seen = [word for window in windows for word in tokenizer.decode(window).split()[1:-1]]
    assert len(seen) == len(set(seen)) > 40 * 8


def test_first_windows_come_from_different_documents_before_any_is_visited_again(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = [" ".join([word] * 2000) for word in WORDS[:4]]
    windows = calibration_windows(documents(*texts), tokenizer, 8, 32, seed=1)
    first = [next(word for word in WORDS[:4] if word in tokenizer.decode(window)) for window in windows]
    assert sorted(first[:4]) == sorted(first[4:]) == sorted(WORDS[:4])


def test_calibration_tokenises_little_of_a_long_text(tokenizer: PreTrainedTokenizerFast) -> None:
    source = documents(*(prose(40_000, seed) for seed in range(4)))
    counting = Counting(tokenizer)
    calibration_windows(source, counting, 6, 32, seed=0)  # type: ignore[arg-type]
    assert counting.characters < 0.01 * sum(map(len, source.texts))


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """One token per whole word; anything else is token 0."""
    level = Tokenizer(
        models.WordLevel({"<unk>": 0} | {word: 1 + at for at, word in enumerate(words)}, unk_token="<unk>")
    )
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=level, unk_token="<unk>")


def test_calibration_windows_hold_whole_words() -> None:
    source = documents(*(prose(2000, seed) for seed in range(10)))
    assert calibration_windows(source, word_tokenizer(*WORDS), 300, 8, seed=0).min() > 0


def test_span_grows_where_tokens_are_long() -> None:
    # Fourteen characters a token: eight do not fill a window at the first try.
    long_word = "antidisestabli"
    windows = calibration_windows(documents(" ".join([long_word] * 5000)), word_tokenizer(long_word), 3, 64, seed=0)
    assert (windows == 1).all()


def test_text_without_white_space(tokenizer: PreTrainedTokenizerFast) -> None:
    assert calibration_windows(documents("baké" * 2000), tokenizer, 5, 32, seed=0).shape == (5, 32)


@pytest.mark.parametrize(
    ("texts", "windows", "length", "held"),
    [
        (["ba"] * 5, 2, 64, "of the 5 documents 0 are that long, and hold 0"),
        ([prose(400, 0), "ba"], 99, 64, "of the 2 documents 1 are that long"),
    ],
    ids=["too-short", "too-few"],
)
def test_too_little_calibration_text(
    texts: list[str], windows: int, length: int, held: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=f"needs {windows} windows of {length} tokens, but {held}"):
        calibration_windows(documents(*texts), tokenizer, windows, length, seed=0)


def test_a_tokenizer_without_places_is_refused(tmp_path: Path) -> None:
    """Those that are written in Python: perplexity needs no more than their tokens."""

    class Slow(PreTrainedTokenizer):
        vocab_size = 256

        def __init__(self) -> None:
            super().__init__()

        def get_vocab(self) -> dict[str, int]:
            return {chr(code): code for code in range(256)}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return ord(token) % 256

    texts, slow = documents("a river " * 20), Slow()
    assert perplexity_windows(texts, slow, 16).shape == (10, 16)
    with pytest.raises(UserError, match=r"Slow: does not say where .* tokenizer\.json"):
        calibration_windows(texts, slow, 2, 16, 0)
    with pytest.raises(UserError, match=r"Slow: does not say where .* tokenizer\.json"):
        token_stream(texts, slow, 16, 0, tmp_path)


def test_stream_holds_every_document_and_its_end(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = [prose(50, seed) for seed in range(7)]
    stream = token_stream(documents(*texts), tokenizer, 16, 0, tmp_path)
    expected = [token for ids in plain(tokenizer, texts) for token in [*ids, tokenizer.eos_token_id]]
    assert stream.tokens.tolist() == expected
    assert stream.windows == len(expected) // 16
    assert stream.batch(0, 3).shape == (3, 16)
    assert stream.batch(0, 3).dtype == torch.int64


def test_stream_does_not_depend_on_how_texts_are_handed_to_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = documents(*(prose(50, seed) for seed in range(7)))
    whole = token_stream(source, tokenizer, 16, 0, tmp_path / "a")
    monkeypatch.setattr(text, "_TOKENIZER_CHARACTERS", 300)
    assert np.array_equal(token_stream(source, tokenizer, 16, 0, tmp_path / "b").tokens, whole.tokens)


def test_stream_tokenises_once_per_text_and_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    counting = Counting(tokenizer)
    for length in (16, 32):
        token_stream(documents(prose(200, 0)), counting, length, 0, tmp_path)  # type: ignore[arg-type]
    assert counting.characters == len(prose(200, 0))
    token_stream(documents(prose(300, 0)), tokenizer, 16, 0, tmp_path)
    token_stream(documents(prose(200, 0)), make_tokenizer(vocabulary=280), 16, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_stream_leaves_nothing_behind_when_it_cannot_be_saved(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(file: BinaryIO, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(np, "save", save)
        token_stream(documents(prose(200, 0)), tokenizer, 16, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert token_stream(documents(prose(200, 0)), tokenizer, 16, 0, tmp_path).windows > 1


def test_stream_longer_than_its_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="windows of 4096 tokens, but the text has"):
        token_stream(documents("ba ke"), tokenizer, 4096, 0, tmp_path)


def numbered_stream(windows: int, length: int, seed: int) -> TokenStream:
    tokens = np.repeat(np.arange(windows, dtype=np.uint16), length)
    return TokenStream(np.append(tokens, np.zeros(length - 1, dtype=np.uint16)), length, seed)


@given(windows=st.integers(1, 40), batch=st.integers(1, 17), seed=st.integers(0, 5))
def test_every_epoch_gives_every_window_once(windows: int, batch: int, seed: int) -> None:
    stream = numbered_stream(windows, 3, seed)
    epochs = 3
    steps = -(-epochs * windows // batch)
    drawn = torch.cat([stream.batch(step, batch) for step in range(steps)])[:, 0].tolist()
    for epoch in range(epochs):
        assert sorted(drawn[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


def test_batch_is_a_function_of_seed_and_step() -> None:
    stream = numbered_stream(50, 4, seed=7)
    straight = [stream.batch(step, 8) for step in range(20)]
    assert torch.equal(numbered_stream(50, 4, seed=7).batch(13, 8), straight[13])
    assert not torch.equal(numbered_stream(50, 4, seed=8).batch(13, 8), straight[13])
    first_epoch, second_epoch = stream.batch(0, 50)[:, 0], stream.batch(1, 50)[:, 0]
    assert not torch.equal(first_epoch, second_epoch)
    assert first_epoch.tolist() != list(range(50))


def test_fingerprint_tells_tokenizers_apart_and_ignores_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    same = make_tokenizer()
    same.pad_token = "</s>"
    same(["ba", "ba ke lo"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(make_tokenizer(bos=True)) != tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(make_tokenizer(vocabulary=280)) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("place", [0.01, 0.5, 0.9])
def test_a_damaged_token_cache_is_made_again(tmp_path: Path, place: float) -> None:
    tokenizer, source = make_tokenizer(), documents(prose(300, 0))
    before = np.array(token_stream(source, tokenizer, 16, 0, tmp_path).tokens)
    (cache,) = tmp_path.glob("*.npy")
    content = bytearray(cache.read_bytes())
    content[int(place * len(content))] ^= 1
    cache.write_bytes(content)
    assert np.array_equal(token_stream(source, tokenizer, 16, 0, tmp_path).tokens, before)
    cache.write_bytes(b"")
    assert np.array_equal(token_stream(source, tokenizer, 16, 0, tmp_path).tokens, before)


def test_the_files_of_a_directory_are_documents(tmp_path: Path) -> None:
    for name, content in {
        "b/two.py": b"two = 2\n",
        "a.py": "eins = 'é'\n".encode(),
        "copy.py": b"two = 2\n",
        "notes.md": b"# notes\n",
        "picture.png": b"\x89PNG\xff\xfe",
        "zeros.bin": b"a\0b",
        "empty.py": b"",
        ".git/config": b"hidden",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert load_documents(str(tmp_path), None).texts == ("eins = 'é'\n", "two = 2\n", "# notes\n")
    assert load_documents(f"{tmp_path}/**/*.py", None).texts == ("eins = 'é'\n", "two = 2\n")
    assert load_documents(f"{tmp_path}/b/*.py", None).texts == ("two = 2\n",)
    with pytest.raises(UserError, match="there is no file"):
        check_source(f"{tmp_path}/*.rs", None)


def two_sources(folder: Path) -> tuple[str, str]:
    paths = (folder / "small.txt", folder / "large.txt")
    for path, words, letter in zip(paths, (400, 4000), "xy", strict=True):
        path.write_text(" ".join([letter] * words))
    return str(paths[0]), str(paths[1])


def test_a_mixture_by_weight_gives_each_source_its_share(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    small, large = two_sources(tmp_path)
    mixed = load_documents(f"3*{small}+1*{large}", None)
    assert [share for share, _ in mixed.parts] == [0.75, 0.25]
    assert mixed.sha256 not in {load_documents(each, None).sha256 for each in (small, large, f"{small}+{large}")}
    stream = token_stream(mixed, tokenizer, 8, 0, tmp_path)
    x, y = (plain(tokenizer, f" {letter}")[-1] for letter in "xy")
    for step in (0, 7):
        windows = stream.batch(step, 16)
        of_small = sum(bool((window == x).any()) and not bool((window == y).any()) for window in windows)
        assert abs(of_small - 12) <= 1, "any stretch has its share, the small source beginning anew"
    assert torch.equal(torch.cat([stream.batch(2, 8), stream.batch(3, 8)]), stream.batch(1, 16))
    drawn = calibration_windows(mixed, tokenizer, 8, 8, 0)
    assert sum(bool((window == x).any()) for window in drawn) == 6
    with pytest.raises(UserError, match="not of a mixture by weight"):
        perplexity_windows(mixed, tokenizer, 8)


def test_every_window_of_a_mixture_comes_as_often(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    one, other = tmp_path / "1.txt", tmp_path / "2.txt"
    for path, seed in ((one, 1), (other, 2)):
        path.write_text(prose(300, seed))
    stream = token_stream(load_documents(f"0.5*{one}+0.5*{other}", None), tokenizer, 16, 3, tmp_path)
    seen = [tuple(window.tolist()) for window in stream.batch(0, stream.windows)]
    assert len(set(seen)) >= stream.windows - 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("0.5*novels+wiki_leads", "give every part a weight"),
        ("0*novels+1*wiki_leads", "a weight of 0"),
        ("0.5*novels+0.5*novels", "give every part a weight, once each"),
        ("0.5*novels+0.5*wiki_lead", "did you mean wiki_leads"),
        ("novels+novels", "named twice"),
        ("novels+", "a part of it has no name"),
        ("", "a part of it has no name"),
    ],
)
def test_weights_that_make_no_sense(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with lzma.open(tmp_path / "train" / "novels96.jsonl.xz", "wt") as file:
        file.write('{"text": "a"}\n')
    with pytest.raises(UserError, match=message):
        check_source(source, tmp_path)


def test_python_source_is_collected_once_with_whole_packages_held_out(tmp_path: Path) -> None:
    code = "".join(f"def function_{number}() -> int:\n    return {number}\n" for number in range(40))
    files = {
        "one/a.py": code,
        "one/copy.py": code,
        "one/tests/test_a.py": code.replace("function", "test"),
        "one/short.py": "x = 1\n",
        "one/table.py": "x = [" + "1, " * 2000 + "]\n",
        "one/made_pb2.py": code.replace("function", "made"),
        "one/_rich/c.py": code.replace("function", "copied"),
        "one/rich.py": code.replace("function", "module"),
        "rich/b.py": code.replace("function", "rich"),
    }
    for name, content in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(content)
    sizes = python_source.collect(tmp_path / "root", tmp_path / "data")
    learned, reported = (load_documents(name, tmp_path / "data").texts for name in ("python", "python/test"))
    assert learned == (code,) and reported == (files["rich/b.py"],)
    assert sizes == (len(code), len(files["rich/b.py"]))
    with pytest.raises(UserError, match="none of the packages held out, click, httpx"):
        python_source.collect(tmp_path / "root" / "one", tmp_path / "other")
    with pytest.raises(UserError, match="no such directory"):
        python_source.collect(tmp_path / "nowhere", tmp_path / "other")


def test_python_source_says_that_it_cannot_be_written_before_packages_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_source, "unpack", lambda *args, **kwargs: pytest.fail("fetched"))
    (tmp_path / "file").write_text("")
    for collect in (lambda data: python_source.collect(tmp_path, data), python_source.collect_packages):
        with pytest.raises(UserError, match=r"cannot write into .*file/train: Not a directory: name another .*--data"):
            collect(tmp_path / "file")


def test_packages_of_other_content_are_not_taken_for_those_of_fixed_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(packages: Sequence[str], folder: Path, otherwise: str, platform: bool = False) -> None:
        assert platform and {package.partition("==")[0] for package in packages} >= set(python_source.HELD_OUT)
        assert all(package.count("==") == 1 for package in packages)
        for package in ("rich", "sympy"):
            (folder / package).mkdir(parents=True)
            (folder / package / "a.py").write_text(f"# {package}\n" * 200)

    monkeypatch.setattr(python_source, "unpack", unpack)
    data, others = tmp_path / "data", tmp_path / "others"
    unpack(python_source.PACKAGES, others, "", platform=True)
    (others / "rich" / "a.py").write_text("# before\n" * 200)
    python_source.collect(others, data)
    before = {name: load_documents(name, data).sha256 for name in python_source.DIGESTS}
    with pytest.raises(UserError, match=r"python: what the packages hold has digest [0-9a-f]{12}, not fefb14be1915"):
        python_source.collect_packages(data)
    assert {name: load_documents(name, data).sha256 for name in python_source.DIGESTS} == before
    (others / "rich" / "a.py").write_text("# rich\n" * 200)
    python_source.collect(others, tmp_path)
    found = {name: load_documents(name, tmp_path).sha256 for name in python_source.DIGESTS}
    monkeypatch.setattr(python_source, "DIGESTS", found)
    assert python_source.collect_packages(data) == (len("# sympy\n") * 200, len("# rich\n") * 200)
    assert {name: load_documents(name, data).sha256 for name in python_source.DIGESTS} == found != before


def test_a_disk_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(root: Path, data: Path, held_out: Sequence[str]) -> tuple[int, int]:
        raise OSError(28, "No space left on device", str(data))

    monkeypatch.setattr(python_source, "collect", full)
    monkeypatch.setattr(sys, "argv", ["python_source", "--root", str(tmp_path), "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .*No space left on device") as told:
        python_source.main()
    assert "\n" not in str(told.value)


def test_a_directory_may_be_called_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").mkdir()
    (tmp_path / "corpus.txt" / "a.txt").write_text("some words")
    assert load_documents(str(tmp_path / "corpus.txt"), None).texts == ("some words",)
