"""Studies of the published tables: their models, settings and tasks."""

from analysis.names import PAPER_TASKS
from experiments.studies.build import TARGETS, Trials, dense, joined, learned, one_shot, trials
from experiments.studies.trial import Calibration, Evaluation, Perplexity, Pruning
from patch.learn.recipe import GUIDED
from patch.methods import members

_PUBLISHED = Evaluation((Perplexity("wikitext2/test", 4096),), PAPER_TASKS)

# Models of the published tables that learn tiles and patterns jointly.
_SMALL = ("qwen2.5-0.5b", "llama-3.2-1b", "gemma-3-1b")


def _accuracy(model: str, method: str) -> list[Pruning]:
    """Dense, the 2:4 baselines, and PATCH at three sparsities, as the published accuracy tables have them."""
    tile, calibration = (128, 128), Calibration()
    return [
        dense(model),
        *(one_shot(model, baseline, "2:4", 0.5, tile, calibration) for baseline in members("one-shot")),
        learned(model, "maskllm", 0.5, tile, "c4", calibration),
        *(learned(model, method, target, tile, "c4", calibration) for target in TARGETS),
    ]


def accuracy_small() -> Trials:
    """The published accuracy table of models up to 1B parameters, where tiles and patterns are learned jointly."""
    return trials([pruning for name in _SMALL for pruning in _accuracy(name, "patch-joint")], _PUBLISHED)


def guided_small() -> Trials:
    """The guided recipe on the models of ``accuracy-small``, beside its trials."""
    guided = [
        learned(name, "patch-joint", target, (128, 128), "c4", Calibration(), **GUIDED)
        for name in _SMALL
        for target in TARGETS
    ]
    return accuracy_small() + trials(guided, _PUBLISHED)


def accuracy_large() -> Trials:
    """The published accuracy table of the larger models, where tiles are learned over MaskLLM's patterns."""
    names = ("llama-2-7b", "llama-3.1-8b")
    return trials([pruning for name in names for pruning in _accuracy(name, "patch-tile")], _PUBLISHED)


def frontier(model: str, method: str) -> Trials:
    """Accuracy and speed of the same checkpoints, of a model of the published tables.

    Args:
        method: that of its table, ``patch-joint`` or ``patch-tile``.
    """
    contrast = [
        one_shot(model, baseline, "unstructured", 0.5, None, Calibration()) for baseline in ("wanda", "sparsegpt")
    ]
    return joined([*_accuracy(model, method), *contrast], _PUBLISHED)


def tile_shapes() -> Trials:
    """Perplexity against the tile shape at 35% sparsity."""
    # The keys and values of this model have 128 rows: no larger tile fits them.
    shapes = ((32, 32), (64, 64), (128, 128), (64, 128), (128, 64))
    prunings = [learned("qwen2.5-0.5b", "patch-joint", 0.35, tile, "c4", Calibration()) for tile in shapes]
    return trials([dense("qwen2.5-0.5b"), *prunings], _PUBLISHED)


def sparsities() -> Trials:
    """Perplexity and accuracy from 0 to 50% in steps of 5."""
    model = "qwen2.5-0.5b"
    targets = [step / 20 for step in range(1, 11)]
    prunings = [learned(model, "patch-joint", target, (128, 128), "c4", Calibration()) for target in targets]
    return trials([dense(model), *prunings], _PUBLISHED)


def priors() -> Trials:
    """What the learned mask owes to the one it starts from: none, each one-shot method, and MaskLLM's, at 45%."""
    model, tile = "qwen2.5-0.5b", (128, 128)
    prunings = [
        learned(model, "patch-joint", 0.45, tile, "c4", Calibration(), start=start)
        for start in (None, *members("one-shot"), "maskllm")
    ]
    return trials([dense(model), *prunings], _PUBLISHED)


def joint_or_tile() -> Trials:
    """Patterns and tiles learned together, against tiles over the patterns that MaskLLM learned."""
    model, tile = "qwen2.5-0.5b", (128, 128)
    prunings = [
        learned(model, method, target, tile, "c4", Calibration())
        for method in ("patch-joint", "patch-tile")
        for target in TARGETS
    ]
    return trials([dense(model), learned(model, "maskllm", 0.5, tile, "c4", Calibration()), *prunings], _PUBLISHED)
