"""Streaming calibration against forward hooks on the whole model, for models whose blocks are called differently."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from patch.errors import UserError
from patch.layers import decoder_blocks, prunable_linears
from patch.oneshot import calibration
from patch.oneshot.calibration import Block, blocks_on, calibrate

VOCABULARY, LENGTH = 97, 24
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(attention: str) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**COMMON, attn_implementation=attention))


def qwen2(attention: str) -> nn.Module:
    # The last block slides: its mask is another one.
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**COMMON, **windowed, attn_implementation=attention))


def gemma3(attention: str) -> nn.Module:
    # Masks and position embeddings differ between the layer types; embeddings are scaled.
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**COMMON, sliding_window=8, layer_types=types, attn_implementation=attention)
    return Gemma3ForCausalLM(config)


MODELS = [
    pytest.param(build, attention, id=f"{build.__name__}-{attention}")
    for build in (llama, qwen2, gemma3)
    for attention in ("sdpa", "eager")
]


class Total:
    """A statistic that is easy to check: sum of outer products, and exact counts."""

    def __init__(self, features: int, device: torch.device | str) -> None:
        self.products = torch.zeros(features, features, device=device)
        self.tokens = self.windows = self.calls = 0

    def add(self, inputs: Tensor, windows: int) -> None:
        assert inputs.dtype == torch.float32 and inputs.ndim == 2
        self.products += inputs.T @ inputs
        self.tokens += len(inputs)
        self.windows += windows
        self.calls += 1

    def finite(self) -> bool:
        return bool(self.products.isfinite().all())


def make(build: Callable[[str], nn.Module], attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = build(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the default initialisation, so that blocks matter beside the residual stream.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_windows(count: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def products_by_hooks(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Sum of outer products of every prunable input, from one forward of the whole model."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            flat = arguments[0].flatten(0, -2).float()
            found[name] = flat.T @ flat

        return note

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in prunable_linears(model).items()]
    model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def drop_some(weight: Tensor) -> None:
    weight.view(-1)[::3] = 0


@pytest.mark.parametrize("batch", [2, 5, 8], ids="batch-{}".format)
@pytest.mark.parametrize(("build", "attention"), MODELS)
def test_statistics_are_those_of_the_whole_model(build: Any, attention: str, batch: int) -> None:
    model, windows = make(build, attention), make_windows()
    expected = products_by_hooks(model, windows)
    seen: list[str] = []
    for index, block in enumerate(calibrate(model, windows, "cpu", batch, Total)):
        assert block.index == index
        assert list(block.weights) == list(block.statistics)
        for name, statistic in block.statistics.items():
            torch.testing.assert_close(statistic.products, expected[name], rtol=1e-4, atol=1e-3)
            assert (statistic.tokens, statistic.windows) == (windows.numel(), len(windows))
            assert block.weights[name] is prunable_linears(model)[name].weight
        seen += block.statistics
    assert seen == list(prunable_linears(model))


@pytest.mark.parametrize(("build", "attention"), MODELS)
def test_blocks_are_calibrated_on_what_the_pruned_model_feeds_them(build: Any, attention: str) -> None:
    model, windows = make(build, attention), make_windows()
    naive = make(build, attention)
    dense = products_by_hooks(naive, windows)
    changed = 0
    for block in calibrate(model, windows, "cpu", 2, Total):
        expected = products_by_hooks(naive, windows)
        for name, statistic in block.statistics.items():
            torch.testing.assert_close(statistic.products, expected[name], rtol=1e-4, atol=1e-3)
            changed += not torch.allclose(expected[name], dense[name], rtol=1e-2)
        for name, weight in block.weights.items():
            drop_some(weight)
            drop_some(prunable_linears(naive)[name].weight)
    assert changed >= 14, "pruning a block must change what the two blocks after it read"
    torch.testing.assert_close(model(windows).logits, naive(windows).logits)


def test_linears_that_read_one_tensor_share_one_statistic() -> None:
    model, windows = make(llama), make_windows()
    for block in calibrate(model, windows, "cpu", 2, Total):
        of = {name.rsplit(".", 1)[1]: statistic for name, statistic in block.statistics.items()}
        assert of["q_proj"] is of["k_proj"] is of["v_proj"]
        assert of["gate_proj"] is of["up_proj"]
        assert len({id(statistic) for statistic in of.values()}) == 4
        assert {statistic.calls for statistic in of.values()} == {3}, "each batch is taken in once"


def test_statistics_do_not_outlive_their_block() -> None:
    blocks = list(calibrate(make(llama), make_windows(), "cpu", 8, Total))
    assert [block.statistics for block in blocks] == [{}, {}, {}]


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "uncalibrated"])
def test_at_most_one_block_is_on_the_device(calibrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(llama)
    blocks = list(decoder_blocks(model))
    # "cpu:0" holds the same tensors as "cpu", but the two are told apart where a block is asked to move.
    device = torch.device("cpu", 0)
    where = {id(block): torch.device("cpu") for block in blocks}
    moves: list[int] = []
    real = nn.Module.to

    def to(module: nn.Module, target: torch.device) -> nn.Module:
        assert id(module) in where, "something other than a block is moved"
        where[id(module)] = torch.device(target)
        moves.append(sum(place == device for place in where.values()))
        return real(module, target)

    def running(block: nn.Module, *_: Any) -> None:
        # Before the first move blocks are only passed over, to note what they are called with.
        assert not moves or where[id(block)] == device, "a block runs where it is not"

    monkeypatch.setattr(nn.Module, "to", to)
    for block in blocks:
        block.register_forward_pre_hook(running)
    stream = calibrate(model, make_windows(), device, 2, Total) if calibrated else blocks_on(model, device)
    for handed in stream:
        assert [place == device for place in where.values()] == [index == handed.index for index in range(3)]
    assert moves == [1, 0, 1, 0, 1, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("build", "attention"), MODELS)
def test_on_a_gpu_only_one_block_lies_there(build: Any, attention: str) -> None:
    model, windows = make(build, attention), make_windows()
    expected = products_by_hooks(model, windows)
    for block in calibrate(model, windows, "cuda", 2, Total):
        there = [next(each.parameters()).device.type == "cuda" for each in decoder_blocks(model)]
        assert there == [index == block.index for index in range(3)]
        for name, statistic in block.statistics.items():
            torch.testing.assert_close(statistic.products.cpu(), expected[name], rtol=1e-3, atol=1e-2)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


class Stop(Exception):
    pass


def stop(*_: Any) -> None:
    raise Stop


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Asserts that the model ends as it was: modes, cache, hooks, forward methods, places."""
    windows = make_windows(2)
    with torch.no_grad():
        expected = model(windows).logits
    modes = [module.training for module in model.modules()]
    yield
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is True
    for linear in prunable_linears(model).values():
        assert not linear._forward_pre_hooks
    for block in decoder_blocks(model):
        assert "forward" not in vars(block)
    with torch.no_grad():
        torch.testing.assert_close(model(windows).logits, expected)


@pytest.mark.parametrize("moment", ["embedding", "positions", "in-a-block", "caller-stops", "end"])
def test_the_model_is_put_back_whatever_happens(moment: str) -> None:
    model = make(llama)
    model.gradient_checkpointing_enable()
    model.train()
    decoder_blocks(model)[1].eval()
    with untouched(model):
        if moment == "end":
            for _ in calibrate(model, make_windows(), "cpu", 2, Total):
                assert model.config.use_cache is False
                assert not any(module.training for module in model.modules())
        elif moment == "caller-stops":
            stream = calibrate(model, make_windows(), "cpu", 2, Total)
            next(stream)
            stream.close()
        else:
            broken = {
                "embedding": model.get_input_embeddings(),
                "positions": model.model.rotary_emb,
                "in-a-block": decoder_blocks(model)[1].mlp,
            }[moment]
            handle = broken.register_forward_pre_hook(stop)
            with pytest.raises(Stop):
                list(calibrate(model, make_windows(), "cpu", 2, Total))
            handle.remove()


def test_a_forward_that_someone_else_replaced_is_kept() -> None:
    model = make(llama)
    block = decoder_blocks(model)[0]
    called: list[int] = []
    plain = block.forward

    def theirs(*arguments: Any, **keywords: Any) -> Tensor:
        called.append(1)
        return plain(*arguments, **keywords)

    block.forward = theirs
    list(calibrate(model, make_windows(2), "cpu", 2, Total))
    assert block.forward is theirs
    assert len(called) == 2, "once for its statistics, once for its outputs"


class OldBlock(nn.Module):
    """A block of the older kind: returns a tuple, is given its mask by position."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.reads_unused = True

    def forward(self, hidden_states: Tensor, scale: Tensor, *, extra: Tensor | None = None) -> tuple[Tensor, None]:
        out = hidden_states + scale * self.linear(hidden_states) + (0 if extra is None else extra)
        return (out + self.unused(out) if self.reads_unused else out), None


class OldModel(nn.Module):
    def __init__(self, per_token: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.per_token = per_token
        self.layers = nn.ModuleList([OldBlock() for _ in range(5)])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embed(input_ids)
        extra = {"extra": self.embed(input_ids).cos()} if self.per_token else {}
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, torch.tensor(index + 0.5), **extra)[0]
        return hidden


def test_blocks_that_return_tuples_and_take_positional_arguments() -> None:
    torch.manual_seed(0)
    model, windows = OldModel(), make_windows()
    expected = products_by_hooks(model, windows)
    for block in calibrate(model, windows, "cpu", 2, Total):
        for name, statistic in block.statistics.items():
            torch.testing.assert_close(statistic.products, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        pytest.param(torch.tensor([1.0, 0.5]) * (1 + 1e-7), None, id="rounding"),
        pytest.param(
            torch.tensor([1.0, 0.6]), "block 0: extra.mask differs in 1 of 2 elements, by up to 0.1", id="other"
        ),
        pytest.param(torch.tensor([1.0, torch.nan]), "by up to nan", id="nan"),
        pytest.param(torch.tensor([1, 0]), "is torch.float32 (2,) and torch.int64 (2,)", id="dtype"),
        pytest.param(torch.ones(3), "(2,) and torch.float32 (3,)", id="shape"),
    ],
)
def test_what_differs_between_two_batches_is_told(now: Tensor, said: str | None) -> None:
    calls = [[calibration._Call((), {"extra": {"mask": mask}})] for mask in (torch.tensor([1.0, 0.5]), now)]
    found = calibration._difference(*calls)
    assert found is None if said is None else found is not None and said in found


def nudged(model: nn.Module, nudge: Callable[[Tensor], Tensor]) -> None:
    """Every second batch has other position embeddings: a kernel that divides its work otherwise rounds otherwise."""
    rotary = model.model.rotary_emb
    own, calls = rotary.forward, []

    def forward(*arguments: Any, **keywords: Any) -> tuple[Tensor, ...]:
        calls.append(1)
        embeddings = own(*arguments, **keywords)
        return embeddings if len(calls) % 2 else tuple(nudge(each) for each in embeddings)

    rotary.forward = forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_position_embeddings_may_differ_by_their_last_digit(dtype: torch.dtype) -> None:
    model, windows = make(qwen2).to(dtype), make_windows(6)
    expected = products_by_hooks(model, windows)
    nudged(model, lambda values: torch.nextafter(values, torch.full_like(values, 2.0)))
    for block in calibrate(model, windows, "cpu", 2, Total):
        for name, statistic in block.statistics.items():
            allowed = 1e-3 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(statistic.products, expected[name], rtol=allowed, atol=10 * allowed)


def test_position_embeddings_that_depend_on_the_text_are_told() -> None:
    model = make(qwen2)
    nudged(model, lambda values: values + 1e-3)
    with pytest.raises(UserError, match=r"position_embeddings\[0\] differs in .* elements, by up to 0.001"):
        list(calibrate(model, make_windows(6), "cpu", 2, Total))


def test_a_mask_that_only_some_batches_have_is_told() -> None:
    calls = [[calibration._Call((None, mask), {})] for mask in (torch.ones(2), None)]
    assert calibration._difference(*calls) == "block 0: argument[1] is there in one of them alone"


def test_inputs_that_depend_on_the_text_are_refused() -> None:
    with pytest.raises(UserError, match="OldModel gives its blocks inputs that depend on the text"):
        list(calibrate(OldModel(per_token=True), make_windows(), "cpu", 2, Total))


def test_a_weight_that_is_never_reached_is_named() -> None:
    model = OldModel()
    model.layers[1].reads_unused = False
    with pytest.raises(UserError, match=r"layers\.1\.unused: no calibration window reaches"):
        list(calibrate(model, make_windows(), "cpu", 2, Total))


def test_a_model_that_skips_blocks_is_refused() -> None:
    model = make(llama)
    model.config.num_hidden_layers = 2
    with pytest.raises(UserError, match="runs 2 of its 3 blocks"):
        list(calibrate(model, make_windows(), "cpu", 2, Total))


def test_activations_that_are_not_finite_name_the_weight() -> None:
    model = make(llama)
    with torch.no_grad():
        decoder_blocks(model)[1].post_attention_layernorm.weight[3] = float("inf")
    stream = calibrate(model, make_windows(), "cpu", 2, Total)
    assert isinstance(next(stream), Block)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate_proj: .* not finite"):
        next(stream)


@pytest.mark.parametrize(
    ("windows", "batch", "message"),
    [
        pytest.param(torch.zeros(2, 8), 2, r"float32 \(2, 8\)", id="not-integers"),
        pytest.param(torch.zeros(8, dtype=torch.long), 2, r"int64 \(8,\)", id="one-dimension"),
        pytest.param(torch.zeros(0, 8, dtype=torch.long), 2, r"int64 \(0, 8\)", id="no-window"),
        pytest.param(torch.full((1, 8), VOCABULARY), 2, "97..97, the model has 97", id="beyond-the-vocabulary"),
        pytest.param(torch.full((1, 8), -1), 2, r"-1..-1", id="negative"),
        pytest.param(torch.zeros(2, 8, dtype=torch.long), 0, "batch 0", id="no-batch"),
    ],
)
def test_bad_windows_are_refused_before_anything_runs(windows: Tensor, batch: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(make(llama), windows, "cpu", batch, Total)


def test_short_integers_are_token_ids_too() -> None:
    model, windows = make(llama), make_windows()
    expected = products_by_hooks(model, windows)
    block = next(calibrate(model, windows.to(torch.int32), "cpu", 8, Total))
    name = next(iter(block.statistics))
    torch.testing.assert_close(block.statistics[name].products, expected[name], rtol=1e-4, atol=1e-3)
