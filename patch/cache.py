"""Where a user keeps what takes time to make: converted models, and what is measured of a GPU."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """``HTS_CACHE``, or ``hybrid-tile-sparsity`` in the user's cache directory."""
    if os.environ.get("HTS_CACHE"):
        return Path(os.environ["HTS_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hybrid-tile-sparsity"
