"""Attention of trees over pages on Hopper that keeps memory busy: launches ring_attention.cu.

Triton's loops (attention_kernel.py) read a sequence's keys and values for twice as long as memory takes, once tiles
have 64 rows of queries, and begin when the projections have ended. Here a warp of its own loads, and before that, and
the splits of a sequence are merged within the launch: their programs are a cluster. The plain twin is
attention_kernel.py.

Shapes: as in attention.py.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from medusa.kernels.attention_plan import FEW_SPLITS, MAX_ROWS, AttentionPlan, Rotation, Visible
from medusa.kernels.hopper import HALF_TYPES, has_compiler, launch, source_of, tensor_map
from medusa.kernels.launch import has_warpgroups

AHEAD = 2  # tiles of keys and values under way at a time until the queries are in place
SIZE = 128  # of a head, the only one it takes
TOKENS = 64  # of a tile
STAGES = 4  # tiles of keys and values that a program has room for, each for one of two warpgroups


@dataclass(frozen=True)
class AttentionKernel:
    """What the kernel is compiled for: query heads a key-value head, shares of a sequence, and tokens of a page."""

    group: int
    splits: int
    page_size: int
    pdl: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not 1 <= self.splits <= FEW_SPLITS:
            raise ValueError(f"a cluster has 1 to {FEW_SPLITS} programs, got {self.splits} splits")

    @property
    def name(self) -> str:
        return "ring_attention"

    @property
    def threads(self) -> int:
        return 4 * 128  # a warpgroup that loads, and gives registers away, and three that attend

    @property
    def shared_bytes(self) -> int:
        tiles = 2 * STAGES + 3  # keys and values; the queries, and the own keys and values
        barriers, ends = (STAGES + 1) * 16, 2 * 128 * 16  # peaks and totals of two warpgroups' threads
        return tiles * TOKENS * SIZE * 2 + barriers + ends

    @property
    def source(self) -> str:
        defined: dict[str, int | str] = {
            "STAGES": STAGES, "AHEAD": AHEAD, "PDL": int(self.pdl), "GROUP": self.group, "SPLITS": self.splits,
            "PAGE": self.page_size,
        }  # fmt: skip
        return source_of(self.name, defined, self.dtype, *_multiply(HALF_TYPES[self.dtype]))


def _multiply(half: str) -> tuple[str, str]:
    """The tensor cores' instructions: 64 queries with 64 keys, by 16 channels; and 64 rows of weights, in registers,
    with 64 channels of values, by 16 tokens."""
    registers = ", ".join(f"%{i}" for i in range(32))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(32))
    name = f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{half}.{half}"
    head = "__device__ __forceinline__ void"
    keys = (
        f"{head} multiply_keys(float* sums, u64 x, u64 w, int added) {{"
        f' asm volatile("{{ .reg .pred p; setp.ne.b32 p, %34, 0; {name} {{{registers}}}, %32, %33, p, 1, 1, 0, 0; }}"'
        f' : {sums} : "l"(x), "l"(w), "r"(added)); }}'
    )
    values = (
        f"{head} multiply_values(float* sums, const u32* x, u64 w) {{"
        f' asm volatile("{name} {{{registers}}}, {{%32, %33, %34, %35}}, %36, 1, 1, 1, 1;"'
        f' : {sums} : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(w)); }}'
    )
    return keys, values


def has_ring(pages: torch.Tensor) -> bool:
    """Whether the kernel can read the pages [..., page size, G, D]: on Hopper, 16 bits an element, and NVIDIA's
    compiler and driver within reach."""
    return (
        has_warpgroups(pages.device)
        and pages.dtype in HALF_TYPES
        and pages.shape[-1] == SIZE
        and pages.shape[-3] % TOKENS == 0
        and has_compiler()
    )


def ring_attention(
    qkv_MHD: torch.Tensor,
    cache_layer: torch.Tensor,
    visible: Visible,
    plan: AttentionPlan,
    out_MHD: torch.Tensor,
    scaling: float,
    rotation: Rotation,
    *,
    pdl: bool,
) -> None:
    """As `attend` with a rotation, for trees of up to 64 nodes and heads of 128, without window or cap; rows of
    `out_MHD` start at multiples of 16 bytes. ValueError for what the kernel does not take."""
    if visible.bits_RNW is None or plan.max_nodes > MAX_ROWS or out_MHD.shape[2] != SIZE:
        raise ValueError(
            f"a ring takes trees of up to {MAX_ROWS} nodes and heads of {SIZE}, got {plan.max_nodes} nodes (chains:"
            f" {visible.bits_RNW is None}) and heads of {out_MHD.shape[2]}: plan without it"
        )
    dtypes = [tensor.dtype for tensor in (qkv_MHD, cache_layer, out_MHD, rotation.cos_TD, rotation.sin_TD)]
    if dtypes[0] not in HALF_TYPES or len(set(dtypes)) > 1:
        raise ValueError(f"projections, pages, result and angles must share a type of 16 bits, got {dtypes}")
    if not qkv_MHD.is_contiguous() or rotation.cos_TD.stride() != rotation.sin_TD.stride():
        raise ValueError(
            "queries, keys and values must lie together, and cos as sin does, got strides"
            f" {qkv_MHD.stride()}, {rotation.cos_TD.stride()} and {rotation.sin_TD.stride()}"
        )
    if out_MHD.data_ptr() % 16 or out_MHD.stride(0) % 8 or out_MHD.stride(1) % 8 or out_MHD.stride(2) != 1:
        raise ValueError(f"rows of the result must start at multiples of 16 bytes, got strides {out_MHD.stride()}")
    heads, (_, num_pages, page_size, groups, _) = out_MHD.shape[1], cache_layer.shape
    kernel = AttentionKernel(heads // groups, plan.splits, page_size, pdl, out_MHD.dtype)
    _, page, token, head, _ = cache_layer.stride()
    maps = [
        tensor_map(pages, [SIZE, page_size, groups, num_pages], [token, head, page], [TOKENS, TOKENS, 1, 1])
        for pages in cache_layer
    ]
    tiles = -(-plan.max_nodes * kernel.group // MAX_ROWS)
    pointer, number, long = (lambda t: ctypes.c_void_p(t.data_ptr())), ctypes.c_int, ctypes.c_long
    arguments = [
        *maps, pointer(qkv_MHD), pointer(rotation.position_M), pointer(rotation.cos_TD), pointer(rotation.sin_TD),
        long(rotation.cos_TD.stride(0)), number(heads), number(groups), pointer(cache_layer[0]),
        pointer(cache_layer[1]), pointer(visible.rows_B), pointer(visible.start_B), pointer(visible.count_B),
        pointer(visible.length_R), pointer(visible.tables_RP), pointer(visible.bits_RNW), pointer(out_MHD),
        ctypes.c_float(scaling * math.log2(math.e)), long(out_MHD.stride(0)), long(out_MHD.stride(1)), long(page),
        long(token), long(head), long(visible.tables_RP.stride(0)), number(visible.bits_RNW.shape[1]),
        number(visible.bits_RNW.shape[2]), number(tiles),
    ]  # fmt: skip
    launch(kernel, out_MHD.device.index, (visible.rows_B.shape[0] * tiles, groups, plan.splits), arguments)
