"""Every contender of the attention benchmark computes the same; what is handed to XQA, read as XQA reads it; the whole
run but for its clock, which needs CUDA graphs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import attending, attention_contenders, hardware
from benchmarks.attending import AttentionConfig, time_attention
from benchmarks.attention_contenders import Contender, Problem, Shape, error, medusa, packed_mask, sdpa, xqa
from medusa.kernels import ring_attention

CPU = torch.device("cpu")
SHAPES = [
    Shape(batch=3, nodes=1, heads=4, groups=4, context=150, head_size=16, page_size=64),
    Shape(batch=2, nodes=20, heads=4, groups=2, context=60, head_size=16, page_size=64),
    Shape(batch=1, nodes=64, heads=4, groups=1, context=100, head_size=16, page_size=64),
]


def problem_of(shape: Shape) -> Problem:
    return Problem(shape, layers=2, dtype=torch.float32, device=CPU)


def off(contender: Contender, problem: Problem, layer: int = 0) -> float:
    return error(contender, problem, problem.expected(layer), layer)


def xqa_in_torch(
    q, k_cache, v_cache, page_table, seq_lens, output, workspace_buffer, semaphores, num_kv_heads, page_size, *,
    q_seq_len, mask, enable_pdl,
) -> None:  # fmt: skip
    """FlashInfer's contract written out: see the docstring of flashinfer.xqa.xqa, version 0.7.2."""
    batch, heads, size = len(page_table), q.shape[-2], q.shape[-1]
    spread = (batch, 1, heads, size) if q_seq_len == 1 else (batch, 1, q_seq_len, heads, size)
    assert q.shape == output.shape == spread and q.is_contiguous()
    assert k_cache.shape == v_cache.shape == (len(k_cache), page_size, num_kv_heads, size)
    assert page_table.dtype == torch.int32 and seq_lens.dtype == torch.uint32 and seq_lens.shape == (batch, 1)
    assert workspace_buffer.dtype == torch.uint8 and semaphores.dtype == torch.uint32
    words = 2 * math.ceil(q_seq_len / 32)
    for b in range(batch):
        total = int(seq_lens[b, 0])
        ahead = total - q_seq_len
        for n in range(q_seq_len):
            seen = list(range(total)) if mask is None else list(range(ahead))
            if mask is not None:
                assert mask.dtype == torch.uint16 and mask.shape == (batch, q_seq_len, words)
                row = [int(word) for word in mask[b, n].int()]
                seen += [ahead + j for j in range(q_seq_len) if row[j // 16] >> j % 16 & 1]
            place = torch.tensor(seen)
            page = page_table[b, place // page_size].long()
            for head in range(heads):
                group = head // (heads // num_kv_heads)
                keys = k_cache[page, place % page_size, group].double()
                values = v_cache[page, place % page_size, group].double()
                query = (q[b, 0] if q_seq_len == 1 else q[b, 0, n])[head].double()
                target = output[b, 0] if q_seq_len == 1 else output[b, 0, n]
                target[head] = (keys @ query / size**0.5).softmax(0) @ values


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.xqa")
    module.xqa = xqa_in_torch
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.xqa", module)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_own_kernel_and_torchs_agree_with_float64(shape: Shape) -> None:
    problem = problem_of(shape)
    for contender in (medusa(problem, pdl=False, writes=True), medusa(problem, pdl=False, writes=False), sdpa(problem)):
        for layer in range(problem.layers):
            assert off(contender, problem, layer) < 2e-5, contender.name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xqa_is_handed_what_it_expects(shape: Shape, flashinfer: None) -> None:
    problem = problem_of(shape)
    for writes in (False, True):
        contender = xqa(problem, pdl=False, writes=writes)
        for layer in range(problem.layers):
            assert off(contender, problem, layer) < 2e-5, contender.name
    assert off(medusa(problem, pdl=False, writes=True), problem) < 2e-5  # its queries were not rotated by the other


def test_an_error_shows() -> None:
    problem = problem_of(SHAPES[1])
    right = medusa(problem, pdl=False, writes=False)
    problem.visible.bits_RNW[:] = -1  # every node sees every other
    blind = medusa(problem, pdl=False, writes=False)
    assert off(blind, problem) > 0.1
    assert math.isnan(off(Contender("idle", True, right.launch), problem))
    gathered = sdpa(problem)
    assert off(gathered, problem) < 2e-5
    problem.cache[0, :, problem.tables_BP[1, 0].long()] += 1
    assert off(gathered, problem) > 0.1  # what it is compared with is read from the cache


@pytest.mark.parametrize(
    ("head_size", "dtype", "writes", "by_ring"),
    [
        (128, torch.bfloat16, True, True),
        (128, torch.bfloat16, False, False),
        (128, torch.float32, True, False),
        (64, torch.bfloat16, True, False),
    ],
)
def test_own_kernel_is_the_one_that_an_engine_runs(
    head_size: int, dtype: torch.dtype, writes: bool, by_ring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper that is a ring, which writes keys and values itself."""
    launched = []
    for module in (attention_contenders, ring_attention):
        monkeypatch.setattr(module, "has_warpgroups", lambda _: True)
    monkeypatch.setattr(ring_attention, "has_compiler", lambda: True)
    monkeypatch.setattr(
        attention_contenders, "attend", lambda queries, cache, visible, plan, *_, **__: launched.append(plan)
    )
    shape = Shape(batch=1, nodes=64, heads=4, groups=2, context=100, head_size=head_size)
    medusa(Problem(shape, layers=1, dtype=dtype, device=CPU), pdl=False, writes=writes).launch(0)
    assert [(plan.rows, plan.ring) for plan in launched] == [(64, by_ring)]


def test_masks_are_packed_by_16_bits() -> None:
    for shape in SHAPES[1:]:
        problem = problem_of(shape)
        mask = packed_mask(problem.visible, shape.nodes)
        assert mask.shape == (shape.batch, shape.nodes, 2 if shape.nodes <= 32 else 4) and mask.is_contiguous()
        bits = (mask.int()[..., None] >> torch.arange(16)) & 1
        seen = bits.flatten(2)[..., : shape.nodes].bool()
        assert seen.eq(problem.ancestors_NN).all()


def test_every_shape_is_written_with_its_error(
    flashinfer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(attending, "UNCACHED_BYTES", 2**16)
    monkeypatch.setattr(attending, "chosen", lambda asked, device: (attending.CONTENDERS, ["a note"]))
    monkeypatch.setattr(attending, "_microseconds", lambda contender, problem, repeats: [3.0, 1.0, 2.0])
    config = AttentionConfig(
        out=tmp_path, shapes=((1, 1), (2, 8)), heads=((2, 1),), contexts=(30,), head_size=16, dtype="float16", repeats=3
    )
    page = time_attention(config, CPU)
    content = json.loads((tmp_path / "attention.json").read_text())
    rate, rows = content["settings"]["copy rate, GB/s"] * 1e9, content["rows"]
    assert [(r["batch"], r["nodes"], r["contender"]) for r in rows] == [
        (*shape, name) for shape in config.shapes for name in attending.CONTENDERS
    ]
    for row in rows:
        read = 2 * row["batch"] * (30 + row["nodes"]) * 16 * 2
        assert row["copy_us"] == pytest.approx(1e6 * read / rate)
        assert row["layers"] == math.ceil(2**16 / read) and row["us"] == 2.0
        assert 0 < row["error"] < 0.01
    assert page == (tmp_path / "attention.md").read_text() and "| 2 x 8 | 2/1 | 30 |" in page and "- a note" in page
