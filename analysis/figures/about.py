"""What a figure is of: the model, the tiles and the GPU of its rows, for titles and captions."""

import re
from collections.abc import Iterable

import pandas as pd


def about(frame: pd.DataFrame, *more: str) -> str:
    """Model, tiles and GPU of some rows, such as ``smollm2-135m, tiles of 64x64, measured on H200``.

    Args:
        frame: as from `analysis.rows.load.load_rows`.
        more: what else is said, between the tiles and the GPU.
    """
    tiles = sorted({tile for tile in frame.tile[frame.structure == "hybrid"] if isinstance(tile, str)})
    few = f"tiles of {listed(tiles)}" if tiles else "no tiles"
    tiled = few if len(tiles) <= 2 else f"{len(tiles)} tile shapes"
    return ", ".join(filter(None, (listed(dict.fromkeys(frame.model)), tiled, *more, f"measured on {gpus(frame.gpu)}")))


def gpus(names: Iterable[object]) -> str:
    """The kinds of GPU, without maker and memory, or the CPU where there was none: ``H100 and H200``."""
    found = {str(name) for name in names if isinstance(name, str)}
    return listed(sorted({short_gpu(name) for name in found})) if found else "CPU"


def short_gpu(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` or ``nvidia-h100-80gb-hbm3`` as ``H100``."""
    words = [word for word in re.split(r"[\s-]+", name) if word.lower() not in ("nvidia", "geforce")]
    kept = [word for word in words if not re.fullmatch(r"(?i)\d+gb|hbm\d\w*|pcie|sxm\d?", word)]
    return " ".join(word.upper() if word.islower() else word for word in kept) or name


def listed(names: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last
