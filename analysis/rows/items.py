"""What each window of a text or item of a task adds to a number, from the labels of its row, where it has them."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def window_items(labels: Mapping[str, Any], perplexity: float) -> np.ndarray | None:
    """Of a perplexity, by the delta method: the loss of each window times the perplexity."""
    losses = labels.get("window_losses")
    return perplexity * np.asarray(losses, dtype=float) if losses else None


def task_items(labels: Mapping[str, Any]) -> np.ndarray | None:
    """Of an accuracy: 1 where an item is right; packed eight a byte, the first in the highest bit, in base64."""
    packed, count = labels.get("items"), labels.get("n")
    if not packed or not isinstance(count, int):
        return None
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), dtype=np.uint8))
    return bits[:count].astype(float) if len(bits) >= count else None
