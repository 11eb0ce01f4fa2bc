"""All studies by name. Each is a function of a module beside this one that returns the trials of a table or figure.

A study names its models, methods, targets, texts and recipes; nothing here runs. ``hts studies`` lists them and
``hts run NAME --dry-run`` shows the trials of one.
"""

import functools

from experiments.studies import embedded, published, qwen_coder, smollm2, speed
from experiments.studies.build import Study

STUDIES = {
    "demo": Study("the whole path on the embedded model, in minutes on a CPU", embedded.demo),
    "embedded-tiles": Study("perplexity of the embedded model against tile shape at 35%", embedded.tiles),
    "embedded-distillation": Study(
        "what learning from the dense model adds on the embedded model, at 45%", embedded.distillation
    ),
    "embedded-guidance": Study(
        "how much of what guided tiles gain MaskLLM gains too, on the embedded model", embedded.guidance
    ),
    "embedded-priors": Study("which tiles of the embedded model should start as dense, at 45%", embedded.priors),
    "embedded-rankings": Study(
        "which tiles of one-shot hybrid masks stay dense, on the embedded model", embedded.rankings
    ),
    "embedded-precisions": Study(
        "whether learning masks over quantised weights pays, on the embedded model, at 45%", embedded.precisions
    ),
    "embedded-recovered-bits": Study(
        "whether kept weights had better be trained as they will be rounded, on the embedded model",
        embedded.recovered_bits,
    ),
    "embedded-refit": Study("what fitting the kept weights adds to the demo's masks", embedded.refit),
    "frontier-embedded": Study("perplexity of masks and dense models in few bits, the embedded model", embedded.bits),
    "smollm2-sinks": Study("what regard to attention sinks does in few bits, SmolLM2, on a CPU", smollm2.sinks),
    "frontier-smollm2-bits": Study("accuracy and speed of masks and dense models in few bits, SmolLM2", smollm2.bits),
    "frontier-qwen-coder-0.5b": Study(
        "accuracy and speed of masks and dense models in few bits, Qwen2.5-Coder-0.5B", qwen_coder.bits
    ),
    "frontier": Study("accuracy and speed of the same checkpoints, the embedded model", embedded.frontier),
    "frontier-smollm2": Study("accuracy and speed of the same checkpoints, SmolLM2-135M", smollm2.frontier),
    **{
        f"frontier-{model}": Study(
            f"accuracy and speed of the same checkpoints, {model}",
            functools.partial(published.frontier, model, method),
        )
        for model, method in (
            ("qwen2.5-0.5b", "patch-joint"),
            ("llama-3.2-1b", "patch-joint"),
            ("llama-2-7b", "patch-tile"),
            ("llama-3.1-8b", "patch-tile"),
        )
    },
    "smollm2-oneshot": Study(
        "one-shot methods and structures on SmolLM2-135M, calibrated on fiction alone", smollm2.one_shot_masks
    ),
    "smollm2-learned": Study(
        "learned masks of SmolLM2-135M on equal tokens by the earlier recipes; see smollm2-published",
        smollm2.learned_masks,
    ),
    "smollm2-published": Study(
        "learned masks of SmolLM2-135M as published, and guided ones, on one mixture of text", smollm2.published
    ),
    "smollm2-tiles": Study("perplexity of SmolLM2-135M against tile shape at 35%", smollm2.tiles),
    "smollm2-recipes": Study("recipes and seeds of SmolLM2-135M at 45% on equal tokens", smollm2.recipes),
    "smollm2-refit": Study("what fitting the kept weights adds to masks of SmolLM2-135M", smollm2.refit),
    "recipe-ablation": Study("what each change of the published recipe does, on SmolLM2-135M", smollm2.recipe_ablation),
    "recipe-effects": Study(
        "the large effects of recipe-ablation from the right start, and tiles over SparseGPT's mask",
        smollm2.recipe_effects,
    ),
    "guided-ideas": Study("what could make guided masks better still, on SmolLM2-135M at 45%", smollm2.guided_ideas),
    "guided-further": Study(
        "guided masks of SmolLM2-135M in four times as many steps, and on more of an encyclopedia, on equal tokens",
        smollm2.guided_further,
    ),
    "smollm2-recovered": Study(
        "what training the kept weights adds to masks of SmolLM2-135M, on equal tokens", smollm2.recovered_masks
    ),
    "smollm2-recovered-mixture": Study(
        "the same on a mixture with more of an encyclopedia, a mask that drops nothing beside it",
        smollm2.recovered_on_mixture,
    ),
    "recovery-texts": Study("which text, loss and rate recover a mask best, on SmolLM2-135M", smollm2.recovery_texts),
    "recovery-ablation": Study("what each part of recovery does, on SmolLM2-135M", smollm2.recovery_ablation),
    "qwen-coder-0.5b": Study("masks of Qwen2.5-Coder-0.5B, for text and code", qwen_coder.half_billion),
    "qwen-coder-1.5b": Study("masks of Qwen2.5-Coder-1.5B, for text and code", qwen_coder.one_and_a_half_billion),
    "qwen-coder-0.5b-recovered": Study(
        "what training the kept weights adds to masks of Qwen2.5-Coder-0.5B", qwen_coder.recovered_half_billion
    ),
    "qwen-coder-recovered-bits": Study(
        "whether kept weights had better be trained as they will be rounded, Qwen2.5-Coder-0.5B",
        qwen_coder.recovered_bits,
    ),
    "speed-kernels": Study("kernel speed of four models by tokens, sparsity and tile shape", speed.kernels),
    "speed-models": Study("end-to-end speed of LLaMA-2-7B and LLaMA-3.1-8B shapes", speed.models),
    "accuracy-small": Study("published accuracy table, models up to 1B", published.accuracy_small),
    "guided-small": Study("the guided recipe beside the published one, models up to 1B", published.guided_small),
    "accuracy-large": Study("published accuracy table, LLaMA-2-7B and LLaMA-3.1-8B", published.accuracy_large),
    "tile-shapes": Study("perplexity against tile shape at 35%", published.tile_shapes),
    "priors": Study("perplexity and accuracy against the mask that learning starts from", published.priors),
    "joint-or-tile": Study("tiles and patterns learned together, against tiles alone", published.joint_or_tile),
    "sparsities": Study("perplexity and accuracy from 0 to 50%", published.sparsities),
}
