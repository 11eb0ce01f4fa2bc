"""What a pruning and an evaluation cost, before they run: floating-point operations and device memory.

Estimates from published shapes, for planning: they leave out start-up, attention over long windows, and the masks' own
arithmetic, and are right within a factor of three. A model whose shapes are not known here (a hub id) has none.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from experiments.data import registry
from experiments.data.registry import BY_SOURCE, ModelSpec
from experiments.studies.trial import Evaluation, KernelGrid, ModelGrid, Pruning, lineage
from patch.recover.recipe import RecoveryRecipe
from patch.tiles import GROUP
from patch.weights import prunable_shapes

GIB = 2**30

# Tokens of a whole evaluation: every answer of every item with its context.
_TASK_TOKENS = {
    "mmlu": 14_042 * 4 * 110,
    "piqa": 1_838 * 2 * 45,
    "arc_easy": 2_376 * 4 * 35,
    "arc_challenge": 1_172 * 4 * 40,
    "winogrande": 1_267 * 2 * 25,
    "openbookqa": 500 * 4 * 20,
    "race": 1_045 * 4 * 400,
    "race_subset": 500 * 4 * 400,
    "hellaswag": 10_042 * 4 * 100,
    "lambada_openai": 5_153 * 90,
    "wiki_continuation": 250 * 4 * 100,
}
_TEXT_TOKENS = 300_000
_REFIT_STEPS = 50


def pruning_flops(pruning: Pruning) -> float | None:
    """Floating-point operations of making one checkpoint, its priors not included; None if the model is not known."""
    shapes = _prunable(pruning.model)
    if shapes is None or pruning.as_it_is:
        return None if shapes is None else 0.0
    weights = sum(rows * cols * count for (rows, cols), count in shapes.items())
    if pruning.quantisation and not pruning.quantisation.joint:
        seen = pruning.quantisation.calibration
        tokens = seen.windows * seen.length if seen else 0
        return 4.0 * weights * tokens + (_sweep_flops(shapes, tokens) if seen else 0.0)
    if pruning.recovery:
        return recovery_flops(pruning.model, pruning.recovery.recipe)
    if pruning.refit:
        tokens = pruning.refit.windows * pruning.refit.length
        # X X^T of every input, and as many products with it as the embedded model's fits take steps.
        products = sum(count * cols**2 * (tokens + rows * _REFIT_STEPS) for (rows, cols), count in shapes.items())
        return 4.0 * weights * tokens + 2.0 * products
    if pruning.learning:
        recipe = pruning.learning.recipe
        # Forward, and backward to inputs and masks, each 2 operations a weight and token; forward again to recompute.
        passes = 8 if recipe.activation_checkpointing else 6
        # The dense model too.
        passes += 2 if recipe.follows_dense else 0
        return float(passes * weights * recipe.steps * recipe.batch * recipe.length)
    tokens = pruning.calibration.windows * pruning.calibration.length if pruning.calibration else 0
    if pruning.structure == "shallow":
        spec = _spec(pruning.model)
        blocks = spec.blocks if spec else 1
        # The whole model, for every block that could be the next to go.
        return 2.0 * weights * tokens * sum(blocks - step for step in range(max(1, round(pruning.sparsity * blocks))))
    total = 4.0 * weights * tokens
    if pruning.tile_ranking == "model":
        # Forward, and backward to inputs and weights.
        total += 6.0 * weights * tokens
    if pruning.method == "sparsegpt":
        total += _sweep_flops(shapes, tokens)
    return total


def _sweep_flops(shapes: Mapping[tuple[int, int], int], tokens: int) -> float:
    """X X^T of every input, its inverse factor, and the update of all columns to the right of each."""
    return sum(
        count * (2.0 * tokens * cols**2 + 2.0 * cols**3 + rows * cols**2) for (rows, cols), count in shapes.items()
    )


def recovery_flops(model: str, recipe: RecoveryRecipe) -> float | None:
    """Floating-point operations of training what a mask keeps; None if the model is not known."""
    shapes = _prunable(model)
    if shapes is None:
        return None
    weights = sum(rows * cols * count for (rows, cols), count in shapes.items())
    # The dense block and the recovered one once each; forward, and backward to inputs and weights, in every epoch.
    blocks = (4 + 6 * recipe.block_epochs) * recipe.block_windows if recipe.block_epochs else 0
    passes = 6 + 2 * recipe.activation_checkpointing + 2 * recipe.follows_dense
    return float(weights * recipe.length * (blocks + passes * recipe.steps * recipe.batch))


def recovery_memory(
    model: str, recipe: RecoveryRecipe, kept: float, processes: int = 1, width: int = 2
) -> float | None:
    """GiB of device memory that it takes; None if the model is not known.

    Args:
        kept: share of the prunable elements.
        processes, width: as `memory`.
    """
    shapes, spec = _prunable(model), _spec(model)
    if shapes is None or spec is None:
        return None
    weights = sum(rows * cols * count for (rows, cols), count in shapes.items())
    block = weights / spec.blocks
    # Values, gradient and two moments in float32, and an index.
    trained = 20.0 * kept / processes
    tokens = recipe.block_windows * recipe.length / processes
    at_once = recipe.block_batch * recipe.length // processes
    # States before and after, of the sparse model and of the dense one.
    states = 4 * tokens * spec.hidden + _activations(spec, at_once, 1) / spec.blocks
    first = (3 * width + trained) * block + width * states if recipe.block_epochs else 0.0
    drawn = block if recipe.activation_checkpointing else weights
    tokens = recipe.microbatch * recipe.length // processes
    states = _activations(spec, tokens, 2 if recipe.activation_checkpointing else spec.blocks)
    head = (10.0 + 6.0 * recipe.follows_dense) * min(tokens, 4096) * spec.vocab
    second = width * spec.parameters + trained * weights + 2 * width * drawn + width / 2 * states + head
    return max(first, second if recipe.steps else 0.0) / GIB


def learning_tokens(pruning: Pruning) -> int:
    """Tokens that a mask is learned on, or what it keeps trained on; none of a pruning that does not learn."""
    recipe = pruning.passes
    if isinstance(recipe, RecoveryRecipe):
        return recipe.tokens
    return recipe.steps * recipe.batch * recipe.length if recipe else 0


def evaluation_flops(model: str, evaluation: Evaluation) -> float | None:
    """Floating-point operations of evaluating one checkpoint; None if the model is not known, 0 for a grid."""
    parameters = _parameters(model)
    if parameters is None:
        return None
    if evaluation.grid:
        return 0.0
    # Texts once more packed, and once more unpacked to compare with it.
    passes = 1 if evaluation.packed is None else 3
    tokens = passes * _TEXT_TOKENS * len(evaluation.perplexity)
    for task in evaluation.tasks:
        share = 1.0 if evaluation.limit is None else min(1.0, evaluation.limit / 1000)
        tokens += int(share * _TASK_TOKENS.get(task, 1_000_000))
    return 2.0 * parameters * tokens


# What a GPU sustains on learning and evaluation, in 1e12 operations a second, from loading to saving: measured with the
# mask of SmolLM2-135M at 45% (`prune_seconds` of its committed row).
H200_TFLOPS = 190.0
# What learning sustains of the rate of one large matrix product. On GPUs, 0.27 with SmolLM2-135M from loading to saving
# and 0.5 with LLaMA-3.2-1B's steps alone; on a CPU 0.85 with the embedded model.
SHARE_OF_PRODUCT = {"cuda": 0.35, "cpu": 0.8}


def grid_seconds(grid: KernelGrid | ModelGrid | None) -> float:
    """Seconds that timing a grid takes on one GPU, compilation included, as it took on an H200; 0 for no grid."""
    if isinstance(grid, KernelGrid):
        cells = 4 * len(grid.tokens) * len(grid.tiles) * 2 * len(grid.sparsities)
        return 60 + 0.05 * cells + (20.0 * 4 * len(grid.tokens) if grid.compiled else 0.0)
    return 8.0 * len(grid.sparsities) * len(grid.workloads) if grid else 0.0


def disk(prunings: Iterable[Pruning]) -> float:
    """GiB that the checkpoints of some prunings take, their priors included; those of unknown models are left out."""
    total = 0.0
    for pruning in with_priors(prunings):
        shapes, parameters = _prunable(pruning.model), _parameters(pruning.model)
        if shapes and parameters and not pruning.as_it_is:
            # Weights of two bytes, and a byte a group for the patterns of the masks.
            total += 2 * parameters + sum(rows * cols * count for (rows, cols), count in shapes.items()) / GROUP
    return total / GIB


def with_priors(prunings: Iterable[Pruning]) -> set[Pruning]:
    """Some prunings and all that they stand on, each once."""
    return {step for pruning in prunings for step in lineage(pruning)}


def memory(pruning: Pruning, evaluation: Evaluation | None = None, processes: int = 1, width: int = 2) -> float | None:
    """GiB of device memory that a pruning, or else the evaluation of one, takes; None if the model is not known.

    Args:
        processes: that learn together, a device each: they divide the logits and the sequences, not the weights.
        width: bytes of a weight and of an activation while learning.
    """
    shapes, parameters, spec = _prunable(pruning.model), _parameters(pruning.model), _spec(pruning.model)
    if shapes is None or parameters is None or spec is None:
        return None
    if evaluation is not None and isinstance(evaluation.grid, KernelGrid):
        # Copies of one linear beyond the cache, dense, packed and compressed, and activations.
        return 8.0
    if evaluation is not None and isinstance(evaluation.grid, ModelGrid):
        tokens = max(work.batch * work.length for work in evaluation.grid.workloads)
        return (4 * parameters + _activations(spec, tokens, blocks=2)) / GIB
    if evaluation is not None:
        length = max([item.length for item in evaluation.perplexity], default=2048)
        # With packed stages also the dense and the packed model, and one in float32 to compare logits with.
        models_ = 2 if evaluation.packed is None else 10
        return (models_ * parameters + _activations(spec, evaluation.batch * length, blocks=2)) / GIB
    weights = sum(rows * cols * count for (rows, cols), count in shapes.items())
    if pruning.recovery:
        return recovery_memory(pruning.model, pruning.recovery.recipe, 1 - pruning.sparsity, processes, width)
    if not pruning.learns or pruning.learning is None:
        # One block at a time, its inputs' statistics in float32, and the calibration windows' states.
        block = sum(rows * cols for rows, cols in shapes)
        squares = sum(4 * cols**2 for _, cols in shapes)
        # Those of first tokens apart.
        squares *= 2 if pruning.quantisation and pruning.quantisation.sink_aware else 1
        rounded_on = pruning.quantisation.calibration if pruning.quantisation else None
        calibration = rounded_on or pruning.refit or pruning.calibration
        tokens = calibration.windows * calibration.length if calibration else 0
        most = 12.0 * block + 2 * squares + 4 * tokens * spec.hidden
        if pruning.tile_ranking == "model" and calibration and not pruning.refit:
            # The whole model, gradients and masks of its weights, and one window's activations and predictions.
            states = _activations(spec, calibration.length, spec.blocks) + 10.0 * calibration.length * spec.vocab
            most = max(most, 2 * parameters + 3 * weights + states)
        return most / GIB
    recipe = pruning.learning.recipe
    tile = pruning.tile or (1, 1)
    logits = 0.0 if recipe.mode == "tile" else 6 / 4
    logits += 0.0 if recipe.mode == "maskllm" else 1 / (tile[0] * tile[1])
    # Logits, their gradient and Adam's two moments; masks of one block, or of all, with their samples.
    states_of_logits = 16 if recipe.logit_dtype == "float32" else 8
    masked = weights / spec.blocks if recipe.activation_checkpointing else weights
    tokens = recipe.microbatch * recipe.length // processes
    states = _activations(spec, tokens, 2 if recipe.activation_checkpointing else spec.blocks)
    head = 10.0 * min(tokens, 4096) * spec.vocab
    # What is gathered of the others' rows, and its gradient, in bfloat16.
    gathered = 4 * masked if processes > 1 else 0.0
    divided = (states_of_logits * logits * weights + 40 * masked) / processes
    # Of rounded weights, masked in place of those as given, which the dense model needs.
    rounded = width * weights / processes if recipe.precision else 0.0
    return (width * parameters + rounded + divided + width / 2 * (gathered + states) + head) / GIB


def _activations(spec: ModelSpec, tokens: int, blocks: int) -> float:
    """Bytes that so many blocks keep of so many tokens, beside the residual stream at every block."""
    return 2.0 * tokens * (spec.blocks * spec.hidden + blocks * (8 * spec.hidden + 4 * spec.intermediate))


def _spec(model: str) -> ModelSpec | None:
    """The widths of a model of the registry, or of one whose configuration is on this machine."""
    if listed := _listed(model):
        return listed
    folder = _folder(model)
    return _described(folder) if folder else None


def _listed(model: str) -> ModelSpec | None:
    """A model of the registry, by its name or its hub id."""
    found = registry.resolve(model)
    return found if isinstance(found, ModelSpec) else BY_SOURCE.get(found)


def _folder(model: str) -> Path | None:
    """Where the configuration of any other model is: its directory, or what of a hub model is here."""
    from huggingface_hub import try_to_load_from_cache

    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    cached = try_to_load_from_cache(model, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


@functools.cache
def _described(folder: Path) -> ModelSpec | None:
    """A model by its configuration, where that says its widths as those of most decoders do."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    widths = [width for name in names if isinstance(width := getattr(config, name, None), int)]
    if len(widths) < len(names):
        return None
    hidden, intermediate, blocks, heads, vocab = widths
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2)
    parameters = embeddings + sum(rows * cols for rows, cols in prunable_shapes(folder).values())
    return ModelSpec(str(folder), "", "", hidden, intermediate, blocks, heads, kv_heads, head_dim, vocab, parameters)


def _prunable(model: str) -> Mapping[tuple[int, int], int] | None:
    """How many prunable weights of each shape a model has."""
    if listed := _listed(model):
        return Counter(shape for shape in listed.linear_shapes().values() for _ in range(listed.blocks))
    folder = _folder(model)
    return Counter(prunable_shapes(folder).values()) or None if folder else None


def _parameters(model: str) -> int | None:
    spec = _spec(model)
    if spec:
        return spec.parameters
    shapes = _prunable(model)
    return sum(rows * cols * count for (rows, cols), count in shapes.items()) if shapes else None
