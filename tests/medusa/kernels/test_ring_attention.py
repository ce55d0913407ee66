"""Attention by a ring of tiles: its compilation for Hopper without a GPU, and on a Hopper GPU what it computes, against
the plain twin and against Triton's kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from medusa.kernels import ring_attention as module
from medusa.kernels.attention import attend
from medusa.kernels.attention_plan import AttentionPlan, Rotation, Scratch, Visible
from medusa.kernels.hopper import SHARED_BYTES
from medusa.kernels.ring_attention import AttentionKernel, ring_attention
from tests.medusa.kernels.hopper import needs_compiler, on_hopper, products_and_waits
from tests.medusa.kernels.interpreted.attention_batch import Batch

LENGTHS = (0, 1, 63, 64, 65, 200, 441)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "splits"), [(1, 1), (1, 3), (4, 4), (7, 2), (7, 8)])
def test_it_compiles_without_spills_or_waits_between_products(group, splits, dtype, tmp_path):
    kernel = AttentionKernel(group, splits, 64, True, dtype)
    assert kernel.shared_bytes <= SHARED_BYTES
    # For each tile, own or cached, eight with its keys and eight with its values.
    assert products_and_waits(kernel, tmp_path) == (32, 4)


@pytest.mark.parametrize("splits", [0, 9])
def test_splits_that_no_cluster_has_are_refused(splits):
    with pytest.raises(ValueError, match=f"1 to 8 programs, got {splits} splits"):
        AttentionKernel(1, splits, 64, True, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_nodes": 65}, "up to 64 nodes and heads of 128, got 65 nodes"),
        ({"chain": True}, r"chains: True"),
        ({"size": 64}, "heads of 64: plan without it"),
        ({"dtype": torch.float32}, "share a type of 16 bits"),
        ({"angles": torch.float32}, "share a type of 16 bits"),
        ({"apart": True}, "must lie together"),
        ({"odd": True}, "multiples of 16 bytes"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_is_refused(change, message, monkeypatch):
    given = dict(max_nodes=4, chain=False, size=128, dtype=torch.bfloat16, angles=None, apart=False, odd=False) | change
    monkeypatch.setattr(module, "tensor_map", lambda *_: None)
    monkeypatch.setattr(module, "launch", lambda *_: pytest.fail("launched"))
    size, dtype = given["size"], given["dtype"]
    qkv = (
        torch.zeros(4, 6, 2 * size, dtype=dtype)[..., :size] if given["apart"] else torch.zeros(4, 6, size, dtype=dtype)
    )
    out = torch.zeros(4, 2, size + 4, dtype=dtype)[..., :size] if given["odd"] else torch.zeros(4, 2, size, dtype=dtype)
    angles = torch.zeros(8, size // 2, dtype=given["angles"] or dtype)
    few = torch.zeros(1, dtype=torch.int32)
    bits = None if given["chain"] else torch.zeros(1, 64, 1, dtype=torch.int64)
    visible = Visible(few, few, few, few.long(), few[None], bits, None)
    plan = AttentionPlan(1, 64, 64, given["max_nodes"], merged_in_place=1, ring=True)
    rotation = Rotation(torch.zeros(4, dtype=torch.int64), angles, angles)
    cache = torch.zeros(2, 3, 64, 2, size, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        ring_attention(qkv, cache, visible, plan, out, 1.0, rotation, pdl=True)


class HalfBatch(Batch):
    """A batch whose numbers are exact in 16 bits."""

    def __init__(self, seed, counts, dtype, *, groups, group, lengths=LENGTHS, page_size=64, width=8):
        super().__init__(
            seed,
            counts,
            heads=groups * group,
            groups=groups,
            size=128,
            page_size=page_size,
            lengths=lengths,
            width=width,
        )
        self.dtype = dtype
        self.projected, self.cache = self._half(self.projected), self._half(self.cache)
        self.rotation = Rotation(
            self.rotation.position_M, self._half(self.rotation.cos_TD), self._half(self.rotation.sin_TD)
        )
        query, key, value = self.projected.split([groups * group, groups, groups], 1)
        cos, sin = (each[self.rotation.position_M, None] for each in (self.rotation.cos_TD, self.rotation.sin_TD))
        query, key = (self._half(_rotated(each, cos, sin)) for each in (query, key))
        self.query = query
        for row, nodes in self.sequences():
            self.cache[self.places(row, int(self.length[row]), len(nodes))] = torch.stack([key[nodes], value[nodes]])

    def _half(self, tensor):
        return tensor.to(self.dtype).float()

    def on_gpu(self, splits, *, ring, max_nodes=None):
        """What a launch finds, and the cache after it, both in float32 on the CPU."""
        plan = AttentionPlan(splits, 64, 64, max_nodes or max(self.counts), merged_in_place=1, ring=ring)
        visible = Visible(
            *(torch.tensor(values, dtype=torch.int32).cuda() for values in (self.rows, self.starts, self.counts)),
            self.length.cuda(), self.tables.cuda(), self.bits.cuda(), self.depth.cuda(),
        )  # fmt: skip
        room = 1 if ring else splits * len(self.query)  # the ring's programs meet elsewhere
        scratch = Scratch(
            torch.full((room, self.heads, 128), float("nan")).cuda(),
            torch.full((room, self.heads), float("nan")).cuda(),
            torch.zeros(4096, dtype=torch.int32).cuda(),
        )
        cache = self.cache.clone()
        for row, nodes in self.sequences():
            cache[self.places(row, int(self.length[row]), len(nodes))] = float("nan")
        cache = cache.to("cuda", self.dtype)
        out = torch.full((len(self.query), self.heads, 128), float("nan"), dtype=self.dtype).cuda()
        position, cos, sin = self.rotation.position_M, self.rotation.cos_TD, self.rotation.sin_TD
        rotation = Rotation(position.cuda(), cos.to("cuda", self.dtype), sin.to("cuda", self.dtype))
        projected = self.projected.to("cuda", self.dtype)
        attend(projected, cache, visible, plan, out, scratch, 0.3, rotation=rotation, pdl=True)
        torch.cuda.synchronize()
        return out.float().cpu(), cache.float().cpu()


def _rotated(heads_MHD, cos, sin):
    first, second = heads_MHD.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("counts", "shape"),
    [
        ([64], dict(groups=4, group=1, lengths=(441,))),
        ([64, 0, 7, 1], dict(groups=2, group=1)),
        ([17, 33], dict(groups=2, group=4)),
        ([9, 20, 64], dict(groups=1, group=7)),
        ([1, 1, 1], dict(groups=3, group=2)),
        ([30, 2], dict(groups=2, group=1, page_size=128)),
        ([32, 17, 1], dict(groups=2, group=1, lengths=(1000, 1025, 2049, 4200), width=70)),  # the ring many times over
    ],
)
def test_equals_the_plain_twins(counts, shape, splits, dtype):
    batch = HalfBatch(len(counts) + splits, counts, dtype, **shape)
    found, cache = batch.on_gpu(splits, ring=True)
    triton_found, triton_cache = batch.on_gpu(splits, ring=False)
    expected = batch.expected()
    used = sum(counts)
    tolerance = dict(atol=2e-2, rtol=2e-2) if dtype == torch.bfloat16 else dict(atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(found[:used], expected[:used], **tolerance)
    torch.testing.assert_close(found[:used], triton_found[:used], **tolerance)
    assert found[used:].isnan().all()  # rows of no sequence are left alone
    torch.testing.assert_close(cache, triton_cache, equal_nan=True, **tolerance)
    torch.testing.assert_close(cache, batch.cache, equal_nan=True, **tolerance)


@on_hopper
@pytest.mark.gpu
def test_rows_that_a_tile_has_room_for_change_nothing():
    one = HalfBatch(3, [20], torch.bfloat16, groups=2, group=1, lengths=(200,))
    alone, _ = one.on_gpu(2, ring=True)
    again, _ = one.on_gpu(2, ring=True, max_nodes=64)
    assert torch.equal(alone[:20], again[:20])


def test_its_source_is_whole():
    source = AttentionKernel(1, 3, 64, True, torch.bfloat16).source
    assert "#include" not in source
    for part in ("place_own(", "write_found(", 'extern "C"', "multiply_values("):
        assert part in source
