"""Which parts of a causal language model are pruned: the ``Linear``s inside its decoder blocks, and nothing else."""

from torch import nn

from patch.errors import UserError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a transformers causal language model (text models: LLaMA, Qwen, Gemma, SmolLM, ...).

    Raises:
        UserError: if the model keeps no module list ``layers`` in its decoder.
    """
    decoder = getattr(model, "get_decoder", lambda: model)()
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UserError(f"{type(model).__name__} has no decoder blocks that can be pruned (no module list 'layers')")
    return blocks


def prunable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every prunable ``Linear`` by its full dotted name, in model order; never embeddings or ``lm_head``."""
    inside = {id(module) for block in decoder_blocks(model) for module in block.modules()}
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }
