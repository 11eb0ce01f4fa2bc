"""The embedded model's text, tokenizer, task and training script."""

import hashlib
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.embedded import DIRECTORY, MODEL, TASKS, TEXT, build_data, train
from experiments.embedded.build_data import Article, continuation_items, position, read_articles, sentences, split
from experiments.eval.tasks import fingerprint
from patch.errors import UserError

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Article]]:
    return {part: read_articles(TEXT / f"{part}.jsonl.xz") for part in PARTS}


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    with lzma.open(TASKS / "wiki_continuation.jsonl.xz") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("content", [None, b"", b"damaged"], ids=["missing", "empty", "damaged"])
def test_a_damaged_task_is_named(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if content is not None:
        (tmp_path / "wiki_continuation.jsonl.xz").write_bytes(content)
    monkeypatch.setattr("experiments.embedded.TASKS", tmp_path)
    with pytest.raises(UserError, match=r"wiki_continuation\.jsonl\.xz cannot be read .*reinstall"):
        fingerprint("wiki_continuation", None)


class TestTokenizer:
    @given(text=st.text())
    @settings(max_examples=300)
    def test_any_text_comes_back(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "\n\n",
            "  two  spaces ",
            "\r\n\t",
            "don't , stop .",
            "1234567",
            "日本 \U0001f389",
            "a\u00a0b\u2060c",
            "<|endoftext|>",
        ],
        ids=repr,
    )
    def test_awkward_text_comes_back(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_held_out_text_comes_back(self, tokenizer: Any, parts: dict[str, list[Article]]) -> None:
        for lead in parts["validation"]:
            assert tokenizer.decode(tokenizer(lead.text).input_ids) == lead.text

    def test_vocabulary(self, tokenizer: Any) -> None:
        assert len(tokenizer) == 4096
        assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
        assert tokenizer("Text").input_ids[0] != 0, "special tokens are only added when asked for"

    def test_documents_tokenise_the_same_alone_and_joined(
        self, tokenizer: Any, parts: dict[str, list[Article]]
    ) -> None:
        texts = [lead.text for lead in parts["test"][:20]]
        joined = tokenizer("\n\n".join(texts)).input_ids
        (separator,) = tokenizer("\n\n").input_ids
        alone = [token for text in texts for token in (*tokenizer(text).input_ids, separator)]
        assert joined == alone[:-1]


class TestText:
    def test_no_article_is_in_two_parts(self, parts: dict[str, list[Article]]) -> None:
        titles = [lead.title for part in PARTS for lead in parts[part]]
        texts = [lead.text for part in PARTS for lead in parts[part]]
        assert len(set(titles)) == len(titles)
        assert len(set(texts)) == len(texts)

    def test_titles_lie_where_their_hash_says(self, parts: dict[str, list[Article]]) -> None:
        held_out = build_data.TEST_SHARE + build_data.VALIDATION_SHARE
        assert all(position(lead.title) < build_data.TEST_SHARE for lead in parts["test"])
        assert all(build_data.TEST_SHARE <= position(lead.title) < held_out for lead in parts["validation"])
        assert all(position(lead.title) >= held_out for lead in parts["train"])

    def test_train_repeats_no_passage_of_held_out_leads(self, parts: dict[str, list[Article]]) -> None:
        held_out = {run for part in PARTS[1:] for lead in parts[part] for run in build_data.shingles(lead.text)}
        assert max(len(held_out & build_data.shingles(lead.text)) for lead in parts["train"]) < 5

    @pytest.mark.parametrize(
        ("part", "low", "high"), [("train", 1.5e6, 2.5e6), ("validation", 8e4, 1.2e5), ("test", 1.5e5, 2.5e5)]
    )
    def test_size(self, parts: dict[str, list[Article]], part: str, low: float, high: float) -> None:
        assert low < sum(len(lead.text.encode()) for lead in parts[part]) < high

    def test_near_copies_of_held_out_leads_are_dropped(self) -> None:
        titles = [f"article {number}" for number in range(1000)]
        test_title = next(title for title in titles if position(title) < build_data.TEST_SHARE)
        train_titles = [title for title in titles if position(title) > 0.5][:2]
        text = " ".join(f"word{number}" for number in range(30))
        splits = split(
            [Article(test_title, text), Article(train_titles[0], text + " more."), Article(train_titles[1], "Other.")]
        )
        assert [lead.title for lead in splits.test] == [test_title]
        assert [lead.title for lead in splits.train] == [train_titles[1]]

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"wiki_leads\.jsonl is not there"):
            build_data.build(tmp_path, None)

    def test_damaged_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "wiki_leads.jsonl"
        path.write_text('{"title": "No text"}\n')
        with pytest.raises(UserError, match="not an article"):
            read_articles(path)


class TestTask:
    def test_its_rows_are_those_that_published_rows_were_scored_on(self) -> None:
        digest = hashlib.sha256(lzma.decompress((TASKS / "wiki_continuation.jsonl.xz").read_bytes())).hexdigest()
        assert digest == "e57095259f81e35d4763c480bd8ad57e6aa511de126c5f5118a75631dac3dd8f"
        # As rows have it among the sources of what they say.
        assert fingerprint("wiki_continuation", None) == hashlib.sha256(digest.encode()).hexdigest()

    def test_there_are_enough(self, items: list[dict[str, Any]]) -> None:
        assert 200 <= len(items) <= 300
        assert len({item["title"] for item in items}) == len(items)

    def test_gold_is_one_of_four_distinct_choices(self, items: list[dict[str, Any]]) -> None:
        assert all(len(set(item["choices"])) == 4 and item["gold"] in range(4) for item in items)

    def test_gold_follows_the_context_in_a_test_lead_and_the_others_do_not(
        self, items: list[dict[str, Any]], parts: dict[str, list[Article]]
    ) -> None:
        leads = {lead.title: lead.text for lead in parts["test"]}
        for item in items:
            lead = leads[item["title"]]
            following = [choice for choice in item["choices"] if lead.startswith(f"{item['context']} {choice}")]
            assert following == [item["choices"][item["gold"]]], item["title"]
            wrong = [choice for choice in item["choices"] if choice not in following]
            assert all(any(choice in other for other in leads.values()) for choice in wrong)

    def test_lengths(self, items: list[dict[str, Any]]) -> None:
        for item in items:
            assert 10 <= len(item["context"].split()) <= 60
            assert all(6 <= len(choice.split()) <= 25 for choice in item["choices"])

    def test_position_of_gold_does_not_give_it_away(self, items: list[dict[str, Any]]) -> None:
        counts = np.bincount([item["gold"] for item in items], minlength=4)
        assert counts.min() > len(items) / 4 * 0.6

    def test_committed_items_are_those_that_the_script_builds(
        self, items: list[dict[str, Any]], parts: dict[str, list[Article]]
    ) -> None:
        assert continuation_items(parts["test"]) == items

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("One here. Two there.", ["One here.", "Two there."]),
            ("By J. S. Bach. He wrote.", ["By J. S. Bach.", "He wrote."]),
            ("In the U.S. Navy it was. Then not.", ["In the U.S. Navy it was.", "Then not."]),
            ("St. Louis is big. Is it? It is.", ["St. Louis is big.", "Is it?", "It is."]),
            ("It cost 3.5 million. c. 800 AD it fell.", ["It cost 3.5 million. c. 800 AD it fell."]),
            ("", [""]),
        ],
        ids=["two", "initials", "abbreviation", "title and question", "number", "empty"],
    )
    def test_sentences(self, text: str, expected: list[str]) -> None:
        assert sentences(text) == expected
        assert " ".join(sentences(text)) == text


class TestCommittedModel:
    def test_linear_dimensions_are_multiples_of_128(self) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
        linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert len(linears) == 7 * model.config.num_hidden_layers + 1
        assert {
            name: tuple(m.weight.shape) for name, m in linears.items() if any(d % 128 for d in m.weight.shape)
        } == {}
        assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 8e6

    def test_weights_are_finite_bfloat16(self) -> None:
        from safetensors.torch import load_file

        weights = load_file(MODEL / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        assert all(bool(weight.isfinite().all()) for weight in weights.values())

    def test_it_predicts_held_out_text(self) -> None:
        """A model that knows only how often each token occurs is beyond 500; four million weights do better than 60."""
        from transformers import AutoTokenizer, LlamaForCausalLM

        model: Any = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        text = "\n\n".join(lead.text for lead in read_articles(TEXT / "validation.jsonl.xz"))
        tokens = np.array(AutoTokenizer.from_pretrained(MODEL)(text).input_ids, dtype=np.int64)
        assert math.exp(train.stream_loss(model, tokens[: 16 * 512], torch.device("cpu"))) < 60

    def test_files_are_small(self) -> None:
        files = [file for file in DIRECTORY.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        assert sum(file.stat().st_size for file in files) < 16 * 2**20


def small_corpus(tmp_path: Path, parts: dict[str, list[Article]]) -> Path:
    """A token file of a few thousand tokens."""
    from tokenizers import Tokenizer

    splits = build_data.Splits(tuple(parts["train"][:20]), tuple(parts["validation"][:8]), tuple(parts["test"][:8]))
    path = tmp_path / "tokens.npz"
    novels = [" ".join(lead.text for lead in parts["train"][20 + start : 40 + start]) for start in (0, 20)]
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    build_data.write_tokens(path, tokenizer, splits, [lead.text for lead in splits.train], novels)
    return path


class TestTraining:
    def test_token_file_holds_the_text(self, tmp_path: Path, tokenizer: Any, parts: dict[str, list[Article]]) -> None:
        corpus = train.load_corpus(small_corpus(tmp_path, parts))
        assert [tokenizer.decode(article) for article in corpus.wiki] == [lead.text for lead in parts["train"][:20]]
        assert tokenizer.decode(corpus.test) == "\n\n".join(lead.text for lead in parts["test"][:8])
        assert tokenizer.decode(corpus.novels).count("<|endoftext|>") == 2
        assert corpus.novels[-1] == 0

    def test_token_file_of_another_tokenizer_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "tokens.npz"
        np.savez(path, tokenizer=np.array("0" * 64))
        with pytest.raises(UserError, match="another tokenizer"):
            train.load_corpus(path)

    def test_missing_token_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"tokens\.npz is not there"):
            train.load_corpus(tmp_path / "tokens.npz")

    def test_pack_keeps_every_article_and_adds_a_separator_to_each(self) -> None:
        articles = [np.full(length, length) for length in (3, 1, 4, 2)]
        separators = [np.array([90]), np.array([91])]
        stream = train.pack(articles, separators, np.random.default_rng(0))
        assert len(stream) == 10 + 4
        assert all((stream == length).sum() == length for length in (1, 2, 3, 4))
        assert (stream >= 90).sum() == 4
        assert stream[-1] >= 90

    @pytest.mark.parametrize(("tokens", "length"), [(100, 7), (64, 8), (9, 8), (1000, 16)])
    def test_windows_predict_every_token_at_most_once_an_epoch(self, tokens: int, length: int) -> None:
        calls = []

        def stream() -> Any:
            calls.append(1)
            return np.arange(tokens)

        drawn = train.windows(stream, np.random.default_rng(0), length)
        first: list[int] = []
        while True:
            window = next(drawn)
            assert window.tolist() == list(range(window[0], window[0] + length + 1))
            if len(calls) == 2:
                break
            first += window[1:].tolist()
        assert len(set(first)) == len(first)
        assert len(first) > tokens - 2 * length - 1

    def test_rate_rises_stays_and_falls_to_zero(self) -> None:
        factors = [train.rate_factor(progress, 0.1, 0.5) for progress in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0, 1.1)]
        assert factors == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])

    def test_stream_loss_is_that_of_transformers(self) -> None:
        torch.manual_seed(0)
        model = train.new_model()
        tokens = np.random.default_rng(0).integers(0, 4096, 2 * 512 + 100)
        rows = torch.from_numpy(tokens[:1024].reshape(2, 512))
        with torch.no_grad():
            expected = float(model(input_ids=rows, labels=rows).loss)
        assert train.stream_loss(model, tokens, torch.device("cpu")) == pytest.approx(expected, rel=1e-5)

    def test_short_run_learns_saves_and_loads(self, tmp_path: Path, parts: dict[str, list[Article]]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        corpus = train.load_corpus(small_corpus(tmp_path, parts))
        settings = {"warmup": 0.2, "decay": 0.5, "wiki_share": 0.5, "wiki_share_decay": 0.5, "weight_decay": 0.1}
        training = train.Training(
            tokens=8 * 2 * 512, minutes=None, rate=3e-3, rows=2, seed=0, report_steps=4, save_steps=4, **settings
        )
        out = tmp_path / "model"
        cpu = torch.device("cpu")
        model, log = train.train(training, corpus, out, cpu, compiled=False)
        train.finish(training, corpus, model, log, out, cpu)

        assert [entry["step"] for entry in log] == [4, 8]
        assert log[-1]["validation_loss"] < math.log(4096) - 0.3
        assert [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()] == log
        loaded: Any = AutoModelForCausalLM.from_pretrained(out)
        assert loaded.dtype == torch.bfloat16
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight.bfloat16()), name
        prompt = AutoTokenizer.from_pretrained(out)("The city", return_tensors="pt")
        assert (
            loaded.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1]
            > prompt.input_ids.shape[1]
        )
        perplexity = math.exp(train.stream_loss(loaded.float(), corpus.test, cpu))
        assert f"**{perplexity:.2f}**" in (out / "README.md").read_text()
        assert not [file for file in out.iterdir() if file.name.startswith(".")]
