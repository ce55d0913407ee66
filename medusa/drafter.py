"""The seam between heads and engine: what a drafter remembers between steps, and how it fills a tree with drafts.

Medusa's heads guess from the hidden state alone: they guess when a step ends, and the next tree picks from the guesses.
Hydra's heads see their path: they wait for the tree and the token at its root, then fill it depth by depth. Either way
verifying, accepting and committing never look inside.

Shapes: B sequences of a step, N nodes, R rows of the device state, K heads, S guesses a head, d hidden size; M nodes
that are asked for guesses at one depth, C their children.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from medusa.decoding import TreeBatch, propose
from medusa.heads import DraftHeads, MedusaHeads
from medusa.hydra import HydraHeads
from medusa.model import Backbone


class Drafter(Protocol):
    """One row of state a running sequence."""

    num_heads: int

    def remember(self, rows_B: torch.Tensor, hidden_Bd: torch.Tensor, num_heads: int) -> None:
        """Takes what the LM head read at the end of a step; the first `num_heads` heads will be asked."""
        ...

    def propose(self, tree: TreeBatch, rows_B: torch.Tensor, root_B: torch.Tensor) -> torch.Tensor:
        """The draft tokens of every node, [B, N]; the root holds `root_B`."""
        ...


def make_drafter(heads: DraftHeads, backbone: Backbone, num_rows: int, width: int) -> Drafter:
    """`width` is the number of guesses a node may take its children from."""
    if isinstance(heads, MedusaHeads):
        return ParallelDrafter(heads, backbone, num_rows, width)
    if isinstance(heads, HydraHeads):
        return PathDrafter(heads, backbone, num_rows, width)
    raise TypeError(f"no drafter for {type(heads).__name__}")


class ParallelDrafter:
    """Medusa heads: guesses [R, K, S] are the state."""

    def __init__(self, heads: MedusaHeads, backbone: Backbone, num_rows: int, width: int) -> None:
        self.num_heads = heads.config.num_heads
        self._heads, self._backbone, self._width = heads, backbone, width
        self._guesses_RKS = torch.zeros(num_rows, self.num_heads, width, dtype=torch.int64, device=backbone.device)

    def remember(self, rows_B: torch.Tensor, hidden_Bd: torch.Tensor, num_heads: int) -> None:
        if num_heads:
            self._guesses_RKS[rows_B, :num_heads] = self._heads.guess(
                hidden_Bd, self._backbone.lm_head_weight, self._width, self._backbone.cap, num_heads
            )[0]

    def propose(self, tree: TreeBatch, rows_B: torch.Tensor, root_B: torch.Tensor) -> torch.Tensor:
        return propose(tree, root_B, self._guesses_RKS[rows_B])


@dataclass(frozen=True)
class DepthPlan:
    """At one depth: which nodes are asked (row of the batch and node), and which children take whose guess."""

    asked_row_M: torch.Tensor
    asked_node_M: torch.Tensor
    child_row_C: torch.Tensor
    child_node_C: torch.Tensor
    source_C: torch.Tensor  # into M
    rank_C: torch.Tensor


class PathDrafter:
    """Hydra heads: the hidden state [R, d] is the state; a tree is filled depth by depth.

    The plan of a batch of trees is made on the host once, as long as the same trees step; filling them then only
    gathers, multiplies and scatters.
    """

    def __init__(self, heads: HydraHeads, backbone: Backbone, num_rows: int, width: int) -> None:
        self.num_heads = heads.config.num_heads
        self._heads, self._backbone, self._width = heads, backbone, width
        size = backbone.hidden_size
        self._hidden_Rd = torch.zeros(num_rows, size, dtype=backbone.dtype, device=backbone.device)
        self._planned: tuple[torch.Tensor, list[DepthPlan]] | None = None

    def remember(self, rows_B: torch.Tensor, hidden_Bd: torch.Tensor, num_heads: int) -> None:
        self._hidden_Rd[rows_B] = hidden_Bd.to(self._hidden_Rd.dtype)

    def propose(self, tree: TreeBatch, rows_B: torch.Tensor, root_B: torch.Tensor) -> torch.Tensor:
        hidden_Bd = self._hidden_Rd[rows_B]
        num_nodes = tree.parent_BN.shape[1]
        tokens_BN = root_B[:, None].repeat(1, num_nodes)
        path_BNJ = tokens_BN[..., None]  # the tokens from the root to each node, of all nodes of the depth at hand
        for head, plan in enumerate(self._plan(tree)):
            guesses_MS, _ = self._heads.guess_next(
                head,
                hidden_Bd[plan.asked_row_M],
                path_BNJ[plan.asked_row_M, plan.asked_node_M],
                self._backbone.embed,
                self._backbone.lm_head_weight,
                self._width,
                self._backbone.cap,
            )
            tokens_BN[plan.child_row_C, plan.child_node_C] = guesses_MS[plan.source_C, plan.rank_C]
            parents_BNJ = path_BNJ.gather(1, tree.parent_BN[..., None].expand(-1, -1, head + 1))
            path_BNJ = torch.cat([parents_BNJ, tokens_BN[..., None]], -1)
        return tokens_BN

    def _plan(self, tree: TreeBatch) -> list[DepthPlan]:
        if self._planned is None or self._planned[0] is not tree.parent_BN:
            self._planned = (tree.parent_BN, plan_depths(tree))
        return self._planned[1]


def plan_depths(tree: TreeBatch) -> list[DepthPlan]:
    """Who is asked and who takes, for depths 1 .. max_depth. Only nodes that have children are asked."""
    device = tree.parent_BN.device
    parent_BN, depth_BN, rank_BN = (t.cpu() for t in (tree.parent_BN, tree.depth_BN, tree.rank_BN))
    plans = []
    for depth in range(1, tree.max_depth + 1):
        child_row_C, child_node_C = (depth_BN == depth).nonzero(as_tuple=True)
        asked = child_row_C * depth_BN.shape[1] + parent_BN[child_row_C, child_node_C]
        asked_M, source_C = asked.unique(return_inverse=True)
        parts = (
            asked_M // depth_BN.shape[1],
            asked_M % depth_BN.shape[1],
            child_row_C,
            child_node_C,
            source_C,
            rank_BN[child_row_C, child_node_C],
        )
        plans.append(DepthPlan(*(part.to(device) for part in parts)))
    return plans
