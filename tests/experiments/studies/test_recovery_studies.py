"""The studies of larger models and of recovery: what they compare, on how many tokens, from how many seeds."""

from collections import Counter

import pytest

from experiments.studies import cost, qwen_coder, smollm2
from experiments.studies.build import Trials
from patch.methods import METHODS


def learned_tokens(trials: Trials) -> set[int]:
    return {cost.learning_tokens(trial.pruning) for trial in trials if trial.pruning.learns}


def test_seeds_and_tokens_of_the_larger_models() -> None:
    half, larger = qwen_coder.half_billion(), qwen_coder.one_and_a_half_billion()
    assert learned_tokens(half) == {65_536_000}
    # The smaller number is that of one mask.
    assert learned_tokens(larger) == {131_072_000, 32_768_000}
    learned = [t.pruning for t in half if t.pruning.learning]
    guided = [p.learning is not None and p.learning.recipe.block_distillation > 0 for p in learned]
    seeds = Counter((p.method, p.sparsity, how) for p, how in zip(learned, guided, strict=True))
    for mask in (("maskllm", 0.5, False), *(("patch-joint", target, True) for target in (0.45, 0.35, 0.25))):
        assert seeds[mask] == 3
    assert seeds["maskllm", 0.5, True] == 1
    # Microbatches that four GPUs share.
    assert all(t.pruning.passes.microbatch % 4 == 0 for t in (*half, *larger) if t.pruning.passes)


@pytest.mark.parametrize(
    ("trained", "plain"),
    [
        (smollm2.recovered_masks, smollm2.published),
        (smollm2.recovered_on_mixture, smollm2.published),
        (qwen_coder.recovered_half_billion, qwen_coder.half_billion),
    ],
    ids=["smollm2", "smollm2 on a mixture", "qwen-coder"],
)
def test_every_kind_of_mask_is_recovered_beside_itself(trained, plain) -> None:  # type: ignore[no-untyped-def]
    trials = trained()
    recovered = [trial.pruning for trial in trials if trial.pruning.recovery]
    masks = {trial.pruning for trial in trials if not trial.pruning.recovery}
    # A mask that drops nothing leaves the dense model, which is there.
    assert {pruning.base for pruning in recovered if pruning.sparsity} < masks
    assert masks - {trial.pruning for trial in plain()} == set(), "no mask is learned for this alone"
    families = {METHODS[pruning.method].family for pruning in recovered}
    assert families == {"one-shot", "learned"} and {p.structure for p in recovered} >= {"2:4", "hybrid"}
    assert all(pruning.recovery and pruning.recovery.recipe.steps * 16 * 1024 == 32_768_000 for pruning in recovered)


@pytest.mark.parametrize("study", [smollm2.recovery_ablation, smollm2.recovery_texts])
def test_what_recovery_is_made_of_is_judged_on_validation_text(study) -> None:  # type: ignore[no-untyped-def]
    trials = study()
    assert {item.source for trial in trials for item in trial.evaluation.perplexity} == {"wikitext2/validation"}
