"""Trials become points: seeds are averaged, evaluations complete each other, everything else keeps points apart."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from analysis.rows.points import Task, Text, gather, mean_tasks, tasks, texts, trial_labels
from patch.errors import UserError
from patch.learn.recipe import GUIDED

RECIPE = {"mode": "joint", "steps": 200, "lr": 1e-3}
Row = dict[str, Any]
Study = Callable[[dict[str, list[Row]]], pd.DataFrame]
Make = Callable[..., Any]
WIKITEXT = Text("wikitext2/test", 2048)
PRIORS: dict[str, Any] = {"magnitude": None, "wanda": {"source": "c4", "windows": 128}}


def test_reading_order(smollm: pd.DataFrame, demo: pd.DataFrame) -> None:
    order = [(point.method, point.structure, point.sparsity) for point in gather(smollm)]
    assert order == [
        ("dense", "dense", 0.0),
        ("magnitude", "unstructured", 0.5),
        ("magnitude", "2:4", 0.5),
        *[("wanda", "unstructured", 0.5), ("wanda", "2:4", 0.5)],
        *[("wanda", "hybrid", share) for share in (0.45, 0.35, 0.25)],
        *[("sparsegpt", "unstructured", 0.5), ("sparsegpt", "2:4", 0.5)],
        *[("sparsegpt", "hybrid", share) for share in (0.45, 0.35, 0.25)],
    ]
    learned = [(point.method, point.sparsity) for point in gather(demo)][4:]
    assert learned == [("maskllm", 0.5), ("patch-joint", 0.45), ("patch-joint", 0.35), ("patch-joint", 0.25)]


def test_the_order_does_not_depend_on_the_order_of_rows(smollm: pd.DataFrame) -> None:
    assert gather(smollm.sample(frac=1, random_state=1)) == gather(smollm)


def test_seeds_give_mean_and_spread(seeded: pd.DataFrame) -> None:
    points = {(point.method, point.sparsity): point for point in gather(seeded)}
    text = Text("embedded/test", 512)
    learned = points["patch-joint", 0.45].perplexity[text]
    assert learned.seeds == 3 and learned.value == pytest.approx(statistics.fmean([39.8, 40.2, 40.6]))
    assert learned.spread == pytest.approx(statistics.stdev([39.8, 40.2, 40.6])) and learned.error == learned.spread
    task = points["patch-joint", 0.45].accuracy[Task("wiki_continuation", 400)]
    assert task.value == pytest.approx(0.56) and task.spread == pytest.approx(0.01)
    assert task.stderr == pytest.approx(math.sqrt(0.56 * 0.44 / 400), rel=1e-3)
    once = points["wanda", 0.5].perplexity[text]
    assert (once.seeds, once.spread) == (1, None) and once.error == once.stderr == pytest.approx(0.712)
    assert [point.trials for point in gather(seeded)][-1] == tuple(f"08{seed:02x}00000000" for seed in range(3))


def test_seeds_are_averaged_where_one_diverged(study: Study, make_pruning: Make, make_trial: Make) -> None:
    about = [make_pruning("m", "patch-joint", "hybrid", 0.25, seed) for seed in (0, 1)]
    frame = study({"a": make_trial("a", about[0], 30.0), "b": make_trial("b", about[1], math.inf)})
    (point,) = gather(frame)
    assert point.perplexity[WIKITEXT].value == math.inf


def test_the_mean_is_over_the_papers_tasks(smollm: pd.DataFrame) -> None:
    over = mean_tasks(tasks(gather(smollm)))
    assert len(over) == 8 and Task("lambada_openai") not in over and Task("race_subset") in over
    point = gather(smollm)[0]
    chosen = [point.accuracy[task] for task in over]
    assert point.mean_accuracy is not None
    assert point.mean_accuracy.value == pytest.approx(statistics.fmean(measured.value for measured in chosen))
    expected = math.sqrt(sum((measured.stderr or 0) ** 2 for measured in chosen)) / 8
    assert point.mean_accuracy.stderr == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "over"),
    [
        pytest.param([Task("piqa"), Task("lambada_openai")], 2, id="other tasks: all"),
        pytest.param([Task("piqa")], 1, id="one task"),
        pytest.param([], 0, id="none"),
    ],
)
def test_without_the_papers_tasks_the_mean_is_over_all(found: list[Task], over: int) -> None:
    assert len(mean_tasks(found)) == over


def test_no_mean_where_a_task_is_missing(study: Study, make_pruning: Make, make_trial: Make) -> None:
    both = {"piqa": (0.6, 100), "arc_easy": (0.5, 100)}
    frame = study(
        {
            "a": make_trial("a", make_pruning("m", "dense", "dense", 0.0), 20.0, both),
            "b": make_trial("b", make_pruning("m", "magnitude", "2:4", 0.5), 30.0, {"piqa": (0.4, 100)}),
        }
    )
    dense, pruned = gather(frame)
    assert dense.mean_accuracy is not None and dense.mean_accuracy.value == pytest.approx(0.55)
    assert pruned.mean_accuracy is None and pruned.accuracy[Task("piqa")].value == 0.4


def test_only_primary_accuracies_count_and_lambadas_perplexity_is_no_text(smollm: pd.DataFrame) -> None:
    assert texts(gather(smollm)) == [WIKITEXT]
    assert gather(smollm)[0].accuracy[Task("piqa")].value == pytest.approx(0.681)


def test_evaluations_of_one_pruning_complete_each_other(study: Study, make_pruning: Make, make_trial: Make) -> None:
    about = make_pruning("m", "wanda", "2:4", 0.5)
    frame = study({"a": make_trial("a", about, 30.0), "b": make_trial("b", about, 25.0, length=4096)})
    (point,) = gather(frame)
    assert {str(text): measured.value for text, measured in point.perplexity.items()} == {
        "wikitext2/test@2048": 30.0,
        "wikitext2/test@4096": 25.0,
    }


def test_evaluations_that_disagree_are_refused(study: Study, make_pruning: Make, make_trial: Make) -> None:
    about = make_pruning("m", "wanda", "2:4", 0.5)
    frame = study({"a": make_trial("a", about, 30.0), "b": make_trial("b", about, 31.0)})
    with pytest.raises(UserError, match=r"trials a, b .* 30\.0 and 31\.0 for wikitext2/test@2048"):
        gather(frame)


def test_limited_tasks_are_not_mixed_with_full_ones(study: Study, make_pruning: Make, make_trial: Make) -> None:
    about = make_pruning("m", "dense", "dense", 0.0)
    part = make_trial("b", about, 30.0, {"piqa": (0.7, 10)}, limit=10)
    frame = study({"a": make_trial("a", about, 30.0, {"piqa": (0.6, 1838)}), "b": part})
    (point,) = gather(frame)
    assert {str(task): measured.value for task, measured in point.accuracy.items()} == {"piqa": 0.6, "piqa[:10]": 0.7}


def test_other_differences_keep_points_apart_and_are_named(study: Study, make_pruning: Make, make_trial: Make) -> None:
    learnings = [{"source": "train", "recipe": {"mode": "joint", "steps": steps}} for steps in (500, 2000)]
    about = [make_pruning("m", "patch-joint", "hybrid", 0.25, learning=learning) for learning in learnings]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("ab", about, strict=True)})
    assert [point.variant for point in gather(frame)] == ["steps=2000", "steps=500"]


def test_what_most_variants_have_goes_without_saying(study: Study, make_pruning: Make, make_trial: Make) -> None:
    recipes = [RECIPE, RECIPE | {"steps": 500}, RECIPE | {"lr": 3e-3}]
    about = [
        make_pruning("m", "patch-joint", "hybrid", 0.25, learning={"source": "train", "recipe": recipe})
        for recipe in recipes
    ]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("abc", about, strict=True)})
    assert [point.variant for point in gather(frame)] == ["", "lr=0.003", "steps=500"]


def test_priors_are_named_by_their_method_alone(study: Study, make_pruning: Make, make_trial: Make) -> None:
    priors = [make_pruning("m", method, "2:4", 0.5, calibration=text) for method, text in PRIORS.items()]
    about = [make_pruning("m", "patch-joint", "hybrid", 0.25, prior=prior) for prior in (None, *priors)]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("abc", about, strict=True)})
    variants = {"no prior", "from Magnitude", "from Wanda"}
    assert {point.variant for point in gather(frame)} == variants


def test_tile_shapes_keep_hybrid_points_apart(study: Study, make_pruning: Make, make_trial: Make) -> None:
    tiles = ([128, 128], [32, 64], [64, 64])
    about = [make_pruning("m", "patch-joint", "hybrid", 0.25, tile=tile) for tile in tiles]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("abc", about, strict=True)})
    assert [(point.tile, point.variant) for point in gather(frame)] == [("32x64", ""), ("64x64", ""), ("128x128", "")]


def test_variants_are_said_of_every_sparsity(study: Study, make_pruning: Make, make_trial: Make) -> None:
    recipes = [(0.45, {}), (0.45, {"distillation": 1.0}), (0.25, {"distillation": 1.0})]
    about = [
        make_pruning("m", "patch-joint", "hybrid", sparsity, learning={"source": "train", "recipe": RECIPE | changes})
        for sparsity, changes in recipes
    ]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("abc", about, strict=True)})
    found = [(point.sparsity, point.variant) for point in gather(frame)]
    assert found == [(0.45, ""), (0.45, "distillation=1"), (0.25, "distillation=1")]
    labels = ["PATCH joint 45%", "PATCH joint 45% (distillation=1)", "PATCH joint 25% (distillation=1)"]
    assert list(trial_labels(frame).values()) == labels


def test_what_no_published_recipe_does_is_always_said(study: Study, make_pruning: Make, make_trial: Make) -> None:
    learning = {"source": "train", "recipe": RECIPE | {"distillation": 1.0}}
    frame = study({"a": make_trial("a", make_pruning("m", "patch-joint", "hybrid", 0.25, learning=learning), 30.0)})
    assert [point.variant for point in gather(frame)] == ["distillation=1"]


@pytest.mark.parametrize(
    ("changes", "variant"),
    [
        ({}, "guided"),
        ({"steps": 400}, "guided"),
        ({"density": "expected"}, "guided, density=expected"),
        ({"block_distillation": 1.0}, "distillation=1, block_distillation=1, tile_ranking=model"),
    ],
    ids=["alone", "shorter", "changed", "another"],
)
def test_the_guided_recipe_goes_by_its_name(
    changes: Row, variant: str, study: Study, make_pruning: Make, make_trial: Make
) -> None:
    learning = {"source": "train", "recipe": RECIPE | GUIDED | changes}
    frame = study({"a": make_trial("a", make_pruning("m", "patch-joint", "hybrid", 0.25, learning=learning), 30.0)})
    (point,) = gather(frame)
    assert set(point.variant.split(", ")) == set(variant.split(", "))


@pytest.mark.parametrize(
    ("fitted", "variants"),
    [
        ([{}], ["", "refitted on c4"]),
        ([{}, {"seed": 1}], ["", "refitted on c4"]),
        ([{}, {"source": "novels"}], ["", "refitted on c4", "refitted on novels"]),
        (
            [{"windows": 64}, {"windows": 128}],
            ["", "refitted on c4, refit.windows=64", "refitted on c4, refit.windows=128"],
        ),
    ],
    ids=["one", "seeds", "texts", "sizes"],
)
def test_what_was_refitted_is_said_of_it(
    fitted: list[dict[str, Any]], variants: list[str], study: Study, make_pruning: Make, make_trial: Make
) -> None:
    text = {"source": "c4", "windows": 128, "length": 2048, "seed": 0}
    about = [make_pruning("m", "wanda", "2:4", 0.5)]
    about += [make_pruning("m", "wanda", "2:4", 0.5, refit=text | changes) for changes in fitted]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("abc", about, strict=False)})
    assert sorted(point.variant for point in gather(frame)) == sorted(variants)


def test_the_text_that_was_learned_on_is_said_where_it_differs(
    study: Study, make_pruning: Make, make_trial: Make
) -> None:
    texts = ("novels", "novels", "0.5*novels+0.5*python")
    about = [
        make_pruning("m", "patch-joint", "hybrid", target, learning={"source": text, "recipe": RECIPE})
        for target, text in zip((0.25, 0.35, 0.25), texts, strict=True)
    ]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("abc", about, strict=True)})
    assert {point.variant for point in gather(frame)} == {"", "learned on 0.5*novels+0.5*python"}


def test_settings_of_recovery_are_words(study: Study, make_pruning: Make, make_trial: Make) -> None:
    about = make_pruning("m", "sparsegpt", "2:4", 0.5)
    recipes = ({"block_epochs": 0, "distillation": 0.5}, {"block_epochs": 2, "distillation": 0.0})
    trials = {
        str(number): make_trial(
            str(number), about | {"recovery": {"source": "text", "recipe": recipe, "seed": 0}}, 20.0
        )
        for number, recipe in enumerate(recipes)
    }
    said = {point.variant for point in gather(study(trials))}
    assert said == {
        "recovered on text, no blocks, 0.5 distilled",
        "recovered on text, blocks for 2 epochs, loss of the text",
    }


def test_how_learning_ran_is_no_variant(study: Study, make_pruning: Make, make_trial: Make) -> None:
    recipes = [RECIPE | {"log_every": 10, "checkpoint_every": 100}, RECIPE | {"log_every": 50, "checkpoint_every": 7}]
    about = [
        make_pruning("m", "patch-joint", "hybrid", 0.25, seed=seed, learning={"source": "train", "recipe": recipe})
        for seed, recipe in enumerate(recipes)
    ]
    frame = study({name: make_trial(name, part, 30.0) for name, part in zip("ab", about, strict=True)})
    (point,) = gather(frame)
    assert point.variant == "" and point.trials == ("a", "b")


def test_a_single_point_has_no_variant(demo: pd.DataFrame) -> None:
    assert {point.variant for point in gather(demo)} == {""}
