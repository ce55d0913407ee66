"""Hydra heads: a head also sees the tokens guessed before it on its path (Ankner et al., arXiv 2402.05109).

Medusa's head k knows only the hidden state of token t, not which t+1 was drawn or what the heads before it guessed;
so its guesses for t+k+2 are an average over all of that. Head k here reads the hidden state and the embeddings of
tokens t+1 .. t+k+1: in training those of the reply (teacher forcing), in decoding those of the node that it guesses
for. It has no state of its own, so trees can still change at every step; the price is that depths run one after
another, each for the nodes that have children.

Shapes: N rows, J = k + 1 tokens that head k sees, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from medusa.heads import DraftHeads, HeadsConfig, ResidualBlock
from medusa.kernels.linear import linear

Embed = Callable[[torch.Tensor], torch.Tensor]  # token ids [...] -> embeddings [..., d] (Backbone.embed)


class PathBlock(nn.Module):
    """h + SiLU(W [h; e_1; ..; e_J] + b), zero at the start, so that a new head is the LM head."""

    def __init__(self, hidden_size: int, num_tokens: int) -> None:
        super().__init__()
        self.linear = nn.Linear((num_tokens + 1) * hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_Nd: torch.Tensor, ahead_NJd: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([hidden_Nd, ahead_NJd.flatten(-2).to(hidden_Nd.dtype)], -1)
        return hidden_Nd + functional.silu(self.linear(seen))


class HydraHeads(DraftHeads):
    """K sequentially dependent heads: a path block, `num_layers - 1` residual blocks, the vocabulary matrix."""

    kind = "hydra"
    sees_path = True

    @classmethod
    def _blocks(cls, config: HeadsConfig, head: int) -> list[nn.Module]:
        residual = [ResidualBlock(config.hidden_size) for _ in range(config.num_layers - 1)]
        return [PathBlock(config.hidden_size, head + 1), *residual]

    def features(self, head: int, hidden: torch.Tensor, ahead: torch.Tensor | None = None) -> torch.Tensor:
        if ahead is None:
            raise ValueError("Hydra heads need the embeddings of the tokens ahead, got none")
        hidden = self._layers(head)[0](hidden, ahead[..., : head + 1, :])
        for layer in range(1, self.config.num_layers):
            hidden = self._layers(head)[layer](hidden)
        return hidden

    def guess_next(
        self,
        head: int,
        hidden_Nd: torch.Tensor,
        path_NJ: torch.Tensor,
        embed: Embed,
        lm_head_weight: torch.Tensor,
        width: int,
        cap: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Head `head`'s best guesses after the tokens `path_NJ` (J = head + 1): ids and log-probabilities, [N, S]."""
        features_Nd = self.features(head, hidden_Nd, embed_path(embed, path_NJ))
        return self.best(linear(features_Nd, self.vocabulary_weight(head, lm_head_weight)), width, cap)


def embed_path(embed: Embed, token_ids: torch.Tensor) -> torch.Tensor:
    """Embeddings scaled to a root mean square of 1, the order of hidden states: models differ in theirs a
    hundredfold."""
    with torch.no_grad():
        embedded = embed(token_ids)
        return embedded * embedded.float().square().mean(-1, keepdim=True).add(1e-12).rsqrt().to(embedded.dtype)
