"""Products with weights of one byte equal the plain ones: whole, split, gated, with bias, at every size of tile."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional

import medusa.kernels.matmul as kernels
from medusa.kernels.tiles import LIBRARY_ROWS, Tiles, plan_gated_of, plan_of, plan_product, plan_quantized
from medusa.quantization import DTYPES as DTYPES_OF
from medusa.quantization import QuantizedWeight, linear, quantize

KINDS = ("int8", "fp8")
TOLERANCE = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a result's largest possible size
DTYPES = [torch.float32, torch.float16]
if os.environ.get("TRITON_INTERPRET") != "1":
    DTYPES.append(torch.bfloat16)  # whose bits Triton 3.8's interpreter multiplies as integers


def inputs(rows, num_out, size, kind, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator).to(dtype)
    weight = torch.randn(num_out, size, generator=generator)
    weight *= torch.logspace(-3, 2, num_out)[:, None]  # a scale applied to the wrong row would show
    weight[num_out // 2] = 0
    return x, quantize(weight, kind)


def close(found, x, weight, bias=None):
    """To the rounding of its own dtype, by what each sum is made of; the scales of output channels lie far apart."""
    expected = linear(x.float(), weight, bias)
    largest = linear(x.float().abs(), QuantizedWeight(weight.values.float().abs(), weight.scale))
    largest += 0 if bias is None else bias.float().abs()
    return bool(((found.float() - expected).abs() <= TOLERANCE[found.dtype] * largest).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_whole_products(kind, dtype, bias):
    x, weight = inputs(5, 96, 80, kind, dtype)
    added = torch.linspace(-1, 1, 96).to(dtype) if bias else None
    out = torch.full((5, 96), float("nan"), dtype=dtype)
    kernels.matmul(x, weight, out, Tiles(16, 32, 32), added)
    assert close(out, x, weight, added)
    assert bias or not out[:, 48].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_out", "size"), [(64, 128), (50, 100)])
def test_partial_sums_are_scaled_each(kind, num_out, size):
    x, weight = inputs(3, num_out, size, kind, DTYPES[-1])
    out = torch.full((2, 3, num_out), float("nan"))
    kernels.matmul(x, weight, out, Tiles(16, 32, 32, splits=2))
    halves = [slice(0, 64), slice(64, size)]
    for part, half in zip(out, halves, strict=True):
        assert close(part, x[:, half], QuantizedWeight(weight.values[:, half], weight.scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_out", [64, 40])
def test_gated_products_scale_both_halves(kind, num_out):
    x, weight = inputs(4, 2 * num_out, 96, kind, torch.float32)
    out = torch.full((4, num_out), float("nan"))
    kernels.gated(x, weight, out, Tiles(16, 32, 32))
    gate, up = linear(x, weight).chunk(2, 1)
    assert torch.allclose(out, functional.silu(gate) * up, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 33, 130, 300])
def test_every_number_of_rows_takes_the_kernel(rows, monkeypatch):
    """The library would need a whole copy of the weight."""
    monkeypatch.setattr(torch, "mm", None)
    monkeypatch.setattr(torch, "addmm", None)
    x, weight = inputs(rows, 128, 64, "int8", torch.float32)
    out = torch.full((rows, 128), float("nan"))
    kernels.product(x, weight, out)
    assert close(out, x, weight)


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 64, 128, 129, 4096])
@pytest.mark.parametrize("num_out", [512, 4096, 22016])
def test_every_product_with_a_quantised_weight_has_a_plan(rows, num_out):
    weight = QuantizedWeight(torch.empty(num_out, 4096, dtype=torch.int8), torch.empty(num_out))
    for may_split in (False, True):
        tiles = plan_of(rows, weight, torch.bfloat16, may_split=may_split)
        assert tiles == plan_quantized(rows, num_out, 4096, may_split=may_split)
        assert tiles.splits == 1 or (may_split and rows <= LIBRARY_ROWS)
    assert (plan_gated_of(rows, weight, torch.bfloat16) is None) == (rows > 16)
    plain_weight = torch.empty(num_out, 4096, device="meta")
    assert plan_of(rows, plain_weight, plain_weight.dtype, may_split=True) == plan_product(
        rows, num_out, 4096, may_split=True
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_widened_exactly(kind, dtype):
    """Products with the identity: on a GPU bfloat16's go through medusa/kernels/widen.py."""
    values = torch.arange(256, dtype=torch.uint8).view(DTYPES_OF[kind])
    values = torch.where(values.float().isnan(), torch.zeros(()), values.float()).to(DTYPES_OF[kind])
    values_NK = values.view(torch.int8).repeat(64, 1).view(DTYPES_OF[kind])
    x = torch.eye(256, dtype=dtype)[:128]
    out = torch.full((128, 64), float("nan"), dtype=torch.float32)
    kernels.matmul(x, QuantizedWeight(values_NK, torch.ones(64)), out, Tiles(16, 32, 32))
    assert out.equal(values_NK.float().t()[:128])
    kernels.matmul(x.flip(1), QuantizedWeight(values_NK, torch.ones(64)), out, Tiles(16, 32, 32))
    assert out.equal(values_NK.float().t().flip(0)[:128])
