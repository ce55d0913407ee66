"""Products equal torch's: whole or in partial sums, with or without bias, of sizes that tiles do not divide."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medusa.kernels import matmul as kernels
from medusa.kernels.matmul import AHEAD_COLUMNS, gated, matmul, product
from medusa.kernels.tiles import LARGEST_MATRIX, LIBRARY_ROWS, Tiles, plan_gated, plan_product, plan_quantized
from medusa.quantization import QuantizedWeight

NAN = float("nan")


def operands(rows, out, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, size, generator=generator), torch.randn(out, size, generator=generator)
    return x, weight, torch.randn(out, generator=generator)


@pytest.mark.parametrize(
    ("rows", "out", "size", "tiles"),
    [
        (1, 64, 128, Tiles(16, 16, 32)),
        (5, 48, 128, Tiles(16, 16, 32, 4)),
        (20, 50, 100, Tiles(16, 32, 32)),
        (20, 50, 100, Tiles(16, 32, 16, 3)),
        (17, 64, 40, Tiles(32, 64, 64, 2)),  # the second split has nothing to add
    ],
)
def test_equals_torch(rows, out, size, tiles):
    x, weight, bias = operands(rows, out, size)
    if tiles.splits > 1:
        found = matmul(x, weight, torch.full((tiles.splits, rows, out), NAN), tiles).sum(0)
        torch.testing.assert_close(found, x @ weight.T, atol=1e-4, rtol=1e-4)
    else:
        for with_bias in (None, bias):
            found = matmul(x, weight, torch.full((rows, out), NAN), tiles, with_bias)
            torch.testing.assert_close(found, functional.linear(x, weight, with_bias), atol=1e-4, rtol=1e-4)


def test_rows_may_be_strided_and_what_lies_between_them_stays():
    x, weight, _ = operands(5, 32, 64)
    wide_x, wide_out = torch.full((5, 3, 64), NAN), torch.full((5, 2, 32), NAN)
    wide_x[:, 1] = x
    matmul(wide_x[:, 1], weight, wide_out[:, 1], Tiles(16, 32, 32))
    torch.testing.assert_close(wide_out[:, 1], x @ weight.T, atol=1e-4, rtol=1e-4)
    assert wide_out[:, 0].isnan().all()


@pytest.mark.parametrize(("rows", "out", "size"), [(1, 32, 64), (20, 50, 100)])
def test_gated_equals_its_formula(rows, out, size):
    x, weight, _ = operands(rows, 2 * out, size)
    gate, up = (x @ weight.T).chunk(2, -1)
    found = gated(x, weight, torch.full((rows, out), NAN), Tiles(16, 16, 32))
    torch.testing.assert_close(found, functional.silu(gate) * up, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 40, LIBRARY_ROWS + 1])
def test_product_takes_the_plan_or_the_library(rows):
    """A caller makes room for as many partial sums as the plan has splits."""
    x, weight, bias = operands(rows, 48, 1024)
    tiles = plan_product(rows, 48, 1024, may_split=True)
    partial = product(x, weight, torch.full((tiles.splits if tiles else 1, rows, 48), NAN))
    torch.testing.assert_close(partial.sum(0) if partial.dim() == 3 else partial, x @ weight.T, atol=2e-3, rtol=1e-3)
    for with_bias in (None, bias):
        found = product(x, weight, torch.full((rows, 48), NAN), with_bias)
        torch.testing.assert_close(found, functional.linear(x, weight, with_bias), atol=2e-3, rtol=1e-3)


def test_plans_leave_to_the_library_what_is_too_large():
    assert plan_product(LIBRARY_ROWS + 1, 4096, 4096, may_split=True) is None
    assert plan_product(1, LARGEST_MATRIX // 4096, 4096, may_split=False) is None
    assert plan_product(1, LARGEST_MATRIX // 4096 - 1, 4096, may_split=False) is not None
    assert plan_gated(64) is not None and plan_gated(65) is None


@pytest.mark.parametrize("size", [64, 128, 256, 1024, 1152, 1664])
def test_what_is_asked_for_ahead_lies_within_the_weight(size, monkeypatch):
    """With few rows and dependent launch only; the launch is looked at, not made."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **constants: launched.append((grid, constants))

    monkeypatch.setattr(kernels, "_matmul", Kernel())
    monkeypatch.setattr(kernels, "_gated", Kernel())
    x, weight, _ = operands(4, 256, size)
    for rows, pdl in ((4, True), (4, False), (20, True)):
        for may_split in (False, True):
            tiles = plan_product(rows, 256, size, may_split=may_split)
            out = torch.empty(tiles.splits, rows, 256) if tiles.splits > 1 else torch.empty(rows, 256)
            matmul(x[:1].expand(rows, size), weight, out, tiles, pdl=pdl)
            (_, _, splits), constants = launched.pop()
            assert (splits - 1) * constants["PER"] + constants["AHEAD"] <= size
            assert (constants["AHEAD"] == AHEAD_COLUMNS) == (pdl and rows <= 16 and size >= AHEAD_COLUMNS)
            quantized = QuantizedWeight(weight.to(torch.int8), torch.ones(256))
            tiles = plan_quantized(rows, 256, size, may_split=may_split)
            out = torch.empty(tiles.splits, rows, 256) if tiles.splits > 1 else torch.empty(rows, 256)
            matmul(x[:1].expand(rows, size), quantized, out, tiles, pdl=pdl)
            (_, _, splits), constants = launched.pop()
            assert (splits - 1) * constants["PER"] + constants["AHEAD"] <= size
    gated(x, weight, torch.empty(4, 128), plan_gated(4), pdl=True)
    assert launched.pop()[1]["AHEAD"] == (AHEAD_COLUMNS if size >= AHEAD_COLUMNS else 0)


def test_a_bias_or_another_number_of_sums_is_refused():
    x, weight, bias = operands(4, 32, 64)
    for out, tiles, with_bias in [
        (torch.empty(2, 4, 32), Tiles(16, 16, 32, 2), bias),
        (torch.empty(4, 32), Tiles(16, 16, 32, 2), None),
        (torch.empty(3, 4, 32), Tiles(16, 16, 32, 2), None),
    ]:
        with pytest.raises(ValueError, match="splits write"):
            matmul(x, weight, out, tiles, with_bias)
