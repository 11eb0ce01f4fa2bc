"""How this package is installed, as messages and model cards say it: it is in no registry."""

PACKAGE = "hybrid-tile-sparsity"


def how(extra: str = "") -> str:
    """What installs the package, or one of its extras.

    >>> how("vllm")
    "pip install '.[vllm]' in a clone of hybrid-tile-sparsity, or the wheel that `make dist` builds there"
    """
    what = f"'.[{extra}]'" if extra else "."
    return f"pip install {what} in a clone of {PACKAGE}, or the wheel that `make dist` builds there"
