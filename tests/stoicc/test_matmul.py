"""The operator without a GPU, and the choice of configurations."""

from pathlib import Path

import pytest
import torch
from stoicc_hybrids import random_hybrid
from torch import Tensor

from patch.errors import UserError
from stoicc import configs, reference
from stoicc.configs import Entry
from stoicc.dispatch import check_operands
from stoicc.kernels.decode import DecodeConfig
from stoicc.kernels.hopper import HopperConfig
from stoicc.kernels.portable import PortableConfig
from stoicc.matmul import linear, linear_op

X = torch.randn(6, 344, dtype=torch.bfloat16)


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


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("band", [1, 2])
def test_every_gpu_has_candidates_that_it_can_run(capability: tuple[int, int], band: int) -> None:
    for tokens in configs.TOKENS:
        found = configs.candidates(tokens, capability, band)
        assert found and all(configs.runs(config, capability, band) for config in found)
        assert len(set(found)) == len(found)
        assert all(isinstance(config, PortableConfig) for config in found) == (capability < (8, 0))
        assert any(isinstance(config, HopperConfig) for config in found) == (capability == (9, 0) and tokens > 32)


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    entries = (
        Entry(64, 128, 1, 8, DecodeConfig(16, 8, (2, 1, 1), 1, 0, 4), 3.5, 4.0),
        Entry(128, 64, 2, 512, HopperConfig(256, 5, 8, 2), 20.25, 21.0),
        Entry(128, 64, 2, 1024, PortableConfig(64), 20.25, 1.0),
    )
    path = tmp_path / "tables" / "gpu.json"
    configs.write_table(path, entries, {"gpu": "one"})
    assert set(configs.read_table(path)) == set(entries)
    changed = Entry(64, 128, 1, 8, DecodeConfig(32, 8, (1, 1, 1), 1, 0, 1), 3.0, 4.0)
    configs.remember(path, [changed], {})
    assert set(configs.read_table(path)) == {changed, *entries[1:]}


def test_a_table_of_an_earlier_version_can_be_read(tmp_path: Path) -> None:
    entry = Entry(64, 128, 1, 8, DecodeConfig(16, 8, (2, 1, 1), 1, 0, 4), 3.5, 4.0)
    path = tmp_path / "gpu.json"
    configs.write_table(path, [entry], {})
    path.write_text(path.read_text().replace('"kernel": "decode"', '"kernel": "stream"'))
    assert configs.read_table(path) == (entry,)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"entries": [{"config": {"kernel": "none"}}]}'], ids=["cut", "empty", "unknown"]
)
def test_a_damaged_table_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"table\.json.*hts tune"):
        configs.read_table(path)


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
            assert entry.config in configs.candidates(entry.tokens, (9, 0), entry.band), entry


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (3, 8), (2, 1), (12, 16), (100, 128), (1_000_000, 8192)])
def test_token_buckets(tokens: int, bucket: int) -> None:
    assert configs.token_bucket(tokens) == bucket
