"""The products of one-byte weights that a ring of tiles feeds: their plans, their compilation for Hopper without a GPU,
and on a Hopper GPU what they compute, against torch and against Triton's products."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from medusa.kernels import ring_bytes as module
from medusa.kernels import tiles as tiles_module
from medusa.kernels.hopper import SHARED_BYTES
from medusa.kernels.matmul import gated, matmul, product, rows_for_product
from medusa.kernels.norm import add_norm, add_norm_reference
from medusa.kernels.ring_bytes import BytesKernel, ring_bytes
from medusa.kernels.tiles import (
    RING_ROWS,
    RingTiles,
    Tiles,
    plan_gated_of,
    plan_of,
    plan_quantized,
    plan_ring_bytes,
    starts_early,
)
from medusa.quantization import QuantizedWeight, dequantize, quantize
from tests.medusa.kernels.aot import MODELS
from tests.medusa.kernels.hopper import half, launch_of, needs_compiler, on_hopper, products_and_waits, recorded

KINDS = ["int8", "fp8"]


def test_a_7b_models_products_are_spread_evenly():
    for rows, rows_x, stages in (
        (1, 8, (12, 7, 9)), (16, 16, (10, 6, 8)), (17, 32, (8, 5, 7)),
        (64, 64, (8, 5, 7)), (65, 96, (6, 4, 5)), (128, 128, (5, 4, 4)),
    ):  # fmt: skip
        qkv, gate, out = stages
        assert plan_ring_bytes(rows, 12288, 4096, processors=132) == RingTiles(rows_x, 96, 1, qkv)
        assert plan_ring_bytes(rows, 11008, 4096, processors=132, gated=True) == RingTiles(rows_x, 88, 1, gate)
        for size in (4096, 11008):
            split = plan_ring_bytes(rows, 4096, size, processors=132, may_split=True)
            assert split == RingTiles(rows_x, 128, 4, out)


def test_other_products_are_left_to_the_other_kernels():
    for rows in (0, RING_ROWS + 1):
        assert plan_ring_bytes(rows, 12288, 4096, processors=132) is None
    assert plan_ring_bytes(64, 12284, 4096, processors=132) is None  # features are cut by eight
    assert plan_ring_bytes(64, 12288, 4088, processors=132) is None  # rows at multiples of 16 bytes
    assert plan_ring_bytes(64, 40000, 4096, processors=132) is None  # 304 rows of W a program
    assert plan_ring_bytes(64, 28672, 4096, processors=132, gated=True) is None  # 224 of each half
    assert plan_ring_bytes(97, 28672, 4096, processors=132) is None  # 224 of them for 128 rows of X
    assert plan_ring_bytes(96, 28672, 4096, processors=132) is not None
    assert plan_ring_bytes(64, 3072, 4096, processors=132) is None  # 24, which two warps have
    assert plan_ring_bytes(64, 4096, 1008, processors=132, may_split=True).splits == 1


@pytest.mark.parametrize("processors", [78, 114, 132])
def test_no_plan_has_more_programs_than_the_gpu_has_multiprocessors(processors):
    found = 0
    for rows, num_out, size, how in itertools.product(
        (1, 16, 64, 128), range(1024, 16384, 512), (4096, 11008), ({}, {"may_split": True}, {"gated": True})
    ):
        if (plan := plan_ring_bytes(rows, num_out, size, processors=processors, **how)) is not None:
            found += 1
            assert -(-num_out // plan.rows_w) * plan.splits <= processors, (rows, num_out, size, how)
            room = rows_for_product(rows, 2, like=torch.zeros(1, dtype=torch.bfloat16))
            assert plan.stages >= 3 and rows <= plan.rows_x <= room.untyped_storage().nbytes() // 4
    assert found > 200


def bytes_of(num_out, size):
    return QuantizedWeight(torch.zeros(num_out, size, dtype=torch.int8), torch.ones(num_out))


def test_a_cpu_has_no_ring():
    weight = bytes_of(12288, 64)
    assert plan_of(16, weight, torch.bfloat16, may_split=False) == plan_quantized(16, 12288, 64, may_split=False)
    assert isinstance(plan_gated_of(16, weight, torch.bfloat16), Tiles)
    assert plan_gated_of(64, weight, torch.bfloat16) is None


@pytest.fixture
def hopper(monkeypatch):
    """Plans as on Hopper, with what the driver would be asked to launch."""
    return recorded(module, monkeypatch)


def test_products_are_launched_as_rings(hopper):
    x, weight, bias = half(40, 4160)[:, :4096], bytes_of(12288, 4096), half(12288)
    out = half(40, 12296)[:, :12288]
    product(x, weight, out, bias, pdl=True)
    kernel, grid, of_weight, of_x, rest = launch_of(hopper)
    assert kernel == BytesKernel(RingTiles(64, 96, 1, 8), 1, True, torch.bfloat16, torch.int8) and grid == (128, 1, 1)
    assert of_weight == ([4096, 12288, 1], [4096, 12288 * 4096], [128, 96, 1])
    assert of_x == ([4096, 40], [4160], [64, 64])
    assert rest == [out.data_ptr(), weight.scale.data_ptr(), bias.data_ptr(), 40, 12288, 32, 12296, 0]
    partial = torch.zeros(4, 16, 4096)
    product(half(16, 11008), bytes_of(4096, 11008), partial)
    kernel, grid, _, _, rest = launch_of(hopper)
    assert kernel == BytesKernel(RingTiles(16, 128, 4, 8), 1, False, torch.bfloat16, torch.int8) and grid == (32, 4, 1)
    assert rest[2:] == [None, 16, 4096, 86, 4096, 16 * 4096]


def test_gated_products_are_launched_as_rings(hopper):
    x, weight, out = half(64, 4096), bytes_of(22016, 4096), half(64, 11008)
    plan = plan_gated_of(64, weight, torch.bfloat16)
    gated(x, weight, out, plan, pdl=True)
    kernel, grid, of_weight, _, rest = launch_of(hopper)
    assert (kernel.halves, kernel.sets, kernel.warpgroups, grid) == (2, 1, 3, (126, 1, 1))
    assert of_weight == ([4096, 11008, 2], [4096, 11008 * 4096], [128, 88, 2])
    assert rest[3:] == [64, 11008, 32, 11008, 0]
    assert starts_early(64, plan)


def test_weights_and_rows_that_the_ring_does_not_take_have_none(hopper, monkeypatch):
    weight = bytes_of(12288, 4096)
    assert isinstance(plan_of(64, weight, torch.bfloat16, may_split=False), RingTiles)
    assert isinstance(plan_of(RING_ROWS + 1, weight, torch.bfloat16, may_split=False), Tiles)
    assert isinstance(plan_of(64, weight, torch.float32, may_split=False), Tiles)
    assert plan_gated_of(64, weight, torch.float32) is None
    odd = torch.zeros(12288 * 4096 + 1, dtype=torch.int8)[1:].view(12288, 4096)
    apart = torch.zeros(12288, 4112, dtype=torch.int8)[:, :4096]
    for values in (odd, apart):
        assert isinstance(plan_of(64, QuantizedWeight(values, weight.scale), torch.bfloat16, may_split=False), Tiles)
    monkeypatch.setattr(tiles_module, "has_compiler", lambda: False)
    assert isinstance(plan_of(64, weight, torch.bfloat16, may_split=False), Tiles)
    assert plan_gated_of(64, weight, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": half(65, 64)}, r"at most 64, .*16 bytes.*got \(65, 64\) with stride 64"),
        ({"x": half(1, 64).expand(2, 64)}, r"apart, and start .*got \(2, 64\) with stride 0"),
        ({"tiles": RingTiles(64, 96, 1, 9)}, r"take 258656 bytes .* has 232448"),
        ({"tiles": RingTiles(64, 96, 1, 1)}, r"1 tiles of 96 rows .* at least 2"),
        ({"x": half(64, 68)[:, :64]}, r"16 bytes; got \(64, 64\) with stride 68"),
        ({"x": half(64 * 64 + 4)[4:].view(64, 64)}, r"16 bytes; got \(64, 64\) with stride 64"),
        ({"tiles": RingTiles(64, 92, 1, 4)}, "multiples of 8 rows .* got 64 and 1 x 92"),
        ({"tiles": RingTiles(68, 96, 1, 4)}, "multiples of 8 rows .* got 68 and 1 x 96"),
        ({"tiles": RingTiles(136, 96, 1, 4)}, "at most 128, .* got 136 and 1 x 96"),
        ({"tiles": RingTiles(128, 200, 1, 3)}, "at most 192 in all; got 128 and 1 x 200"),
        ({"tiles": RingTiles(64, 128, 1, 2)}, "leaves 67584 bytes of sums"),
        ({"out": half(64, 100)[:, :96]}, "rows of out .* got stride 100"),
        (
            {"weight": QuantizedWeight(bytes_of(96, 80).values[:, :64], torch.ones(96))},
            r"strides \(80, 1\) of \(96, 64\)",
        ),
        ({"weight": QuantizedWeight(bytes_of(96, 64).values, torch.ones(95))}, r"scales \(95,\) in torch.float32"),
        ({"weight": QuantizedWeight(bytes_of(96, 64).values, half(96))}, r"scales \(96,\) in torch.bfloat16"),
        ({"bias": torch.zeros(96)}, "bias must be .* got .*float32"),
        ({"tiles": RingTiles(64, 264, 1, 4)}, "at most 256 in all; got 64 and 1 x 264"),
        ({"tiles": RingTiles(64, 136, 1, 3), "gated": True}, "at most 256 in all; got 64 and 2 x 136"),
        ({"tiles": RingTiles(64, 96, 2, 4)}, r"2 splits write .* got out \(64, 96\)"),
        ({"out": torch.zeros(2, 64, 96), "tiles": RingTiles(64, 96, 2, 4), "bias": half(96)}, "without bias"),
        ({"gated": True, "tiles": RingTiles(64, 48, 1, 4), "bias": half(48)}, "a gated product none either"),
        ({"out": torch.zeros(64, 96)}, "of one byte a value; got .*bfloat16, torch.float32"),
        ({"x": half(64, 64).half()}, "must be .*float16.* got .*float16, torch.bfloat16"),
        ({"x": torch.zeros(64, 64)}, "must be .*bfloat16.* got .*float32"),
        ({"weight": QuantizedWeight(half(96, 64), torch.ones(96))}, "of one byte a value; got .* and torch.bfloat16"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, message, hopper):
    given = {"x": half(64, 64), "weight": bytes_of(96, 64), "out": half(64, 96), "tiles": RingTiles(64, 96, 1, 4)}
    ring_bytes(**given)
    with pytest.raises(ValueError, match=message):
        ring_bytes(**(given | change))
    assert len(hopper) == 1


def kernels(rows=(1, 96, 128)) -> set[BytesKernel]:
    """What the models of aot.py need."""
    found = set()
    for model, num_rows in itertools.product(MODELS, rows):
        qkv = (model.heads + 2 * model.groups) * model.head_size
        cuts = [(qkv, model.hidden, {}), (model.channels, model.hidden, {"gated": True})]
        for size in (model.heads * model.head_size, model.channels):
            cuts.append((model.hidden, size, {"may_split": True}))
        for num_out, size, how in cuts:
            tiles = plan_ring_bytes(num_rows, num_out, size, processors=132, **how)
            if tiles is not None:
                found.add(BytesKernel(tiles, 2 if "gated" in how else 1, True, torch.bfloat16, torch.int8))
    return found


@needs_compiler
def test_every_plan_compiles_for_hopper_fits_and_does_not_spill(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = kernels()
    assert len(found) >= 12 and {kernel.halves for kernel in found} == {1, 2}
    of_7b = [kernel for kernel in found if kernel.tiles.rows_w in (88, 96)]
    assert len(of_7b) >= 6 and {kernel.sets for kernel in of_7b} == {1, 2}
    others = {replace(kernel, stored=torch.float8_e4m3fn, pdl=False) for kernel in of_7b}
    for kernel in found | others | {replace(kernel, dtype=torch.float16) for kernel in others}:
        assert kernel.shared_bytes <= SHARED_BYTES, kernel
        products, waits = products_and_waits(kernel, tmp_path)
        assert products == 8 // kernel.sets, kernel
        assert waits == products // 2 + 1, (kernel, waits)  # two at a time, and at the end


def matrices(rows, num_out, size, kind, *, behind=0, dtype=torch.bfloat16):
    """`behind`: rows of X's memory beyond its own."""
    torch.manual_seed(rows * num_out + size)
    x = torch.full((rows + behind, size), float("nan"), device="cuda", dtype=dtype)[:rows].normal_()
    weight = torch.randn(num_out, size, device="cuda", dtype=dtype) / size**0.5
    return x, quantize(weight * torch.rand(num_out, 1, device="cuda").add(0.1), kind)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "behind"), [(1, 0), (1, 7), (9, 0), (17, 15), (64, 0), (65, 0), (128, 0)])
@pytest.mark.parametrize(
    ("num_out", "size", "shares"),
    [
        (12288, 4096, (96, 1, 5)),
        (4096, 11008, (128, 4, 4)),
        (4096, 512, (184, 1, 3)),  # three warpgroups of rows, the last not full
        (4096, 576, (64, 1, 3)),  # the last tile has columns in one of two blocks alone
        (1040, 1008, (72, 2, 3)),  # neither tiles nor rows come out even
        (512, 80, (64, 4, 2)),  # more splits than tiles of columns
        (512, 256, (40, 1, 4)),  # a warp of half its rows
    ],
)
def test_a_product_is_that_of_torch_and_of_triton(rows, behind, num_out, size, shares, kind):
    x, weight = matrices(rows, num_out, size, kind, behind=behind)
    rows_x = next(most for most in (8, 16, 32, 64, 96, 128) if rows <= most)
    tiles = RingTiles(rows_x, *shares)
    whole = tiles.splits == 1
    bias = torch.randn(num_out, device="cuda", dtype=x.dtype) if whole else None
    shape = (rows + 8, num_out + 8) if whole else (tiles.splits, rows + 8, num_out + 8)
    around = [torch.full(shape, 7.0, device="cuda", dtype=x.dtype if whole else torch.float32) for _ in range(2)]
    out, twin = (wide[..., :rows, :num_out] for wide in around)
    for _ in range(2):  # the second right behind the first, under dependent launch
        ring_bytes(x, weight, out, tiles, bias, pdl=True)
    matmul(x, weight, twin, Tiles(64, 64, 64, tiles.splits), bias)
    torch.cuda.synchronize()
    expected = x.float() @ dequantize(weight).T + (0 if bias is None else bias.float())
    for found in (out, twin):
        summed = found.float() if whole else found.sum(0)
        torch.testing.assert_close(summed, expected, atol=2e-2, rtol=1e-2)
    for wide in around:
        assert wide[..., rows:, :].eq(7).all() and wide[..., num_out:].eq(7).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "rows_x"), [(1, 8), (40, 64), (128, 128)])
@pytest.mark.parametrize(("channels", "rows_w", "size"), [(11008, 88, 512), (2048, 96, 576), (520, 40, 336)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gated_product_is_that_of_torch_and_of_triton(rows, rows_x, channels, rows_w, size, kind, dtype):
    x, weight = matrices(rows, 2 * channels, size, kind, dtype=dtype)
    out, twin = (torch.full((rows, channels), 7.0, device="cuda", dtype=x.dtype) for _ in range(2))
    gated(x, weight, out, RingTiles(rows_x, rows_w, 1, 3), pdl=True)
    gated(x, weight, twin, Tiles(16, 32, 128, stages=6, warps=2))
    gate, up = (x.float() @ dequantize(weight).T).chunk(2, dim=1)
    for found in (out, twin):
        torch.testing.assert_close(found.float(), torch.nn.functional.silu(gate) * up, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_product_of_more_rows_of_the_matrix_is_that_of_torch(kind):
    x, weight = matrices(70, 2 * 2048, 512, kind)
    out = gated(x, weight, torch.empty(70, 2048, device="cuda", dtype=x.dtype), RingTiles(96, 128, 1, 4), pdl=True)
    gate, up = (x.float() @ dequantize(weight).T).chunk(2, dim=1)
    torch.testing.assert_close(out.float(), torch.nn.functional.silu(gate) * up, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_in_float16_adds_its_bias(kind):
    x, weight = matrices(20, 1024, 512, kind, dtype=torch.float16)
    bias = torch.randn(1024, device="cuda", dtype=x.dtype)
    out = ring_bytes(x, weight, torch.empty(20, 1024, device="cuda", dtype=x.dtype), RingTiles(32, 64, 1, 4), bias)
    torch.testing.assert_close(out.float(), x.float() @ dequantize(weight).T + bias.float(), atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@on_hopper
def test_a_graph_of_products_replays():
    x, weight = matrices(64, 4096, 4096, "int8")
    tiles = plan_of(64, weight, x.dtype, may_split=True)
    assert isinstance(tiles, RingTiles) and tiles.splits > 1
    partial = torch.zeros(tiles.splits, 64, 4096, device="cuda")
    product(x, weight, partial, pdl=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            product(x, weight, partial, pdl=True)
    x.neg_()
    partial.zero_()
    graph.replay()
    torch.testing.assert_close(partial.sum(0), x.float() @ dequantize(weight).T, atol=2e-2, rtol=1e-2)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("size", "splits"), [(4096, 4), (256, 4)]
)  # with 256 columns half of the programs have no tiles
def test_a_product_waits_for_an_early_norm_and_for_what_that_waits_for(size, splits):
    """The last product writes where the first one's sums are, which the norm between them reads."""
    x, weight = matrices(64, 4096, size, "int8")
    after = quantize(torch.randn(4096, 4096, device="cuda", dtype=x.dtype) / 64, "int8")
    last = quantize(torch.randn(4096, size, device="cuda", dtype=x.dtype) / size**0.5, "int8")
    residual, scale = torch.randn(64, 4096, device="cuda", dtype=x.dtype), torch.rand(4096, device="cuda").to(x.dtype)
    partial = torch.empty(splits, 64, 4096, device="cuda")
    normed, out = (torch.empty_like(residual) for _ in range(2))
    summed = x.float() @ dequantize(weight).T
    new_residual, expected = add_norm_reference(summed[None], residual, scale, 1e-5)
    for _ in range(20):
        found = residual.clone()
        for tensor in (partial, normed, out):
            tensor.fill_(float("nan"))
        ring_bytes(x, weight, partial, RingTiles(64, 128, splits, 4), pdl=True)
        add_norm(partial, found, scale, 1e-5, normed, pdl=True, early=True)
        ring_bytes(normed, after, out, RingTiles(64, 32, 1, 6), pdl=True)
        ring_bytes(x, last, partial, RingTiles(64, 128, splits, 4), pdl=True)
        torch.testing.assert_close(found, new_residual, atol=5e-2, rtol=5e-2)
        torch.testing.assert_close(out.float(), expected.float() @ dequantize(after).T, atol=5e-2, rtol=5e-2)
        torch.testing.assert_close(partial.sum(0), x.float() @ dequantize(last).T, atol=2e-2, rtol=1e-2)


@pytest.mark.gpu
@on_hopper
def test_rows_do_not_depend_on_how_many_others_there_are_up_to_96():
    x, weight = matrices(64, 12288, 4096, "int8")
    found = {}
    for rows, rows_x in ((1, 8), (16, 16), (30, 32), (64, 96)):
        out = torch.empty(rows, 12288, device="cuda", dtype=x.dtype)
        found[rows] = ring_bytes(x[:rows], weight, out, RingTiles(rows_x, 96, 1, 5))
    for rows in (1, 16, 30):
        assert torch.equal(found[rows], found[64][:rows])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_byte_is_widened_exactly(kind, dtype):
    bits = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(64, 1)  # every byte at every place of a unit
    bits = torch.stack([row.roll(shift) for shift, row in enumerate(bits)])
    values = bits.view(torch.int8) if kind == "int8" else bits.view(torch.float8_e4m3fn)
    whole = values.float()
    values, whole = values.clone(), whole.nan_to_num(0.0)
    values.view(torch.uint8)[values.float().isnan()] = 0  # which no quantised weight has
    weight = QuantizedWeight(values, torch.ones(64, device="cuda"))
    for first in range(0, 256, 128):
        x = torch.zeros(128, 256, device="cuda", dtype=dtype)
        x[torch.arange(128), torch.arange(first, first + 128)] = 1
        partial = torch.empty(2, 128, 64, device="cuda")
        ring_bytes(x, weight, partial, RingTiles(128, 64, 2, 3))
        assert torch.equal(partial.sum(0), whole[:, first : first + 128].T)
