"""The products that a ring of tiles feeds: their plans, their compilation for Hopper without a GPU, and on a Hopper GPU
what they compute, against torch and against Triton's products."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from medusa.kernels import ring_product as module
from medusa.kernels.launch import has_warpgroups
from medusa.kernels.matmul import gated, matmul, product
from medusa.kernels.ring_product import SHARED_BYTES, Kernel, compiled, ring_product
from medusa.kernels.tiles import RING_ROWS, RingTiles, Tiles, plan_gated, plan_gated_of, plan_of, plan_ring
from tests.medusa.kernels.aot import MODELS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="NVIDIA's bindings are missing")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_warpgroups(torch.device("cuda")), reason="needs a Hopper GPU"
)


def kernels(rows=(64, RING_ROWS)) -> set[Kernel]:
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
                found.add(Kernel(tiles, num_rows // 64, 2 if "gated" in how else 1, True, torch.bfloat16))
    return found


def test_a_7b_models_products_are_spread_evenly():
    for rows in (33, 64, 65, 128):
        few = rows <= 64
        assert plan_ring(rows, 12288, 4096, processors=132) == RingTiles(96, 1, 9 if few else 6)
        assert plan_ring(rows, 11008, 4096, processors=132, gated=True) == RingTiles(84, 1, 6 if few else 5)
        assert plan_ring(rows, 4096, 4096, processors=132, may_split=True) == RingTiles(64, 2, 11 if few else 7)
        down = RingTiles(64, 2, 11) if few else RingTiles(128, 4, 5)
        assert plan_ring(rows, 4096, 11008, processors=132, may_split=True) == down


def test_other_products_are_left_to_the_other_kernels():
    for rows in (1, 32, RING_ROWS + 1):
        assert plan_ring(rows, 12288, 4096, processors=132) is None
    assert plan_ring(64, 12284, 4096, processors=132) is None  # eight columns are stored by four threads
    assert plan_ring(64, 12288, 4092, processors=132) is None  # rows at multiples of 16 bytes
    assert plan_ring(64, 128256, 4096, processors=132) is None  # no program has registers for 976 columns
    assert plan_ring(128, 6144, 4096, processors=132) is None  # 128 rows of X for 48 of W
    assert plan_ring(64, 6144, 4096, processors=132) == RingTiles(48, 1, 13)


def test_a_cpu_has_no_ring():
    weight = torch.zeros(12288, 64, dtype=torch.bfloat16)
    assert isinstance(plan_of(64, weight, may_split=False), Tiles)
    assert plan_gated_of(64, weight) == plan_gated(64)


@pytest.mark.parametrize("shape", [(64, 2), (RING_ROWS + 1, 64)])
def test_rows_that_the_hardware_cannot_copy_are_refused(shape):
    x = torch.zeros(shape, dtype=torch.bfloat16)[:, : shape[1]]
    with pytest.raises(ValueError, match=r"at most 128 .*16 bytes.*got \(\d+, \d+\) with stride"):
        ring_product(x, torch.zeros(64, shape[1], dtype=torch.bfloat16), torch.zeros(len(x), 64), RingTiles(64, 1, 4))


def test_tiles_that_do_not_fit_are_refused():
    x, weight = torch.zeros(128, 64, dtype=torch.bfloat16), torch.zeros(96, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"9 tiles .* take 258192 bytes of shared memory; a program has 232448"):
        ring_product(x, weight, torch.zeros(128, 96), RingTiles(96, 1, 9))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


@needs_compiler
def test_every_plan_compiles_for_hopper_fits_and_does_not_spill(cache):
    found = kernels()
    assert len(found) >= 12 and {kernel.halves for kernel in found} == {1, 2}
    halves = {replace(kernel, dtype=torch.float16, pdl=False) for kernel in found if kernel.tiles.rows_w in (84, 128)}
    assert len(halves) >= 2
    for kernel in found | halves:
        assert kernel.shared_bytes <= SHARED_BYTES, kernel
        assert kernel.shared_bytes > SHARED_BYTES // 2, kernel  # one program a multiprocessor
        code = cache / "product.cubin"
        code.write_bytes(compiled(kernel))
        usage = subprocess.run([CUOBJDUMP, "-res-usage", code], capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, (kernel, usage)


@needs_compiler
def test_compiled_code_is_kept_on_disk(cache, monkeypatch):
    kernel = Kernel(RingTiles(64, 2, 4), 1, 1, True, torch.bfloat16)
    code = compiled(kernel)
    assert code.startswith(b"\x7fELF")
    from cuda.bindings import nvrtc

    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", lambda *_: pytest.fail("compiled again"))
    assert compiled(kernel) == code


@needs_compiler
def test_what_does_not_compile_says_why(cache, monkeypatch, tmp_path):
    source = tmp_path / "ring_product.cu"
    source.write_text("int product( {", encoding="utf-8")
    monkeypatch.setattr(module, "_SOURCE", source)
    with pytest.raises(RuntimeError, match=r"does not compile: ring_product.cu\(\d+\): error"):
        compiled(Kernel(RingTiles(64, 1, 4), 1, 1, False, torch.bfloat16))


def matrices(rows, num_out, size, dtype):
    torch.manual_seed(rows * num_out + size)
    x = torch.randn(rows, size, device="cuda", dtype=dtype)
    return x, torch.randn(num_out, size, device="cuda", dtype=dtype) / size**0.5


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [1, 33, 64, 65, 128])
@pytest.mark.parametrize(
    ("num_out", "size", "tiles", "dtype"),
    [
        (12288, 4096, RingTiles(96, 1, 6), torch.bfloat16),
        (4096, 4096, RingTiles(64, 2, 7), torch.bfloat16),
        (4096, 11008, RingTiles(128, 4, 5), torch.bfloat16),
        (1040, 1000, RingTiles(72, 1, 3), torch.float16),  # neither tiles nor rows come out even
        (512, 72, RingTiles(64, 4, 2), torch.bfloat16),  # more splits than tiles of columns
    ],
)
def test_a_product_is_that_of_torch_and_of_triton(rows, num_out, size, tiles, dtype):
    x, weight = matrices(rows, num_out, size, dtype)
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
@pytest.mark.parametrize("rows", [40, 64, 128])
@pytest.mark.parametrize(("channels", "rows_w"), [(11008, 84), (11008, 88), (520, 40), (520, 44)])
def test_a_gated_product_is_that_of_torch_and_of_triton(rows, channels, rows_w):
    x, weight = matrices(rows, 2 * channels, 512, torch.bfloat16)
    out, twin = (torch.full((rows, channels), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gated(x, weight, out, RingTiles(rows_w, 1, 4), pdl=True)
    gated(x, weight, twin, Tiles(64, 64, 64))
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=1)
    for found in (out, twin):
        torch.testing.assert_close(found.float(), torch.nn.functional.silu(gate) * up, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@on_hopper
def test_a_graph_of_ring_products_replays():
    x, weight = matrices(64, 4096, 4096, torch.bfloat16)
    tiles = plan_of(64, weight, may_split=True)
    assert isinstance(tiles, RingTiles)
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
def test_rows_do_not_depend_on_how_many_others_there_are():
    x, weight = matrices(128, 12288, 4096, torch.bfloat16)
    found = {}
    for rows in (64, 100, 128):
        out = torch.empty(rows, 12288, device="cuda", dtype=torch.bfloat16)
        found[rows] = ring_product(x[:rows], weight, out, RingTiles(96, 1, 6))
    assert torch.equal(found[64], found[128][:64]) and torch.equal(found[100], found[128][:100])
