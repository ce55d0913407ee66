"""How the processes of a tensor-parallel engine do a GPU's step together: what the first one hands to the others.

Each is told of a pass on the host (`tell`), launches the same layers, and gets the pass's nodes, pages and trees from
the first process's GPU (`hand_out`), in the stream and so inside a CUDA graph too: the host of neither knows them. What
a step accepted goes the same way before keys and values are moved. With one process both do nothing.

Shapes: B sequences, M nodes, R batch rows, P pages of a row, N nodes a tree (W words), D deepest depth + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from math import prod
from typing import Protocol

import torch
from torch import distributed

from medusa.engine.followers import Followers
from medusa.engine.messages import MakeStep, PassShape, StepMove, StepPass, StepSizes
from medusa.kernels.attention_plan import Visible
from medusa.kernels.state import Drafts, Emitted
from medusa.parallel import Rank

Spec = tuple[tuple[int, ...], torch.dtype]


class Team(Protocol):
    """The other processes, as the step sees them."""

    @property
    def is_alone(self) -> bool: ...

    def tell(self, order: StepPass | StepMove) -> None:
        """On the host: what is launched next."""
        ...

    def hand_out(self, tensors: Items[torch.Tensor]) -> None:
        """On the device: their values."""
        ...


class Alone:
    """No others."""

    is_alone = True

    def tell(self, order: StepPass | StepMove) -> None:
        pass

    def hand_out(self, tensors: Items[torch.Tensor]) -> None:
        pass


class Lead:
    """The first of several processes."""

    is_alone = False

    def __init__(self, followers: Followers, rank: Rank, setup: MakeStep) -> None:
        self._followers, self._group = followers, rank.mesh.get_group()
        with followers.together():
            followers.send(setup)
            followers.expect_done()

    def tell(self, order: StepPass | StepMove) -> None:
        with self._followers.together():
            self._followers.send(order)

    def hand_out(self, tensors: Items[torch.Tensor]) -> None:
        packed = torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors])
        distributed.broadcast(packed, 0, group=self._group)


LeadOf = Callable[[MakeStep], Lead]


class Receiver:
    """The follower's side of `hand_out`, in buffers that stay where they are."""

    def __init__(self, rank: Rank, sizes: StepSizes) -> None:
        self._group, self._device, self._sizes = rank.mesh.get_group(), rank.device, sizes
        self._buffers: dict[tuple[Spec, ...], torch.Tensor] = {}

    def inputs(self, shape: PassShape) -> tuple[Drafts, Visible]:
        """What `handed_out_inputs` lists."""
        sizes, batch, nodes = self._sizes, shape.batch, shape.nodes
        tree: list[Spec] = []
        if not shape.is_chain:
            tree_shape = (sizes.rows, sizes.tree_nodes)
            tree = [((*tree_shape, sizes.tree_nodes // 64), torch.int64), (tree_shape, torch.int32)]
        token_M, position_M, length_R, *bits, row_M, node_M, rows_B, start_B, count_B, tables_RP = self._received(
            [
                ((nodes,), torch.int64),
                ((nodes,), torch.int64),
                ((sizes.rows,), torch.int64),
                *tree,
                ((nodes,), torch.int32),
                ((nodes,), torch.int32),
                ((batch,), torch.int32),
                ((batch,), torch.int32),
                ((batch,), torch.int32),
                ((sizes.rows, sizes.pages), torch.int32),
            ],
            stays=not shape.is_chain,
        )
        bits_RNW, depth_RN = bits or (None, None)
        drafts = Drafts(token_M, position_M, row_M, node_M, torch.ones_like(row_M), start_B)
        return drafts, Visible(rows_B, start_B, count_B, length_R, tables_RP, bits_RNW, depth_RN)

    def accepted(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Emitted]:
        """What `handed_out_moves` lists: rows, lengths after the step, tables, and the accepted nodes."""
        sizes = self._sizes
        length_R, rows_B, num_B, path_BD, tables_RP = self._received(
            [
                ((sizes.rows,), torch.int64),
                ((batch,), torch.int32),
                ((batch,), torch.int32),
                ((batch, sizes.depths), torch.int32),
                ((sizes.rows, sizes.pages), torch.int32),
            ]
        )
        nothing = torch.zeros_like(num_B)
        emitted = Emitted(torch.zeros_like(path_BD, dtype=torch.int64), path_BD, num_B, nothing, nothing)
        return rows_B, length_R, tables_RP, emitted

    def _received(self, specs: list[Spec], *, stays: bool = True) -> list[torch.Tensor]:
        """Into buffers that a graph will find again; prompts' passes are in none, and of too many sizes to keep."""
        key = tuple(specs)
        ends = [0]
        for shape, dtype in specs:
            ends.append(ends[-1] + prod(shape) * dtype.itemsize)
        packed = self._buffers.get(key)
        if packed is None:
            packed = torch.empty(ends[-1], dtype=torch.uint8, device=self._device)
            if stays:
                self._buffers[key] = packed
        distributed.broadcast(packed, 0, group=self._group)
        parts = zip(ends, ends[1:], specs, strict=False)
        return [packed[start:end].view(dtype).view(shape) for start, end, (shape, dtype) in parts]


def handed_out_inputs(drafts: Drafts, visible: Visible) -> list[torch.Tensor]:
    """A pass's nodes and what they see; 64-bit values before 32-bit ones, which keeps each aligned."""
    tree = [] if visible.bits_RNW is None or visible.depth_RN is None else [visible.bits_RNW, visible.depth_RN]
    return [
        drafts.tokens_M,
        drafts.position_M,
        visible.length_R,
        *tree,
        drafts.row_M,
        drafts.node_M,
        visible.rows_B,
        visible.start_B,
        visible.count_B,
        visible.tables_RP,
    ]


def handed_out_moves(
    rows_B: torch.Tensor, length_R: torch.Tensor, tables_RP: torch.Tensor, emitted: Emitted
) -> list[torch.Tensor]:
    """What a step accepted."""
    return [length_R, rows_B, emitted.num_B, emitted.path_BD, tables_RP]
