"""Recipes: the published values, what they set at each step, and what is refused."""

import dataclasses
import json
import math
from typing import Any

import pytest

from patch.errors import UserError
from patch.learn.recipe import CHANGES, GUIDED, MASKLLM, PATCH_JOINT, PATCH_TILE, PUBLISHED, Recipe
from patch.methods import members, published_recipe

NAMES = pytest.mark.parametrize("name", members("learned"))


@NAMES
def test_a_recipe_survives_json(name: str) -> None:
    recipe = published_recipe(name)
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


def test_equal_numbers_are_spelled_alike_because_recipes_are_hashed() -> None:
    spelled = dataclasses.replace(PATCH_JOINT, sparsity_penalty=7, tau=[4, 0.05], clip=1)  # type: ignore[arg-type]
    assert json.dumps(dataclasses.asdict(spelled)) == json.dumps(dataclasses.asdict(PATCH_JOINT))


def test_patch_as_published() -> None:
    assert (PATCH_JOINT.mode, PATCH_TILE.mode) == ("joint", "tile")
    assert (PATCH_JOINT.sparsity_penalty, PATCH_JOINT.weight_penalty) == (7, 10)
    first, last = PATCH_JOINT.at(0), PATCH_JOINT.at(2000)
    assert (first.tau, first.pattern_scale, first.tile_scale, first.weight_penalty) == (4, 100, 25, 10)
    assert (last.tau, last.pattern_scale, last.tile_scale, last.weight_penalty) == pytest.approx((0.05, 500, 350, 0))


def test_maskllm_as_published() -> None:
    assert (MASKLLM.at(0).lr, MASKLLM.at(2000).lr) == pytest.approx((5e-4, 5e-5))
    assert (MASKLLM.betas, MASKLLM.eps, MASKLLM.weight_decay, MASKLLM.clip) == ((0.9, 0.95), 1e-5, 0.1, 1)
    assert (MASKLLM.logit_std, MASKLLM.weight_penalty, MASKLLM.weight_penalty_kind) == (0.01, 1e-5, "square")


def test_tiles_may_have_a_temperature_of_their_own() -> None:
    recipe = dataclasses.replace(PATCH_JOINT, steps=10, tau=(4, 2), tile_tau=(2, 1))
    halfway = recipe.at(5)
    assert (halfway.tau, halfway.tile_tau, halfway.temperatures.of_tiles) == (3, 1.5, 1.5)
    assert dataclasses.replace(recipe, tile_tau=None).at(5).tile_tau == 3


def test_every_published_run_has_the_settings_of_its_table() -> None:
    tiles = {
        name: (r.lr, r.tile_scale, r.tile_tau or r.tau, r.sparsity_penalty, r.weight_penalty)
        for name, r in PUBLISHED.items()
        if r.mode != "maskllm"
    }
    assert tiles == {
        "patch-joint-45": (1e-3, (25, 350), (4, 0.05), 7, 10),
        "patch-joint-35-25": (1e-3, (25, 350), (2, 0.05), 7, 10),
        "patch-tile-7b-8b": (1e-4, (100, 500), (2, 0.05), 3, 0.1),
        "patch-tile-13b": (1e-3, (100, 500), (2, 0.05), 2, 0.05),
    }
    patterns = {name: (r.lr, r.tau, r.pattern_scale) for name, r in PUBLISHED.items() if r.mode != "tile"}
    assert {about[1:] for about in patterns.values()} == {((4, 0.05), (100, 500))}
    assert (patterns["maskllm-of-patch"][0], patterns["maskllm"][0]) == (1e-4, 5e-4)
    assert not any(getattr(recipe, name) for recipe in PUBLISHED.values() for name in ("distillation",))
    assert {name for name, recipe in PUBLISHED.items() if recipe.pattern_start == "noisy"} == {"maskllm"}


def test_the_published_recipe_of_patch_joint_depends_on_the_target() -> None:
    assert published_recipe("patch-joint", 0.45) == PUBLISHED["patch-joint-45"]
    assert (
        published_recipe("patch-joint", 0.35) == published_recipe("patch-joint", 0.25) == PUBLISHED["patch-joint-35-25"]
    )


@NAMES
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_schedules_are_linear_between_their_ends(name: str, steps: int) -> None:
    recipe = dataclasses.replace(published_recipe(name), steps=steps)
    for step in range(steps):
        share = step / steps
        settings = recipe.at(step)
        for field in ("tau", "pattern_scale", "tile_scale"):
            start, end = getattr(recipe, field)
            assert getattr(settings, field) == pytest.approx(start * (1 - share) + end * share)
        assert settings.weight_penalty == pytest.approx(recipe.weight_penalty * (1 - share))


def test_the_guided_recipe_has_no_value_of_a_published_one() -> None:
    for name in ("patch-joint", "patch-tile"):
        published = published_recipe(name)
        guided = dataclasses.replace(published, **CHANGES["guided"])
        assert guided.follows_dense and all(getattr(guided, key) != getattr(published, key) for key in GUIDED)
    assert dataclasses.replace(PATCH_JOINT, **CHANGES["published"]) == PATCH_JOINT


def test_where_all_tiles_are_alike_none_are_ranked() -> None:
    with pytest.raises(UserError, match="tile_ranking 'model': maskllm has no dense tiles"):
        dataclasses.replace(MASKLLM, **GUIDED)


def test_learning_rate_rises_linearly_then_follows_a_cosine() -> None:
    recipe = dataclasses.replace(PATCH_JOINT, steps=50, warmup=10, lr=1.0, lr_end=0.2)
    rates = [recipe.at(step).lr for step in range(51)]
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert rates[30] == pytest.approx(0.6), "halfway down, the cosine is halfway between its ends"
    assert rates[20] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[50] == pytest.approx(0.2)


def test_a_recipe_without_steps_has_settings() -> None:
    assert dataclasses.replace(PATCH_JOINT, steps=0).at(0).tau == 4


BAD = [
    ("mode", "patch"),
    ("steps", -1),
    ("steps", 1.5),
    ("batch", 0),
    ("microbatch", 0),
    ("microbatch", 7),
    ("length", 1),
    ("lr", 0),
    ("lr", math.nan),
    ("lr_end", 1.0),
    ("warmup", -1),
    ("betas", (0.9,)),
    ("betas", (0.9, 1.0)),
    ("eps", 0),
    ("weight_decay", -0.1),
    ("clip", 0),
    ("tau", (4.0, 0.0)),
    ("tau", 4.0),
    ("pattern_scale", (100.0, "500")),
    ("tile_scale", (-1.0, 350.0)),
    ("logit_std", 0),
    ("pattern_prior", -1),
    ("tile_prior", math.inf),
    ("sparsity_penalty", -7),
    ("weight_penalty", None),
    ("weight_penalty_kind", "cube"),
    ("weight_penalty_by", "inputs"),
    ("pattern_start", "random"),
    ("tile_tau", (2.0, 0.0)),
    ("activation_checkpointing", 1),
    ("checkpoint_every", 0),
    ("log_every", 0),
    ("log_every", True),
]


@pytest.mark.parametrize(("name", "value"), [pytest.param(*bad, id=f"{bad[0]}={bad[1]}") for bad in BAD])
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        dataclasses.replace(PATCH_JOINT, **{name: value})
    message = str(error.value)
    assert name in message and "\n" not in message
    assert str(value) in message or isinstance(value, tuple)
