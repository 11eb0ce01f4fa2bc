"""How long a text a model takes: what its configuration says of positions."""

from typing import Any

from patch.errors import UserError


def longest(config: Any) -> int | None:
    """Most tokens that a model with this configuration has positions for; None where its configuration names no limit.

    A rope that is scaled by a factor of an original length (YaRN, dynamic) reaches that many times as far.

    Args:
        config: of transformers; that of the text where it is of several parts.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not known:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if isinstance(original, int | float) and isinstance(factor, int | float):
        known.append(int(original * factor))
    return max(known)


def check_length(model: Any, length: int, what: str) -> None:
    """Raise if a text of ``length`` tokens is longer than the model has positions for.

    Args:
        model: of transformers; one without a configuration is taken to have no limit.
        what: the text, such as ``perplexity windows``.

    Raises:
        UserError: naming the limit.
    """
    limit = longest(model.config) if hasattr(model, "config") else None
    if limit is not None and length > limit:
        raise UserError(
            f"{what} of {length} tokens: {type(model).__name__} has max_position_embeddings {limit}: "
            f"choose a length of at most {limit}"
        )
