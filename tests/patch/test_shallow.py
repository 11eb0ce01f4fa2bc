"""Fewer blocks: those that are missed least go, and what is left is a model of its own."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from patch.errors import UserError
from patch.layers import decoder_blocks
from patch.shallow import drop_blocks, remove_blocks

BLOCKS = 4
WINDOWS = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def make_model(kind: str = "llama") -> LlamaForCausalLM | Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES))
    with torch.no_grad():
        for block, size in zip(decoder_blocks(model), (2.0, 0.0, 1.5, 0.5), strict=True):
            for part in (block.self_attn.o_proj, block.mlp.down_proj):  # type: ignore[union-attr]
                part.weight.copy_(size * torch.randn_like(part.weight))
    return model.eval()


@torch.no_grad()
def divergence(model: LlamaForCausalLM, whole: LlamaForCausalLM) -> float:
    found, wanted = (each(input_ids=WINDOWS).logits.double().log_softmax(-1) for each in (model, whole))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_each_time_the_block_goes_that_is_missed_least() -> None:
    whole = make_model()
    model = copy.deepcopy(whole)
    seen: list[tuple[int, int]] = []
    dropped = drop_blocks(model, 2, WINDOWS, "cpu", lambda *done: seen.append(done))
    assert dropped[0].block == 1 and dropped[0].divergence == pytest.approx(0.0, abs=1e-6)
    assert seen[-1] == (7, 7)
    found = {}
    for other in (0, 2, 3):
        shorter = copy.deepcopy(whole)
        remove_blocks(shorter, {1, other})
        found[other] = divergence(shorter, whole)
    assert dropped[1].block == min(found, key=found.__getitem__)
    assert dropped[1].divergence == pytest.approx(found[dropped[1].block], rel=1e-4)
    assert divergence(model, whole) == pytest.approx(dropped[1].divergence, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_is_left_saves_loads_and_generates(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    drop_blocks(model, 1, WINDOWS, "cpu")
    assert model.config.num_hidden_layers == BLOCKS - 1 == len(decoder_blocks(model))
    assert len(getattr(model.config, "layer_types", None) or range(BLOCKS - 1)) == BLOCKS - 1
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = WINDOWS[:1, :5]
    with torch.no_grad():
        torch.testing.assert_close(loaded(WINDOWS).logits, model(WINDOWS).logits)
    kept = [each.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0) for each in (model, loaded)]
    assert torch.equal(*kept)
    without_cache = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(kept[0], without_cache)


@pytest.mark.parametrize("count", [0, BLOCKS, BLOCKS + 1])
def test_some_blocks_go_and_some_stay(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} of {BLOCKS} decoder blocks cannot be dropped"):
        drop_blocks(make_model(), count, WINDOWS, "cpu")


def test_windows_must_fit() -> None:
    with pytest.raises(UserError, match="max_position_embeddings is 64"):
        drop_blocks(make_model(), 1, torch.zeros(1, 65, dtype=torch.long), "cpu")
