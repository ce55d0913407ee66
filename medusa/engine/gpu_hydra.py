"""Hydra heads of a GPU step: they guess at its beginning, when the device knows each row's tree, depth by depth.

Which nodes are asked is decided on the device (`plan_paths`); how many may be is known by the step's size, so each head
takes so many slots, and what it makes of empty ones is read by nobody. Everything between the launches is allocated as
they run: in a graph's memory, where graphs share it.

Shapes: R batch rows, C slots of a head, J = head + 1 tokens ahead, S guesses, d hidden size, V vocabulary of the heads.
"""

from __future__ import annotations

import torch
from torch import nn

from medusa.heads import DraftHeads
from medusa.hydra import HydraHeads
from medusa.kernels.launch import supports_pdl
from medusa.kernels.matmul import product, rows_for_product
from medusa.kernels.path import Paths, most_asked, plan_paths, read_paths, take_guesses
from medusa.kernels.seen import add_silu, see
from medusa.kernels.state import Drafts, RowState, Trees
from medusa.kernels.tiles import plan_of
from medusa.kernels.topk import scratch, topk
from medusa.model import Backbone


class GpuHydra:
    """A GpuDrafter. The plain twin is `medusa.drafter.PathDrafter`."""

    def __init__(self, heads: HydraHeads, backbone: Backbone, *, num_rows: int, width: int) -> None:
        self._heads, self._backbone, self._width = heads, backbone, width
        self._pdl = supports_pdl(backbone.device)
        self._hidden_Rd = torch.zeros(num_rows, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
        self._token_map = heads.token_map if heads.config.vocabulary == "truncated" else None

    def take(self, heads: DraftHeads) -> DraftHeads:
        """As GpuDrafter.take."""
        self._heads.load_state_dict(heads.state_dict())
        return self._heads

    def remember(self, hidden_Bd: torch.Tensor, rows_B: torch.Tensor, state: RowState) -> None:
        """As GpuDrafter.remember."""
        self._hidden_Rd.index_copy_(0, rows_B.long(), hidden_Bd)

    def propose(self, drafts: Drafts, trees: Trees, state: RowState) -> None:
        """As GpuDrafter.propose."""
        device, batch, num_nodes = self._hidden_Rd.device, len(drafts.start_B), drafts.num_nodes
        paths = Paths.empty(num_nodes, self._heads.config.num_heads, self._width, device)
        plan_paths(drafts, trees, paths, pdl=self._pdl)
        slots_K = [most_asked(head, batch, num_nodes, self._width) for head in range(self._heads.config.num_heads)]
        pairs = scratch(max(slots_K), 1, self._width, self._heads.config.head_vocab_size, device)
        every_C = torch.arange(max(slots_K), dtype=torch.int32, device=device)
        for head, slots in enumerate(slots_K):
            if slots > 0:
                ahead_CJ = torch.empty(slots, head + 1, dtype=torch.int64, device=device)
                read_paths(head, drafts, trees, state, paths, ahead_CJ, pdl=self._pdl)
                logits_CV = self._logits(head, self._features(head, paths.asked_KA[head, :slots], drafts, ahead_CJ))
                guesses_C1S = paths.guesses_KAS[head, :slots, None]
                topk(
                    logits_CV[:, None], every_C[:slots], guesses_C1S, pairs[:slots], token_map=self._token_map,
                    pdl=self._pdl,
                )  # fmt: skip
        take_guesses(drafts, trees, paths, pdl=self._pdl)

    def _features(self, head: int, asked_C: torch.Tensor, drafts: Drafts, ahead_CJ: torch.Tensor) -> torch.Tensor:
        slots, size = len(ahead_CJ), self._backbone.hidden_size
        embedded_CJd = self._backbone.embed(ahead_CJ)
        seen = rows_for_product(slots, (head + 2) * size, like=self._hidden_Rd)
        see(asked_C, drafts.row_M, self._hidden_Rd, embedded_CJd, seen, pdl=self._pdl)
        features_Cd = self._block(self._heads[head][0].linear, seen, seen[:, :size])  # type: ignore[index]
        for layer in range(1, self._heads.config.num_layers):
            features_Cd = self._block(self._heads[head][layer].linear, features_Cd, features_Cd)  # type: ignore[index]
        return features_Cd

    def _block(self, linear: nn.Linear, x: torch.Tensor, residual_Cd: torch.Tensor) -> torch.Tensor:
        """residual + SiLU(linear(x))."""
        tiles = plan_of(len(x), linear.weight, x.dtype, may_split=True)
        splits = tiles.splits if tiles else 1
        dtype = torch.float32 if splits > 1 else x.dtype
        partial_SCd = x.new_empty(splits, *residual_Cd.shape, dtype=dtype)
        product(x, linear.weight, partial_SCd, pdl=self._pdl)
        out_Cd = rows_for_product(*residual_Cd.shape, like=x)
        add_silu(partial_SCd, linear.bias, residual_Cd, out_Cd, pdl=self._pdl)
        return out_Cd

    def _logits(self, head: int, features_Cd: torch.Tensor) -> torch.Tensor:
        weight = self._heads.vocabulary_weight(head, self._backbone.lm_head_weight)
        logits_CV = features_Cd.new_empty(len(features_Cd), self._heads.config.head_vocab_size)
        product(features_Cd, weight, logits_CV, pdl=self._pdl)
        return self._backbone.cap(logits_CV)
