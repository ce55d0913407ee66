"""The products that a ring of tiles feeds: their plans, their compilation for Hopper without a GPU, and on a Hopper GPU
what they compute, against torch and against Triton's products."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from medusa.kernels import ring_product as module
from medusa.kernels import tiles as tiles_module
from medusa.kernels.hopper import SHARED_BYTES
from medusa.kernels.matmul import gated, matmul, product, rows_for_product
from medusa.kernels.norm import add_norm, add_norm_reference
from medusa.kernels.ring_product import ProductKernel, ring_product
from medusa.kernels.tiles import (
    EARLY_ROWS,
    RING_ROWS,
    ROW_CLASSES,
    RingTiles,
    Tiles,
    multiplied_rows,
    plan_gated,
    plan_gated_of,
    plan_of,
    plan_product,
    plan_ring,
    starts_early,
)
from tests.medusa.kernels.aot import MODELS
from tests.medusa.kernels.hopper import half, launch_of, needs_compiler, on_hopper, products_and_waits, recorded


def kernels(rows=(1, 16, 64, RING_ROWS)) -> set[ProductKernel]:
    """What the models of aot.py need."""
    found = set()
    for model, num_rows in itertools.product(MODELS, rows):
        qkv = (model.heads + 2 * model.groups) * model.head_size
        cuts = [(qkv, model.hidden, {}), (model.vocab, model.hidden, {})]
        cuts.append((model.channels, model.hidden, {"gated": True}))
        for size in (model.heads * model.head_size, model.channels):
            cuts.append((model.hidden, size, {"may_split": True}))
        for num_out, size, how in cuts:
            tiles = plan_ring(num_rows, num_out, size, processors=132, **how)
            if tiles is not None:
                found.add(ProductKernel(tiles, 2 if "gated" in how else 1, True, torch.bfloat16))
    return found


def test_a_7b_models_products_are_spread_evenly():
    for rows, rows_x, stages in (
        (1, 8, (17, 10, 24)),
        (9, 16, (16, 9, 22)),
        (64, 64, (11, 7, 14)),
        (121, 128, (8, 5, 9)),
    ):
        qkv, gate, out = stages
        assert plan_ring(rows, 12288, 4096, processors=132) == RingTiles(rows_x, 96, 1, qkv)
        gate_rows = 84 if rows <= 64 else 88
        assert plan_ring(rows, 11008, 4096, processors=132, gated=True) == RingTiles(rows_x, gate_rows, 1, gate)
        assert plan_ring(rows, 4096, 4096, processors=132, may_split=True) == RingTiles(rows_x, 64, 2, out)
        down = RingTiles(rows_x, 64, 2, out) if rows <= 64 else RingTiles(rows_x, 96, 3, 8)
        assert plan_ring(rows, 4096, 11008, processors=132, may_split=True) == down


def test_the_tensor_cores_read_nothing_behind_the_last_tile():
    assert plan_ring(1, 6144, 4096, processors=132) == RingTiles(16, 48, 1, 28)  # 64 rows from X on
    assert plan_ring(1, 4104, 4096, processors=132) == RingTiles(32, 32, 1, 28)
    assert plan_ring(65, 12288, 4096, processors=132) == RingTiles(96, 96, 1, 9)  # 128


def test_no_ring_reads_rows_that_a_product_has_no_memory_for():
    found = set()
    for rows, num_out, size, how in itertools.product(
        range(1, RING_ROWS + 1), range(2048, 16384, 1024), (4096, 11008), ({}, {"may_split": True}, {"gated": True})
    ):
        if (plan := plan_ring(rows, num_out, size, processors=132, **how)) is not None:
            room = rows_for_product(rows, 2, like=half(0))
            assert rows == len(room) <= plan.rows_x <= room.untyped_storage().nbytes() // 4
            found.add(plan.rows_x)
    assert set(ROW_CLASSES) <= found
    assert rows_for_product(RING_ROWS + 1, 2, like=half(0)).untyped_storage().nbytes() == (RING_ROWS + 1) * 4


@pytest.mark.parametrize(("rows", "ahead"), [(1, 3), (16, 3), (17, 2), (128, 2)])
def test_few_rows_have_one_tile_more_under_way(rows, ahead):
    tiles = plan_ring(rows, 12288, 4096, processors=132)
    assert f"#define AHEAD {ahead}\n" in ProductKernel(tiles, 1, True, torch.bfloat16).source


def test_other_products_are_left_to_the_other_kernels():
    for rows in (0, RING_ROWS + 1):
        assert plan_ring(rows, 12288, 4096, processors=132) is None
    assert plan_ring(1, 3072, 4096, processors=132) is None  # 24 rows of W
    assert plan_ring(64, 12284, 4096, processors=132) is None  # eight columns are stored by four threads
    assert plan_ring(64, 12288, 4092, processors=132) is None  # rows at multiples of 16 bytes
    assert plan_ring(64, 128256, 4096, processors=132) is None  # no program has registers for 976 columns
    assert plan_ring(128, 6144, 4096, processors=132) is None  # 128 rows of X for 48 of W
    assert plan_ring(64, 6144, 4096, processors=132) == RingTiles(64, 48, 1, 16)
    assert plan_ring(64, 4096, 1016, processors=132, may_split=True).splits == 1
    assert plan_ring(64, 4096, 1024, processors=132, may_split=True).splits == 2
    assert plan_ring(128, 4096, 8192, processors=132, may_split=True).splits == 3
    assert plan_ring(128, 2048, 8192, processors=132, may_split=True) == RingTiles(
        128, 64, 4, 9
    )  # of 48 rows otherwise
    assert plan_ring(128, 1536, 8960, processors=132, may_split=True) is None  # nor have four shares enough
    assert plan_ring(128, 4096, 8184, processors=132, may_split=True).splits == 2


def test_rings_of_few_rows_alone_start_early():
    assert starts_early(EARLY_ROWS, RingTiles(64, 96, 1, 8)) and not starts_early(
        EARLY_ROWS + 1, RingTiles(96, 96, 1, 8)
    )
    assert not starts_early(1, None) and not starts_early(1, Tiles(16, 64, 128))


@pytest.mark.parametrize("processors", [78, 114, 132])
def test_no_plan_has_more_programs_than_the_gpu_has_multiprocessors(processors):
    found = 0
    for rows, num_out, size, how in itertools.product(
        (1, 64, 128), range(1024, 16384, 512), (4096, 11008), ({}, {"may_split": True}, {"gated": True})
    ):
        if (plan := plan_ring(rows, num_out, size, processors=processors, **how)) is not None:
            found += 1
            assert -(-num_out // plan.rows_w) * plan.splits <= processors, (rows, num_out, size, how)
            assert plan.stages >= 3
    assert found > 200


def test_a_cpu_has_no_ring():
    weight = torch.zeros(12288, 64, dtype=torch.bfloat16)
    assert plan_of(64, weight, torch.bfloat16, may_split=False) == plan_product(64, 12288, 64, may_split=False)
    assert plan_gated_of(64, weight, torch.bfloat16) == plan_gated(64)


@pytest.fixture
def hopper(monkeypatch):
    """Plans as on Hopper, with what the driver would be asked to launch."""
    return recorded(module, monkeypatch)


def test_products_of_many_rows_are_launched_as_rings(hopper):
    x, weight, bias = half(100, 4160)[:, :4096], half(6144, 4096), half(6144)
    assert plan_of(100, half(12288, 4096), torch.bfloat16, may_split=False) == RingTiles(128, 96, 1, 8)
    out = half(40, 6152)[:, :6144]
    product(x[:40], weight, out, bias, pdl=True)
    kernel, grid, of_weight, of_x, rest = launch_of(hopper)
    assert kernel == ProductKernel(RingTiles(64, 48, 1, 16), 1, True, torch.bfloat16) and grid == (128, 1, 1)
    assert of_weight == ([4096, 6144, 1], [4096, 6144 * 4096], [64, 48, 1]) and of_x == ([4096, 64], [4160], [64, 64])
    assert rest == [out.data_ptr(), bias.data_ptr(), 40, 6144, 64, 6152, 0]
    partial = torch.zeros(3, 100, 4096)
    product(half(100, 11008), half(4096, 11008), partial)
    kernel, grid, of_weight, of_x, rest = launch_of(hopper)
    assert kernel == ProductKernel(RingTiles(128, 96, 3, 8), 1, False, torch.bfloat16) and grid == (43, 3, 1)
    assert of_x == ([11008, 100], [11008], [64, 128])
    assert rest == [partial.data_ptr(), None, 100, 4096, 172, 4096, 100 * 4096]


@pytest.mark.parametrize(("behind", "read"), [(0, 10), (1, 11), (6, 16), (7, 16)])
def test_rows_behind_those_of_x_are_read_where_there_are_some(behind, read, hopper):
    x = half(2 + 10 + behind, 4104)[2:12, 8:]
    product(x, half(6144, 4096), half(10, 6144))
    _, _, _, of_x, _ = launch_of(hopper)
    assert of_x == ([4096, read], [4104], [64, 16])


def test_gated_products_of_many_rows_are_launched_as_rings(hopper):
    x, weight, out = half(64, 4096), half(22016, 4096), half(64, 11008)
    plan = plan_gated_of(64, weight, torch.bfloat16)
    assert plan == RingTiles(64, 84, 1, 7)
    gated(x, weight, out, plan, pdl=True)
    kernel, grid, of_weight, _, rest = launch_of(hopper)
    assert (kernel.halves, grid) == (2, (132, 1, 1))
    assert of_weight == ([4096, 11008, 2], [4096, 11008 * 4096], [64, 84, 2])
    assert rest[2:] == [64, 11008, 64, 11008, 0]


def test_weights_that_the_hardware_cannot_copy_have_no_ring(hopper):
    whole = half(12288, 4096)
    assert isinstance(plan_of(64, whole, torch.bfloat16, may_split=False), RingTiles)
    odd = torch.zeros(12288 * 4096 + 1, dtype=torch.bfloat16)[1:].view(12288, 4096)
    for weight in (whole.float(), half(12288, 4104)[:, :4096], odd):
        assert isinstance(plan_of(64, weight, torch.bfloat16, may_split=False), Tiles)


def test_without_a_compiler_there_is_no_ring(hopper, monkeypatch):
    weight = half(12288, 4096)
    assert isinstance(plan_of(64, weight, torch.bfloat16, may_split=False), RingTiles)
    monkeypatch.setattr(tiles_module, "has_compiler", lambda: False)
    assert plan_of(64, weight, torch.bfloat16, may_split=False) == plan_product(64, 12288, 4096, may_split=False)
    assert plan_gated_of(64, weight, torch.bfloat16) == plan_gated(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": half(65, 64)}, r"at most 64, .*16 bytes.*got \(65, 64\) with stride 64"),
        ({"x": half(1, 64).expand(2, 64)}, r"apart, and start .*got \(2, 64\) with stride 0"),
        ({"x": half(64, 66)[:, :64]}, r"got \(64, 64\) with stride 66"),
        (
            {"x": half(128, 64), "out": half(128, 96), "tiles": RingTiles(128, 96, 1, 9)},
            r"take 258272 bytes .* has 232448",
        ),
        ({"tiles": RingTiles(64, 96, 1, 1)}, r"1 tiles of 96 rows .* at least 2"),
        ({"tiles": RingTiles(64, 92, 1, 4)}, "multiples of 8 rows .* got 64 and 92"),
        ({"x": half(60, 64), "tiles": RingTiles(60, 96, 1, 4)}, "multiples of 8 rows .* got 60 and 96"),
        ({"x": half(8, 64), "tiles": RingTiles(8, 48, 1, 4)}, "together 64 or more; got 8 and 48"),
        ({"x": half(72, 64), "tiles": RingTiles(72, 48, 1, 4)}, "together 128 or more; got 72 and 48"),
        ({"tiles": RingTiles(64, 96, 2, 4)}, r"2 splits write .* got out \(64, 96\)"),
        ({"out": torch.zeros(2, 64, 96), "tiles": RingTiles(64, 96, 2, 4), "bias": half(96)}, "without bias"),
        ({"gated": True, "tiles": RingTiles(64, 48, 1, 4), "bias": half(48)}, "a gated product none either"),
        ({"out": torch.zeros(64, 96)}, r"of 16 bits a value; got .*bfloat16, torch.float32\]"),
        ({"weight": half(96, 64).to(torch.float16)}, "got .*float16"),
        ({"bias": torch.zeros(96)}, "bias must be .* got .*float32"),
        ({"x": torch.zeros(64, 64), "weight": torch.zeros(96, 64), "out": torch.zeros(64, 96)}, "of 16 bits a value"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, message, hopper):
    given = {"x": half(64, 64), "weight": half(96, 64), "out": half(64, 96), "tiles": RingTiles(64, 96, 1, 4)}
    ring_product(**given)
    with pytest.raises(ValueError, match=message):
        ring_product(**(given | change))
    assert len(hopper) == 1


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


@needs_compiler
def test_every_plan_compiles_for_hopper_fits_and_does_not_spill(cache):
    found = kernels()
    assert len(found) >= 12 and {kernel.halves for kernel in found} == {1, 2}
    halves = {replace(kernel, dtype=torch.float16, pdl=False) for kernel in found if kernel.tiles.rows_w in (84, 88)}
    assert len(halves) >= 2
    for kernel in found | halves:
        assert kernel.shared_bytes <= SHARED_BYTES, kernel
        assert kernel.shared_bytes > SHARED_BYTES // 2, kernel  # one program a multiprocessor
        products, waits = products_and_waits(kernel, cache)
        assert products >= 4 and waits <= products // 2, (kernel, products, waits)  # not one after the other


def matrices(rows, num_out, size, dtype, *, behind=0):
    """`behind`: rows of X's memory beyond its own."""
    torch.manual_seed(rows * num_out + size)
    x = torch.full((rows + behind, size), float("nan"), device="cuda", dtype=dtype)[:rows].normal_()
    return x, torch.randn(num_out, size, device="cuda", dtype=dtype) / size**0.5


def cut(rows, rows_w, splits, stages, halves=1):
    rows_x = next(most for most in ROW_CLASSES if rows <= most)
    return RingTiles(max(rows_x, multiplied_rows(rows) - halves * rows_w), rows_w, splits, stages)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("rows", "behind"), [(1, 0), (1, 7), (16, 0), (33, 3), (64, 0), (65, 7), (96, 0), (128, 0)])
@pytest.mark.parametrize(
    ("num_out", "size", "shares", "dtype"),
    [
        (12288, 4096, (96, 1, 6), torch.bfloat16),
        (4096, 4096, (64, 2, 7), torch.bfloat16),
        (4096, 11008, (96, 3, 8), torch.bfloat16),
        (4096, 11008, (128, 4, 5), torch.bfloat16),
        (1040, 1000, (72, 1, 3), torch.float16),  # neither tiles nor rows come out even
        (512, 72, (64, 4, 2), torch.bfloat16),  # more splits than tiles of columns
        (512, 256, (32, 1, 4), torch.bfloat16),  # fewer rows than the tensor cores multiply
    ],
)
def test_a_product_is_that_of_torch_and_of_triton(rows, behind, num_out, size, shares, dtype):
    x, weight = matrices(rows, num_out, size, dtype, behind=behind)
    tiles = cut(rows, *shares)
    whole = tiles.splits == 1
    bias = torch.randn(num_out, device="cuda", dtype=dtype) if whole else None
    shape = (rows + 8, num_out + 8) if whole else (tiles.splits, rows + 8, num_out + 8)
    around = [torch.full(shape, 7.0, device="cuda", dtype=dtype if whole else torch.float32) for _ in range(2)]
    out, twin = (wide[..., :rows, :num_out] for wide in around)
    for _ in range(2):  # the second right behind the first, under dependent launch
        ring_product(x, weight, out, tiles, bias, pdl=True)
    matmul(x, weight, twin, Tiles(64, 64, 64, tiles.splits), bias)
    torch.cuda.synchronize()
    expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    for found in (out, twin):
        summed = found.float() if whole else found.sum(0)
        torch.testing.assert_close(summed, expected, atol=2e-2, rtol=1e-2)
    for wide in around:
        assert wide[..., rows:, :].eq(7).all() and wide[..., num_out:].eq(7).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 40, 64, 128])
@pytest.mark.parametrize(("channels", "rows_w"), [(11008, 84), (11008, 88), (520, 40), (520, 44)])
def test_a_gated_product_is_that_of_torch_and_of_triton(rows, channels, rows_w):
    x, weight = matrices(rows, 2 * channels, 512, torch.bfloat16)
    out, twin = (torch.full((rows, channels), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gated(x, weight, out, cut(rows, rows_w, 1, 4, halves=2), pdl=True)
    gated(x, weight, twin, Tiles(64, 64, 64))
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=1)
    for found in (out, twin):
        torch.testing.assert_close(found.float(), torch.nn.functional.silu(gate) * up, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@on_hopper
def test_a_graph_of_ring_products_replays():
    x, weight = matrices(64, 4096, 4096, torch.bfloat16)
    tiles = plan_of(64, weight, torch.bfloat16, may_split=True)
    assert isinstance(tiles, RingTiles) and isinstance(
        plan_gated_of(64, matrices(1, 22016, 4096, x.dtype)[1], x.dtype), RingTiles
    )
    partial = torch.zeros(tiles.splits, 64, 4096, device="cuda")
    product(x, weight, partial, pdl=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            product(x, weight, partial, pdl=True)
    x.neg_()
    partial.zero_()
    graph.replay()
    torch.testing.assert_close(partial.sum(0), x.float() @ weight.float().T, atol=2e-2, rtol=1e-2)


@pytest.mark.gpu
@on_hopper
def test_a_product_waits_for_the_one_that_writes_its_rows():
    x, weight = matrices(64, 4096, 4096, torch.bfloat16)
    expected = (x.float() @ weight.float().T).to(x.dtype).float() @ weight.float().T
    between, out = (torch.empty(64, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(20):
        between.zero_()
        ring_product(x, weight, between, RingTiles(64, 64, 1, 6), pdl=True)
        ring_product(between, weight, out, RingTiles(64, 64, 1, 6), pdl=True)
        torch.testing.assert_close(out.float(), expected, atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@on_hopper
def test_a_product_waits_for_an_early_norm_and_for_what_that_waits_for():
    x, weight = matrices(64, 4096, 4096, torch.bfloat16)
    residual, scale = torch.randn_like(x), torch.rand_like(x[0])
    partial = torch.empty(2, 64, 4096, device="cuda")
    normed, out = (torch.empty_like(x) for _ in range(2))
    new_residual, expected = add_norm_reference((x.float() @ weight.float().T)[None], residual, scale, 1e-5)
    for _ in range(20):
        found = residual.clone()
        for tensor in (partial, normed, out):
            tensor.fill_(float("nan"))
        ring_product(x, weight, partial, RingTiles(64, 64, 2, 7), pdl=True)
        add_norm(partial, found, scale, 1e-5, normed, pdl=True, early=True)
        ring_product(normed, weight, out, RingTiles(64, 64, 1, 6), pdl=True)
        torch.testing.assert_close(found, new_residual, atol=5e-2, rtol=5e-2)
        torch.testing.assert_close(out.float(), expected.float() @ weight.float().T, atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@on_hopper
def test_rows_do_not_depend_on_how_many_others_there_are():
    x, weight = matrices(128, 12288, 4096, torch.bfloat16)
    found = {}
    for rows in (1, 64, 100, 128):
        out = torch.empty(rows, 12288, device="cuda", dtype=torch.bfloat16)
        found[rows] = ring_product(x[:rows], weight, out, cut(rows, 96, 1, 6))
    for rows in (1, 64, 100):
        assert torch.equal(found[rows], found[128][:rows])
