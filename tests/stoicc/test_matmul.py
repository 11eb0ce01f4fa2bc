"""The operator without a GPU, and the choice of configurations."""

import json
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stoicc_hybrids import random_hybrid, random_mask, random_weight
from torch import Tensor

from patch.errors import UserError
from patch.quantise.values import quantise_weight
from stoicc import configs, reference, tune
from stoicc.configs import Entry
from stoicc.dispatch import check_operands, check_quantised
from stoicc.format import GROUPED, HybridWeight, pack, unpack
from stoicc.kernels.decode import DecodeConfig
from stoicc.kernels.expand import ExpandConfig
from stoicc.kernels.hopper import HopperConfig
from stoicc.kernels.hopper_decode import HopperDecodeConfig
from stoicc.kernels.portable import PortableConfig
from stoicc.matmul import choose, linear, linear_op, scaled_linear_op
from stoicc.quantise import quantise_tokens

X = torch.randn(6, 344, dtype=torch.bfloat16)
WEIGHT = random_weight(200, 344)


@pytest.mark.parametrize(
    "x", [X, X.reshape(2, 3, 344), X[:, None], X[0], X[:0], X.repeat(1, 2)[:, ::2]],
    ids=["matrix", "batch", "extra-dimension", "vector", "no-tokens", "strided"],
)  # fmt: skip
def test_any_leading_dimensions(x: Tensor) -> None:
    hybrid = random_hybrid(200, 344, (64, 64), 0.5)
    y = linear(x, hybrid)
    assert y.shape == (*x.shape[:-1], 200)
    assert torch.equal(y, reference.linear(x, hybrid))


@pytest.mark.parametrize("bias", [None, torch.randn(200, dtype=torch.bfloat16)], ids=["plain", "bias"])
def test_it_is_a_well_formed_operator(bias: Tensor | None) -> None:
    hybrid = random_hybrid(200, 344, (64, 64), 0.5)
    parts = (*hybrid.parts().values(), hybrid.orders)
    torch.library.opcheck(linear_op, (X, *parts, bias, torch.bfloat16, [200, 344], [64, 64], hybrid.band))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        pytest.param(X[:, :336], None, "last dimension of 344", id="columns"),
        pytest.param(X.float(), None, "float32", id="dtype"),
        pytest.param(X.to("meta"), None, "meta", id="device"),
        pytest.param(X, torch.zeros(199, dtype=torch.bfloat16), r"bias.*\(199,\)", id="bias-shape"),
        pytest.param(X, torch.zeros(200), "bias.*float32", id="bias-dtype"),
    ],
)
def test_operands_that_do_not_fit(x: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_operands(x, random_hybrid(200, 344, (64, 64), 0.5), bias)


def eight_bits(dtype: torch.dtype) -> HybridWeight:
    mask = random_mask(200, 344, (64, 128), 0.5)
    values, scales = quantise_weight(mask.apply(WEIGHT), dtype)
    return pack(values, mask, scales)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize(
    "x", [X, X.reshape(2, 3, 344), X[0], X[:0], X.repeat(1, 2)[:, ::2], X.half()],
    ids=["matrix", "batch", "vector", "no-tokens", "strided", "half"],
)  # fmt: skip
def test_a_product_of_eight_bits_is_that_of_the_quantised_operands(x: Tensor, dtype: torch.dtype) -> None:
    hybrid = eight_bits(dtype)
    bias = torch.randn(200, dtype=x.dtype)
    y = linear(x, hybrid, bias)
    values, scales = reference.quantise_tokens(x.reshape(-1, 344), dtype, None, 0.0)
    expected = reference.exact(values, hybrid, bias, scales)
    assert y.shape == (*x.shape[:-1], 200) and y.dtype == x.dtype
    assert torch.equal(y.reshape(-1, 200), expected.to(x.dtype))
    dense = x.reshape(-1, 344).double() @ unpack(hybrid).double().mul(hybrid.scales[:, None]).T + bias.double()
    assert len(x) == 0 or (expected - dense).norm() <= 0.04 * dense.norm()


def test_the_operators_of_eight_bits_are_well_formed() -> None:
    hybrid = eight_bits(torch.int8)
    torch.library.opcheck(quantise_tokens, (X, torch.int8, torch.ones(344, dtype=X.dtype), 1e-5))
    values, scales = quantise_tokens(X, torch.int8)
    parts = (*hybrid.parts().values(), hybrid.orders)
    kinds = (torch.bfloat16, [200, 344], [64, 128], hybrid.band)
    torch.library.opcheck(scaled_linear_op, (values, scales, *parts, None, *kinds))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"values": torch.zeros(6, 352, dtype=torch.float8_e4m3fn)}, "e4m3fn.*int8", id="dtype"),
        pytest.param({"values": torch.zeros(6, 344, dtype=torch.int8)}, r"\(6, 344\).*\[tokens, 352\]", id="columns"),
        pytest.param({"token_scales": torch.ones(5)}, r"\(5,\), need float32 \(6,\)", id="scales"),
        pytest.param({"token_scales": torch.ones(6).double()}, "float64", id="scales-dtype"),
        pytest.param({"bias": torch.zeros(200)}, "bias.*float32", id="bias"),
        pytest.param({"out_dtype": torch.float32}, "result torch.float32", id="result"),
        pytest.param({"hybrid": random_hybrid(200, 344, (64, 64), 0.5)}, "packed weight torch.bfloat16", id="weight"),
    ],
)
def test_quantised_operands_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    good = {"values": torch.zeros(6, 352, dtype=torch.int8), "token_scales": torch.ones(6), "bias": None}
    good |= {"hybrid": eight_bits(torch.int8), "out_dtype": torch.bfloat16}
    check_quantised(**good)
    with pytest.raises(UserError, match=message):
        check_quantised(**good | change)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_gpu_without_the_instruction_falls_back(capability: tuple[int, int], dtype: torch.dtype) -> None:
    least = (8, 9) if dtype == torch.float8_e4m3fn else (8, 0)
    for tokens in configs.TOKENS:
        for band in (1, 2):
            found = configs.candidates(tokens, capability, band, dtype)
            assert found and all(configs.runs(config, capability, band, dtype) for config in found)
            assert len(set(found)) == len(found)
            assert all(isinstance(config, PortableConfig) for config in found) == (capability < least)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("band", [1, 2])
def test_four_bits_have_a_kernel_for_few_tokens_and_are_expanded_for_more(
    capability: tuple[int, int], band: int
) -> None:
    for tokens in configs.TOKENS:
        found = configs.candidates(tokens, capability, band, GROUPED)
        assert found and all(configs.runs(config, capability, band, GROUPED) for config in found)
        assert len(set(found)) == len(found)
        few = capability >= (8, 0) and tokens <= configs.MOST_OF_FOUR
        assert all(isinstance(config, DecodeConfig) for config in found) == few
        assert few or found == [ExpandConfig()]
    assert not any(configs.runs(ExpandConfig(), capability, band, kind) for kind in (torch.bfloat16, torch.int8))
    assert not configs.runs(PortableConfig(32), capability, band, GROUPED)


@pytest.mark.parametrize(
    ("capability", "tokens", "dtype", "said"),
    [
        pytest.param((9, 0), 128, GROUPED, ["many tokens .* expanded to 16 bits"], id="many-tokens"),
        pytest.param((7, 5), 8, GROUPED, ["GPU of .* expanded to 16 bits"], id="few-before-ampere"),
        pytest.param((8, 0), 8, torch.float8_e4m3fn, ["GPU of .* portable kernel"], id="eight-bits"),
    ],
)
def test_a_fallback_says_what_it_does(
    capability: tuple[int, int], tokens: int, dtype: torch.dtype, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: f"GPU of {capability}")
    monkeypatch.setattr(configs, "capability_of", lambda _: capability)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        config = choose.__wrapped__(torch.device("cuda"), 256, 512, 2, tokens, dtype)
    assert isinstance(config, ExpandConfig if dtype == GROUPED else PortableConfig)
    assert len(found) == len(said)
    assert all(re.search(part, str(each.message)) for part, each in zip(said, found, strict=True))


@pytest.fixture
def unknown_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[int, ...]]]:
    """A GPU without a table, whose every measurement takes another candidate; what was measured so far."""
    done: list[tuple[int, ...]] = []

    def measure(_: torch.device, n: int, k: int, band: int, tokens: int, dtype: torch.dtype) -> Entry:
        found = configs.candidates(tokens, (8, 0), band, dtype)
        done.append((n, k, band, tokens))
        return Entry(n, k, band, tokens, found[len(done) % len(found)], 1.0, 2.0, configs.table_dtype(dtype))

    monkeypatch.setenv("HTS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Unknown GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(configs, "capability_of", lambda _: (8, 0))
    monkeypatch.setattr(tune, "measure_shape", measure)
    forget_tables()
    yield done
    forget_tables()


def forget_tables() -> None:
    for cached in (configs.tables, configs.measured, choose):
        cached.cache_clear()


def test_what_was_measured_at_its_first_use_tells_of_nothing_else(unknown_gpu: list[tuple[int, ...]]) -> None:
    gpu = torch.device("cuda")
    wanted = [(256, 512, 2, 1), (256, 512, 2, 16), (512, 512, 2, 1), (256, 1024, 2, 1), (256, 512, 1, 1)]
    with pytest.warns(UserWarning, match="Unknown GPU knows bfloat16 with 1 tokens: .*hts tune"):
        chosen = [choose(gpu, *shape) for shape in wanted]
    assert unknown_gpu == wanted
    # Another process finds them, and measures what differs by its dtype alone.
    forget_tables()
    assert [choose(gpu, *shape) for shape in wanted] == chosen and unknown_gpu == wanted
    choose(gpu, *wanted[0], torch.int8)
    assert unknown_gpu == [*wanted, wanted[0]]
    # Whether to pack is not asked of what is known of other shapes.
    assert configs.known("Unknown GPU", 512, 512, 2, 16, (8, 0)) is None
    assert configs.known("Unknown GPU", 256, 512, 2, 14, (8, 0)) is not None


def test_a_table_that_was_tuned_tells_of_shapes_near_its_own(unknown_gpu: list[tuple[int, ...]]) -> None:
    entry = Entry(4096, 4096, 2, 16, DecodeConfig(32, 16, (1, 1, 1), 2, 4, 1), 3.5, 4.0)
    configs.remember(configs.user_table("Unknown GPU"), [entry], {"gpu": "one"})
    assert choose(torch.device("cuda"), 256, 512, 2, 16) == entry.config and not unknown_gpu
    # With so many tokens nothing was tuned.
    assert choose(torch.device("cuda"), 4096, 4096, 2, 4096) != entry.config
    assert unknown_gpu == [(4096, 4096, 2, 4096)]


def test_nothing_is_measured_while_a_graph_is_captured(
    unknown_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UserError, match=r"no tuning table for Unknown GPU.*run `hts tune`"):
        choose(gpu, 256, 512, 2, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    measured = choose(gpu, 256, 512, 2, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="512x512 of bfloat16 with 1 tokens.* as 256x512 with 1 does"):
        assert choose(gpu, 512, 512, 2, 1) == measured
    assert unknown_gpu == [(256, 512, 2, 1)]


def test_own_entries_replace_committed_ones_of_the_same_shape_and_number_of_tokens(
    unknown_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second, *_ = configs.candidates(1, (8, 0), 2)
    few, many = (
        Entry(4096, 4096, 2, tokens, configs.candidates(tokens, (8, 0), 2)[0], 3.5, 4.0) for tokens in (1, 4096)
    )
    small, own = replace(few, n=1024, config=first), replace(few, n=1024, config=second)
    monkeypatch.setattr(configs, "committed_table", lambda _: tmp_path / "committed.json")
    configs.write_table(tmp_path / "committed.json", [small, few, many], {})
    configs.remember(configs.user_table("Unknown GPU"), [own], {"gpu": "one"})
    assert configs.tables("Unknown GPU") == (own, few, many)
    # Who tunes a small model still runs a large one as the committed table says.
    assert choose(torch.device("cuda"), 4096, 4096, 2, 1) == few.config and not unknown_gpu
    assert choose(torch.device("cuda"), 1024, 2048, 2, 1) == second and not unknown_gpu


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "another known"])
def test_without_memory_to_measure_in_what_is_likely_runs(
    known: bool, unknown_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    if known:
        choose(gpu, 256, 512, 2, 1)

    def full(*_: Any) -> Entry:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune, "measure_shape", full)
    said = "as 256x512 with 1 does" if known else "with the likeliest configuration"
    with pytest.warns(UserWarning, match=f"512x512 of bfloat16 with 1 tokens.* too little memory.* {said}"):
        config = choose(gpu, 512, 512, 2, 1)
    assert config == (choose(gpu, 256, 512, 2, 1) if known else configs.candidates(1, (8, 0), 2)[0])


def test_what_was_measured_counts_though_it_cannot_be_kept(
    unknown_gpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HTS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept.*HTS_CACHE"):
        config = choose(torch.device("cuda"), 256, 512, 2, 1)
    assert config == choose(torch.device("cuda"), 256, 512, 2, 1) and len(unknown_gpu) == 1


def test_processes_that_measure_at_the_same_time_keep_what_each_found(tmp_path: Path) -> None:
    entries = [Entry(64 * n, 128, 1, 8, DecodeConfig(16, 8, (2, 1, 1), 1, 0, 4), 3.5, 4.0) for n in range(1, 9)]
    with ThreadPoolExecutor(len(entries)) as pool:
        list(pool.map(lambda entry: configs.remember(tmp_path / "gpu.json", [entry], {"gpu": "one"}), entries))
    assert configs.read_table(tmp_path / "gpu.json") == tuple(entries)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize("tokens", configs.TOKENS)
@pytest.mark.parametrize("band", [1, 2])
def test_every_configuration_of_hopper_has_one_that_promotes(tokens: int, band: int) -> None:
    for config in configs.candidates(tokens, (9, 0), band, torch.float8_e4m3fn):
        found = configs.promoting(config)
        assert found.promote and type(found) is type(config) and configs.runs(found, (9, 0), band, torch.float8_e4m3fn)
        assert found.tokens <= (128 if isinstance(found, HopperConfig) else 64)
        assert configs.promoting(found) == found
    ada = DecodeConfig(16, 8, (1, 1, 1), 1, 0)
    assert configs.promoting(ada) is ada


def test_entries_serve_weights_of_their_dtype() -> None:
    sixteen = Entry(64, 128, 1, 512, HopperConfig(64, 8, 8, 1), 3.5, 4.0)
    eight = Entry(64, 128, 1, 512, HopperConfig(128, 6, 8, 1), 3.5, 4.0, "float8_e4m3fn")
    for dtype, entry in ((torch.bfloat16, sixteen), (torch.float16, sixteen), (torch.float8_e4m3fn, eight)):
        assert configs.nearest((sixteen, eight), 64, 128, 1, 512, (9, 0), dtype) is entry
    assert configs.nearest((sixteen, eight), 64, 128, 1, 512, (9, 0), torch.int8) is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("band", [1, 2])
def test_every_gpu_has_candidates_that_it_can_run(capability: tuple[int, int], band: int) -> None:
    for tokens in configs.TOKENS:
        found = configs.candidates(tokens, capability, band)
        assert found and all(configs.runs(config, capability, band) for config in found)
        assert len(set(found)) == len(found)
        assert all(isinstance(config, PortableConfig) for config in found) == (capability < (8, 0))
        assert any(isinstance(config, HopperConfig) for config in found) == (capability == (9, 0) and tokens > 32)
        few = any(isinstance(config, HopperDecodeConfig) for config in found)
        assert few == (capability == (9, 0) and 8 < tokens <= 256)


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    entries = (
        Entry(64, 128, 1, 8, DecodeConfig(16, 8, (2, 1, 1), 1, 0, 4), 3.5, 4.0),
        Entry(128, 64, 2, 512, HopperConfig(256, 5, 8, 2), 20.25, 21.0),
        Entry(128, 64, 2, 1024, PortableConfig(64), 20.25, 1.0),
        Entry(128, 64, 2, 1024, HopperDecodeConfig(64, 64, 4, 2, 2), 20.25, 1.0, "float8_e4m3fn"),
        Entry(128, 128, 2, 128, ExpandConfig(), 20.25, 1.0, "int4"),
    )
    path = tmp_path / "tables" / "gpu.json"
    # As earlier versions wrote it, one provenance for all.
    configs.write_table(path, entries, {"gpu": "one"})
    assert set(configs.read_table(path)) == set(entries)
    changed = Entry(64, 128, 1, 8, DecodeConfig(32, 8, (1, 1, 1), 1, 0, 1), 3.0, 4.0)
    another = Entry(128, 128, 2, 128, ExpandConfig(), 10.0, 1.0, "int4")
    configs.remember(path, [changed, another], {"gpu": "two"})
    assert set(configs.read_table(path)) == {changed, *entries[1:-1], another}
    # Some of bfloat16's entries are of the first, none of int4's.
    assert json.loads(path.read_text())["provenance"] == {
        "bfloat16": [{"gpu": "two"}, {"gpu": "one"}], "float8_e4m3fn": [{"gpu": "one"}], "int4": [{"gpu": "two"}],
    }  # fmt: skip


def test_a_table_of_an_earlier_version_can_be_read(tmp_path: Path) -> None:
    entry = Entry(64, 128, 1, 8, DecodeConfig(16, 8, (2, 1, 1), 1, 0, 4), 3.5, 4.0)
    path = tmp_path / "gpu.json"
    text = """{"provenance": {"gpu": "one"}, "entries": [
        {"n": 64, "k": 128, "band": 1, "tokens": 8, "config": {"kernel": "stream", "rows": 16, "tokens": 8,
         "warps": [2, 1, 1], "records": 1, "stages": 0, "blocks": 4}, "microseconds": 3.5, "dense_microseconds": 4.0}
    ]}"""
    path.write_text(text)
    assert configs.read_table(path) == (entry,)
    another = replace(entry, tokens=16)
    configs.remember(path, [another], {"gpu": "two"})
    assert configs.read_table(path) == (entry, another)
    assert json.loads(path.read_text())["provenance"] == {"bfloat16": [{"gpu": "two"}, {"gpu": "one"}]}


ENTRY = (
    '{"entries": [{"n": 512, "k": 512, "band": 1, "tokens": %s, "config": {"kernel": "portable", "tokens": %s}, '
    '"microseconds": 1, "dense_microseconds": %s}]}'
)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        '{"entries": [{"config": {"kernel": "none"}}]}',
        '{"columns": ["config"], "entries": [[0]]}',
        '{"columns": ["config"], "entries": [[0, 1]]}',
        ENTRY % ("0", "16", "1"),
        ENTRY % ('"8"', "16", "1"),
        ENTRY % ("8", '"16"', "1"),
        ENTRY % ("8", "16", "null"),
        ENTRY % ("8", "16", "NaN"),
    ],
    ids=[
        "cut",
        "empty",
        "list",
        "unknown",
        "unnumbered",
        "unnamed",
        "none",
        "text",
        "setting",
        "no time",
        "nan",
    ],
)
def test_a_damaged_table_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"table\.json.*hts tune"):
        configs.read_table(path)


def test_a_place_that_is_no_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .*Is a directory"):
        configs.read_table(tmp_path)


def test_entries_are_added_to_a_table_that_does_not_say_where_its_own_are_from(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(ENTRY % ("8", "16", "1"))
    (before,) = configs.read_table(path)
    configs.remember(path, [replace(before, tokens=1)], {"gpu": "one"})
    assert [entry.tokens for entry in configs.read_table(path)] == [1, 8]


def test_the_nearest_entry_is_one_that_can_run() -> None:
    clustered = Entry(4096, 4096, 2, 4096, HopperConfig(256, 5, 8, 2), 100, 150)
    alone = Entry(1024, 1024, 1, 4096, HopperConfig(256, 4, 4, 1), 10, 15)
    few = Entry(4096, 4096, 2, 1, DecodeConfig(16, 8, (2, 1, 1), 1, 0, 4), 10, 15)
    entries = (clustered, alone, few)
    assert configs.nearest(entries, 4096, 4096, 2, 2048, (9, 0)) is clustered
    assert configs.nearest(entries, 4096, 4096, 1, 4096, (9, 0)) is alone
    assert configs.nearest(entries, 900, 900, 2, 2, (9, 0)) is few
    assert configs.nearest(entries, 900, 900, 2, 2, (7, 5)) is None


def test_the_committed_tables_are_ones_that_can_be_used() -> None:
    paths = list((Path(configs.__file__).parent / "tuning").glob("*.json"))
    assert paths
    for path in paths:
        entries = configs.read_table(path)
        assert {entry.tokens for entry in entries} >= set(configs.TOKENS)
        for entry in entries:
            dtype = getattr(torch, entry.dtype)
            assert entry.config in configs.candidates(entry.tokens, (9, 0), entry.band, dtype), entry


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (3, 8), (2, 1), (12, 16), (100, 128), (1_000_000, 8192)])
def test_token_buckets(tokens: int, bucket: int) -> None:
    assert configs.token_bucket(tokens) == bucket
