"""Kernel speed: hybrid weights against dense ones of several precisions and 2:4 libraries, side by side in one process.

A case is one product: a linear of a model of the registry (query, key and value fused, gate and up fused) and a number
of tokens. Its entries are the implementations of `IMPLEMENTATIONS`: dense ones, libraries at 50%, and hybrid weights at
every sparsity and tile shape, with tiles spread evenly or as unevenly as learned maps are. Every result is compared
with float64, of the quantised operands where they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from experiments.bench import baselines
from experiments.bench.harness import BEGIN_EARLY, Bench, Case, Entry, Lab, Labels, Ready
from experiments.data.registry import REGISTRY
from experiments.studies.trial import KernelGrid, Trial, key
from patch.mask import HybridMask, best_patterns
from patch.quantise.values import quantise_groups, quantise_rows, quantise_weight
from patch.tiles import TileShape, tile_grid
from stoicc import configs, dense8, dispatch, matmul
from stoicc.format import GROUPED, SCALE_GROUP, pack
from stoicc.timing import CACHE_BYTES, Call
from stoicc.tune import faster_packed

# From here on a product is long enough to be timed alone, with a cold cache.
LONG = 512
# Up to here what is timed is so short that it counts when a kernel begins; a kernel of many blocks may lose by it.
FEW = 64
# How often a function may be compiled for one linear: for numbers of tokens, sums, and when its kernels begin.
RECOMPILATIONS = 64
CHECKED_TOKENS = 256
# Kernels of 4-bit weights are for decoding.
INT4_TOKENS = 128
# The precision, in rows, of FP8 with sums in float32.
PRECISE = "fp8_precise"
# Relative errors: of a float32 sum of bfloat16 products, rounded to bfloat16; and of FP8's fast accumulation.
BOUND, FP8_BOUND = 5e-3, 1e-2
# How much further from float64 than cuBLAS a hybrid product may be.
OVER_CUBLAS = 1.1


@dataclass(frozen=True)
class Linear:
    """One kind of linear of a model, siblings fused: ``n`` output and ``k`` input features."""

    model: str
    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Variant:
    """A hybrid weight to time. ``tiles`` is ``even`` or ``uneven``; both are random, not learned."""

    sparsity: float
    tile: TileShape
    tiles: str

    @property
    def labels(self) -> Labels:
        return {"sparsity": self.sparsity, "tile": list(self.tile), "tiles": self.tiles}


@dataclass(frozen=True)
class Operands:
    """What is multiplied, but for the activations.

    Attributes:
        weight: ``[N, K]``, bfloat16.
        masks: of each variant.
        compiled: also time ``torch.compile`` in max-autotune mode.
    """

    linear: Linear
    weight: Tensor
    masks: Mapping[Variant, HybridMask]
    compiled: bool

    @property
    def half(self) -> tuple[Variant, HybridMask] | None:
        """The first variant that is 2:4 throughout."""
        return next(((variant, mask) for variant, mask in self.masks.items() if variant.sparsity == 0.5), None)


# Prepares one implementation's weights, once for all numbers of tokens; what it returns takes activations ``[T, K]``.
Implementation = Callable[[Operands], Callable[[Tensor], Iterator[Entry]]]


def fused_linears(model: str) -> list[Linear]:
    """The products of one decoder block of a model of the registry."""
    shapes = REGISTRY[model].linear_shapes()
    (q, hidden), (k, _), (gate, _) = shapes["q_proj"], shapes["k_proj"], shapes["gate_proj"]
    return [
        Linear(model, "qkv", q + 2 * k, hidden),
        Linear(model, "o", *shapes["o_proj"]),
        Linear(model, "gate_up", 2 * gate, hidden),
        Linear(model, "down", *shapes["down_proj"]),
    ]


def variants(tiles: Sequence[TileShape], sparsities: Sequence[float]) -> Iterator[Variant]:
    """Even and uneven maps of every sparsity; with no or all tiles 2:4 there is only one map."""
    for tile in tiles:
        for sparsity in sparsities:
            for spread in ("even", "uneven") if 0 < sparsity < 0.5 else ("even",):
                yield Variant(sparsity, tile, spread)


def random_mask(n: int, k: int, variant: Variant, scores: Tensor, generator: torch.Generator) -> HybridMask:
    """A mask at the tile share of ``variant``; uneven maps vary by row and column of tiles like learned ones."""
    tile = (min(variant.tile[0], n), min(variant.tile[1], k))
    rows, cols = tile_grid((n, k), tile)
    device = scores.device
    draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    order = draw(rows, cols)
    if variant.tiles == "uneven":
        order = order + draw(rows, 1) + draw(1, cols)
    dense = torch.ones(rows * cols, dtype=torch.bool, device=device)
    dense[order.flatten().argsort()[: round(2 * variant.sparsity * rows * cols)]] = False
    return HybridMask((n, k), tile, dense.reshape(rows, cols), best_patterns(scores))


def operands(linear: Linear, grid: KernelGrid, device: str, generator: torch.Generator) -> Operands:
    """A random weight of a linear, and a mask of each variant."""
    weight = torch.randn(linear.n, linear.k, device=device, dtype=torch.bfloat16, generator=generator)
    weight /= linear.k**0.5
    masks = {
        variant: random_mask(linear.n, linear.k, variant, weight.abs(), generator)
        for variant in variants(grid.tiles, grid.sparsities)
    }
    return Operands(linear, weight, masks, grid.compiled)


def cases(trial: Trial, parts: Sequence[str], lab: Lab) -> Iterator[tuple[str, Iterator[Case]]]:
    """Every linear."""
    for linear in fused_linears(trial.pruning.model):
        part = f"kernels:{linear.name}"
        if part in parts:
            yield part, products(linear, trial.evaluation.grid, lab)


def products(linear: Linear, grid: Any, lab: Lab) -> Iterator[Case]:
    """A linear with every number of tokens of a `KernelGrid`."""
    torch.compiler.reset()
    generator = torch.Generator(lab.device).manual_seed(0)
    given = operands(linear, grid, lab.device, generator)
    # Until the last case has been verified, which compiles. Beyond dynamo's own limit a function would run uncompiled.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, fail_on_recompile_limit_hit=True):
        ready = [implementation(given) for implementation in IMPLEMENTATIONS]
        for done, tokens in enumerate(grid.tokens):
            lab.progress(f"{linear.model} {linear.name}", done, len(grid.tokens))
            x = torch.randn(tokens, linear.k, device=lab.device, dtype=torch.bfloat16, generator=generator)
            entries = [entry for make in ready for entry in make(x)]
            about = {"model": linear.model, "linear": linear.name, "n": linear.n, "k": linear.k, "tokens": tokens}
            yield Case(about, entries, grid.rounds, flush=tokens >= LONG)


# Implementations


def beginnings(x: Tensor) -> tuple[bool, ...]:
    """Whether kernels of ``torch.compile`` begin while the one before them ends: both, where either may be faster."""
    return (True,) if len(x) <= FEW else (False, True)


def quantising(function: Callable[..., Tensor], early: bool | None, **how: Any) -> Callable[..., Tensor]:
    """A function compiled, so that its quantisation of activations is one kernel, which begins early or does not.

    Args:
        early: None for the function as it is, which has a kernel for that.
    """
    return function if early is None else torch.compile(function, options=BEGIN_EARLY if early else None, **how)


def copies(x: Tensor, nbytes: int) -> int:
    """How many weights of so many bytes are taken in turns, so that none is read from the L2 cache."""
    return 1 if len(x) >= LONG else max(2, -(-3 * CACHE_BYTES // (2 * nbytes)))


def error(x: Tensor, weight: Tensor, y: Tensor) -> float:
    """Relative error of ``y`` against ``x @ weight^T`` in float64, over some evenly spaced tokens."""
    some = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_TOKENS), device=x.device).long()
    exact = x[some].double() @ weight.double().T
    return float((y[some].double() - exact).norm() / exact.norm())


def cublas(given: Operands) -> Callable[[Tensor], Iterator[Entry]]:
    def entries(x: Tensor) -> Iterator[Entry]:
        def prepare() -> Ready:
            weights = [given.weight, *(given.weight.clone() for _ in range(copies(x, given.weight.nbytes) - 1))]
            calls = [partial(dense_linear, x, weight) for weight in weights]
            return Ready(calls, lambda y: (error(x, given.weight, y), BOUND))

        yield Entry({"implementation": "cublas", "precision": "bf16"}, prepare)

    return entries


def compiled(given: Operands) -> Callable[[Tensor], Iterator[Entry]]:
    def entries(x: Tensor) -> Iterator[Entry]:
        def prepare() -> Ready:
            # Of a single token it makes a kernel of its own, which may begin early as packed weights' do.
            how = torch._inductor.list_mode_options("max-autotune-no-cudagraphs") | (
                BEGIN_EARLY if len(x) <= FEW else {}
            )
            best = torch.compile(dense_linear, options=how, dynamic=False)
            weights = [given.weight, *(given.weight.clone() for _ in range(copies(x, given.weight.nbytes) - 1))]
            calls = [partial(best, x, weight) for weight in weights]
            return Ready(calls, lambda y: (error(x, given.weight, y), BOUND))

        if given.compiled:
            yield Entry({"implementation": "compiled", "precision": "bf16"}, prepare)

    return entries


def fp8(given: Operands) -> Callable[[Tensor], Iterator[Entry]]:
    """All ways to scale, activations quantised by a compiled kernel, each with fast accumulation and without."""
    by_row, whole = baselines.fp8_scale(given.weight, dim=1), baselines.fp8_scale(given.weight)
    quantised = {"rowwise": (by_row, baselines.to_fp8(given.weight, by_row))}
    quantised["tensorwise"] = (whole, baselines.to_fp8(given.weight, whole))
    n, k = given.weight.shape
    if given.weight.device.type == "cpu" or dense8.runs(given.weight.device, n, k, baselines.FP8, given.weight.dtype):
        quantised["dense8"] = quantised["rowwise"]

    def entries(x: Tensor) -> Iterator[Entry]:
        def prepare(way: str, early: bool | None, fast: bool) -> Ready:
            scale, weight = quantised[way]
            weights = [weight, *(weight.clone() for _ in range(copies(x, weight.nbytes) - 1))]
            torch._dynamo.maybe_mark_dynamic(x, 0)
            calls: list[Call]
            if way == "dense8":
                x_scale = baselines.fp8_scale(x, dim=1)
                dense = quantising(dense8.linear, early, fullgraph=True)
                scales, unit = scale[:, 0].contiguous(), scale.new_ones(())
                calls = [partial(dense, x, one, scales, unit, precise=not fast) for one in weights]
            elif way == "rowwise":
                x_scale = baselines.fp8_scale(x, dim=1)
                rowwise = quantising(baselines.fp8_rowwise, early)
                calls = [partial(rowwise, x, one, scale, fast) for one in weights]
            else:
                x_scale = baselines.fp8_scale(x)
                tensorwise = quantising(baselines.fp8_tensorwise, early)
                calls = [partial(tensorwise, x, one, scale, x_scale, fast) for one in weights]

            def check(y: Tensor) -> tuple[float, float]:
                x8 = baselines.to_fp8(x, x_scale).double() * x_scale
                return error(x8, weight.double() * scale, y), FP8_BOUND if fast else BOUND

            return Ready(calls, check)

        ways: list[tuple[str, bool | None]] = [*product(quantised, beginnings(x))]
        # As it is dense8 quantises by the kernel that packed weights have.
        ways += [("dense8", None)] if "dense8" in quantised else []
        for (way, early), (precision, fast) in product(ways, (("fp8", True), (PRECISE, False))):
            labels: Labels = {"implementation": f"{precision}_{way}", "precision": precision, "early": early}
            yield Entry(labels, partial(prepare, way, early, fast))

    return entries


def int4(given: Operands) -> Callable[[Tensor], Iterator[Entry]]:
    def entries(x: Tensor) -> Iterator[Entry]:
        def prepare() -> Ready:
            values, scale = baselines.to_int4(given.weight)
            packed, scales = baselines.pack_int4(values, scale)
            weights = [packed, *(packed.clone() for _ in range(copies(x, packed.nbytes) - 1))]
            calls = [partial(baselines.int4, x, one, scales) for one in weights]
            return Ready(calls, lambda y: (error(x, baselines.from_int4(values, scale), y), BOUND))

        if len(x) <= INT4_TOKENS:
            yield Entry({"implementation": "int4", "precision": "int4"}, prepare)

    return entries


def libraries(given: Operands) -> Callable[[Tensor], Iterator[Entry]]:
    """cuSPARSELt with its own search for the fastest algorithm, bfloat16 and FP8, and what ``torch.sparse`` gives."""

    def entries(x: Tensor) -> Iterator[Entry]:
        if given.half is None:
            return
        variant, mask = given.half
        # cuSPARSELt takes tokens by eight at least.
        padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16))

        def cusparselt() -> Ready:
            masked = mask.apply(given.weight)
            held = [torch._cslt_compress(masked) for _ in range(copies(x, masked.nbytes))]
            algorithm = int(torch._cslt_sparse_mm_search(held[0], padded.T, transpose_result=True))

            def multiply(weight: Tensor) -> Tensor:
                return torch._cslt_sparse_mm(weight, padded.T, transpose_result=True, alg_id=algorithm)[: len(x)]

            return Ready([partial(multiply, one) for one in held], lambda y: (error(x, masked, y), BOUND))

        def cusparselt_fp8(early: bool) -> Ready:
            # Masked, then quantised: the scale is that of what is kept. It is left to whatever follows to multiply by.
            masked = mask.apply(given.weight)
            scale, x_scale = baselines.fp8_scale(masked), baselines.fp8_scale(x)
            weight = baselines.to_fp8(masked, scale)
            held = [torch._cslt_compress(weight) for _ in range(copies(x, weight.nbytes))]
            torch._dynamo.maybe_mark_dynamic(padded, 0)
            quantise = quantising(baselines.to_fp8, early)
            how: dict[str, Any] = {"transpose_result": True, "out_dtype": torch.bfloat16}
            algorithm = int(torch._cslt_sparse_mm_search(held[0], quantise(padded, x_scale).T, **how))

            def multiply(one: Tensor) -> Tensor:
                return torch._cslt_sparse_mm(one, quantise(padded, x_scale).T, alg_id=algorithm, **how)[: len(x)]

            def check(y: Tensor) -> tuple[float, float]:
                return error(baselines.to_fp8(x, x_scale).double(), weight.double(), y), FP8_BOUND

            return Ready([partial(multiply, one) for one in held], check)

        def semi_structured() -> Ready:
            masked = mask.apply(given.weight)
            made = [torch.sparse.to_sparse_semi_structured(masked.clone()) for _ in range(copies(x, masked.nbytes))]
            return Ready([partial(dense_linear, x, one) for one in made], lambda y: (error(x, masked, y), BOUND))

        for name, prepare in (("cusparselt", cusparselt), ("semi_structured", semi_structured)):
            yield Entry({"implementation": name, "precision": "bf16"} | variant.labels, prepare)
        for early in beginnings(x):
            labels = {"implementation": "cusparselt_fp8", "precision": "fp8", "early": early} | variant.labels
            yield Entry(labels, partial(cusparselt_fp8, early))

    return entries


def hybrid(given: Operands) -> Callable[[Tensor], Iterator[Entry]]:
    """Every variant, with the kernel that the tables choose; dense where they say that packed would be slower."""
    packed = {variant: pack(given.weight, mask) for variant, mask in given.masks.items()}
    n, k = given.linear.n, given.linear.k

    def entries(x: Tensor) -> Iterator[Entry]:
        def prepare(variant: Variant) -> Ready:
            weight = packed[variant]
            masked = given.masks[variant].apply(given.weight)
            about: Labels = {"bytes": weight.nbytes}
            bound = OVER_CUBLAS * error(x, masked, dense_linear(x, masked))
            check = lambda y: (error(x, masked, y), bound)  # noqa: E731
            if x.device.type == "cpu":
                return Ready([partial(matmul.linear, x, weight)], check, about)
            config = matmul.choose(x.device, n, k, weight.band, configs.token_bucket(len(x)))
            about |= {"kernel": configs.kernel_name(config), "config": asdict(config)}
            if not faster_packed(x.device, weight, [len(x)]):
                dense = [masked, *(masked.clone() for _ in range(copies(x, masked.nbytes) - 1))]
                about["fallback"] = "predicted slower than dense"
                return Ready([partial(dense_linear, x, one) for one in dense], check, about)
            held = [weight, *(weight.copy() for _ in range(copies(x, weight.nbytes) - 1))]
            return Ready([partial(dispatch.run, x, one, None, config) for one in held], check, about)

        for variant in packed:
            labels = {"implementation": "hybrid", "precision": "bf16"} | variant.labels
            yield Entry(labels, partial(prepare, variant))

    return entries


def hybrid_fp8(given: Operands) -> Callable[[Tensor], Iterator[Entry]]:
    """Every variant in FP8, a scale for each feature and each token, which are quantised within what is timed.

    Dense, with the same scales, where the tables say that packed would be slower. Also with sums in float32.
    """
    n, k = given.linear.n, given.linear.k
    packed, masked = {}, {}
    for variant, mask in given.masks.items():
        masked[variant] = quantise_weight(mask.apply(given.weight), baselines.FP8)
        values, scales = masked[variant]
        packed[variant] = pack(values, mask, scales)

    def entries(x: Tensor) -> Iterator[Entry]:
        def prepare(variant: Variant, precise: bool) -> Ready:
            weight = packed[variant]
            values, scales = masked[variant]

            def check(y: Tensor) -> tuple[float, float]:
                x8, x_scales = quantise_rows(x, baselines.FP8)
                bound = BOUND if precise else FP8_BOUND
                return error(x8.double() * x_scales[:, None], values.double() * scales[:, None], y), bound

            about: Labels = {"bytes": weight.nbytes}
            if x.device.type == "cuda":
                config = matmul.choose(x.device, n, k, weight.band, configs.token_bucket(len(x)), baselines.FP8)
                config = configs.promoting(config) if precise else config
                about |= {"kernel": configs.kernel_name(config), "config": asdict(config)}
                can = dense8.runs(x.device, n, k, baselines.FP8, x.dtype)
                if can and not faster_packed(x.device, weight, [len(x)], precise=precise):
                    about["fallback"] = "predicted slower than dense"
                    weights = [values, *(values.clone() for _ in range(copies(x, values.nbytes) - 1))]
                    one = scales.new_ones(())
                    # What splits its sums needs a compiler for what comes after them.
                    early = beginnings(x)[0] if dense8.splits(len(x), n, k) else None
                    dense = partial(quantising(dense8.linear, early, fullgraph=True), precise=precise)
                    return Ready([partial(dense, x, each, scales, one) for each in weights], check, about)
            held = [weight, *(weight.copy() for _ in range(copies(x, weight.nbytes) - 1))]
            return Ready([partial(matmul.linear, x, one, precise=precise) for one in held], check, about)

        for variant in packed:
            for precise in (False, True):
                labels = {"implementation": "hybrid", "precision": PRECISE if precise else "fp8"} | variant.labels
                yield Entry(labels, partial(prepare, variant, precise))

    return entries


def hybrid_int4(given: Operands) -> Callable[[Tensor], Iterator[Entry]]:
    """Every variant in INT4, in groups as dense INT4, with activations of 16 bits."""
    n, k = given.linear.n, given.linear.k
    packed, masked = {}, {}
    for variant, mask in given.masks.items() if k % SCALE_GROUP == 0 else ():
        masked[variant] = quantise_groups(mask.apply(given.weight), SCALE_GROUP)
        packed[variant] = pack(masked[variant].values, mask, masked[variant].scales)

    def entries(x: Tensor) -> Iterator[Entry]:
        def prepare(variant: Variant) -> Ready:
            weight = packed[variant]
            check = lambda y: (error(x, masked[variant].dequantised(), y), BOUND)  # noqa: E731
            about: Labels = {"bytes": weight.nbytes}
            held = [weight, *(weight.copy() for _ in range(copies(x, weight.nbytes) - 1))]
            if x.device.type == "cpu":
                return Ready([partial(matmul.linear, x, one) for one in held], check, about)
            config = matmul.choose(x.device, n, k, weight.band, configs.token_bucket(len(x)), GROUPED)
            about |= {"kernel": configs.kernel_name(config), "config": asdict(config)}
            if about["kernel"] == "expand":
                about["fallback"] = "expanded to 16 bits"
            return Ready([partial(dispatch.run, x, one, None, config) for one in held], check, about)

        for variant in packed if len(x) <= INT4_TOKENS else ():
            labels = {"implementation": "hybrid", "precision": "int4"} | variant.labels
            yield Entry(labels, partial(prepare, variant))

    return entries


IMPLEMENTATIONS: tuple[Implementation, ...] = (cublas, compiled, fp8, int4, libraries, hybrid, hybrid_fp8, hybrid_int4)

BENCH = Bench(
    title="every linear of a model",
    parts=lambda trial: trial.evaluation.grid.parts,
    cases=cases,
    # Grids of one linear lie beside each other: readers take the newest row of a cell.
    file=lambda trial, part: f"kernels/{trial.pruning.model}-{part.partition(':')[2]}-{key(trial)}.jsonl",
)
