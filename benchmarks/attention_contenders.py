"""One layer's tree attention as several kernels compute it, over the same pages, and what they should give.

Shapes: L layers, B sequences, N nodes each, M = B * N nodes, H query heads, G key-value heads, D head size, P pages a
sequence of S positions, T positions of dense keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.stepping import ACCURACY
from medusa.kernels.attention import attend
from medusa.kernels.attention_plan import AttentionPlan, Rotation, Scratch, Visible
from medusa.kernels.launch import has_warpgroups
from medusa.kernels.ring_attention import has_ring
from medusa.kernels.rope import rope_write
from medusa.kernels.tree_attention import PagedTree
from medusa.tree import grow

XQA_CAPABILITIES = (9, 10, 12)
XQA_WORKSPACE_BYTES = 64 * 2**20  # what its splits leave each other: under 10 MiB at 64 nodes of 4 grouped heads
XQA_SEMAPHORES = 2**20
TABLE_WIDTH = (
    16  # tables of a multiple of this many pages, as an engine's usually are: one compilation for all contexts
)


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `context` committed tokens with trees of `nodes` nodes; `groups` key-value heads."""

    batch: int
    nodes: int
    heads: int
    groups: int
    context: int
    head_size: int = 128
    page_size: int = 64

    @property
    def pages(self) -> int:
        """Of each sequence."""
        return -(-(self.context + self.nodes) // self.page_size)

    def kv_bytes(self, itemsize: int) -> int:
        """Of the keys and values that one layer's attention has to read."""
        return 2 * self.batch * (self.context + self.nodes) * self.groups * self.head_size * itemsize


class Problem:
    """A step's inputs to attention in `layers` layers: random pages in a random order, and one tree for all sequences.

    `qkv_LMHD` [L, M, H + 2G, D] are queries, keys and values as projections give them, `query_LMHD` rotated queries.
    """

    def __init__(self, shape: Shape, *, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(shape.batch * shape.nodes)
        nodes, total = shape.nodes, shape.batch * shape.nodes
        tree = grow(ACCURACY, nodes)
        self.ancestors_NN = tree.ancestors.to(device)
        self.scaling = shape.head_size**-0.5
        in_use = shape.batch * shape.pages
        pages = 1 + torch.randperm(in_use, generator=self._generator, device=device)
        unused = -shape.pages % TABLE_WIDTH
        self.tables_BP = functional.pad(pages.view(shape.batch, shape.pages).int(), (0, unused))
        self.length_B = torch.full((shape.batch,), shape.context, device=device)
        self.row_M = torch.arange(total, device=device, dtype=torch.int32) // nodes
        self.node_M = torch.arange(total, device=device, dtype=torch.int32) % nodes
        self.depth_N = torch.tensor(tree.depth, device=device)
        self.position_M = shape.context + self.depth_N.repeat(shape.batch)
        self.cos_TD, self.sin_TD = _angles(shape.context + tree.max_depth + 1, shape.head_size, dtype, device)
        self.visible = self._visible()
        self.cache = self._random(layers, 2, in_use + 1, shape.page_size, shape.groups, shape.head_size, dtype=dtype)
        self.qkv_LMHD = self._random(layers, total, shape.heads + 2 * shape.groups, shape.head_size, dtype=dtype)
        turned_LMHD = self._turned(self.qkv_LMHD[:, :, : shape.heads + shape.groups])
        self.query_LMHD = turned_LMHD[:, :, : shape.heads].contiguous()
        self._key_LMHD = turned_LMHD[:, :, shape.heads :]
        self._value_LMHD = self.qkv_LMHD[:, :, shape.heads + shape.groups :]
        for layer in range(layers):
            self.write(layer)

    @property
    def layers(self) -> int:
        return len(self.cache)

    @property
    def processors(self) -> int:
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 4

    def write(self, layer: int) -> None:
        """Puts the nodes' rotated keys and their values where a step writes them: at the sequence's length + node."""
        self._put(layer, self._key_LMHD[layer], self._value_LMHD[layer])

    def forget(self, layer: int) -> None:
        """Spoils the nodes' places in the cache, for contenders that write them themselves."""
        nothing = torch.full_like(self._key_LMHD[layer], float("nan"))
        self._put(layer, nothing, nothing)

    def expected(self, layer: int) -> torch.Tensor:
        """[M, H, D] in float64 by the plain twin, a sequence at a time."""
        shape = self.shape
        out = []
        for b in range(shape.batch):
            nodes = slice(b * shape.nodes, (b + 1) * shape.nodes)
            step = PagedTree(
                self.cache[layer].index_select(1, self.tables_BP[b, : shape.pages].long()).double()[None],
                torch.arange(shape.pages, device=self.device)[None],
                self.length_B[None, b],
                self.depth_N[None],
                torch.ones(1, shape.nodes, dtype=torch.bool, device=self.device),
                self.ancestors_NN[None],
            )
            query, key, value = (
                each[layer, nodes].double().transpose(0, 1)[None]
                for each in (self.query_LMHD, self._key_LMHD, self._value_LMHD)
            )
            out.append(step.attend(0, query, key, value, self.scaling, None, None)[0])
        return torch.cat(out)

    def _put(self, layer: int, key_MHD: torch.Tensor, value_MHD: torch.Tensor) -> None:
        row_M, size = self.row_M.long(), self.shape.page_size
        place_M = self.length_B[row_M] + self.node_M
        page_M = self.tables_BP[row_M, place_M // size].long()
        self.cache[layer, 0, page_M, place_M % size] = key_MHD
        self.cache[layer, 1, page_M, place_M % size] = value_MHD

    def _visible(self) -> Visible:
        batch, nodes = self.shape.batch, self.shape.nodes
        room = -(-nodes // 64) * 64
        seen_NN = torch.zeros(room, room, dtype=torch.bool, device=self.device)
        seen_NN[:nodes, :nodes] = self.ancestors_NN
        bit = torch.ones(64, dtype=torch.int64, device=self.device) << torch.arange(64, device=self.device)
        bits_NW = (seen_NN.view(room, room // 64, 64).long() * bit).sum(-1)
        depth_N = functional.pad(self.depth_N.int(), (0, room - nodes))
        rows_B = torch.arange(batch, device=self.device, dtype=torch.int32)
        return Visible(
            rows_B,
            rows_B * nodes,
            torch.full_like(rows_B, nodes),
            self.length_B,
            self.tables_BP,
            bits_NW.repeat(batch, 1, 1),
            depth_N.repeat(batch, 1),
        )

    def _random(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=self.device, generator=self._generator)

    def _turned(self, heads_LMHD: torch.Tensor) -> torch.Tensor:
        """Rotated in float32 and rounded once, as the kernels do."""
        cos, sin = (each[self.position_M, None].float() for each in (self.cos_TD, self.sin_TD))
        first, second = heads_LMHD.float().chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(heads_LMHD.dtype)


@dataclass(frozen=True)
class Contender:
    """`launch` attends in one layer and returns what reshapes to [M, H, D]; `writes`: it rotates the keys and writes
    them with the values before, as a decoding step has to. The others find that done."""

    name: str
    writes: bool
    launch: Callable[[int], torch.Tensor]


def medusa(problem: Problem, *, pdl: bool, writes: bool) -> Contender:
    """This project's kernel, cut as an engine cuts it whose largest tree has the shape's nodes. By a ring, where there
    is one, only if it writes: a ring always does."""
    shape = problem.shape
    plan = AttentionPlan.of(
        batch_size=shape.batch,
        num_nodes=len(problem.row_M),
        max_nodes=shape.nodes,
        chain=False,
        group=shape.heads // shape.groups,
        num_kv_heads=shape.groups,
        head_size=shape.head_size,
        processors=problem.processors,
        warpgroups=has_warpgroups(problem.device),
        ring=writes and has_ring(problem.cache),
    )
    scratch = Scratch.of(heads=shape.heads, size=shape.head_size, processors=problem.processors, device=problem.device)
    rotation = Rotation(problem.position_M, problem.cos_TD, problem.sin_TD) if writes else None
    queries = problem.qkv_LMHD if writes else problem.query_LMHD
    out_MHD = torch.empty_like(problem.query_LMHD[0])

    def launch(layer: int) -> torch.Tensor:
        return attend(
            queries[layer], problem.cache[layer], problem.visible, plan, out_MHD, scratch, problem.scaling,
            rotation=rotation, pdl=pdl,
        )  # fmt: skip

    return Contender("medusa" if writes else "medusa-written", writes, launch)


def xqa(problem: Problem, *, pdl: bool, writes: bool) -> Contender:
    """FlashInfer's kernel, after a launch that rotates and writes where it is to be a whole step's attention.

    It scales by the head size's root itself, counts a step's nodes in the lengths, lets every node see all tokens ahead
    of the tree, and splits by the tables' width. The queries come rotated and contiguous, which costs nothing here.
    """
    from flashinfer.xqa import xqa as launch_xqa

    shape = problem.shape
    single = shape.nodes == 1
    per_sequence = (1, shape.heads) if single else (1, shape.nodes, shape.heads)
    queries = problem.query_LMHD.view(problem.layers, shape.batch, *per_sequence, shape.head_size)
    out = torch.empty_like(queries[0])
    lengths = (problem.length_B + shape.nodes).int().view(torch.uint32)[:, None]
    tables_BP = problem.tables_BP[:, : shape.pages].contiguous()
    mask = None if single else packed_mask(problem.visible, shape.nodes)
    workspace = torch.zeros(XQA_WORKSPACE_BYTES, dtype=torch.uint8, device=problem.device)
    semaphores = torch.zeros(XQA_SEMAPHORES, dtype=torch.int32, device=problem.device).view(torch.uint32)
    qkv_LMHD = problem.qkv_LMHD.clone() if writes else None  # whose queries the launch ahead rotates in place

    def launch(layer: int) -> torch.Tensor:
        cache = problem.cache[layer]
        if qkv_LMHD is not None:
            rope_write(
                qkv_LMHD[layer], cache, problem.tables_BP, problem.length_B, problem.row_M, problem.node_M,
                problem.position_M, problem.cos_TD, problem.sin_TD, pdl=pdl,
            )  # fmt: skip
        launch_xqa(
            queries[layer], cache[0], cache[1], tables_BP, lengths, out, workspace, semaphores, shape.groups,
            shape.page_size, q_seq_len=shape.nodes, mask=mask, enable_pdl=pdl,
        )  # fmt: skip
        return out

    return Contender("rope+xqa" if writes else "xqa", writes, launch)


def packed_mask(visible: Visible, nodes: int) -> torch.Tensor:
    """Each sequence's ancestor bits as XQA reads them: [B, N, 2 * ceil(N / 32)] words of 16 bits, the lowest first."""
    assert visible.bits_RNW is not None
    bits_BNW = visible.bits_RNW[visible.rows_B.long(), :nodes].contiguous()
    return bits_BNW.view(torch.int16)[..., : 2 * -(-nodes // 32)].contiguous().view(torch.uint16)


def sdpa(problem: Problem) -> Contender:
    """Torch's attention over keys and values that somebody gathered from the pages before; grouped heads are rows."""
    shape, group = problem.shape, problem.shape.heads // problem.shape.groups
    dense = [
        problem.cache[layer]
        .index_select(1, problem.tables_BP[:, : shape.pages].flatten().long())
        .view(2, shape.batch, -1, shape.groups, shape.head_size)
        .transpose(2, 3)
        .contiguous()
        for layer in range(problem.layers)
    ]
    queries = problem.query_LMHD.view(-1, shape.batch, shape.nodes, shape.groups, group, shape.head_size)
    queries = queries.permute(0, 1, 3, 4, 2, 5).flatten(3, 4).contiguous()
    hidden_NT = (
        torch.arange(shape.pages * shape.page_size, device=problem.device).repeat(shape.nodes, 1) >= shape.context
    )
    hidden_NT[:, shape.context : shape.context + shape.nodes] = ~problem.ancestors_NN
    mask_MT = torch.zeros(hidden_NT.shape, dtype=queries.dtype, device=problem.device)
    mask_MT = mask_MT.masked_fill_(hidden_NT, float("-inf")).repeat(group, 1)[None, None]

    def launch(layer: int) -> torch.Tensor:
        keys, values = dense[layer]
        out = functional.scaled_dot_product_attention(
            queries[layer], keys, values, attn_mask=mask_MT, scale=problem.scaling
        )
        return out.unflatten(2, (group, shape.nodes)).permute(0, 3, 1, 2, 4)

    return Contender("sdpa", False, launch)


def error(contender: Contender, problem: Problem, expected: torch.Tensor, layer: int) -> float:
    """The largest deviation from what is expected of the layer, over the root mean square of that."""
    if contender.writes:
        problem.forget(layer)
    got = contender.launch(layer).reshape(expected.shape).double()
    problem.write(layer)
    return float((got - expected).abs().max() / expected.square().mean().sqrt())


def _angles(positions: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angle_TD = torch.arange(positions, device=device)[:, None] * frequency
    return angle_TD.cos().to(dtype), angle_TD.sin().to(dtype)
