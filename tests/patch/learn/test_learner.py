"""Learning on tiny models: the loss and its gradient, what is learned, budgets, resuming, and what is refused."""

import dataclasses
import errno
import functools
import io
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import Python
from tensorboard.summary.writer import event_file_writer
from tiny_learner import RAGGED, SHORT, VOCABULARY, magnitude_prior, tiny_model, words
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from patch.budget import cut_globally
from patch.errors import UserError
from patch.layers import decoder_blocks, prunable_linears
from patch.learn import cuda_graph, saved, soft_mask
from patch.learn import prior as prior_of_learning
from patch.learn.descent import LearningDiverged, Stopped
from patch.learn.inputs import input_scales
from patch.learn.learner import Implementation, Learned, learn
from patch.learn.prior import Prior
from patch.learn.recipe import Recipe, Temperatures
from patch.learn.saved import CHECKPOINT
from patch.learn.sensitivity import tile_sensitivity
from patch.mask import KEPT_PAIRS, HybridMask, best_patterns, tile_sizes, tile_sums
from patch.quantise.precisions import PRECISIONS
from patch.quantise.values import rounded
from patch.tiles import tile_grid

MODES = ["joint", "tile", "maskllm"]
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def trained() -> LlamaForCausalLM:
    """A model that knows the language, by its prunable weights alone: embedding and head stay random."""
    model = tiny_model().requires_grad_(False)
    source = torch.Generator().manual_seed(0)
    model.model.embed_tokens.weight.normal_(0, 0.3, generator=source)
    model.lm_head.weight.normal_(0, 0.2, generator=source)
    weights = [linear.weight.requires_grad_() for linear in prunable_linears(model).values()]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    for step in range(120):
        tokens = words(step, 16, 24)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def run(
    model: nn.Module,
    recipe: Recipe,
    work: Path,
    batches: Callable[[int], Tensor] | None = None,
    on_step: Callable[[Mapping[str, float]], None] | None = None,
    prior: Prior | None = None,
    sparsity: float | None = None,
    tile: tuple[int, int] = RAGGED,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
    implementation: Implementation | None = None,
) -> Learned:
    return learn(
        model,
        recipe,
        batches or (lambda step: words(step, recipe.batch, recipe.length)),
        sparsity=(0.5 if recipe.mode == "maskllm" else 0.35) if sparsity is None else sparsity,
        tile=tile,
        seed=seed,
        prior=magnitude_prior(model, tile) if prior is None else prior,
        work=work,
        device="cpu",
        on_step=on_step,
        stop=stop,
        implementation=implementation,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Learned, Path]]:
    """The outcome of the short recipe of a mode, run once, and the folder that it worked in."""

    @functools.cache
    def of(mode: str) -> tuple[Learned, Path]:
        work = tmp_path_factory.mktemp(mode)
        return run(tiny_model(), SHORT[mode], work), work

    return of


@pytest.fixture
def worked(finished: Callable[[str], tuple[Learned, Path]], tmp_path: Path) -> Path:
    """A folder in which the short recipe of the joint mode has been run."""
    return shutil.copytree(finished("joint")[1], tmp_path / "worked")


def learned_logits(state: dict[str, Any]) -> dict[str, Tensor]:
    """The logits in a learner's checkpoint, by weight and kind."""
    return {name: learned["logits"] for name, learned in state["learned"].items()}


def same(left: Learned, right: Learned) -> bool:
    """Whether two outcomes are equal to the last bit."""
    alike = all(
        torch.equal(left.masks[name].dense, mask.dense) and torch.equal(left.masks[name].patterns, mask.patterns)
        for name, mask in right.masks.items()
    )
    return alike and left.masks.keys() == right.masks.keys() and left.history == right.history


def hard_loss(model: nn.Module, masks: Mapping[str, HybridMask]) -> float:
    """Cross entropy on unseen sentences with the masks applied."""
    weights = {f"{n}.weight": masks[n].apply(linear.weight) for n, linear in prunable_linears(model).items()}
    tokens = words(10**6, 64, 24)
    with torch.no_grad():
        logits = torch.func.functional_call(model, weights, kwargs={"input_ids": tokens}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


# --- the loss and its gradient --------------------------------------------------------------------------------------


def naive_mask(
    logits: Mapping[str, Tensor], name: str, patterns: Tensor, stream: tuple[int, ...], tau: float, recipe: Recipe
) -> Tensor:
    """Float64 soft mask of one weight, pattern by pattern and element by element, with the noise of ``stream``."""
    if f"{name}/patterns" in logits:
        learned = logits[f"{name}/patterns"]
        noise = soft_mask.gumbel(
            learned.shape, soft_mask.generator(soft_mask.stream_seed("patterns", *stream), "cpu")
        ).double()
        shares = torch.softmax((recipe.pattern_scale[0] * learned + noise) / tau, 0)
    else:
        shares = F.one_hot(patterns.long(), 6).double().movedim(-1, 0)
    kept = [torch.stack([shares[p] for p in range(6) if e in KEPT_PAIRS[p]]).sum(0) for e in range(4)]
    two_four = torch.stack(kept, -1).flatten(1)
    if f"{name}/tiles" not in logits:
        return two_four
    learned = logits[f"{name}/tiles"]
    noise = soft_mask.logistic(
        learned.shape, soft_mask.generator(soft_mask.stream_seed("tiles", *stream), "cpu")
    ).double()
    t = torch.sigmoid((recipe.tile_scale[0] * learned + noise) / tau)
    row_of, col_of = torch.arange(two_four.shape[0]) // RAGGED[0], torch.arange(two_four.shape[1]) // RAGGED[1]
    dense = t[row_of][:, col_of]
    return dense + (1 - dense) * two_four


@pytest.fixture
def ranked_by(monkeypatch: pytest.MonkeyPatch) -> int:
    """So few sequences rank tiles."""
    monkeypatch.setattr(prior_of_learning, "RANKED_BY", 32)
    return 32


@every_mode
@pytest.mark.parametrize(("kind", "by"), [("norm", "weights"), ("square", "weights"), ("norm", "outputs")])
def test_loss_and_gradient_are_the_definition(mode: str, kind: Any, by: Any, tmp_path: Path) -> None:
    # Steps so small that the logits in the checkpoint are those that the step was taken from.
    penalty = 10.0 if kind == "norm" else 1e-2
    recipe = dataclasses.replace(
        SHORT[mode],
        steps=1,
        lr=1e-12,
        weight_decay=0,
        checkpoint_every=1,
        weight_penalty=penalty,
        weight_penalty_kind=kind,
        weight_penalty_by=by,
    )
    recipe = dataclasses.replace(recipe, sparsity_penalty=7, tau=(1.5, 1.5), clip=None)
    model, seen = tiny_model(), []
    prior = magnitude_prior(model)
    scales = dict.fromkeys(prunable_linears(model), torch.ones(()))
    if by == "outputs":
        scales = input_scales(model, prior_of_learning.first_sequences(recipe, words))
    run(model, recipe, tmp_path, on_step=seen.append, seed=5, prior=prior)
    state = torch.load(tmp_path / CHECKPOINT)
    logits = {name: value.double().requires_grad_() for name, value in learned_logits(state).items()}

    model = model.double().requires_grad_(False)
    target = 0.5 if mode == "maskllm" else 0.35
    loss, losses, densities = torch.zeros((), dtype=torch.float64), [], []
    for microbatch, tokens in enumerate(words(0).split(recipe.microbatch)):
        weights, kept, size, dense_size, elements = {}, 0.0, 0.0, 0.0, 0
        for index, (name, linear) in enumerate(prunable_linears(model).items()):
            stream = (5, 0, microbatch, index)
            assert prior.patterns is not None
            mask = naive_mask(logits, name, prior.patterns[name], stream, 1.5, recipe)
            weights[f"{name}.weight"] = linear.weight * mask
            kept, elements = kept + mask.sum(), elements + mask.numel()
            squares = (linear.weight * mask * scales[name]).square().sum()
            size = size + (squares.sqrt() if kind == "norm" else squares)
            dense_size += (linear.weight * scales[name]).norm().item()
        out = torch.func.functional_call(model, weights, kwargs={"input_ids": tokens}).logits
        losses.append(F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
        densities.append(kept / elements)
        part = losses[-1] - penalty * (size / dense_size if kind == "norm" else size)
        if mode != "maskllm":
            part = part + 7 * (densities[-1] - (1 - target)).abs()
        loss = loss + part / 2
    loss.backward()
    norm = torch.stack([value.grad.norm() for value in logits.values() if value.grad is not None]).norm()
    assert seen[0]["cross_entropy"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    assert seen[0]["density"] == pytest.approx(sum(densities).item() / 2, rel=1e-5)
    assert seen[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert seen[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    # After one step from zero moments, Adam's first moment is a tenth of the gradient.
    for name, value in logits.items():
        moment = state["learned"][name]["exp_avg"].double()
        torch.testing.assert_close(10 * moment, value.grad, rtol=1e-3, atol=1e-6 * norm.item())


def test_logits_move_as_the_recipe_says(tmp_path: Path) -> None:
    """Clipping, and AdamW's update with the learning rate of the step, from one checkpoint to the next."""
    recipe = dataclasses.replace(
        SHORT["joint"], steps=4, checkpoint_every=1, warmup=3, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-5, clip=0.03
    )
    states, norms = [], []

    def keep(entry: Mapping[str, float]) -> None:
        states.append(torch.load(tmp_path / CHECKPOINT))
        norms.append(entry["grad_norm"])

    run(tiny_model(), recipe, tmp_path, on_step=keep)
    for step in (1, 2, 3):
        gradients = []
        for name in states[0]["learned"]:
            old, new = (states[step + i]["learned"][name] for i in (-1, 0))
            gradient = (new["exp_avg"] - 0.8 * old["exp_avg"]) / 0.2
            gradients.append(gradient)
            torch.testing.assert_close(
                new["exp_avg_sq"], 0.9 * old["exp_avg_sq"] + 0.1 * gradient**2, rtol=1e-3, atol=1e-10
            )
            mean = new["exp_avg"] / (1 - 0.8 ** (step + 1))
            square = new["exp_avg_sq"] / (1 - 0.9 ** (step + 1))
            before, after = old["logits"], new["logits"]
            lr = recipe.at(step).lr
            expected = before * (1 - lr * 0.1) - lr * mean / (square.sqrt() + 1e-5)
            torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-7)
        assert norms[step] > 0.03, "nothing to clip"
        assert torch.cat([g.flatten() for g in gradients]).norm().item() == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [*((mode, torch.float32) for mode in MODES), ("joint", torch.bfloat16)],
    ids=str,
)
def test_activation_checkpointing_changes_nothing(
    mode: str, dtype: torch.dtype, finished: Callable[[str], tuple[Learned, Path]], tmp_path: Path
) -> None:
    recipe = dataclasses.replace(SHORT[mode], activation_checkpointing=True)
    plain = finished(mode)[0] if dtype == torch.float32 else run(tiny_model(dtype), SHORT[mode], tmp_path / "plain")
    assert same(run(tiny_model(dtype), recipe, tmp_path / "checkpointing"), plain)


@every_mode
def test_what_a_failed_capture_leaves_behind_is_not_used(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        captured = False

        def __init__(self, function: Callable[[], Tensor], after_failure: Any) -> None:
            self.function, self.after_failure = function, after_failure

        def __call__(self) -> Tensor:
            self.function()
            for masked in self.after_failure.__self__._drop_gradients.__self__._linears.values():
                masked.sums = tuple(torch.full_like(total, torch.nan) for total in masked.sums)
            self.after_failure()
            return self.function()

        def close(self) -> None:
            pass

    monkeypatch.setattr(cuda_graph, "Replayed", Failing)
    recipe = dataclasses.replace(SHORT[mode], batch=2)
    outcomes = [
        run(
            tiny_model(),
            recipe,
            tmp_path / str(captured),
            implementation=Implementation(soft_mask.sampled_weight, captured=captured),
        )
        for captured in (False, True)
    ]
    assert same(*outcomes)


@pytest.mark.parametrize(("mode", "checkpointing"), [("joint", False), *((mode, True) for mode in MODES)], ids=str)
def test_masks_that_are_drawn_ahead_are_the_same(
    mode: str, checkpointing: bool, finished: Callable[[str], tuple[Learned, Path]], tmp_path: Path
) -> None:
    assert not Implementation.of(torch.device("cpu")).ahead
    recipe = dataclasses.replace(SHORT[mode], activation_checkpointing=checkpointing)
    ahead = Implementation(soft_mask.sampled_weight, ahead=True)
    assert same(run(tiny_model(), recipe, tmp_path, implementation=ahead), finished(mode)[0])


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_distillation_is_the_divergence_from_the_dense_model(share: float, tmp_path: Path) -> None:
    """Dense tiles alone, so that the masked model is the dense one at first, but for a tiny share of its weights."""
    plain = dataclasses.replace(SHORT["joint"], steps=1, sparsity_penalty=0, weight_penalty=0)
    model, seen = tiny_model(), []
    for distillation in (0.0, share):
        recipe = dataclasses.replace(plain, distillation=distillation)
        run(model, recipe, tmp_path / str(distillation), on_step=seen.append)
    # The same noise, the same masked weights: losses differ by what the text is replaced with.
    divergence = (seen[1]["loss"] - (1 - share) * seen[0]["cross_entropy"]) / share
    assert seen[1]["cross_entropy"] == seen[0]["cross_entropy"] == seen[0]["loss"]
    losses = []
    for index, tokens in enumerate(words(0).split(plain.microbatch)):
        weights = drawn_weights(plain, model, index)
        with torch.no_grad():
            ours = torch.func.functional_call(model, weights, kwargs={"input_ids": tokens}).logits[:, :-1]
            dense = model(input_ids=tokens).logits[:, :-1]
        losses.append(F.kl_div(ours.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True))
    expected = torch.stack([part.sum(-1).mean() for part in losses]).mean().item()
    assert divergence == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_masks_are_laid_over_rounded_weights(precision: str, tmp_path: Path) -> None:
    """The dense model that is learned from stays as it is, and so does the model."""
    recipe = dataclasses.replace(SHORT["joint"], steps=1, sparsity_penalty=0, weight_penalty=0, precision=precision)
    model, seen = tiny_model(intermediate_size=96), []
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    run(model, recipe, tmp_path / "rounded", on_step=seen.append)
    run(model, dataclasses.replace(recipe, distillation=1.0), tmp_path / "distilled", on_step=seen.append)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    by_hand = tiny_model(intermediate_size=96)
    for linear in prunable_linears(by_hand).values():
        linear.weight.data = rounded(linear.weight.data, PRECISIONS[precision], 32)
    plain, start = dataclasses.replace(recipe, precision=None), magnitude_prior(model)
    run(by_hand, plain, tmp_path / "by hand", prior=start, on_step=seen.append)
    assert seen[0]["loss"] == seen[2]["loss"]
    # From a teacher that is rounded too, what is learned is another divergence.
    distilled = dataclasses.replace(plain, distillation=1.0)
    run(by_hand, distilled, tmp_path / "both", prior=start, on_step=seen.append)
    assert seen[1]["cross_entropy"] == seen[3]["cross_entropy"] and seen[1]["loss"] != seen[3]["loss"]


def test_block_distillation_is_the_distance_from_the_dense_model_s_hidden_states(tmp_path: Path) -> None:
    """Of one step, against masked weights laid over the model by hand."""
    plain = dataclasses.replace(SHORT["joint"], steps=1, sparsity_penalty=0, weight_penalty=0)
    model, seen = tiny_model(), []
    for factor in (0.0, 3.0):
        recipe = dataclasses.replace(plain, block_distillation=factor)
        run(model, recipe, tmp_path / str(factor), on_step=seen.append)
    assert seen[1]["cross_entropy"] == seen[0]["cross_entropy"] == seen[0]["loss"]
    distances = []
    for index, tokens in enumerate(words(0).split(plain.microbatch)):
        weights = drawn_weights(plain, model, index)
        inputs = {"input_ids": tokens, "output_hidden_states": True}
        with torch.no_grad():
            ours = torch.func.functional_call(model, weights, kwargs=inputs).hidden_states[1:]
            dense = model(**inputs).hidden_states[1:]
        assert len(ours) == len(decoder_blocks(model))
        for mine, other in zip(ours, dense, strict=True):
            for token, wanted in zip(mine.flatten(0, 1).double(), other.flatten(0, 1).double(), strict=True):
                distances.append(float((token - wanted) @ (token - wanted) / (wanted @ wanted)))
    assert (seen[1]["loss"] - seen[0]["loss"]) / 3 == pytest.approx(sum(distances) / len(distances), rel=1e-3)


def drawn_weights(recipe: Recipe, model: nn.Module, microbatch: int) -> dict[str, Tensor]:
    """`drawn_weight` of every linear in one micro-batch, by the name of its parameter."""
    return {
        f"{name}.weight": drawn_weight(linear, name, recipe, model, (0, 0, microbatch, number))
        for number, (name, linear) in enumerate(prunable_linears(model).items())
    }


def drawn_weight(linear: nn.Linear, name: str, recipe: Recipe, model: nn.Module, stream: tuple[int, ...]) -> Tensor:
    """The masked weight of the first step of a run of seed 0 that starts from `magnitude_prior`."""
    prior = magnitude_prior(model)
    assert prior.patterns is not None and prior.tile_scores is not None
    index = list(prunable_linears(model)).index(name)
    logits = {}
    for kind, shape, lift in (
        ("patterns", (6, *prior.patterns[name].shape), 3.0 * soft_mask.pattern_prior(prior.patterns[name])),
        ("tiles", prior.tile_scores[name].shape, 3.0 * soft_mask.tile_prior(prior.tile_scores[name], 0.35)),
    ):
        source = soft_mask.generator(soft_mask.stream_seed(f"initial {kind}", 0, index), "cpu")
        logits[kind] = recipe.logit_std * (torch.empty(shape).normal_(generator=source) + lift)
    temperatures = Temperatures(4.0, 100.0, 25.0)
    return soft_mask.sampled_weight(
        linear.weight.detach(), logits["patterns"], logits["tiles"], RAGGED, temperatures, stream
    ).weight


def test_expected_density_does_not_depend_on_the_noise(tmp_path: Path) -> None:
    """With a penalty on density alone, what it acts on is the density that the tile logits stand for."""
    recipe = dataclasses.replace(SHORT["joint"], steps=1, weight_penalty=0, sparsity_penalty=1000, density="expected")
    losses = []
    for seed_of_words in (0, 1):
        seen: list[Mapping[str, float]] = []
        run(
            tiny_model(),
            recipe,
            tmp_path / str(seed_of_words),
            batches=lambda step, first=seed_of_words: words(step + first),
            on_step=seen.append,
            sparsity=0.0,
        )
        losses.append((seen[0]["loss"] - seen[0]["cross_entropy"]) / 1000)
    # All tiles start near scale * 0.042 = 1.05 or its negative: at target 0, all at the former.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(0.5 * torch.sigmoid(torch.tensor(-1.05)).item(), rel=0.05)


def test_bfloat16_logits_learn_and_resume(tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT["joint"], logit_dtype="bfloat16")
    whole = run(tiny_model(), recipe, tmp_path / "whole")
    with pytest.raises(Stopped, match="after step 3 of 6"):
        seen: list[Any] = []
        run(tiny_model(), recipe, tmp_path / "part", on_step=seen.append, stop=lambda: len(seen) == 3)
    assert same(run(tiny_model(), recipe, tmp_path / "part"), whole)
    state = torch.load(tmp_path / "part" / CHECKPOINT)
    assert {part.dtype for learned in state["learned"].values() for part in learned.values()} == {torch.bfloat16}


ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 16, "sliding_window": 8}),
    "opt": (OPTConfig, OPTForCausalLM, {"ffn_dim": 100, "word_embed_proj_dim": 64, "dropout": 0.5}),
}


@pytest.mark.parametrize(("config", "kind", "extra"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_other_architectures_learn_alike(config: Any, kind: Any, extra: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config(**(sizes | extra))).train()
    outcomes = [
        run(model, dataclasses.replace(SHORT["joint"], activation_checkpointing=on), tmp_path / str(on))
        for on in (False, True)
    ]
    assert same(*outcomes) and len(outcomes[0].masks) == len(prunable_linears(model)) >= 12


@pytest.mark.parametrize("mode", ["joint", "maskllm"])
def test_accumulation_changes_nothing_but_the_noise(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_mask, "gumbel", lambda shape, source: torch.zeros(shape))
    monkeypatch.setattr(soft_mask, "logistic", lambda shape, source: torch.zeros(shape))
    recipe = dataclasses.replace(SHORT[mode], sparsity_penalty=70, weight_penalty=100 if mode == "joint" else 0.1)
    whole, halves, quarters = (
        run(tiny_model(), dataclasses.replace(recipe, microbatch=size), tmp_path / str(size)).history
        for size in (4, 2, 1)
    )
    for name in ("loss", "cross_entropy", "density", "grad_norm"):
        for other in (halves, quarters):
            assert [entry[name] for entry in other] == pytest.approx([entry[name] for entry in whole], rel=1e-3)


# --- what is learned ------------------------------------------------------------------------------------------------


@every_mode
def test_a_bad_prior_is_mended(mode: str, trained: LlamaForCausalLM, tmp_path: Path) -> None:
    """Patterns that drop the largest weights, the most important tiles sparse: wrong gradients could not mend that."""
    weights = {name: linear.weight.detach() for name, linear in prunable_linears(trained).items()}
    worst = Prior(
        {name: best_patterns(-weight.abs()) for name, weight in weights.items()},
        {name: -tile_sums(weight.square(), RAGGED) for name, weight in weights.items()},
    )
    recipe = dataclasses.replace(SHORT[mode], steps=30, lr=0.02, batch=8, microbatch=8, length=24, weight_penalty=0)
    before = run(trained, dataclasses.replace(recipe, steps=0), tmp_path, prior=worst).masks
    after = run(trained, recipe, tmp_path, prior=worst).masks
    dense = {name: HybridMask(m.shape, m.tile, torch.ones_like(m.dense), m.patterns) for name, m in before.items()}
    known = hard_loss(trained, dense)
    damage, left = hard_loss(trained, before) - known, hard_loss(trained, after) - known
    assert damage > 0.5, "the prior is not bad enough to tell anything"
    assert left < 0.2 * damage


def test_tiles_compete_across_weights(tmp_path: Path) -> None:
    """One layer's weights are zero, so its tiles cost nothing to prune: the budget is spent there first."""
    model = tiny_model()
    idle = [name for name in prunable_linears(model) if name.startswith("model.layers.1.")]
    with torch.no_grad():
        for name in idle:
            prunable_linears(model)[name].weight.zero_()
    recipe = dataclasses.replace(SHORT["joint"], steps=30, lr=0.04, sparsity_penalty=7, weight_penalty=10)
    learned = run(model, recipe, tmp_path, prior=Prior(), sparsity=0.2)
    shares = {name: mask.dense.float().mean().item() for name, mask in learned.masks.items()}
    assert sum(shares[name] for name in idle) / len(idle) < 0.3
    assert sum(share for name, share in shares.items() if name not in idle) / (len(shares) - len(idle)) > 0.8


@pytest.mark.parametrize(
    ("mode", "dtype", "tile"),
    [
        pytest.param(mode, dtype, tile, id=f"{tile[0]}x{tile[1]}-{dtype}-{mode}")
        for row, tile in enumerate([RAGGED, (32, 32), (7, 4), (32, 64)])
        for column, mode in enumerate(MODES)
        for dtype in [(torch.float32, torch.bfloat16)[(row + column) % 2]]
    ],
)
def test_masks_meet_the_budget(mode: str, dtype: torch.dtype, tile: tuple, tmp_path: Path) -> None:
    model = tiny_model(dtype)
    learned = run(model, dataclasses.replace(SHORT[mode], steps=2), tmp_path, tile=tile)
    shapes = {name: tuple(linear.weight.shape) for name, linear in prunable_linears(model).items()}
    assert {name: mask.shape for name, mask in learned.masks.items()} == shapes
    assert list(learned.masks) == list(shapes), "in model order"
    half_a_tile = tile[0] * tile[1] / 4 / sum(n * k for n, k in shapes.values())
    target = 0.5 if mode == "maskllm" else 0.35
    found = learned.masks.values()
    sparsity = sum(mask.zeros for mask in found) / sum(mask.keep().numel() for mask in found)
    assert abs(sparsity - target) <= half_a_tile
    assert all(mask.tile == tile and mask.dense.device.type == "cpu" for mask in learned.masks.values())


@pytest.mark.parametrize(("sparsity", "dense"), [(0.0, True), (0.5, False)])
def test_extreme_budgets(sparsity: float, dense: bool, tmp_path: Path) -> None:
    learned = run(tiny_model(), dataclasses.replace(SHORT["joint"], steps=2), tmp_path, sparsity=sparsity)
    assert all(bool((mask.dense == dense).all()) for mask in learned.masks.values())


@every_mode
def test_without_steps_the_prior_is_hardened(mode: str, tmp_path: Path) -> None:
    # Tiles of one size and a quarter of zeros: the budget is half of each weight's tiles, as the prior has it.
    model, tile = tiny_model(intermediate_size=96), (32, 32)
    prior = magnitude_prior(model, tile)
    recipe = dataclasses.replace(SHORT[mode], steps=0, pattern_prior=100, tile_prior=100)
    sparsity = 0.5 if mode == "maskllm" else 0.25
    learned = run(model, recipe, tmp_path / "unused", prior=prior, tile=tile, sparsity=sparsity)
    assert learned.history == [] and not (tmp_path / "unused").exists()
    assert prior.patterns is not None and prior.tile_scores is not None
    for name, mask in learned.masks.items():
        scores = prior.tile_scores[name]
        assert torch.equal(mask.patterns, prior.patterns[name])
        assert torch.equal(mask.dense, scores > scores.median() if sparsity < 0.5 else scores < 0)


@pytest.mark.parametrize(
    ("mode", "prior"),
    [("joint", "magnitude"), ("tile", "magnitude"), ("joint", None)],
    ids=["joint", "tile", "joint-without-prior"],
)
def test_the_most_sensitive_tiles_start_as_dense(mode: str, prior: str | None, ranked_by: int, tmp_path: Path) -> None:
    model = tiny_model()
    recipe = dataclasses.replace(SHORT[mode], steps=0, tile_prior=100, tile_ranking="model")
    learned = run(model, recipe, tmp_path, prior=magnitude_prior(model) if prior else Prior(), seed=2)
    tokens = torch.cat([words(step) for step in range(ranked_by // recipe.batch)])
    cost = tile_sensitivity(model, magnitude_prior(model).patterns or {}, RAGGED, tokens, 2)
    dense = cut_globally(cost, {name: tile_sizes(mask.shape, RAGGED) for name, mask in learned.masks.items()}, 0.35)
    shares = {round(float(tiles.float().mean()), 3) for tiles in dense.values()}
    assert len(shares) > 3, "ranked over the model, weights get different shares"
    for name, mask in learned.masks.items():
        assert torch.equal(mask.dense, dense[name])


@pytest.mark.usefixtures("ranked_by")
def test_tiles_are_ranked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(SHORT["joint"], tile_ranking="model")
    whole = run(tiny_model(), recipe, tmp_path / "whole")
    seen: list[Any] = []
    with pytest.raises(Stopped):
        run(tiny_model(), recipe, tmp_path / "part", on_step=seen.append, stop=lambda: len(seen) == 3)
    monkeypatch.setattr(prior_of_learning, "most_sensitive_tiles", lambda *_: pytest.fail("ranked again"))
    assert same(run(tiny_model(), recipe, tmp_path / "part"), whole)


def test_the_published_prior_strength_leaves_patterns_open(tmp_path: Path) -> None:
    model = tiny_model()
    prior = magnitude_prior(model)
    learned = run(model, dataclasses.replace(SHORT["joint"], steps=0), tmp_path, prior=prior)
    assert prior.patterns is not None
    kept = torch.cat([(m.patterns == prior.patterns[n]).flatten() for n, m in learned.masks.items()]).float().mean()
    assert 0.9 < kept < 0.97, "three standard deviations above four rivals hold 94 in 100 groups"


def test_tile_mode_keeps_the_patterns(tmp_path: Path) -> None:
    model = tiny_model()
    prior = magnitude_prior(model)
    learned = run(model, SHORT["tile"], tmp_path, prior=prior)
    assert prior.patterns is not None
    assert all(torch.equal(mask.patterns, prior.patterns[name]) for name, mask in learned.masks.items())


def test_as_published_every_group_starts_at_the_pattern_of_the_prior(tmp_path: Path) -> None:
    model = tiny_model()
    prior = magnitude_prior(model)
    recipe = dataclasses.replace(SHORT["joint"], steps=0, pattern_start="prior", pattern_prior=0.1)
    learned = run(model, recipe, tmp_path, prior=prior)
    assert prior.patterns is not None
    assert all(torch.equal(mask.patterns, prior.patterns[name]) for name, mask in learned.masks.items())


def test_learning_works_without_any_prior(tmp_path: Path) -> None:
    assert run(tiny_model(), SHORT["joint"], tmp_path, prior=Prior()).history


# --- the record -----------------------------------------------------------------------------------------------------


@every_mode
def test_history_and_progress(mode: str, tmp_path: Path) -> None:
    seen: list[Mapping[str, float]] = []
    recipe = dataclasses.replace(SHORT[mode], steps=5)
    learned = run(tiny_model(), recipe, tmp_path, on_step=seen.append)
    assert [entry["step"] for entry in seen] == [1, 2, 3, 4, 5]
    assert all(entry["tokens_per_second"] > 0 for entry in seen)
    assert [entry["step"] for entry in learned.history] == [2, 4, 5]
    for entry, steps in zip(learned.history, [(0, 2), (2, 4), (4, 5)], strict=True):
        for name in ("loss", "cross_entropy", "density", "grad_norm"):
            values = [s[name] for s in seen[slice(*steps)]]
            assert entry[name] == pytest.approx(sum(values) / len(values))
        assert entry["tau"] == recipe.at(int(entry["step"]) - 1).tau
        assert "tokens_per_second" not in entry, "times differ between runs, histories must not"
        assert ("pattern_change_rate" in entry) == (mode != "tile")
        assert ("tile_change_rate" in entry) == ("hard_density" in entry) == (mode != "maskllm")
        assert ("tiles_turned" in entry) == (mode != "maskllm")


def test_a_checkpoint_of_before_does_not_know_where_tiles_started(tmp_path: Path) -> None:
    run(tiny_model(), dataclasses.replace(SHORT["joint"], checkpoint_every=4), tmp_path)
    state = torch.load(tmp_path / CHECKPOINT)
    del state["started"]
    torch.save(state | {"step": 6}, tmp_path / CHECKPOINT)
    assert run(tiny_model(), SHORT["joint"], tmp_path).history[-1]["step"] == 6


def test_change_rates_count_from_entry_to_entry(tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT["joint"], steps=4, lr=0.05, log_every=1)
    model = tiny_model()
    masks = [run(model, dataclasses.replace(recipe, steps=0), tmp_path).masks]

    def harden(entry: Mapping[str, float]) -> None:
        state = torch.load(tmp_path / "run" / CHECKPOINT)
        masks.append({n: HybridMask(m.shape, m.tile, *state["logged"][n]) for n, m in masks[0].items()})

    recipe = dataclasses.replace(recipe, checkpoint_every=1)
    history = run(model, recipe, tmp_path / "run", on_step=harden).history
    groups = sum(m.patterns.numel() for m in masks[0].values())
    tiles = sum(m.dense.numel() for m in masks[0].values())
    for before, after, entry in zip(masks, masks[1:], history, strict=False):
        changed = sum(int((before[n].patterns != after[n].patterns).sum()) for n in before)
        turned = sum(int((before[n].dense != after[n].dense).sum()) for n in before)
        assert entry["pattern_change_rate"] == changed / groups > 0
        assert entry["tile_change_rate"] == turned / tiles
        since = sum(int((masks[0][n].dense != after[n].dense).sum()) for n in before)
        assert entry["tiles_turned"] == since / tiles


def scalars(folder: Path, name: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


# --- leaving no trace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_model_and_the_process_are_left_as_they_were(fails: bool, checkpointing: bool, tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True).train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    kept = {name: value.clone() for name, value in model.state_dict().items()}

    def traces() -> list[Any]:
        modules = [(name, type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
        parameters = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
        return [modules, parameters, torch.get_float32_matmul_precision(), torch.get_rng_state().tolist()]

    def stop(entry: Mapping[str, float]) -> None:
        if fails:
            raise KeyboardInterrupt

    torch.set_float32_matmul_precision("high")
    before = traces()
    try:
        run(model, dataclasses.replace(SHORT["joint"], activation_checkpointing=checkpointing), tmp_path, on_step=stop)
    except KeyboardInterrupt:
        assert fails
    after = traces()
    torch.set_float32_matmul_precision("highest")
    assert after == before
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_dropout_and_global_random_numbers_play_no_part(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = run(tiny_model(), SHORT["joint"], tmp_path / "plain")
    torch.manual_seed(2)
    assert same(run(tiny_model(attention_dropout=0.5).train(), SHORT["joint"], tmp_path / "dropout"), plain)


def test_seeds_matter(finished: Callable[[str], tuple[Learned, Path]], tmp_path: Path) -> None:
    assert not same(run(tiny_model(), SHORT["joint"], tmp_path, seed=1), finished("joint")[0])


# --- resuming -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@every_mode
def test_a_run_that_is_stopped_again_and_again_ends_the_same(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second are read in the order of their names, in which the tenth of a process is before its ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    recipe = dataclasses.replace(SHORT[mode], steps=11, log_every=3, checkpoint_every=2)
    undisturbed = run(tiny_model(), recipe, tmp_path / "undisturbed")
    chance = random.Random(MODES.index(mode))
    stops = sorted(chance.sample(range(1, 12), 3))
    for stop in stops:

        def on_step(entry: Mapping[str, float], stop: int = stop) -> None:
            if entry["step"] == stop:
                raise Killed

        with pytest.raises(Killed):
            run(tiny_model(), recipe, tmp_path / "stopped", on_step=on_step)
    seen: list[Mapping[str, float]] = []
    resumed = run(tiny_model(), recipe, tmp_path / "stopped", on_step=seen.append)
    assert same(resumed, undisturbed), f"stopped at {stops}"
    assert len(seen) == (0 if stops[-1] == 11 else 11 - stops[-1] // 2 * 2), (
        "went back further than the last checkpoint"
    )
    assert scalars(tmp_path / "stopped" / "tensorboard", "loss") == [3, 6, 9, 11]


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import torch
torch.set_num_threads(int(sys.argv[3]))
import test_learner as t

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def on_step(entry):
    if entry["step"] == 5 and sys.argv[4] == "between-checkpoints":
        kill()
    if entry["step"] == 3 and sys.argv[4] == "while-writing":
        os.replace = kill

t.run(t.tiny_model(), t.SHORT["joint"], Path(sys.argv[2]), on_step=on_step)
"""


@pytest.mark.parametrize("moment", ["between-checkpoints", "while-writing"])
def test_a_killed_process_is_continued_bit_by_bit(
    moment: str, finished: Callable[[str], tuple[Learned, Path]], tmp_path: Path
) -> None:
    folders = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
    arguments = [folders, str(tmp_path / "killed"), str(torch.get_num_threads()), moment]
    child = Python(CHILD, *arguments)
    assert child.wait() == -signal.SIGKILL, child.stderr
    state = torch.load(tmp_path / "killed" / CHECKPOINT)
    assert state["step"] == (4 if moment == "between-checkpoints" else 2)
    resumed = run(tiny_model(), SHORT["joint"], tmp_path / "killed")
    assert same(resumed, finished("joint")[0])
    assert sorted(os.listdir(tmp_path / "killed")) == [CHECKPOINT, "tensorboard"]


def test_a_run_is_continued_whatever_changes_in_how_it_runs(
    finished: Callable[[str], tuple[Learned, Path]], tmp_path: Path
) -> None:
    seen: list[Any] = []
    with pytest.raises(Stopped):
        run(tiny_model(), SHORT["joint"], tmp_path / "part", on_step=seen.append, stop=lambda: len(seen) == 4)
    other = dataclasses.replace(SHORT["joint"], checkpoint_every=1, activation_checkpointing=True)
    assert same(run(tiny_model(), other, tmp_path / "part"), finished("joint")[0])


def test_a_finished_run_is_not_run_again(finished: Callable[[str], tuple[Learned, Path]], worked: Path) -> None:
    def no_tokens(step: int) -> Tensor:
        raise AssertionError("asked for tokens")

    assert same(run(tiny_model(), SHORT["joint"], worked, batches=no_tokens), finished("joint")[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"recipe": dataclasses.replace(SHORT["joint"], lr=0.5)}, "recipe.lr", id="recipe"),
        pytest.param({"recipe": SHORT["tile"]}, "recipe.mode", id="mode"),
        pytest.param({"seed": 1}, "seed", id="seed"),
        pytest.param({"sparsity": 0.25}, "sparsity", id="sparsity"),
        pytest.param({"tile": (32, 32)}, "tile", id="tile"),
        pytest.param({"prior": Prior()}, "prior", id="prior"),
        pytest.param({"model": tiny_model(intermediate_size=104)}, "weights", id="model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changes: dict[str, Any], named: str, worked: Path) -> None:
    started = {"model": tiny_model(), "recipe": SHORT["joint"], "work": worked}
    with pytest.raises(UserError, match="belongs to another run") as error:
        run(**(started | changes))
    assert named in str(error.value) and str(worked / CHECKPOINT) in str(error.value)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint\n", encoding="utf-8")
    elif how == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    elif how == "code":
        torch.save({"format": Path("/")}, path)
    else:
        state = torch.load(path)
        del state["learned"][next(iter(state["learned"]))]
        torch.save(state, path)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "foreign", "code", "incomplete"])
def test_a_damaged_checkpoint_is_named(how: str, worked: Path) -> None:
    damage(worked / CHECKPOINT, how)
    with pytest.raises(UserError, match="not a whole checkpoint") as error:
        run(tiny_model(), SHORT["joint"], worked)
    assert str(worked / CHECKPOINT) in str(error.value) and "\n" not in str(error.value)


def test_what_torch_reports_as_the_systems_error_is_the_files(tmp_path: Path) -> None:
    """It seeks to wherever a damaged directory of a zip archive says."""
    said = r"learner\.pt is not a whole checkpoint .*Invalid argument"
    with pytest.raises(UserError, match=said), saved.undamaged(tmp_path / CHECKPOINT):
        raise OSError(errno.EINVAL, "Invalid argument")
    with pytest.raises(PermissionError), saved.undamaged(tmp_path / CHECKPOINT):
        raise PermissionError


@pytest.mark.parametrize("place", [0.02, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_a_flipped_bit_of_a_checkpoint_is_noticed(place: float, worked: Path) -> None:
    content = bytearray((worked / CHECKPOINT).read_bytes())
    content[int(place * len(content))] ^= 4
    (worked / CHECKPOINT).write_bytes(content)
    with pytest.raises(UserError, match=r"not a whole checkpoint.*SHA-256"):
        run(tiny_model(), SHORT["joint"], worked)


def test_a_checkpoint_of_another_format_is_refused(worked: Path) -> None:
    state = torch.load(worked / CHECKPOINT)
    torch.save(state | {"format": 99}, worked / CHECKPOINT)
    with pytest.raises(UserError, match="format 99"):
        run(tiny_model(), SHORT["joint"], worked)


@pytest.mark.parametrize(
    "raised", [RuntimeError("file write failed"), OSError(28, "No space left on device")], ids=repr
)
def test_a_full_disk_keeps_the_checkpoint_before(
    raised: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(entry: Mapping[str, float]) -> None:
        def full(*_: Any) -> None:
            raise raised

        if entry["step"] == 3:
            monkeypatch.setattr(torch, "save", full)

    with pytest.raises(OSError, match=r"write|space"):
        run(tiny_model(), SHORT["joint"], tmp_path, on_step=fill_up)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [CHECKPOINT, "tensorboard"]
    assert torch.load(tmp_path / CHECKPOINT)["step"] == 2
    assert run(tiny_model(), SHORT["joint"], tmp_path).history


def test_a_full_disk_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the file, torch raises an error of its own ("unexpected pos") over the system's."""

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            if self.tell() + len(content) > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    monkeypatch.setattr(saved, "open", lambda path, mode: Full(path, mode), raising=False)
    with pytest.raises(
        OSError, match=rf"learner's checkpoint {tmp_path / CHECKPOINT}: No space left on device"
    ) as error:
        run(tiny_model(), SHORT["joint"], tmp_path)
    assert "\n" not in str(error.value) and "pos" not in str(error.value)


# --- divergence -----------------------------------------------------------------------------------------------------


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT["joint"], lr=1e38, warmup=4, checkpoint_every=1, clip=None)
    seen: list[Mapping[str, float]] = []
    with pytest.raises(LearningDiverged) as error:
        run(tiny_model(), recipe, tmp_path, on_step=seen.append)
    assert error.value.step == len(seen) + 1 > 1
    assert f"step {error.value.step} of 6" in str(error.value) and "lower lr" in str(error.value)
    assert error.value.checkpoint == tmp_path / CHECKPOINT and str(tmp_path / CHECKPOINT) in str(error.value)
    assert torch.load(tmp_path / CHECKPOINT)["step"] == len(seen)


def test_divergence_at_once_says_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(LearningDiverged, match="no checkpoint") as error:
        run(model, SHORT["joint"], tmp_path)
    assert (error.value.step, error.value.checkpoint) == (1, None)


# --- what is refused ------------------------------------------------------------------------------------------------


def without(known: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return dict(list((known or {}).items())[1:])


def changed(known: Mapping[str, Tensor] | None, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(value) for name, value in (known or {}).items()}


PRIOR = magnitude_prior(tiny_model())
FIRST = "model.layers.0.self_attn.q_proj"
BAD = {
    "maskllm-at-35%": ({"recipe": SHORT["maskllm"], "sparsity": 0.35}, "0.5, not 0.35"),
    "sparsity-60%": ({"sparsity": 0.6}, "0.6"),
    "tile-columns": ({"tile": (8, 6)}, "multiple of 4"),
    "tile-too-large": ({"tile": (64, 64), "prior": Prior()}, r"model.layers.0.self_attn.k_proj: tile 64x64 is larger"),
    "tile-mode-without-patterns": ({"recipe": SHORT["tile"], "prior": Prior()}, "give the patterns"),
    "patterns-missing": ({"prior": Prior(without(PRIOR.patterns))}, f"{FIRST}: the prior has no patterns"),
    "patterns-shape": ({"prior": Prior(changed(PRIOR.patterns, lambda p: p[1:]))}, rf"{FIRST}.*\(63, 16\)"),
    "patterns-dtype": ({"prior": Prior(changed(PRIOR.patterns, Tensor.long))}, f"{FIRST}.*int64"),
    "patterns-range": ({"prior": Prior(changed(PRIOR.patterns, lambda p: p + 6))}, "out of range"),
    "scores-missing": ({"prior": Prior(None, without(PRIOR.tile_scores))}, f"{FIRST}: the prior has no tile scores"),
    "scores-shape": ({"prior": Prior(None, changed(PRIOR.tile_scores, lambda s: s[:1]))}, "tiles of 24x20 need"),
    "scores-nan": ({"prior": Prior(None, changed(PRIOR.tile_scores, lambda s: s * torch.nan))}, "not finite"),
    "dense-tiles-missing": ({"prior": Prior(dense_tiles={})}, f"{FIRST}: the prior has no dense tiles"),
    "dense-tiles-dtype": ({"prior": Prior(dense_tiles=PRIOR.tile_scores)}, f"{FIRST}.*dense tiles are torch.float32"),
    "tokens-shape": ({"batches": lambda step: words(step, 3)}, r"\(3, 16\)"),
    "tokens-dtype": ({"batches": lambda step: words(step).int()}, "int32"),
    "tokens-vocabulary": ({"batches": lambda step: words(step) + 1}, "vocabulary of 32"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_clear_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(**({"model": tiny_model(), "recipe": SHORT["joint"], "work": tmp_path} | changes))
    assert "\n" not in str(error.value)


def test_a_model_elsewhere_is_refused(tmp_path: Path) -> None:
    model = tiny_model().to("meta")
    with pytest.raises(UserError, match="the weight is on meta, learning on cpu"):
        learn(
            model, SHORT["joint"], words, sparsity=0.35, tile=RAGGED, seed=0, prior=Prior(), work=tmp_path, device="cpu"
        )


def test_a_weight_that_the_model_does_not_use_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].spare = nn.Linear(64, 64)
    with pytest.raises(UserError, match=r"model.layers.1.spare takes no part"):
        run(model, SHORT["joint"], tmp_path)


def test_the_grid_of_a_ragged_tile_is_tested() -> None:
    """The tile used throughout is ragged on every weight, in rows, columns or both."""
    for linear in prunable_linears(tiny_model()).values():
        assert len(tile_sizes(linear.weight.shape, RAGGED).unique()) > 1
        assert tile_grid(linear.weight.shape, RAGGED) != (1, 1)
