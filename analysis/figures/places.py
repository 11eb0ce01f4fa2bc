"""Where in a model a weight is, by its full name."""

from collections import Counter
from collections.abc import Iterable


def places_of(layers: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Block and kind of weights that belong to one model: ``model.layers.3.self_attn.q_proj`` is ``(3, "q")``.

    A kind is called by the last part of the name, or by all of it within the block where another kind ends alike. The
    experts of a block are of one kind, so several weights may be in one place.
    """
    paths: dict[str, tuple[int, tuple[str, ...]]] = {}
    for layer in layers:
        parts = layer.split(".")
        at = next((index for index, part in enumerate(parts) if part.isdecimal()), -1)
        named = tuple(part for part in parts[at + 1 :] if not part.isdecimal())
        paths[layer] = int(parts[at]) if at >= 0 else 0, named or tuple(parts)
    ends = Counter(path[-1] for path in {path for _, path in paths.values()})
    return {
        layer: (block, (path[-1] if ends[path[-1]] == 1 else ".".join(path)).removesuffix("_proj"))
        for layer, (block, path) in paths.items()
    }
