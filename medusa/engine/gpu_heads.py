"""Medusa heads of a GPU step: guesses from one row a sequence, in as few products as the heads allow.

The first blocks of all heads see the same hidden state, so they are one product; a shared vocabulary matrix is read
once for all heads. Shapes: B sequences, K heads, S guesses a head, d hidden size, V vocabulary of the heads.
"""

from __future__ import annotations

import torch

from medusa.heads import DraftHeads, MedusaHeads
from medusa.kernels.launch import supports_pdl
from medusa.kernels.matmul import product, rows_for_product
from medusa.kernels.seen import add_silu
from medusa.kernels.state import Drafts, RowState, Trees
from medusa.kernels.topk import scratch, topk
from medusa.model import Backbone


class GpuHeads:
    """A GpuDrafter over static buffers for batches of up to `max_batch_size`. The plain twin is `MedusaHeads.guess`."""

    def __init__(self, heads: MedusaHeads, backbone: Backbone, *, max_batch_size: int, width: int) -> None:
        config, device = heads.config, backbone.device
        self._heads, self._backbone = heads, backbone
        self._first_weight, self._first_bias = _joined_blocks(heads)
        self._pdl = supports_pdl(device)
        shape = (max_batch_size, config.num_heads, config.head_vocab_size)
        self._logits_BKV = torch.empty(shape, dtype=backbone.dtype, device=device)
        self._pairs = scratch(max_batch_size, config.num_heads, width, config.head_vocab_size, device)
        self._token_map = heads.token_map if config.vocabulary == "truncated" else None

    def take(self, heads: DraftHeads) -> DraftHeads:
        """As GpuDrafter.take."""
        self._heads.load_state_dict(heads.state_dict())
        return self._heads

    def remember(self, hidden_Bd: torch.Tensor, rows_B: torch.Tensor, state: RowState) -> None:
        """As GpuDrafter.remember: writes all heads' best guesses into the sequences' rows."""
        batch, config = len(hidden_Bd), self._heads.config
        features_BKd = self._features(hidden_Bd)
        logits_BKV = self._logits_BKV[:batch]
        if config.vocabulary == "shared":
            flat = logits_BKV.view(-1, config.head_vocab_size)
            product(features_BKd.view(-1, config.hidden_size), self._backbone.lm_head_weight, flat, pdl=self._pdl)
        else:
            for head in range(config.num_heads):
                weight = self._heads.vocabulary_weight(head, self._backbone.lm_head_weight)
                product(features_BKd[:, head], weight, logits_BKV[:, head], pdl=self._pdl)
        pairs = self._pairs[: batch * config.num_heads]
        topk(self._backbone.cap(logits_BKV), rows_B, state.guesses_RKS, pairs, token_map=self._token_map, pdl=self._pdl)

    def propose(self, drafts: Drafts, trees: Trees, state: RowState) -> None:
        """As GpuDrafter.propose: the guesses were in the state."""

    def _features(self, hidden_Bd: torch.Tensor) -> torch.Tensor:
        config = self._heads.config
        first = hidden_Bd.new_empty(len(hidden_Bd), len(self._first_weight))
        product(hidden_Bd, self._first_weight, first, self._first_bias, pdl=self._pdl)
        rows_Cd = first.view(-1, config.hidden_size)
        features_BKd = rows_for_product(*rows_Cd.shape, like=rows_Cd).view(len(hidden_Bd), config.num_heads, -1)
        add_silu(
            rows_Cd[None], None, hidden_Bd, features_BKd.view_as(rows_Cd), sharing=config.num_heads, pdl=self._pdl
        )  # fmt: skip
        if config.num_layers == 1:
            return features_BKd
        later = [self._later_blocks(head, features_BKd[:, head]) for head in range(config.num_heads)]
        return torch.stack(later, 1)

    def _later_blocks(self, head: int, features_Bd: torch.Tensor) -> torch.Tensor:
        for layer in range(1, self._heads.config.num_layers):
            features_Bd = self._heads[head][layer](features_Bd)  # type: ignore[index]
        return features_Bd


def _joined_blocks(heads: MedusaHeads) -> tuple[torch.Tensor, torch.Tensor]:
    """The first blocks' weights as one matrix [K * d, d] and bias; the heads' own parameters become views of them."""
    linears = [heads[head][0].linear for head in range(heads.config.num_heads)]  # type: ignore[index]
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = torch.cat([linear.bias.data for linear in linears])
    for linear, part, its_bias in zip(linears, weight.chunk(len(linears)), bias.chunk(len(linears)), strict=True):
        linear.weight.data, linear.bias.data = part, its_bias
    return weight, bias
