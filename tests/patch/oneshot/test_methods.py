"""Magnitude, Wanda and SparseGPT on one weight against plain float64 references, written from the papers' equations."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from patch.errors import UserError
from patch.oneshot import magnitude, sparsegpt, wanda
from patch.tiles import tile_grid

CASES = [
    pytest.param((64, 96), (64, 32), id="64x96-in-64x32"),
    pytest.param((128, 320), (64, 64), id="128x320-in-64x64"),
    pytest.param((72, 136), (32, 48), id="72x136-ragged"),
    pytest.param((40, 132), (16, 20), id="40x132-ragged"),
    pytest.param((5, 4), (5, 4), id="5x4-one-tile"),
]
DTYPES = [pytest.param(dtype, id=str(dtype)[6:]) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
MAPS = ["none-dense", "all-dense", "mixed"]
RATIOS = [0.0, 0.3, 0.5, 0.87]
DEAD = 3


@dataclass(frozen=True)
class Layer:
    weight: Tensor
    inputs: Tensor
    """``[windows, tokens, K]``; input `DEAD` is always zero."""

    @property
    def tokens(self) -> Tensor:
        return self.inputs.flatten(0, 1).double()


def make_layer(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Layer:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return Layer(weight.to(dtype), make_inputs(shape[1]))


@functools.cache
def make_inputs(cols: int) -> Tensor:
    """Correlated inputs of different sizes: what separates the three methods."""
    generator = torch.Generator().manual_seed(cols)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    scales = torch.rand(cols, generator=generator) * 3 + 0.1
    inputs = (torch.randn(8, 96, cols, generator=generator) @ mixing) * scales
    inputs[..., DEAD] = 0
    return inputs


def make_map(shape: tuple[int, int], tile: tuple[int, int], kind: str) -> Tensor:
    grid = tile_grid(shape, tile)
    if kind == "mixed":
        return torch.rand(grid, generator=torch.Generator().manual_seed(7)) < 0.5
    return torch.full(grid, kind == "all-dense")


def norm_of(layer: Layer) -> Tensor:
    statistic = wanda.InputNorm(layer.weight.shape[1])
    for batch in layer.inputs.split(3):
        statistic.add(batch.flatten(0, 1), len(batch))
    return statistic.norm()


def factor_of(layer: Layer) -> sparsegpt.InverseFactor:
    statistic = sparsegpt.InputHessian(layer.weight.shape[1])
    for batch in layer.inputs.split(3):
        statistic.add(batch.flatten(0, 1), len(batch))
    return sparsegpt.inverse_factor(statistic.hessian())


# References: float64, one decision at a time.


def lowest(scores: list[float], count: int) -> set[int]:
    """Indices of the ``count`` lowest; among equals the later ones."""
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:count])


def naive_two_four(scores: Tensor) -> Tensor:
    keep = torch.ones(scores.shape, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        for start in range(0, len(values), 4):
            for index in lowest(values[start : start + 4], 2):
                keep[row, start + index] = False
    return keep


def naive_hybrid(scores: Tensor, tile: tuple[int, int], dense: Tensor) -> Tensor:
    keep = naive_two_four(scores)
    for row in range(dense.shape[0]):
        for col in range(dense.shape[1]):
            if dense[row, col]:
                keep[row * tile[0] : (row + 1) * tile[0], col * tile[1] : (col + 1) * tile[1]] = True
    return keep


def naive_wanda_scores(layer: Layer) -> Tensor:
    tokens = layer.tokens
    squares = torch.zeros(tokens.shape[1], dtype=torch.float64)
    for token in tokens:
        squares += token * token
    return layer.weight.double().abs() * (squares / len(tokens)).sqrt()


@functools.cache
def naive_inverse(inputs: Tensor, damping: float = 0.01) -> Tensor:
    tokens = inputs.flatten(0, 1).double()
    hessian = 2 / len(inputs) * tokens.T @ tokens
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    return torch.linalg.inv(hessian)


def naive_obs_steps(inputs: Tensor, damping: float = 0.01) -> tuple[Tensor, list[Tensor]]:
    """The cost divisor of each column, and its correction of the columns from it on, by removing columns one by one.

    No Cholesky factor: the inverse of the Hessian of the columns still to come is updated explicitly.
    """
    inverse = naive_inverse(inputs, damping)
    costs, corrections = [], []
    for column in range(len(inverse)):
        pivot = inverse[column, column].clone()
        costs.append(pivot)
        corrections.append(inverse[column, column:] / pivot)
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / pivot
    return torch.stack(costs), corrections


def naive_sparsegpt(
    layer: Layer, tile: tuple[int, int] | None = None, dense: Tensor | None = None, sparsity: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Hybrid if ``dense`` is given, otherwise unstructured at ``sparsity``: weight and keep mask."""
    costs, corrections = naive_obs_steps(layer.inputs)
    weight = layer.weight.double().clone()
    weight[:, (layer.tokens == 0).all(0)] = 0
    rows, cols = weight.shape
    keep = torch.ones(rows, cols, dtype=torch.bool)
    done = 0
    for column in range(cols):
        if dense is not None and tile is not None and column % 4 == 0:
            group = slice(column, column + 4)
            keep[:, group] = naive_two_four(weight[:, group] ** 2 / costs[group])
            for row in range(rows):
                if dense[row // tile[0], column // tile[1]]:
                    keep[row, group] = True
        if dense is None and column % 128 == 0:
            block = slice(column, min(column + 128, cols))
            scores = (weight[:, block] ** 2 / costs[block]).flatten().tolist()
            total = round(sparsity * rows * block.stop)
            flat = torch.ones(len(scores), dtype=torch.bool)
            flat[list(lowest(scores, total - done))] = False
            keep[:, block] = flat.reshape(rows, -1)
            done = total
        dropped = ~keep[:, column]
        weight[dropped, column:] -= torch.outer(weight[dropped, column], corrections[column])
        weight[dropped, column] = 0
    return weight, keep


def assert_agree(keep: Tensor, expected_keep: Tensor, weight: Tensor, expected_weight: Tensor) -> None:
    """Masks agree but where float32 decides a near tie otherwise; weights agree in the rows without one."""
    assert keep.dtype == torch.bool and keep.shape == expected_keep.shape
    same = (keep == expected_keep).all(1)
    assert (keep != expected_keep).double().mean() <= 1e-3, "masks differ in more than near ties"
    assert same.double().mean() >= 0.9
    assert not weight[~keep].any(), "a dropped element is not zero"
    torch.testing.assert_close(weight[same].double(), expected_weight[same], rtol=2e-3, atol=2e-3)


# Every two of shape, dtype and map meet.
@pytest.mark.parametrize(
    ("shape", "tile", "dtype", "kind"),
    [
        pytest.param(*case.values, *dtype.values, kind, id=f"{case.id}-{dtype.id}-{kind}")
        for row, case in enumerate(CASES)
        for column, kind in enumerate(MAPS)
        for dtype in [DTYPES[(row + column) % len(DTYPES)]]
    ],
)
class TestHybrid:
    """2:4 is the map without dense tiles."""

    def test_magnitude(self, shape: tuple, tile: tuple, dtype: torch.dtype, kind: str) -> None:
        layer, dense = make_layer(shape, dtype), make_map(shape, tile, kind)
        weight, mask = magnitude.prune_hybrid(layer.weight, tile, dense)
        keep = naive_hybrid(layer.weight.double().abs(), tile, dense)
        assert torch.equal(mask.keep(), keep)
        assert torch.equal(weight.double(), layer.weight.double() * keep)

    def test_wanda(self, shape: tuple, tile: tuple, dtype: torch.dtype, kind: str) -> None:
        layer, dense = make_layer(shape, dtype), make_map(shape, tile, kind)
        weight, mask = wanda.prune_hybrid(layer.weight, norm_of(layer), tile, dense)
        keep = naive_hybrid(naive_wanda_scores(layer), tile, dense)
        assert_agree(mask.keep(), keep, weight, layer.weight.double() * keep)
        assert torch.equal(weight, layer.weight.float() * mask.keep()), "kept weights do not change"

    def test_sparsegpt(self, shape: tuple, tile: tuple, dtype: torch.dtype, kind: str) -> None:
        layer, dense = make_layer(shape, dtype), make_map(shape, tile, kind)
        weight, mask = sparsegpt.prune_hybrid(layer.weight, factor_of(layer), tile, dense)
        expected, keep = naive_sparsegpt(layer, tile, dense)
        assert torch.equal(mask.dense, dense) and mask.tile == tile
        assert_agree(mask.keep(), keep, weight, expected)
        if kind == "all-dense":
            alive = [column for column in range(shape[1]) if column != DEAD]
            assert torch.equal(weight[:, alive], layer.weight.float()[:, alive]), "nothing dropped, nothing corrected"
        assert not weight[:, DEAD].any()

    def test_sparsegpt_frozen(self, shape: tuple, tile: tuple, dtype: torch.dtype, kind: str) -> None:
        layer, dense = make_layer(shape, dtype), make_map(shape, tile, kind)
        weight, mask = sparsegpt.FROZEN.hybrid(layer.weight, factor_of(layer), tile, dense)
        alive = layer.weight.double().clone()
        alive[:, DEAD] = 0
        keep = naive_hybrid(alive**2 / naive_obs_steps(layer.inputs)[0], tile, dense)
        assert_agree(mask.keep(), keep, weight, layer.weight.double() * keep)
        assert torch.equal(weight, layer.weight.float() * mask.keep()), "kept weights do not change"


@pytest.mark.parametrize("sparsity", RATIOS)
@pytest.mark.parametrize(("shape", "tile"), CASES)
class TestUnstructured:
    def test_magnitude_drops_an_exact_count_per_weight(self, shape: tuple, tile: tuple, sparsity: float) -> None:
        layer = make_layer(shape, torch.bfloat16)
        weight, keep = magnitude.prune_unstructured(layer.weight, sparsity)
        expected = torch.ones(layer.weight.numel(), dtype=torch.bool)
        expected[list(lowest(layer.weight.abs().flatten().tolist(), round(sparsity * layer.weight.numel())))] = False
        assert torch.equal(keep.flatten(), expected)
        assert torch.equal(weight, layer.weight.float() * keep)

    def test_wanda_drops_an_exact_count_per_row(self, shape: tuple, tile: tuple, sparsity: float) -> None:
        layer = make_layer(shape)
        weight, keep = wanda.prune_unstructured(layer.weight, norm_of(layer), sparsity)
        expected = torch.ones(shape, dtype=torch.bool)
        for row, scores in enumerate(naive_wanda_scores(layer).tolist()):
            expected[row, list(lowest(scores, round(sparsity * shape[1])))] = False
        assert ((~keep).sum(1) == round(sparsity * shape[1])).all()
        assert_agree(keep, expected, weight, layer.weight.double() * expected)
        assert torch.equal(weight, layer.weight * keep)

    def test_sparsegpt_drops_an_exact_count_per_block_of_columns(
        self, shape: tuple, tile: tuple, sparsity: float
    ) -> None:
        layer = make_layer(shape)
        weight, keep = sparsegpt.prune_unstructured(layer.weight, factor_of(layer), sparsity)
        expected, expected_keep = naive_sparsegpt(layer, sparsity=sparsity)
        assert_agree(keep, expected_keep, weight, expected)
        for start in range(0, shape[1], 128):
            stop = min(start + 128, shape[1])
            assert int((~keep[:, :stop]).sum()) == round(sparsity * shape[0] * stop)

    def test_sparsegpt_frozen(self, shape: tuple, tile: tuple, sparsity: float) -> None:
        layer = make_layer(shape)
        weight, keep = sparsegpt.FROZEN.unstructured(layer.weight, factor_of(layer), sparsity)
        assert torch.equal(weight, layer.weight * keep), "kept weights do not change"
        for start in range(0, shape[1], 128):
            stop = min(start + 128, shape[1])
            assert int((~keep[:, :stop]).sum()) == round(sparsity * shape[0] * stop)


@pytest.mark.parametrize(("shape", "tile"), CASES)
def test_scores_are_the_costs_of_the_papers(shape: tuple, tile: tuple) -> None:
    layer = make_layer(shape)
    assert torch.equal(magnitude.scores(layer.weight), layer.weight.abs())
    torch.testing.assert_close(
        wanda.scores(layer.weight, norm_of(layer)).double(), naive_wanda_scores(layer), rtol=1e-5, atol=1e-6
    )
    alive = layer.weight.double().clone()
    alive[:, DEAD] = 0
    costs = alive**2 / naive_inverse(layer.inputs).diagonal()
    torch.testing.assert_close(
        sparsegpt.scores(layer.weight, factor_of(layer)).double().square(), costs, rtol=1e-3, atol=1e-3
    )


def test_factor_is_the_upper_cholesky_factor_of_the_damped_inverse() -> None:
    layer = make_layer((4, 64))
    hessian = 2 / len(layer.inputs) * layer.tokens.T @ layer.tokens
    hessian[DEAD, DEAD] = 1
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    factor = factor_of(layer)
    torch.testing.assert_close(factor.upper.double(), expected, rtol=1e-3, atol=1e-5)
    assert factor.dead.nonzero().flatten().tolist() == [DEAD]


def output_error(layer: Layer, weight: Tensor) -> float:
    return float((layer.tokens @ (weight.double() - layer.weight.double()).T).square().sum())


@pytest.mark.parametrize("kind", ["none-dense", "mixed"])
def test_methods_rank_as_in_the_literature(kind: str) -> None:
    shape, tile = (96, 256), (32, 64)
    layer, dense = make_layer(shape), make_map(shape, tile, kind)
    by_magnitude, _ = magnitude.prune_hybrid(layer.weight, tile, dense)
    by_wanda, _ = wanda.prune_hybrid(layer.weight, norm_of(layer), tile, dense)
    by_sparsegpt, mask = sparsegpt.prune_hybrid(layer.weight, factor_of(layer), tile, dense)
    errors = [output_error(layer, weight) for weight in (by_magnitude, by_wanda, by_sparsegpt)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * output_error(layer, mask.apply(layer.weight)), "the update makes up for what is dropped"


def test_statistics_do_not_depend_on_how_windows_are_batched() -> None:
    layer = make_layer((4, 64))
    norm, whole = wanda.InputNorm(64), sparsegpt.InputHessian(64)
    norm.add(layer.inputs.flatten(0, 1), len(layer.inputs))
    whole.add(layer.inputs.flatten(0, 1), len(layer.inputs))
    torch.testing.assert_close(norm.norm(), norm_of(layer))
    torch.testing.assert_close(sparsegpt.inverse_factor(whole.hessian()).upper, factor_of(layer).upper)


@pytest.mark.parametrize("statistic", [wanda.InputNorm, sparsegpt.InputHessian])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_notice_inputs_that_are_not_finite(statistic: type, value: float) -> None:
    accumulated = statistic(8)
    accumulated.add(torch.ones(4, 8), 1)
    assert accumulated.finite()
    accumulated.add(torch.tensor([[1.0, 1, 1, value, 1, 1, 1, 1]]), 1)
    accumulated.add(torch.ones(4, 8), 1)
    assert not accumulated.finite()


def test_a_hessian_that_is_not_positive_definite_names_the_weight() -> None:
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 5
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.down_proj: .* 1% damping: calibrate on more windows"):
        sparsegpt.inverse_factor(hessian, "layers.3.mlp.down_proj")


def test_fewer_tokens_than_inputs_is_what_damping_is_for() -> None:
    layer = make_layer((8, 64))
    few = Layer(layer.weight, layer.inputs[:2, :9])
    weight, mask = sparsegpt.prune_hybrid(few.weight, factor_of(few), (8, 64), make_map((8, 64), (8, 64), "none-dense"))
    expected, keep = naive_sparsegpt(few, (8, 64), torch.zeros(1, 1, dtype=torch.bool))
    assert torch.equal(mask.keep(), keep)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-2, atol=1e-2)


def test_the_precision_of_matrix_products_is_put_back() -> None:
    layer = make_layer((8, 64))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        sparsegpt.prune_unstructured(layer.weight, factor_of(layer), 0.5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
