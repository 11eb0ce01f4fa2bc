"""A recipe on the command line: every field by name, of its type, and what learning takes."""

import dataclasses
import re
from typing import Any

import pytest

from experiments.cli.recipe import changes, forecast, forecast_recovery, settings
from experiments.run.runtime import Machine
from experiments.studies.build import learned
from experiments.studies.trial import Calibration, Pruning
from patch.learn.recipe import MASKLLM, PATCH_JOINT, Recipe
from patch.recover.recipe import RecoveryRecipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("steps=400", 400),
        ("lr=2e-3", 2e-3),
        ("tau=2,0.05", (2.0, 0.05)),
        ("clip=none", None),
        ("clip=0.5", 0.5),
        ("activation_checkpointing=False", False),
        ("logit_dtype=bfloat16", "bfloat16"),
    ],
)
def test_values_are_of_the_fields_type(text: str, value: Any) -> None:
    (given,) = changes([text]).values()
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize("recipe", [PATCH_JOINT, MASKLLM], ids=["patch-joint", "maskllm"])
def test_what_is_shown_can_be_set(recipe: Recipe) -> None:
    rows = settings(recipe, PATCH_JOINT)
    assert [name for name, _, _ in rows] == [field.name for field in dataclasses.fields(Recipe)]
    assert dataclasses.replace(PATCH_JOINT, **changes(f"{name}={value}" for name, value, _ in rows)) == recipe


def test_what_is_not_as_published_is_shown_beside_it() -> None:
    other = dataclasses.replace(PATCH_JOINT, steps=400, tau=(2.0, 0.05), activation_checkpointing=False)
    assert [row for row in settings(other, PATCH_JOINT) if row[2]] == [
        ("steps", "400", "2000"),
        ("tau", "2,0.05", "4,0.05"),
        ("activation_checkpointing", "false", "true"),
    ]


def pruning(model: str = "embedded", method: str = "patch-joint", **changes: Any) -> Pruning:
    short = {"steps": 2, "batch": 4, "microbatch": 4, "length": 32, "warmup": 0} | changes
    return learned(
        model, method, 0.45 if method != "maskllm" else 0.5, (64, 64), "c4", Calibration("c4", 8, 64), **short
    )


CPU = Machine("cpu", None, lambda *_: None)


def test_a_short_run_is_said_to_be_short() -> None:
    (line,) = forecast(pruning(), CPU)
    assert re.match(r"learning takes 256 tokens, about (a|\d+) minutes? and 0\.\d+ GiB here \(cpu\)", line)


def test_tokens_of_the_prior_that_is_learned_count() -> None:
    assert next(forecast(pruning(method="patch-tile"), CPU)).startswith("learning takes 512 tokens")


def test_the_published_recipe_on_a_cpu_is_warned_of() -> None:
    published = {"steps": 2000, "batch": 256, "microbatch": 64, "length": 4096}
    said, warned, *_ = forecast(pruning("llama-2-7b", **published), CPU)
    assert "2,097,152,000 tokens" in said and "days" in said
    assert warned.startswith("warning:") and "on a CPU" in warned
    *_, memory = forecast(pruning("llama-2-7b", **published, activation_checkpointing=False), CPU)
    assert "microbatch" in memory


@pytest.mark.parametrize("warmup", [0, 3, 4, 50])
def test_steps_that_end_within_the_warm_up_are_warned_of(warmup: int) -> None:
    for lines in (
        forecast(pruning(steps=4, warmup=warmup), CPU),
        forecast_recovery("embedded", RecoveryRecipe(steps=4, warmup=warmup), 0.5, CPU),
    ):
        assert any("end within the warm-up" in line for line in lines) == (warmup >= 4)


@pytest.mark.parametrize("distillation", [0.0, 1.0])
@pytest.mark.parametrize("refits", [False, True])
def test_fitting_again_what_was_learned_from_the_dense_model_is_warned_of(distillation: float, refits: bool) -> None:
    mask = pruning(distillation=distillation)
    seen = dataclasses.replace(mask, refit=Calibration("embedded/train", 8, 64) if refits else None)
    said = any("had better not be refitted" in line for line in forecast(seen, CPU))
    assert said == (refits and distillation > 0)


def test_a_model_of_unknown_shapes_is_said_to_be_unknown() -> None:
    (line,) = forecast(pruning("some/model"), CPU)
    assert "cannot be told" in line and "configuration of some/model" in line
