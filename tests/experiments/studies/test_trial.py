"""Definitions: hashes that name content, and errors before hours of work."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from experiments.studies import build, smollm2
from experiments.studies.trial import (
    Calibration,
    Evaluation,
    Learning,
    Perplexity,
    Pruning,
    Trial,
    check_name,
    definition,
    describe,
    key,
    lineage,
)
from patch.errors import UserError
from patch.learn.recipe import EARLIER, GUIDED, MASKLLM, PATCH_JOINT


def sparsegpt(**changes: Any) -> Pruning:
    fields: dict[str, Any] = {
        "model": "embedded",
        "method": "sparsegpt",
        "structure": "2:4",
        "sparsity": 0.5,
        "tile": (64, 64),
        "calibration": Calibration(),
    }
    return Pruning(**(fields | changes))


def joint(**changes: Any) -> Pruning:
    fields: dict[str, Any] = {
        "model": "embedded",
        "method": "patch-joint",
        "structure": "hybrid",
        "sparsity": 0.45,
        "tile": (64, 64),
        "learning": Learning("c4", PATCH_JOINT),
        "prior": sparsegpt(),
    }
    return Pruning(**(fields | changes))


def test_a_hash_is_the_same_in_another_process() -> None:
    code = "Pruning('embedded', 'wanda', 'hybrid', 0.35, (64, 64), calibration=Calibration('novels', 8, 64))"
    script = f"from experiments.studies.trial import *; print(key({code}))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    here = Pruning("embedded", "wanda", "hybrid", 0.35, (64, 64), calibration=Calibration("novels", 8, 64))
    assert found == key(here)


def test_equal_definitions_hash_alike_whether_the_tile_is_a_list_or_a_tuple() -> None:
    assert key(sparsegpt(tile=[64, 64])) == key(sparsegpt(tile=(64, 64)))
    assert definition(sparsegpt())["tile"] == [64, 64]


RECIPE = PATCH_JOINT


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(joint(sparsity=0.35), id="sparsity"),
        pytest.param(joint(seed=1), id="seed"),
        pytest.param(joint(model="qwen2.5-0.5b", prior=None), id="model"),
        pytest.param(joint(revision="abc"), id="revision"),
        pytest.param(joint(prior=None), id="no-prior"),
        pytest.param(joint(prior=sparsegpt(calibration=Calibration(seed=1))), id="calibration-of-the-prior"),
        pytest.param(joint(learning=Learning("novels", RECIPE)), id="text"),
        pytest.param(joint(refit=Calibration()), id="refit"),
        pytest.param(joint(learning=Learning("c4", dataclasses.replace(RECIPE, lr=2e-3))), id="rate"),
    ],
)
def test_whatever_changes_in_a_definition_changes_its_hash(other: Pruning) -> None:
    assert key(other) != key(joint())
    evaluation = Evaluation()
    assert key(Trial(other, evaluation)) != key(Trial(joint(), evaluation))


def test_how_a_recipe_runs_changes_no_hash() -> None:
    other = dataclasses.replace(RECIPE, activation_checkpointing=False, checkpoint_every=7, log_every=3)
    pruning = joint(learning=Learning("c4", other))
    assert key(pruning) == key(joint())
    assert key(Trial(pruning, Evaluation())) == key(Trial(joint(), Evaluation()))
    assert key(definition(pruning)) == key(pruning)
    assert definition(pruning) != definition(joint())


def test_tiles_are_learned_over_the_masks_that_are_reported() -> None:
    prunings = [trial.pruning for trial in smollm2.learned_masks()]
    reported = {key(pruning) for pruning in prunings if pruning.method == "maskllm"}
    over = {key(p.prior) for p in prunings if p.method == "patch-tile" and p.prior and p.prior.method == "maskllm"}
    assert over == reported


def test_published_masks_start_from_masks_of_their_own_method() -> None:
    mixture, tile = Calibration("c4", drawn_from="stream"), (64, 64)
    joint_, tiles, maskllm = (
        build.learned("embedded", method, target, tile, "c4", mixture)
        for method, target in (("patch-joint", 0.35), ("patch-tile", 0.35), ("maskllm", 0.5))
    )
    assert [(p.method, p.structure, p.sparsity) for p in joint_.bases] == [
        ("sparsegpt", "2:4", 0.5),
        ("sparsegpt", "unstructured", 0.35),
    ]
    assert [(p.method, p.structure, p.sparsity) for p in tiles.bases] == [
        ("maskllm", "2:4", 0.5),
        ("wanda", "unstructured", 0.35),
    ]
    assert [p.weight_update for p in lineage(maskllm)[:-1]] == [False]
    assert lineage(tiles)[:-1] == [*lineage(maskllm), tiles.tile_prior]
    guided = build.learned("embedded", "patch-joint", 0.35, tile, "c4", mixture, **GUIDED)
    assert guided.tile_prior is None, "its tiles are ranked over the model"


def test_a_refit_stands_on_the_same_pruning_without_it() -> None:
    plain, fitted = joint(), joint(refit=Calibration())
    assert "refit" not in definition(plain)
    assert lineage(fitted) == [sparsegpt(), plain, fitted]
    assert plain.learns and not fitted.learns and not sparsegpt().learns


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_tiles_that_are_ranked_over_the_model_stand_on_the_two_four_mask(method: str) -> None:
    plain, ranked = (
        build.one_shot("embedded", method, "hybrid", 0.35, (64, 64), Calibration(), ranking)
        for ranking in ("weight", "model")
    )
    assert "tile_ranking" not in definition(plain)
    two_four = build.one_shot("embedded", method, "2:4", 0.5, (64, 64), Calibration())
    assert lineage(ranked) == [two_four, ranked] and ranked.calibration == Calibration()
    fitted = build.refitted(ranked, Calibration())
    assert lineage(fitted) == [two_four, ranked, fitted]


def test_another_evaluation_is_another_trial_of_the_same_pruning() -> None:
    one, other = (Trial(joint(), Evaluation((Perplexity(length=length),))) for length in (512, 1024))
    assert key(one) != key(other) and key(one.pruning) == key(other.pruning)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        pytest.param(sparsegpt, {"sparsity": 0.4}, "structure 2:4 has sparsity 0.5", id="2:4-at-40"),
        pytest.param(joint, {"sparsity": 0.6}, "target sparsity 0.6", id="over-half"),
        pytest.param(joint, {"sparsity": -0.1}, "target sparsity -0.1", id="negative"),
        pytest.param(joint, {"tile": (64, 66)}, "columns must be a multiple of 4", id="cut-groups"),
        pytest.param(joint, {"tile": None}, "needs a tile shape", id="no-tile"),
        pytest.param(joint, {"learning": None}, "needs text and a recipe", id="no-recipe"),
        pytest.param(joint, {"structure": "unstructured"}, "learns hybrid masks", id="learned-unstructured"),
        pytest.param(
            joint,
            {"learning": Learning("c4", MASKLLM)},
            "recipe of mode joint, got maskllm.* take that method",
            id="other-mode",
        ),
        pytest.param(joint, {"prior": sparsegpt(tile=(32, 32))}, "same model and tile", id="prior-of-another-tile"),
        pytest.param(sparsegpt, {"calibration": None}, "needs calibration text", id="uncalibrated"),
        pytest.param(
            sparsegpt,
            {"method": "magnitude", "structure": "hybrid", "tile_ranking": "model", "calibration": None},
            "magnitude with tiles ranked over the model needs calibration text",
            id="ranked-uncalibrated",
        ),
        pytest.param(sparsegpt, {"tile_ranking": "model"}, "not sparsegpt 2:4", id="ranked-2:4"),
        pytest.param(joint, {"tile_ranking": "model"}, "a recipe has its own", id="ranked-learned"),
        pytest.param(sparsegpt, {"tile_ranking": "modle"}, "did you mean model", id="unknown-ranking"),
        pytest.param(joint, {"weight_update": False}, "changes no weight", id="frozen-learned"),
        pytest.param(joint, {"tile_prior": sparsegpt()}, "must be an unstructured pruning", id="tile-prior-2:4"),
        pytest.param(sparsegpt, {"tile_prior": sparsegpt()}, "learns no tiles", id="tile-prior-of-one-shot"),
        pytest.param(sparsegpt, {"method": "dense"}, "cannot have structure 2:4", id="dense-2:4"),
        pytest.param(sparsegpt, {"structure": "unstructured", "sparsity": 1.0}, "not including, 1", id="all-dropped"),
        pytest.param(
            sparsegpt, {"structure": "unstructured", "tile": None, "refit": Calibration()}, "refit", id="refit-untiled"
        ),
    ],
)
def test_definitions_that_make_no_sense_are_refused(make: Any, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("wands", r"did you mean wanda\?"),
        ("patch-", r"did you mean patch-tile, patch-joint or patch-both\?"),
        ("sprint", "known: dense"),
    ],
    ids=["near", "between", "far"],
)
def test_unknown_names_get_a_hint(given: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        check_name("method", given, ["dense", "wanda", "sparsegpt", "patch-tile", "patch-joint", "patch-both"])


def test_descriptions_tell_prunings_apart() -> None:
    guided = dataclasses.replace(PATCH_JOINT, **GUIDED)
    prunings = [
        Pruning("embedded", "dense", "dense", 0.0),
        sparsegpt(),
        sparsegpt(structure="unstructured", tile=None),
        sparsegpt(structure="hybrid", sparsity=0.35),
        joint(),
        joint(seed=1),
        joint(tile=(32, 64), prior=None),
        joint(refit=Calibration()),
        joint(learning=Learning("c4", guided)),
        joint(learning=Learning("c4", dataclasses.replace(guided, lr=2e-3))),
        sparsegpt(structure="hybrid", sparsity=0.35, tile_ranking="model"),
    ]
    assert len({describe(pruning) for pruning in prunings}) == len(prunings)
    assert describe(joint()) == "embedded patch-joint hybrid 45% 64x64"
    assert describe(joint(learning=Learning("c4", guided))) == "embedded patch-joint hybrid 45% 64x64 guided"
    earlier = dataclasses.replace(EARLIER["patch-joint"], lr=2e-3)
    assert describe(joint(learning=Learning("c4", earlier))) == "embedded patch-joint hybrid 45% 64x64 earlier lr 0.002"
    warm = dataclasses.replace(PATCH_JOINT, tile_tau=(2.0, 0.05), clip=None)
    said = "clip none tile_tau 2,0.05"
    assert describe(joint(learning=Learning("c4", warm))) == f"embedded patch-joint hybrid 45% 64x64 {said}"
