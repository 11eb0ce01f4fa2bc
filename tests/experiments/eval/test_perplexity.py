import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from experiments.eval import perplexity as measuring
from experiments.eval.perplexity import logit_parts, perplexity, target_log_probs
from patch.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def make_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif kind == "llama-tied":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2))
    else:
        # A cap this low bends every logit: leaving it out shows.
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


KINDS = ["llama", "llama-tied", "qwen2", "gpt2", "gemma2-softcapped"]


def make_windows(count: int, length: int) -> Tensor:
    return torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(1))


def naive_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of each window, from whole float64 logits, one prediction at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            log_probs = model(window[None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(log_probs[at, window[at + 1]] for at in range(len(window) - 1)) / (len(window) - 1))
    return torch.stack(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "length"), [(5, 33), (2, 2), (1, 50)])
def test_perplexity_agrees_with_whole_float64_logits(kind: str, count: int, length: int) -> None:
    model, windows = make_model(kind), make_windows(count, length)
    losses = naive_losses(model, windows)
    result = perplexity(model, windows, device="cpu", batch=2)
    assert result.mean_loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result.value == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert (result.tokens, result.windows) == (count * (length - 1), count)
    if count == 1:
        assert result.stderr is None
    else:
        spread = math.sqrt(sum((loss - losses.mean()) ** 2 for loss in losses.tolist()) / (count - 1))
        assert result.stderr == pytest.approx(losses.mean().exp().item() * spread / math.sqrt(count), rel=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_batch_size_does_not_matter(batch: int) -> None:
    model, windows = make_model("llama"), make_windows(7, 40)
    assert perplexity(model, windows, "cpu", batch).value == pytest.approx(
        perplexity(model, windows, "cpu", 7).value, rel=1e-6
    )


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = make_model("llama"), make_windows(4, 30)
    expected = perplexity(model, windows, "cpu", 4).value
    monkeypatch.setattr(measuring, "_CHUNK", 16)
    shapes = []
    model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    assert logit_parts(model, windows) is not None
    assert perplexity(model, windows, "cpu", 4).value == pytest.approx(expected, rel=1e-6)
    positions = [shape[0] for shape in shapes if len(shape) == 2]
    assert max(positions) == 16
    assert sum(positions) == 4 * 29
    assert all(math.prod(shape[:-1]) <= 16 for shape in shapes)


def test_bfloat16_model_is_reduced_in_float32() -> None:
    model, windows = make_model("llama").to(torch.bfloat16), make_windows(3, 64)
    losses = naive_losses(model, windows)
    # The rounding of the logits is in both; a log-softmax in bfloat16 would be off by 2e-4.
    assert perplexity(model, windows, "cpu", 3).mean_loss == pytest.approx(losses.mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2-softcapped"])
def test_broken_model_is_reported_as_it_is(kind: str) -> None:
    model, windows = make_model(kind), make_windows(3, 20)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(math.nan)
    result = perplexity(model, windows, "cpu", 2)
    assert math.isnan(result.value)
    assert math.isnan(result.mean_loss)


def test_perplexity_beyond_float_is_infinite() -> None:
    model, windows = make_model("llama"), make_windows(3, 20)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    result = perplexity(model, windows, "cpu", 2)
    assert math.isinf(result.value)
    assert 710 < result.mean_loss < math.inf


def test_progress_and_mode() -> None:
    model, windows = make_model("llama").train(), make_windows(5, 10)
    seen: list[tuple[int, int]] = []
    perplexity(model, windows, "cpu", 2, on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert model.training


@pytest.mark.parametrize("kind", KINDS)
def test_target_log_probs_at_chosen_positions(kind: str) -> None:
    model, tokens = make_model(kind), make_windows(3, 12)
    rows, columns = torch.tensor([0, 2, 2, 1]), torch.tensor([11, 0, 5, 5])
    with torch.no_grad():
        expected = model(tokens).logits.double().log_softmax(-1)[rows, columns]
        best = expected.argmax(1)
        targets = torch.tensor([3, int(best[1]), 96, int(best[3])])
        parts = logit_parts(model, tokens)
        log_probs, greedy = target_log_probs(model, tokens, rows, columns, targets, parts)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected[range(4), targets], rtol=1e-4, atol=1e-5)
    assert greedy.tolist() == (best == targets).tolist()


def test_what_changes_logits_after_the_head_is_noticed_whatever_it_is_called() -> None:
    """As FalconH1's ``lm_head_multiplier`` and Gemma 4's soft cap, which no list of names had."""
    model, windows = make_model("llama"), make_windows(3, 20)
    plain = perplexity(model, windows, "cpu", 2).value
    own = model.forward

    def scaled(**inputs: Any) -> Any:
        outputs = own(**inputs)
        outputs.logits = outputs.logits * 3
        return outputs

    model.forward = scaled  # type: ignore[method-assign]
    with torch.no_grad():
        logits = model(input_ids=windows).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).exp()
    assert perplexity(model, windows, "cpu", 2).value == pytest.approx(expected.item(), rel=1e-5)
    assert abs(plain - expected.item()) > 0.1
    assert logit_parts(model, windows) is None


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"max_position_embeddings": 16}, 16),
        ({"max_position_embeddings": 16, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 32),
    ],
    ids=["plain", "scaled"],
)
def test_windows_longer_than_the_model_are_refused(changes: dict[str, Any], limit: int) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
    assert perplexity(model, make_windows(2, limit), "cpu", 2).windows == 2
    with pytest.raises(UserError, match=f"max_position_embeddings is {limit}"):
        perplexity(model, make_windows(2, limit + 1), "cpu", 2)
