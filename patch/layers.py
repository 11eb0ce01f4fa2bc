"""Which matrices of a causal language model are pruned: those inside its decoder blocks that multiply hidden states.

Decoder blocks are found by what they are made of: the module list of the decoder that holds most of its parameters,
whatever it is called (``layers``, ``h``, ``blocks``). In them prunable are

* every ``Linear``;
* every expert of a mixture of experts, a slice of a parameter ``[experts, ., .]``, as a weight of its own;
* every ``Conv1D`` of transformers (GPT-2), which is a ``Linear`` stored as ``[K, N]``.

Never prunable are routers, gates and mixing coefficients of fewer than `LEAST` rows or columns (Gemma 3n's `AltUp` has
some of 4x4), embeddings, ``lm_head``, norms and biases. What else multiplies, such as the block-diagonal gates of a
recurrent block, no method here knows: `coverage` says which share of all matrix elements is prunable, and whoever
prunes asks for it (`check_coverage`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from patch.errors import UserError

# Outputs and inputs of the smallest matrix that is pruned: what is smaller weighs a few streams against each other.
LEAST = 8


@dataclass(frozen=True)
class Matrix:
    """A prunable matrix.

    Attributes:
        name: full dotted name of its ``Linear``, or of an expert: ``model.layers.0.mlp.experts.down_proj.3``.
        parameter: full dotted name of the parameter that holds it.
        weight: ``[N, K]``, outputs by inputs; a view, so that what is written to it changes the model.
    """

    name: str
    parameter: str
    weight: Tensor


@dataclass(frozen=True)
class Coverage:
    """How many elements of the decoder blocks' matrices can be pruned.

    Attributes:
        prunable: elements of prunable matrices.
        matrices: elements of all matrices but routers and small gates, which no method prunes.
        left: full dotted names of the parameters that cannot be pruned.
    """

    prunable: int
    matrices: int
    left: tuple[str, ...]

    @property
    def share(self) -> float:
        """Prunable over all elements, 0 to 1."""
        return self.prunable / self.matrices


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a transformers causal language model (text models: LLaMA, Qwen, GPT-2, Bloom, ...).

    Raises:
        UserError: if the decoder holds no module list.
    """
    decoder = getattr(model, "get_decoder", lambda: model)()
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no decoder blocks that can be pruned (its decoder has no module list)"
        )
    # The first of those that hold as much: a list of one block holds no more than the lists inside that block.
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


def prunable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every prunable ``Linear`` by its full dotted name, in model order, each once however often it is used."""
    blocks = decoder_blocks(model)
    inside = {id(module) for module in blocks.modules()}
    never = {id(router) for router in _routers(blocks)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) in inside
        and id(module.weight) not in never
        and min(module.weight.shape) >= LEAST
    }


def prunable_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every prunable matrix by name, in model order: of ``Linear``, of ``Conv1D``, and of every expert."""
    linears = {id(linear.weight) for linear in prunable_linears(model).values()}
    experts = {id(parameter): transposed for parameter, transposed in _experts(decoder_blocks(model))}
    convolved = {id(module.weight) for module in decoder_blocks(model).modules() if _is_conv1d(module)}
    found: dict[str, Matrix] = {}
    for parameter, tensor in model.named_parameters():
        module = parameter.removesuffix(".weight")
        if id(tensor) in linears:
            found[module] = Matrix(module, parameter, tensor)
        elif id(tensor) in convolved:
            found[module] = Matrix(module, parameter, tensor.T)
        elif id(tensor) in experts:
            for index, expert in enumerate(tensor):
                name = f"{module}.{index}"
                found[name] = Matrix(name, parameter, expert.T if experts[id(tensor)] else expert)
    return found


def coverage(model: nn.Module) -> Coverage:
    """Which share of the matrix elements of the decoder blocks is prunable."""
    blocks = decoder_blocks(model)
    prunable = {matrix.parameter for matrix in prunable_matrices(model).values()}
    never = {id(router) for router in _routers(blocks)}
    kernels = {id(module.weight) for module in blocks.modules() if isinstance(module, nn.modules.conv._ConvNd)}
    inside = {id(parameter) for parameter in blocks.parameters()}
    counted = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) in inside
        and parameter.ndim >= 2
        and min(parameter.shape) >= (LEAST if parameter.ndim == 2 else 2)
        and not name.endswith("bias")
        and id(parameter) not in never | kernels
    }
    left = tuple(name for name in counted if name not in prunable)
    total = sum(counted.values())
    return Coverage(total - sum(counted[name] for name in left), total, left)


def check_coverage(model: nn.Module, partial: bool = False) -> Coverage:
    """`coverage`, which must be whole unless ``partial`` is asked for.

    Raises:
        UserError: if some matrices cannot be pruned and ``partial`` is false, or none can.
    """
    found = coverage(model)
    if not found.prunable:
        raise UserError(f"{type(model).__name__}: its decoder blocks have no matrix that can be pruned")
    if found.left and not partial:
        raise UserError(
            f"{type(model).__name__}: only {found.share:.1%} of its decoder blocks' matrix elements can be pruned, not "
            f"{found.left[0]} and {len(found.left) - 1} more: ask for partial pruning (--partial) to leave those dense"
        )
    return found


def check_present(model: nn.Module) -> None:
    """Raise if a weight is not in memory: offloaded, it lies on the meta device, without values.

    Raises:
        UserError: naming the first one.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{name} is offloaded (on the meta device): load the model whole, without a device_map")


def check_shared(model: nn.Module) -> None:
    """Raise if a decoder block or a prunable parameter is used more than once: pruned twice, it would be counted once.

    Raises:
        UserError: naming the second place.
    """
    blocks = decoder_blocks(model)
    if len({id(block) for block in blocks}) < len(blocks):
        raise UserError(f"{type(model).__name__} runs the same decoder block more than once: cannot prune it")
    places: dict[int, str] = {}
    held = {matrix.parameter for matrix in prunable_matrices(model).values()}
    prunable = {id(parameter) for name, parameter in model.named_parameters() if name in held}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in prunable and (first := places.setdefault(id(parameter), name)) != name:
            raise UserError(f"{name} is the same weight as {first}: cannot prune a weight that is used twice")


def require_linears(model: nn.Module, what: str) -> dict[str, nn.Linear]:
    """`prunable_linears` of a model that has no other prunable matrix.

    Args:
        what: who asks, such as ``learning``, for the error.

    Raises:
        UserError: naming the first expert or ``Conv1D`` that ``what`` would leave out.
    """
    linears = prunable_linears(model)
    for name in prunable_matrices(model):
        if name not in linears:
            raise UserError(f"{name}: {what} covers Linear weights alone, not experts or Conv1D")
    return linears


def _is_conv1d(module: nn.Module) -> bool:
    # Of transformers, told by its name: importing it costs seconds, and nothing else is called so.
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), nn.Parameter)


def _experts(blocks: nn.ModuleList) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every parameter ``[experts, ., .]``, and whether its experts are stored as ``[K, N]``.

    Only of holders that say which, as those of transformers do that run one expert at a time. The others, which are
    multiplied all at once, are left out and so not covered: an expert that is pruned along its outputs is wrong.
    """
    for holder, parameters, _ in _mixtures(blocks):
        transposed = getattr(holder, "is_transposed", None)
        if isinstance(transposed, bool):
            yield from ((parameter, transposed) for parameter in parameters)


def _routers(blocks: nn.ModuleList) -> Iterator[nn.Parameter]:
    """The weights that choose among experts."""
    for _, _, routers in _mixtures(blocks):
        yield from routers


def _mixtures(blocks: nn.ModuleList) -> Iterator[tuple[nn.Module, list[nn.Parameter], list[nn.Parameter]]]:
    """Every mixture of experts: what holds the experts, their fused parameters, and its routers' weights.

    The experts are fused in parameters of three dimensions, or a list of modules (then there are no fused parameters).
    What has no router beside it, such as a block-diagonal gate, is no mixture.
    """
    for mixture in blocks.modules():
        for holder in mixture.children():
            if isinstance(holder, nn.modules.conv._ConvNd):
                continue
            fused = [each for each in holder.parameters(recurse=False) if each.ndim == 3]
            listed = isinstance(holder, nn.ModuleList) and holder is not blocks and len(holder) > 1
            if not fused and not listed:
                continue
            experts = len(fused[0]) if fused else len(holder)  # type: ignore[arg-type]
            if routers := _routers_beside(mixture, holder, experts):
                yield holder, fused, routers


def _routers_beside(mixture: nn.Module, holder: nn.Module, experts: int) -> list[nn.Parameter]:
    """Weights of one row an expert, in a part of the mixture that has no other: attention has others too."""
    parts = [list(part.parameters()) for part in mixture.children() if part is not holder]
    parts += [[each] for each in mixture.parameters(recurse=False)]
    routers = []
    for part in parts:
        # What is added to the scores of experts may have two dimensions too, of which one is 1.
        matrices = [each for each in part if each.ndim == 2 and min(each.shape) > 1]
        if matrices and experts > 1 and all(len(each) == experts for each in matrices):
            routers += matrices
    return routers
