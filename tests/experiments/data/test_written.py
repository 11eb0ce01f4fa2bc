"""Text that a model writes: how many, how long, the same from the same seed, and a source that can be learned on."""

from pathlib import Path

import pytest
import torch
from tiny_learner import tiny_model

from experiments.data import text
from experiments.data.written import write, written
from patch.errors import UserError


def test_each_text_goes_on_from_its_token_by_the_models_distribution() -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        # After token t comes t + 1, whatever came before.
        model.model.embed_tokens.weight.copy_(torch.eye(32, 64))
        model.lm_head.weight.copy_(torch.eye(32, 64).roll(1, 0) * 100)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    model.generation_config.suppress_tokens = [5, 9]
    parts = list(written(model, torch.tensor([3, 30, 7]), 5, at_once=2))
    assert [len(part) for part in parts] == [2, 1]
    expected = [[3, 4, 5, 6, 7], [30, 31, 0, 1, 2], [7, 8, 9, 10, 11]]
    assert torch.cat(parts).tolist() == expected


def test_a_file_of_them_is_a_text_source(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        write("embedded", file, 3, 8, seed, "cpu", 2, None)
    same, again, other = (text.load_documents(str(file), None) for file in files)
    assert len(same.texts) == 3
    assert same.sha256 == again.sha256 != other.sha256


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 texts"):
        write("embedded", tmp_path / "a.jsonl", 0, 8, 0, "cpu", 2, None)
    assert not any(tmp_path.iterdir())
