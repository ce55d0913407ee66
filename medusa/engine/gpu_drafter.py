"""What a GPU step asks of its heads, whatever their kind (medusa/drafter.py has the plain twins).

Medusa's heads guess when a step ends, Hydra's when the next one begins. Both are launches over buffers that stay where
they are, and neither tells the host anything.
"""

from __future__ import annotations

from typing import Protocol

import torch

from medusa.engine.gpu_heads import GpuHeads
from medusa.engine.gpu_hydra import GpuHydra
from medusa.heads import DraftHeads, MedusaHeads
from medusa.hydra import HydraHeads
from medusa.kernels.state import Drafts, RowState, Trees
from medusa.kernels.topk import MAX_WIDTH
from medusa.model import Backbone


class GpuDrafter(Protocol):
    """Guesses for every row of the batch."""

    def take(self, heads: DraftHeads) -> DraftHeads:
        """Copies the weights of heads of the same shape into those in use, which it returns."""
        ...

    def remember(self, hidden_Bd: torch.Tensor, rows_B: torch.Tensor, state: RowState) -> None:
        """At the end of a step: what the LM head read of each sequence's last token."""
        ...

    def propose(self, drafts: Drafts, trees: Trees, state: RowState) -> None:
        """At the beginning of a step: the tokens of valid nodes below the roots, where `state` did not have them."""
        ...


def make_gpu_drafter(heads: DraftHeads, backbone: Backbone, *, num_rows: int, width: int) -> GpuDrafter:
    """For steps of up to `num_rows` sequences, the row of nobody counted; a node's children take its first `width`
    guesses."""
    if width > MAX_WIDTH:
        raise ValueError(
            f"a tree takes guess {width - 1} of a head, but a GPU step has guesses 0 to {MAX_WIDTH - 1}; calibrate "
            "narrower trees"
        )
    if isinstance(heads, MedusaHeads):
        return GpuHeads(heads, backbone, max_batch_size=num_rows - 1, width=width)
    if isinstance(heads, HydraHeads):
        return GpuHydra(heads, backbone, num_rows=num_rows, width=width)
    raise TypeError(f"a GPU step knows no {type(heads).__name__}")
