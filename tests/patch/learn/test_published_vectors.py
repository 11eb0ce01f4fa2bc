"""The learner computes what the papers say: starts, schedules, loss and gradients of one step, the noise given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patch.learn import prior, soft_mask
from patch.learn.distributed import ALONE
from patch.learn.learner import _Run
from patch.learn.masked_model import MaskedLinear
from patch.learn.recipe import PUBLISHED
from patch.learn.soft_mask import Masked
from patch.learn.state import State

VECTORS = json.loads(Path(__file__).with_name("published_vectors.json").read_text())
TILE = (4, 8)
every_run = pytest.mark.parametrize("name", PUBLISHED)


def given(index: int, what: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(VECTORS["weights"][index][what], dtype=dtype)


def linear_of(index: int) -> nn.Linear:
    weight = given(index, "weight")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def test_every_published_run_has_vectors() -> None:
    assert VECTORS["runs"].keys() == PUBLISHED.keys()


@every_run
def test_logits_start_where_the_papers_have_them(name: str) -> None:
    recipe, run = PUBLISHED[name], VECTORS["runs"][name]
    for index, expected in enumerate(run["initial"]):
        kept = given(index, "kept")
        shares = kept.view(kept.shape[0] // TILE[0], TILE[0], kept.shape[1] // TILE[1], TILE[1]).mean((1, 3))
        known = {"patterns": given(index, "patterns", torch.uint8), "tile scores": shares}
        patterns, tiles, fixed = prior._prepare_linear(
            linear_of(index), recipe, run["target"], TILE, (3, index), known, torch.device("cpu")
        )
        assert (fixed is not None) == (recipe.mode == "tile")
        for kind, found in (("patterns", patterns), ("tiles", tiles)):
            assert (found is None) == (kind not in expected)
            if found is None:
                continue
            lift = torch.tensor(expected[kind])
            # The papers add what the prior says of tiles to noise; of patterns, MaskLLM adds it, PATCH has it alone.
            noisy = kind == "tiles" or name == "maskllm"
            source = soft_mask.generator(soft_mask.stream_seed(f"initial {kind}", 3, index), "cpu")
            noise = torch.empty(lift.shape).normal_(0, recipe.logit_std, generator=source)
            torch.testing.assert_close(found, lift + noise if noisy else lift, rtol=1e-6, atol=1e-8)


@every_run
def test_schedules_are_those_of_the_papers(name: str) -> None:
    recipe = PUBLISHED[name]
    for step, expected in VECTORS["runs"][name]["schedule"].items():
        at = recipe.at(int(step))
        found = {"lr": at.lr, "pattern_tau": at.tau, "pattern_scale": at.pattern_scale, "tile_tau": at.tile_tau}
        found |= {"tile_scale": at.tile_scale, "weight_penalty": at.weight_penalty}
        used = {"tile": {"pattern_tau", "pattern_scale"}, "maskllm": {"tile_tau", "tile_scale"}}.get(recipe.mode, set())
        for what in expected.keys() - used:
            assert found[what] == pytest.approx(expected[what], rel=1e-9, abs=1e-15), what


@every_run
def test_loss_and_gradients_of_a_step_are_those_of_the_papers(name: str, tmp_path: Path) -> None:
    recipe, run = PUBLISHED[name], VECTORS["runs"][name]
    linears: dict[str, MaskedLinear] = {}
    for index, logits in enumerate(run["initial"]):

        def masked_weight(weight: Tensor, *of: Any, index: int = index, **_: Any) -> Masked:
            patterns, tiles, tile, temperatures, _stream = of
            pattern_noise = given(index, "pattern_noise") if patterns.is_floating_point() else None
            tile_noise = None if tiles is None else given(index, "tile_noise")
            return soft_mask.masked_weight(weight, patterns, tiles, tile, temperatures, pattern_noise, tile_noise)

        fixed = given(index, "patterns", torch.uint8) if recipe.mode == "tile" else None
        linear = linear_of(index)
        masked = MaskedLinear(linear, TILE, fixed, masked_weight, ALONE, linear.weight)
        for kind, values in logits.items():
            setattr(masked, kind, torch.tensor(values, dtype=torch.float64).requires_grad_())
        linears[str(index)] = masked

    def text_loss(_: Tensor) -> tuple[Tensor, Tensor]:
        total = sum(
            ((given(index, "gradient") * masked.draw()).sum() for index, masked in enumerate(linears.values())),
            torch.zeros(()),
        )
        return total, total

    state = State(linears, recipe, {}, tmp_path / "learner.pt", ALONE)
    step = _Run(linears, recipe, run["target"], 0, state, ALONE)
    at = recipe.at(run["step"])
    step.begin(at, 0, None)
    factors = torch.tensor([at.weight_penalty, at.tile_scale], dtype=torch.float64)
    found = step.backward(text_loss, torch.zeros(1), *factors)  # type: ignore[arg-type]
    assert float(found[0]) == pytest.approx(run["loss"], rel=1e-6)
    # One micro-batch's share of the step's gradient.
    passes = recipe.batch // recipe.microbatch
    for index, expected in enumerate(run["gradients"]):
        for kind, values in expected.items():
            logits = getattr(linears[str(index)], kind)
            wanted = torch.tensor(values, dtype=torch.float64)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(logits.grad * passes, wanted, rtol=1e-5, atol=1e-5 * scale)
