"""Every bench by name."""

from experiments.bench import kernels, learning, model, serving, soft_mask
from experiments.bench.harness import Bench

BENCHES: dict[str, Bench] = {
    "kernels": kernels.BENCH,
    "model": model.BENCH,
    "soft_mask": soft_mask.BENCH,
    "learning": learning.BENCH,
    "serving": serving.BENCH,
}
