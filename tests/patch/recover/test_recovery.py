"""Recovery on tiny models: what is kept is trained, what is dropped stays zero, and a run that is stopped goes on."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_learner import tiny_model, words
from tiny_recovery import PHASES, SHORT, dense_model, hybrid_masks, kept_by, linears, run, same, sparse_weights
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from patch.errors import UserError
from patch.layers import prunable_linears
from patch.learn.descent import LearningDiverged, Stopped
from patch.learn.saved import CHECKPOINT
from patch.oneshot.gptq import quantise_model
from patch.quantise.precisions import PRECISIONS
from patch.recover.distil import Implementation
from patch.recover.run import has_risen

every_phase = pytest.mark.parametrize("phase", PHASES)


def wide_model() -> Any:
    """`dense_model` whose inputs make whole groups of INT4."""
    return tiny_model(torch.float32, initializer_range=0.15, intermediate_size=128)


def divergence(model: nn.Module, dense: nn.Module) -> float:
    """From the dense model's predictions, on unseen sentences."""
    tokens = words(10**6, 32, 16)
    with torch.no_grad():
        ours, theirs = (F.log_softmax(each(input_ids=tokens).logits, -1) for each in (model, dense))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def masked(model: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, linear in prunable_linears(model).items():
            linear.weight.mul_(keep[name])
    return model


@pytest.mark.parametrize(
    ("phase", "dtype"), [("blocks", torch.float32), ("distil", torch.float32), ("both", torch.bfloat16)]
)
def test_what_is_dropped_stays_zero_and_only_kept_weights_change(
    phase: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    dense = dense_model(dtype)
    keep = kept_by(hybrid_masks(dense))
    model, _ = run(PHASES[phase], tmp_path, dense_model(dtype), keep)
    for name, weight in linears(model).items():
        assert not weight[~keep[name]].any() and weight.dtype == dtype
        assert (weight != linears(dense)[name])[keep[name]].float().mean() > 0.5
    rest = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in keep:
            assert torch.equal(parameter, rest[name])


@every_phase
def test_the_dense_model_is_approached(phase: str, tmp_path: Path) -> None:
    targets: Any = "sparse" if phase == "blocks" else "dense"
    recipe = dataclasses.replace(PHASES[phase], block_targets=targets, block_epochs=4 if phase != "distil" else 0)
    dense = dense_model()
    keep = kept_by(hybrid_masks(dense))
    model, recovered = run(recipe, tmp_path, keep=keep)
    assert divergence(model, dense) < 0.9 * divergence(masked(dense_model(), keep), dense)
    for block in {entry["block"] for entry in recovered.history if "block" in entry}:
        losses = [entry["loss"] for entry in recovered.history if entry.get("block") == block]
        assert losses[-1] < losses[0]


def test_weights_trained_as_they_are_rounded_stay_so_and_are_nearer(tmp_path: Path) -> None:
    plain = dataclasses.replace(PHASES["distil"], steps=40, lr=1e-3, microbatch=4)
    dense = wide_model()
    masks = hybrid_masks(dense)
    found = {}
    for recipe in (plain, dataclasses.replace(plain, precision="int4")):
        model, _ = run(recipe, tmp_path / str(recipe.precision), wide_model(), kept_by(masks))
        trained = {name: weight.clone() for name, weight in linears(model).items()}
        quantise_model(model, PRECISIONS["int4"], words(7), "cpu", masks, sink_aware=True)
        off = sum(float((weight - trained[name]).square().sum()) for name, weight in linears(model).items())
        found[recipe.precision] = off, divergence(model, dense)
    assert found["int4"][0] < 0.01 * found[None][0]
    assert found["int4"][1] < found[None][1]


def test_the_first_step_is_the_definition(tmp_path: Path) -> None:
    """Of plain gradient descent on the whole weight, what the mask keeps; Adam's first step is its sign."""
    recipe = dataclasses.replace(PHASES["distil"], steps=1, warmup=0, lr=1e-4, eps=1e-12, clip=None, microbatch=4)
    dense, seen = dense_model(), []
    keep = kept_by(hybrid_masks(dense))
    model, _ = run(recipe, tmp_path, keep=keep, on_step=seen.append)
    sparse, tokens = masked(dense_model(), keep), words(0, 4, 16)
    ours, theirs = (F.log_softmax(each(input_ids=tokens).logits[:, :-1], -1) for each in (sparse, dense))
    loss = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    loss.backward()
    assert seen[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    grads = {name: linear.weight.grad * keep[name] for name, linear in prunable_linears(sparse).items()}
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    assert seen[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for name, weight in linears(model).items():
        moved, sure = weight - linears(sparse)[name], grads[name].abs() > 1e-6
        assert torch.allclose(moved[sure], -1e-4 * grads[name].sign()[sure], rtol=0.02, atol=1e-7)


def test_a_block_is_fitted_on_what_the_recovered_blocks_before_it_feed_it(tmp_path: Path) -> None:
    recipe = dataclasses.replace(PHASES["blocks"], block_targets="sparse")
    dense, seen = dense_model(), []
    keep = kept_by(hybrid_masks(dense))
    model, _ = run(recipe, tmp_path, keep=keep, on_step=seen.append)
    # The block after the first, before its first step: its masked weights behind the first block as it was recovered.
    first = next(each for each in seen if each["block"] == 1)
    states: dict[str, Tensor] = {}
    blocks = model.model.layers
    for other in (dense, masked(dense_model(), keep)):
        handle = blocks[1].register_forward_pre_hook(lambda *call: states.update(inputs=call[1][0]))
        blocks[1].load_state_dict(other.model.layers[1].state_dict())
        after = blocks[1].register_forward_hook(lambda module, call, out, o=other: states.update({str(id(o)): out}))
        with torch.no_grad():
            model.model(input_ids=words(999, 8, 16))
        handle.remove()
        after.remove()
    wanted, ours = (states[name][0] if isinstance(states[name], tuple) else states[name] for name in list(states)[1:])
    off = ((ours - wanted).square().sum(-1) / wanted.square().sum(-1)).mean((1,))
    order = [off[:4].mean().item(), off[4:].mean().item()]
    assert min(abs(first["loss"] - each) for each in order) < 1e-5


@every_phase
def test_a_run_that_is_stopped_again_and_again_ends_the_same(phase: str, tmp_path: Path) -> None:
    undisturbed, expected = run(PHASES[phase], tmp_path / "whole")
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked % 4 == 0

    stops = 0
    while True:
        try:
            model, recovered = run(PHASES[phase], tmp_path / "work", stop=stop)
            break
        except Stopped as error:
            assert str(tmp_path / "work" / CHECKPOINT) in str(error)
            stops += 1
    assert stops >= 2
    assert same(model, undisturbed) and recovered.history == expected.history


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    model, recovered = run(SHORT, tmp_path)
    again, repeated = run(SHORT, tmp_path, batches=lambda step: pytest.fail("runs again"))
    assert same(model, again) and repeated.history == recovered.history


@pytest.mark.parametrize(
    ("changes", "recipe", "named"),
    [
        pytest.param({"origin": "another"}, {}, "origin", id="origin"),
        pytest.param({"seed": 1}, {}, "seed", id="seed"),
        pytest.param({}, {"lr": 0.1}, "recipe.lr", id="rate"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], recipe: dict[str, Any], named: str, tmp_path: Path
) -> None:
    run(PHASES["blocks"], tmp_path)
    with pytest.raises(UserError, match=rf"belongs to another run \(.*{named}.* differ") as error:
        run(dataclasses.replace(PHASES["blocks"], **recipe), tmp_path, **changes)
    assert "not a whole checkpoint" not in str(error.value)


def test_accumulation_and_activation_checkpointing_change_nothing(tmp_path: Path) -> None:
    recipe = PHASES["distil"]
    plain, _ = run(dataclasses.replace(recipe, microbatch=4), tmp_path / "plain")
    for number, other in enumerate((recipe, dataclasses.replace(recipe, microbatch=4, activation_checkpointing=True))):
        model, _ = run(other, tmp_path / str(number))
        for name, weight in linears(model).items():
            assert torch.allclose(weight, linears(plain)[name], atol=2e-4)


def test_weights_that_are_exchanged_ahead_are_the_same(tmp_path: Path) -> None:
    plain, _ = run(PHASES["distil"], tmp_path / "plain")
    ahead, _ = run(PHASES["distil"], tmp_path / "ahead", implementation=Implementation(ahead=True))
    assert same(plain, ahead)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_phase
def test_a_gpu_recovers_what_a_cpu_recovers(phase: str, tmp_path: Path) -> None:
    """Compiled and captured, in float32: the same curve and weights but for rounding, which Adam's first steps blow up.

    Ten steps, for a capture begins after the third.
    """
    recipe = dataclasses.replace(PHASES[phase], steps=10 if phase != "blocks" else 0, microbatch=4, lr=1e-4)
    there, expected = run(recipe, tmp_path / "cpu")
    here, found = run(recipe, tmp_path / "cuda", dense_model().cuda(), device="cuda")
    for ours, theirs in zip(found.history, expected.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-5)
    keep = kept_by(hybrid_masks(dense_model()))
    for name, weight in linears(here).items():
        assert torch.allclose(weight.cpu(), linears(there)[name], atol=3e-3) and not weight.cpu()[~keep[name]].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("microbatch", [2, 4], ids=["accumulated", "at-once"])
def test_captured_passes_are_the_plain_ones(microbatch: int, tmp_path: Path) -> None:
    recipe = dataclasses.replace(PHASES["distil"], steps=10, microbatch=microbatch, lr=1e-4)
    curves = [
        run(
            recipe,
            tmp_path / str(captured),
            dense_model().cuda(),
            device="cuda",
            implementation=Implementation(captured=captured),
        )[1].history
        for captured in (False, True)
    ]
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_the_history_says_which_block_and_step(tmp_path: Path) -> None:
    _, recovered = run(SHORT, tmp_path)
    assert [entry.get("block") for entry in recovered.history] == [0, 0, 1, 1, None, None, None]
    assert [entry["step"] for entry in recovered.history] == [3, 4, 6, 8, 9, 12, 14]
    assert "cross_entropy" in recovered.history[-1] and "cross_entropy" not in recovered.history[0]


def test_a_loss_that_rises_is_told_once_and_blocks_are_no_part_of_it() -> None:
    history: list[dict[str, float]] = [{"block": 0, "loss": 0.1}]
    told = []
    for loss in (0.2, 0.29, 0.31, 0.7, 0.2, 0.8):
        history.append({"loss": loss})
        told.append(has_risen(history))
    assert told == [False, False, True, False, False, False]
    assert not has_risen([*history, {"block": 1, "loss": 9.0}])


def test_an_unstructured_mask_is_recovered_too(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    dense = dense_model()
    keep = {name: torch.rand(weight.shape, generator=source) < 0.6 for name, weight in linears(dense).items()}
    keep[next(iter(keep))][:] = False
    model, _ = run(SHORT, tmp_path, keep=keep)
    assert not any(weight[~keep[name]].any() for name, weight in linears(model).items())
    assert divergence(model, dense) < divergence(masked(dense_model(), keep), dense)


def test_divergence_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(LearningDiverged, match=r"(gradient|loss) at step \d of 6 is not finite"):
        run(dataclasses.replace(PHASES["distil"], lr=1e30, warmup=0, clip=None), tmp_path)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    model = dense_model()
    keep = kept_by(hybrid_masks(model))
    name = next(iter(keep))
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "not masked": ({"weights": {n: w.detach() for n, w in linears(model).items()}}, "are not zero though the mask"),
        "missing mask": ({"keep": {n: k for n, k in keep.items() if n != name}}, f"{name}: there is no mask"),
        "another mask": ({"keep": keep | {name: keep[name][1:]}}, "its mask is for a weight"),
        "unknown mask": ({"keep": keep | {"head": keep[name]}}, "'head', which is no prunable weight"),
        "missing weight": ({"weights": {n: w for n, w in sparse_weights(model, keep).items() if n != name}}, "no such"),
        "not finite": (
            {"weights": {n: torch.where(keep[n], torch.nan, 0.0) for n in keep}},
            "not finite: the checkpoint is damaged",
        ),
        "windows": ({"windows": words(0, 3, 16)}, "windows of recovery are"),
        "batches": ({"batches": lambda step: words(step, 3, 16)}, "tokens of a step are"),
    }
    for place, (changes, message) in enumerate(cases.values()):
        arguments = {"keep": keep, "weights": sparse_weights(model, keep)} | changes
        with pytest.raises(UserError, match=message):
            run(PHASES["distil" if "batches" in changes else "both"], tmp_path / str(place), dense_model(), **arguments)


def test_a_model_of_other_matrices_is_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="recovery covers Linear weights alone"):
        run(SHORT, tmp_path, model, {}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0, "block_epochs": 0}, "recover nothing"),
        ({"microbatch": 3}, "microbatch 3 does not divide batch 4"),
        ({"block_batch": 3}, "block_batch 3 does not divide block_windows 8"),
        ({"lr": 0}, "lr 0"),
        ({"lr_end": 1.0}, "above lr"),
        ({"block_targets": "none"}, "block_targets"),
        ({"distillation": 1.5}, "share of the loss"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"activation_checkpointing": 1}, "true or false"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SHORT, **changes)
