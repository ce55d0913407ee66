"""What the first process of a tensor-parallel engine tells the others: one message a pass, in the order of its own.

Arrays lie on the host. Shapes as in medusa/engine/runner.py; P pages of a sequence, D deepest depth + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from medusa.kernels.tree_attention import PagedTree

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Load:
    """Join the group whose store is at `port` of this machine, and load share `index` of the model in `directory`."""

    port: int
    index: int
    size: int
    directory: str
    device_type: str
    dtype: torch.dtype | None
    timeout_s: float
    num_threads: int


@dataclass(frozen=True)
class Proceed:
    """All have loaded."""


@dataclass(frozen=True)
class MakePages:
    """Make a cache of so many pages for the share's key-value heads."""

    num_pages: int


@dataclass(frozen=True)
class TreePass:
    """One forward over tree nodes: a step's, or prompt chunks'."""

    token_BN: Array
    position_BN: Array
    tables_BP: Array
    length_B: Array
    depth_BN: Array
    valid_BN: Array
    ancestors_BNN: Array

    @classmethod
    def of(cls, token_BN: torch.Tensor, position_BN: torch.Tensor, tree: PagedTree) -> TreePass:
        return cls(
            token_BN=on_host(token_BN),
            position_BN=on_host(position_BN),
            tables_BP=on_host(tree.tables_BP),
            length_B=on_host(tree.length_B),
            depth_BN=on_host(tree.depth_BN),
            valid_BN=on_host(tree.valid_BN),
            ancestors_BNN=on_host(tree.ancestors_BNN),
        )

    def tree(self, pages: torch.Tensor) -> PagedTree:
        """The same pass over another share's pages."""
        device = pages.device
        return PagedTree(
            cache=pages,
            tables_BP=on(device, self.tables_BP),
            length_B=on(device, self.length_B),
            depth_BN=on(device, self.depth_BN),
            valid_BN=on(device, self.valid_BN),
            ancestors_BNN=on(device, self.ancestors_BNN),
        )


@dataclass(frozen=True)
class PlainPass:
    """One plain causal forward, as teacher-forced scores need it."""

    token_BT: Array


@dataclass(frozen=True)
class Move:
    """Move keys and values between places of the pages (`kv_cache.move`)."""

    source_2BD: Array
    target_2BD: Array


@dataclass(frozen=True)
class StepSizes:
    """Of the tables that a pass reads: rows of the batch, pages a row, room for a tree's nodes, deepest depth + 1."""

    rows: int
    pages: int
    tree_nodes: int
    depths: int


@dataclass(frozen=True)
class MakeStep:
    """Get ready for steps of these sizes, over positions below `max_positions`."""

    sizes: StepSizes
    max_positions: int


@dataclass(frozen=True)
class PassShape:
    """Sequences, nodes in all, most of one sequence; whether its nodes are a prompt's chains; whether the accepted
    ones' keys and values are moved after it."""

    batch: int
    nodes: int
    max_nodes: int
    is_chain: bool = False
    moves: bool = False


@dataclass(frozen=True)
class StepPass:
    """Launch a pass; `capture` its graph without a step of anybody's, or run it by its graph, or (`eager`) without."""

    shape: PassShape
    way: Literal["capture", "graph", "eager"]


@dataclass(frozen=True)
class StepMove:
    """Move what a step of so many sequences accepted, which was decided after its pass."""

    batch: int


@dataclass(frozen=True)
class Done:
    """A follower's answer to Load, MakePages and MakeStep."""


@dataclass(frozen=True)
class Failed:
    """A follower's last word."""

    reason: str


def on_host(tensor: torch.Tensor) -> Array:
    return np.ascontiguousarray(tensor.cpu().numpy())


def on(device: torch.device, array: Array) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
