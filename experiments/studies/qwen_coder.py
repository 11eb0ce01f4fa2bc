"""Studies of Qwen2.5-Coder of 0.5 and 1.5 thousand million parameters, for text and for code."""

from typing import Any

from analysis.names import PAPER_TASKS
from experiments.eval.names import HUMANEVAL
from experiments.studies.build import (
    TARGETS,
    Trials,
    dense,
    fewer_blocks,
    in_fewer_bits,
    joined,
    learned,
    one_shot,
    recovered,
    rounded_and_recovered,
    trials,
)
from experiments.studies.trial import WORKLOADS, Calibration, Evaluation, Perplexity, Pruning, Workload
from patch.learn.recipe import GUIDED, GUIDED_PATTERNS
from patch.tiles import TileShape

# Shares of the windows, for calibration, learning and recovery alike.
_TEXT = "0.4*novels+0.2*wiki_leads+0.4*python"
_CALIBRATION = Calibration(_TEXT, 128, 2048, drawn_from="stream")
_TILE: TileShape = (128, 128)
_TEXTS = (Perplexity("wikitext2/test", 2048), Perplexity("python/test", 2048))
_EVALUATION = Evaluation(_TEXTS, (*PAPER_TASKS, HUMANEVAL), batch=8)
_RUNNING: dict[str, Any] = {"activation_checkpointing": False, "checkpoint_every": 250, "log_every": 50}
# 65.5 million tokens for the smaller model, 131 million for the larger one.
_STEPS: dict[str, dict[str, Any]] = {
    "qwen2.5-coder-0.5b": {"steps": 2000, "batch": 32, "microbatch": 16, "length": 1024},
    "qwen2.5-coder-1.5b": {"steps": 2000, "batch": 64, "microbatch": 16, "length": 1024},
}


def _learned(model: str, method: str, sparsity: float, **changes: Any) -> Pruning:
    return learned(model, method, sparsity, _TILE, _TEXT, _CALIBRATION, **(_STEPS[model] | _RUNNING | changes))


def _one_shot(model: str, method: str, structure: str, sparsity: float, ranking: str = "weight") -> Pruning:
    return one_shot(model, method, structure, sparsity, _TILE, _CALIBRATION, ranking)


def _each_kind(model: str) -> list[Pruning]:
    """A mask of every kind that kernels run: 2:4 of SparseGPT and MaskLLM, tiles ranked and guided."""
    return [
        _one_shot(model, "sparsegpt", "2:4", 0.5),
        _learned(model, "maskllm", 0.5),
        *(_one_shot(model, "sparsegpt", "hybrid", target, "model") for target in TARGETS),
        *(_learned(model, "patch-joint", target, **GUIDED) for target in TARGETS),
    ]


def half_billion() -> Trials:
    """Masks of the model of 0.5B: one-shot, as published, guided; three seeds of what is closest to one another."""
    model = "qwen2.5-coder-0.5b"
    return trials(
        [
            dense(model),
            _one_shot(model, "wanda", "2:4", 0.5),
            _one_shot(model, "sparsegpt", "2:4", 0.5),
            *(_one_shot(model, "sparsegpt", "hybrid", target, "model") for target in TARGETS),
            *(_one_shot(model, "sparsegpt", "unstructured", target) for target in (0.5, *TARGETS)),
            *(_learned(model, "maskllm", 0.5, seed=seed) for seed in range(3)),
            _learned(model, "maskllm", 0.5, **GUIDED_PATTERNS),
            *(_learned(model, "patch-joint", target) for target in TARGETS),
            *(_learned(model, "patch-joint", target, seed=seed, **GUIDED) for target in TARGETS for seed in range(3)),
        ],
        _EVALUATION,
    )


def bits() -> Trials:
    """Accuracy and speed of masks of the model of 0.5B in FP8 and INT4, dense models, smaller ones too, beside them.

    Its masks are those of ``qwen-coder-0.5b``.
    """
    model = "qwen2.5-coder-0.5b"
    smaller = [fewer_blocks(model, share, _CALIBRATION) for share in (0.1, 0.2, 0.3)]
    deployed = ("fp8", "int4")
    models = in_fewer_bits([dense(model), *smaller, *_each_kind(model)], _CALIBRATION, True, deployed)
    workloads = (*WORKLOADS[:2], Workload("decode", 64, 1), *WORKLOADS[2:])
    return joined(models, _EVALUATION, ("llama-2-7b", "llama-3.1-8b"), workloads)


def one_and_a_half_billion() -> Trials:
    """Masks of the model of 1.5B, from one seed, learned on several GPUs; one also on a quarter of the tokens."""
    model = "qwen2.5-coder-1.5b"
    wanda = _one_shot(model, "wanda", "2:4", 0.5)
    shorter = _learned(model, "patch-joint", 0.45, **GUIDED, batch=16)
    return trials([dense(model), wanda, *_each_kind(model), shorter], _EVALUATION)


def recovered_half_billion() -> Trials:
    """What training the kept weights adds to masks of the model of 0.5B, 32.8 million tokens each.

    The published masks stand beside them as they are: what was learned in as long is compared with too.
    Ranked tiles at 45 and 25% also at the default rate, which is too high for this model; of guided tiles, which are
    nearest to the dense one, 1e-4 is too.
    """
    model = "qwen2.5-coder-0.5b"
    steps: dict[str, Any] = {"steps": 2000, "batch": 16, "microbatch": 16, "length": 1024}
    masks = _each_kind(model)
    published = [_learned(model, "patch-joint", target) for target in TARGETS]
    ranked = [_one_shot(model, "sparsegpt", "hybrid", target, "model") for target in (0.45, 0.25)]
    trained = [
        *(recovered(mask, _TEXT, **steps) for mask in ranked),
        *(recovered(mask, _TEXT, **(steps | {"lr": 1e-4})) for mask in masks),
        *(recovered(mask, _TEXT, **(steps | {"lr": 2e-5})) for mask in masks if mask.method == "patch-joint"),
    ]
    return trials([dense(model), *masks, *published, *trained], _EVALUATION)


def recovered_bits() -> Trials:
    """Whether what is kept had better be trained as it will be rounded: INT4 of two masks, 16.4 million tokens each.

    One drops nothing, so that training it is training the dense model.
    """
    model = "qwen2.5-coder-0.5b"
    steps: dict[str, Any] = {"steps": 1000, "batch": 16, "microbatch": 16, "length": 1024, "lr": 2e-5}
    masks = (_one_shot(model, "magnitude", "hybrid", 0.0), _learned(model, "patch-joint", 0.45, **GUIDED))
    each = rounded_and_recovered(masks, "int4", _TEXT, _CALIBRATION, **steps)
    return trials([dense(model), *each], Evaluation(_TEXTS))
