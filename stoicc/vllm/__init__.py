"""The vLLM plugin: serves masked and packed checkpoints on packed weights.

    vllm serve packed                             # a packed checkpoint says itself what it is
    vllm serve learned --quantization stoicc      # a masked one runs dense, unless asked: packed as its weights load
    vllm serve learned --quantization stoicc-fp8  # ... and quantised, as stoicc-int8 and stoicc-int4 do

vLLM finds `register` by the entry point ``vllm.general_plugins``. Nothing here imports vLLM before it is called, and
what cuts masks into the slices of tensor parallelism, `stoicc.vllm.shards`, never does.
"""

import logging
from importlib.metadata import version

OLDEST = (0, 20)


def register() -> None:
    """Make the quantization methods known to vLLM; in one that is too old, say so and leave it as it is."""
    import vllm

    if too_old(vllm.__version__):
        oldest = ".".join(map(str, OLDEST))
        logging.getLogger(__name__).warning(
            "hybrid-tile-sparsity %s serves packed weights in vLLM %s and newer, this is %s: update vLLM",
            version("hybrid-tile-sparsity"),
            oldest,
            vllm.__version__,
        )
        return
    import stoicc.vllm.plugin  # noqa: F401  # registers itself


def too_old(version: str) -> bool:
    """Whether a version of vLLM is older than what the plugin was made for."""
    numbers = version.split(".")[:2]
    # A build from source may have no number at all.
    return all(number.isdecimal() for number in numbers) and tuple(map(int, numbers)) < OLDEST
