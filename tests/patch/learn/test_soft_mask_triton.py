"""The fused soft mask against the eager one in float64, given the same noise; in Triton's interpreter or on a GPU."""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import look_once
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from patch.errors import UserError
from patch.layers import prunable_linears
from patch.learn import philox, soft_mask, soft_mask_triton
from patch.learn.learner import Implementation, Learned, learn
from patch.learn.prior import Prior
from patch.learn.recipe import PATCH_JOINT, Temperatures
from patch.learn.saved import CHECKPOINT
from patch.learn.soft_mask import Masked
from patch.mask import best_patterns, tile_sums
from patch.tiles import TileShape, tile_grid

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RUNS = GPU or soft_mask_triton.triton.knobs.runtime.interpret
# Of the mask. Noise is magnified by scale over temperature, and the GPU's logarithm is coarse beside the interpreter's.
PRECISION = 1e-3 if GPU else 2e-4
if RUNS and not GPU:
    look_once()
needs_kernels = pytest.mark.skipif(not RUNS, reason="needs a GPU or TRITON_INTERPRET=1, which another test here sets")

MODES = ["joint", "tile", "maskllm"]
every_mode = pytest.mark.parametrize("mode", MODES)
SHAPES = [
    pytest.param((8, 16), (4, 8), id="even"),
    pytest.param((7, 20), (3, 8), id="ragged-both"),
    pytest.param((5, 4), (5, 4), id="one-tile-one-group-wide"),
    pytest.param((1, 12), (1, 8), id="one-row"),
    pytest.param((24, 32), (20, 20), id="tile-of-five-groups"),
    pytest.param((33, 32), (33, 4), id="tile-of-one-group"),
    pytest.param((3, 1040), (3, 1032), id="tile-wider-than-a-block"),
    pytest.param((40, 72), (24, 72), id="several-programs-a-tile"),
]
# In the interpreter these take long: there they have one mode.
LARGE_SHAPES = [
    pytest.param((3, 1040), (2, 1032), id="several-blocks-across-a-ragged-tile"),
    pytest.param((40, 80), (24, 72), id="several-programs-a-tile-and-tiles-a-row"),
]
TEMPERATURES = [
    pytest.param(Temperatures(4.0, 100.0, 25.0), id="first-step"),
    pytest.param(Temperatures(0.05, 500.0, 350.0), id="last-step"),
    pytest.param(Temperatures(3.0, 200.0, 100.0, 1.5), id="tiles-of-their-own"),
]
# The interpreter takes a second a case: there each shape has one of the temperatures, unless all are asked for.
EVERY = GPU or "EVERY_ARCHITECTURE" in os.environ
# And there the joint mode takes twice what the mode of tiles does.
QUICK = "joint" if EVERY else "tile"
STREAM = (3, 1, 4, 1)


@pytest.mark.skipif(RUNS, reason="the tests below run in this process")
def test_in_the_interpreter() -> None:
    """Runs this file in a process of its own, since Triton asks for its interpreter once, when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight, what is learned about it, and a gradient for each of what comes out."""

    weight: Tensor
    patterns: Tensor
    tiles: Tensor | None
    tile: TileShape
    grads: tuple[Tensor, Tensor, Tensor]

    def outcome(self, masked: Masked) -> dict[str, Tensor]:
        """Values and gradients, in float64."""
        results = {"weight": masked.weight, "kept": masked.kept, "squares": masked.squares}
        sum((out * grad.to(out.dtype)).sum() for out, grad in zip(masked, self.grads, strict=True)).backward()
        for name, logits in (("patterns", self.patterns), ("tiles", self.tiles)):
            if logits is not None and logits.is_floating_point():
                assert logits.grad is not None
                results[name] = logits.grad
        return {name: value.detach().double() for name, value in results.items()}

    def fused(self, temperatures: Temperatures, stream: Sequence[int] = STREAM) -> dict[str, Tensor]:
        case = self.copy(lambda x: x)
        return case.outcome(
            soft_mask_triton.sampled_weight(case.weight, case.patterns, case.tiles, case.tile, temperatures, stream)
        )

    def eager(self, temperatures: Temperatures, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        case = self.copy(lambda x: x.to(dtype))
        return case.outcome(
            reference(case.weight, case.patterns, case.tiles, case.tile, temperatures, STREAM, dtype=dtype)
        )

    def copy(self, change: Any) -> "Case":
        def leaf(logits: Tensor | None) -> Tensor | None:
            if logits is None or not logits.is_floating_point():
                return logits
            return change(logits).detach().clone().requires_grad_()

        patterns = leaf(self.patterns)
        assert patterns is not None
        return dataclasses.replace(self, weight=change(self.weight), patterns=patterns, tiles=leaf(self.tiles))


def reference(
    weight: Tensor,
    patterns: Tensor,
    tiles: Tensor | None,
    tile: TileShape,
    temperatures: Temperatures,
    stream: Sequence[int],
    *,
    first_row: int = 0,
    rows: int | None = None,
    packed: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Masked:
    """The eager soft mask with the noise that the kernels draw."""
    key = soft_mask.stream_seed("masks", *stream)
    n, groups = weight.shape[0], weight.shape[1] // 4
    pattern_noise = tile_noise = None
    if patterns.is_floating_point():
        pattern_noise = philox.pattern_noise(key, rows or n, groups, weight.device).to(dtype)
        pattern_noise = pattern_noise[:, first_row : first_row + n]
    if tiles is not None:
        tile_rows, first = -(-(rows or n) // tile[0]), first_row // tile[0]
        tile_noise = philox.tile_noise(key, tile_rows, tiles.shape[1], weight.device).to(dtype)
        tile_noise = tile_noise[first : first + len(tiles)]
    return soft_mask.masked_weight(weight, patterns, tiles, tile, temperatures, pattern_noise, tile_noise)


def make(
    mode: str,
    shape: tuple[int, int],
    tile: TileShape,
    weights: torch.dtype = torch.float32,
    logits: torch.dtype = torch.float32,
    std: float = 0.014,
) -> Case:
    source = torch.Generator().manual_seed(shape[0] + shape[1])

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=source).to(DEVICE)

    fixed = torch.randint(6, (shape[0], shape[1] // 4), generator=source, dtype=torch.uint8).to(DEVICE)
    patterns = fixed if mode == "tile" else (std * normal(6, shape[0], shape[1] // 4)).to(logits)
    tiles = None if mode == "maskllm" else (std * normal(*tile_grid(shape, tile))).to(logits)
    grads = normal(*shape).to(weights), normal(1)[0] / 10, normal(1)[0] / 10
    return Case(normal(*shape).to(weights), patterns, tiles, tile, grads)


def assert_equal(
    fused: Mapping[str, Tensor], exact: Mapping[str, Tensor], case: Case, temperatures: Temperatures
) -> None:
    assert fused.keys() == exact.keys()
    coarse = torch.finfo(case.weight.dtype).eps
    torch.testing.assert_close(fused["weight"], exact["weight"], rtol=coarse, atol=3 * PRECISION)
    for name in ("kept", "squares"):
        torch.testing.assert_close(fused[name], exact[name], rtol=1e-5, atol=1e-4)
    # Gradients of saturated masks are tiny; what counts is the size that they have elsewhere.
    for name, scale in (("patterns", temperatures.pattern_scale), ("tiles", temperatures.tile_scale)):
        if name in fused:
            logits = case.patterns if name == "patterns" else case.tiles
            assert logits is not None
            coarse = max(1e-4, torch.finfo(logits.dtype).eps)
            size = scale / temperatures.tau * (1 if name == "patterns" else max(1, case.tile[0] * case.tile[1]) ** 0.5)
            torch.testing.assert_close(fused[name], exact[name], rtol=coarse, atol=2 * PRECISION * size)


def some(number: int, of: Sequence[Any], several: int = 1) -> Sequence[Any]:
    """The members of a list that case ``number`` has in the interpreter; all if all are asked for."""
    return of if EVERY else [of[(number + each) % len(of)] for each in range(several)]


@needs_kernels
@pytest.mark.parametrize(
    ("mode", "shape", "tile", "temperatures"),
    [
        pytest.param(mode, *shape.values, *temperatures.values, id=f"{shape.id}-{temperatures.id}-{mode}")
        for number, shape in enumerate(SHAPES)
        for temperatures in some(number, TEMPERATURES)
        # The temperatures go round with the shapes, the modes once more slowly.
        for mode in some(number + number // 3, MODES, 2 if shape.id == "ragged-both" else 1)
    ],
)
def test_values_and_gradients_are_the_eager_ones(
    mode: str, temperatures: Temperatures, shape: tuple[int, int], tile: TileShape
) -> None:
    case = make(mode, shape, tile)
    assert_equal(case.fused(temperatures), case.eager(temperatures), case, temperatures)


@needs_kernels
@pytest.mark.parametrize("mode", MODES if EVERY else ["joint"])
@pytest.mark.parametrize("temperatures", TEMPERATURES if EVERY else TEMPERATURES[:1])
@pytest.mark.parametrize(("shape", "tile"), LARGE_SHAPES)
def test_values_and_gradients_of_large_weights_are_the_eager_ones(
    mode: str, temperatures: Temperatures, shape: tuple[int, int], tile: TileShape
) -> None:
    case = make(mode, shape, tile)
    assert_equal(case.fused(temperatures), case.eager(temperatures), case, temperatures)


@needs_kernels
@pytest.mark.parametrize(
    ("mode", "weights", "logits"),
    [
        pytest.param(mode, weights, logits, id=f"{weights}-logits-{logits}-{mode}")
        for number, weights in enumerate((torch.bfloat16, torch.float16, torch.float32))
        for place, logits in enumerate((torch.float32, torch.bfloat16))
        for mode in some(number + place, MODES)
    ],
)
def test_every_dtype_is_near_float64(mode: str, weights: torch.dtype, logits: torch.dtype) -> None:
    temperatures = Temperatures(0.7, 100.0, 50.0)
    case = make(mode, (8, 28), (8, 16), weights, logits)
    assert_equal(case.fused(temperatures), case.eager(temperatures), case, temperatures)


@needs_kernels
@every_mode
def test_programs_of_several_blocks_add_up_to_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    temperatures, case = Temperatures(1.0, 100.0, 100.0), make(mode, (40, 72), (24, 72))
    few = soft_mask_triton._blocks.__wrapped__((40, 72), (24, 72))
    monkeypatch.setattr(soft_mask_triton, "_PROGRAMS", 2)
    monkeypatch.setattr(soft_mask_triton, "_blocks", soft_mask_triton._blocks.__wrapped__)
    more = soft_mask_triton._blocks((40, 72), (24, 72))
    assert (few.steps, few.chunks) == (1, 2) and (more.steps, more.chunks) == (2, 1)
    assert_equal(case.fused(temperatures), case.eager(temperatures), case, temperatures)


@needs_kernels
@pytest.mark.parametrize("part", ["weight", "kept", "squares"])
def test_each_output_has_a_gradient_of_its_own(part: str) -> None:
    temperatures = Temperatures(1.0, 10.0, 10.0)
    case = make("joint", (12, 16), (8, 16))
    grads = tuple(
        grad if name == part else torch.zeros_like(grad) for name, grad in zip(Masked._fields, case.grads, strict=True)
    )
    case = dataclasses.replace(case, grads=grads)
    fused, exact = case.fused(temperatures), case.eager(temperatures)
    assert exact["tiles"].abs().max() > 1e-3
    for name in ("patterns", "tiles"):
        torch.testing.assert_close(fused[name], exact[name], rtol=1e-4, atol=1e-5)


@needs_kernels
def test_the_same_stream_draws_the_same_bits_and_another_one_others() -> None:
    temperatures, case = Temperatures(1.0, 100.0, 100.0), make("joint", (26, 72), (24, 72))
    first, again, other = case.fused(temperatures), case.fused(temperatures), case.fused(temperatures, (3, 1, 4, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in ("weight", "patterns", "tiles"))


@needs_kernels
def test_noise_does_not_depend_on_how_a_weight_is_divided() -> None:
    """Under tiles that are surely 2:4, whatever their shape, the mask is that without tiles."""
    temperatures, case = Temperatures(1.0, 100.0, 1.0), make("maskllm", (16, 24), (8, 8))
    expected = case.fused(temperatures)["weight"]
    for tile in ((8, 8), (12, 20), (16, 24)):
        sparse = torch.full(tile_grid((16, 24), tile), -1000.0, device=DEVICE)
        found = dataclasses.replace(case, tiles=sparse, tile=tile).fused(temperatures)["weight"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@needs_kernels
@every_mode
def test_rows_of_a_weight_are_masked_as_in_the_whole(mode: str) -> None:
    temperatures, case = Temperatures(1.0, 100.0, 25.0), make(mode, (70, 24), (16, 16))
    whole = soft_mask_triton.sampled_weight(case.weight, case.patterns, case.tiles, case.tile, temperatures, STREAM)
    kept = torch.zeros((), device=DEVICE)
    for start, stop in ((0, 16), (16, 64), (64, 70)):  # the last, of less than a tile
        patterns = case.patterns[start:stop] if mode == "tile" else case.patterns[:, start:stop]
        tiles = None if case.tiles is None else case.tiles[start // 16 : -(-stop // 16)]
        rows = {"first_row": start, "rows": 70}
        part = soft_mask_triton.sampled_weight(
            case.weight[start:stop], patterns, tiles, case.tile, temperatures, STREAM, **rows
        )
        assert torch.equal(part.weight, whole.weight[start:stop])
        kept = kept + part.kept
    torch.testing.assert_close(kept, whole.kept)


@needs_kernels
def test_nothing_is_saved_but_the_inputs() -> None:
    case = make("joint", (16, 32), (8, 16)).copy(lambda x: x)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        soft_mask_triton.sampled_weight(
            case.weight, case.patterns, case.tiles, case.tile, Temperatures(1, 1, 1), STREAM
        )
    assert case.tiles is not None
    assert set(saved) <= {tensor.data_ptr() for tensor in (case.weight, case.patterns, case.tiles)}


@needs_kernels
def test_shares_at_the_floor_have_no_gradient_as_in_the_eager_mask() -> None:
    temperatures = Temperatures(0.2, 200.0, 1.0)
    case = make("joint", (16, 64), (16, 32))
    noise = philox.pattern_noise(soft_mask.stream_seed("masks", *STREAM), 16, 16, DEVICE)
    exponents = (temperatures.pattern_scale * case.patterns.double() + noise) / temperatures.tau
    above_floor = exponents - exponents.amax(0) - math.log(torch.finfo(torch.float32).eps / 64)
    fused, eager = case.fused(temperatures)["patterns"], case.eager(temperatures, torch.float32)["patterns"]
    # Neither mask is exact to better than this.
    held, free = above_floor < -0.01, above_floor > 0.01
    assert held.double().mean() > 0.2 and free.double().mean() > 0.2
    assert (eager[held] == 0).all() and (fused[held] == 0).all()
    assert (fused[free] != 0).double().mean() > 0.9


@needs_kernels
@every_mode
@pytest.mark.parametrize("spread", [0.1, 10.0, 1e4])
def test_extreme_logits_keep_masks_and_gradients_finite(mode: str, spread: float) -> None:
    case = make(mode, (8, 20), (8, 16), std=spread)
    case = dataclasses.replace(case, weight=torch.ones_like(case.weight))
    fused = case.fused(Temperatures(0.05, 500.0, 350.0))
    assert all(value.isfinite().all() for value in fused.values())
    assert fused["weight"].min() >= 0 and fused["weight"].max() <= 1 + 1e-6


@needs_kernels
@pytest.mark.parametrize("where", ["patterns", "tiles", "weight"])
def test_a_value_that_is_not_a_number_does_not_pass_unseen(where: str) -> None:
    case = make("joint", (8, 16), (4, 16)).copy(lambda x: x)
    with torch.no_grad():
        getattr(case, where).view(-1)[-1] = torch.nan
    fused = case.fused(Temperatures(1.0, 1.0, 1.0))
    assert fused["weight"][-1].isnan().any() and fused["squares"].isnan()


@needs_kernels
def test_inputs_need_not_be_contiguous() -> None:
    temperatures, case = Temperatures(1.0, 100.0, 100.0), make("joint", (12, 16), (8, 16))
    assert case.tiles is not None
    strided = dataclasses.replace(
        case,
        weight=case.weight.t().contiguous().t(),
        patterns=case.patterns.movedim(0, -1).contiguous().movedim(-1, 0),
        tiles=case.tiles.t().contiguous().t(),
        grads=(case.grads[0].t().contiguous().t(), *case.grads[1:]),
    )
    expected, found = case.fused(temperatures), strided.fused(temperatures)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@needs_kernels
def test_patterns_are_sampled_as_often_as_their_softmax_says() -> None:
    logits = torch.tensor([0.9, -0.5, 0.2, 0.0, 1.4, -2.0], device=DEVICE)
    rows, groups = 16, 320
    masked = soft_mask_triton.sampled_weight(
        torch.ones(rows, 4 * groups, device=DEVICE),
        logits.view(6, 1, 1).expand(6, rows, groups),
        None,
        (64, 64),
        Temperatures(1e-6, 1.0, 1.0),
        STREAM,
    )
    shares = torch.bincount(best_patterns(masked.weight).flatten().long(), minlength=6) / (rows * groups)
    torch.testing.assert_close(shares, torch.softmax(logits, 0), atol=0.025, rtol=0)


def test_a_weight_beyond_32_bit_offsets_is_refused() -> None:
    weight = torch.empty(2**16, 2**15, device="meta")
    with pytest.raises(UserError, match="2\\*\\*31"):
        soft_mask_triton.sampled_weight(weight, weight, None, (64, 64), Temperatures(1, 1, 1), STREAM)


# --- in the learner -------------------------------------------------------------------------------------------------

SHORT = dataclasses.replace(
    PATCH_JOINT,
    steps=2,
    batch=2,
    microbatch=2,
    length=8,
    warmup=0,
    lr=0.01,
    log_every=2,
    checkpoint_every=1,
    activation_checkpointing=False,
)
# No width here is a multiple of its columns. In the interpreter each program takes a tenth of a second: most tests have
# fewer tiles there, of which some are ragged too.
RAGGED_TILE = (16, 12)
TILE = RAGGED_TILE if EVERY else (16, 16)


def words(step: int) -> Tensor:
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))


def logits_in(work: Path) -> dict[str, Tensor]:
    state = torch.load(work / CHECKPOINT)
    return {name: learned["logits"] for name, learned in state["learned"].items()}


def run(mode: str, work: Path, **changes: Any) -> Learned:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
    sizes["num_hidden_layers"] = changes.pop("blocks", 1)
    sizes |= {"num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16}
    tile = changes.pop("tile", TILE)
    config = LlamaConfig(attn_implementation="sdpa", **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(DEVICE)
    weights = {name: linear.weight.detach() for name, linear in prunable_linears(model).items()}
    prior = Prior(
        {name: best_patterns(weight.abs()) for name, weight in weights.items()},
        {name: tile_sums(weight.square(), tile) for name, weight in weights.items()},
    )
    recipe = dataclasses.replace(SHORT, mode=mode, **changes.pop("recipe", {}))
    sparsity = 0.5 if mode == "maskllm" else 0.35
    arguments = {"sparsity": sparsity, "tile": tile, "seed": 0, "prior": prior, "work": work, "device": DEVICE}
    arguments |= {"implementation": Implementation(soft_mask_triton.sampled_weight)} | changes
    # The backward passes of other attention kernels add in any order.
    with sdpa_kernel(SDPBackend.MATH):
        return learn(model, recipe, words, **arguments)


@needs_kernels
@every_mode
def test_learning_is_as_with_the_eager_mask(mode: str, tmp_path: Path) -> None:
    tile = RAGGED_TILE if mode == QUICK else TILE
    histories = [
        run(mode, tmp_path / name, implementation=Implementation(masks, False), tile=tile).history
        for name, masks in (("fused", soft_mask_triton.sampled_weight), ("eager", reference))
    ]
    for fused, eager in zip(*histories, strict=True):
        assert fused == pytest.approx(eager, rel=1e-2, abs=1e-3)


@needs_kernels
def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for on in (False, True):
        run(QUICK, tmp_path / str(on), recipe={"activation_checkpointing": on, "steps": 1})
    assert_same_bits(*(logits_in(tmp_path / str(on)) for on in (False, True)))


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@every_mode
@pytest.mark.parametrize("microbatch", [2, 1], ids=["one-microbatch", "several"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_replayed_run_is_a_plain_one(mode: str, microbatch: int, checkpointing: bool, tmp_path: Path) -> None:
    recipe = {"steps": 8, "microbatch": microbatch, "distillation": 0.5, "block_distillation": 1.0}
    recipe["activation_checkpointing"] = checkpointing
    plain, replayed = (
        run(
            mode,
            tmp_path / str(captured),
            recipe=recipe,
            implementation=Implementation(soft_mask_triton.sampled_weight, captured=captured),
        )
        for captured in (False, True)
    )
    assert plain.history == replayed.history
    assert_same_bits(*(logits_in(tmp_path / str(captured)) for captured in (False, True)))


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@every_mode
def test_a_run_that_cannot_be_captured_is_a_plain_one(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = torch.cuda.graph

    @contextmanager
    def failing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
        with captures(graph, stream=stream):
            yield
        raise RuntimeError("the capture was ended")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    implementation = Implementation(soft_mask_triton.sampled_weight, captured=True)
    plain = run(mode, tmp_path / "plain", recipe={"steps": 8})
    with pytest.warns(UserWarning, match="the capture was ended"):
        failed = run(mode, tmp_path / "failed", recipe={"steps": 8}, implementation=implementation)
    assert plain.history == failed.history


@pytest.mark.skipif(DEVICE != "cuda", reason="streams need a GPU")
@every_mode
@pytest.mark.parametrize("microbatch", [2, 1], ids=["one-microbatch", "several"])
def test_a_run_that_draws_ahead_is_a_plain_one(mode: str, microbatch: int, tmp_path: Path) -> None:
    recipe = {"steps": 8, "microbatch": microbatch, "activation_checkpointing": False}
    plain, ahead = (
        run(
            mode,
            tmp_path / str(on),
            recipe=recipe,
            blocks=4,
            implementation=Implementation(soft_mask_triton.sampled_weight, ahead=on),
        )
        for on in (False, True)
    )
    assert plain.history == ahead.history
    assert_same_bits(*(logits_in(tmp_path / str(on)) for on in (False, True)))


@pytest.mark.skipif(DEVICE != "cuda", reason="compiles for a GPU")
def test_a_compiled_run_is_as_a_plain_one(tmp_path: Path) -> None:
    plain, compiled = (
        run(
            "joint",
            tmp_path / str(on),
            recipe={"steps": 8, "distillation": 0.5, "block_distillation": 1.0},
            implementation=Implementation(soft_mask_triton.sampled_weight, compiled=on, captured=on),
        )
        for on in (False, True)
    )
    for ours, theirs in zip(compiled.history, plain.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)


@needs_kernels
def test_a_stopped_run_is_continued_bit_by_bit(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(entry: Mapping[str, float]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(QUICK, tmp_path / "stopped", on_step=stop)
    resumed, undisturbed = run(QUICK, tmp_path / "stopped"), run(QUICK, tmp_path / "undisturbed")
    assert resumed.history == undisturbed.history
    assert_same_bits(*(logits_in(tmp_path / name) for name in ("stopped", "undisturbed")))


def assert_same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
