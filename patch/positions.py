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


def check_length(name: str, limit: int | None, length: int, what: str) -> None:
    """Raise if a text of ``length`` tokens is longer than a model has positions for.

    Args:
        name: of the model.
        limit: as from `longest`; None lets any length pass.
        what: the text, such as ``perplexity windows``.

    Raises:
        UserError: naming the limit.
    """
    if limit is not None and length > limit:
        setting = f" (--set length={limit})" if what in ("learning sequences", "recovery sequences") else ""
        raise UserError(
            f"{name}: {what} of {length} tokens, but its max_position_embeddings is {limit}: choose {limit} or fewer"
            f"{setting}"
        )


def check_model_length(model: Any, length: int, what: str) -> None:
    """`check_length` of a loaded model; one without a configuration is taken to have no limit."""
    if hasattr(model, "config"):
        check_length(type(model).__name__, longest(model.config), length, what)
