"""The Medusa heads: small networks on the backbone's last hidden state that guess the tokens after next.

Head k (0-based) at position t guesses token t + k + 2; the backbone's own LM head gives token t + 1 (paper, section
2.1.1). A head is `num_layers` residual blocks, x + SiLU(W x + b), then a matrix over the vocabulary: its own, or the
backbone's LM head shared by all, or its own over a truncated vocabulary.

Shapes: B rows, K heads, S guesses a head, d hidden size, V vocabulary (V_t truncated).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from medusa.config import strict
from medusa.kernels.linear import linear

Vocabulary = Literal["own", "shared", "truncated"]


@strict
@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Shape of a set of heads. `truncated_vocab_size` is given exactly when `vocabulary` is "truncated"."""

    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    num_layers: int = 1
    vocabulary: Vocabulary = "own"
    truncated_vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the heads must be at least 1, got {getattr(self, name)}")
        if (self.vocabulary == "truncated") != (self.truncated_vocab_size is not None):
            raise ValueError(
                f"truncated_vocab_size is {self.truncated_vocab_size} with vocabulary {self.vocabulary!r}; "
                "give it with 'truncated' and only then"
            )
        if self.truncated_vocab_size is not None and not 1 <= self.truncated_vocab_size <= self.vocab_size:
            raise ValueError(f"truncated_vocab_size {self.truncated_vocab_size} must be 1 to {self.vocab_size}")

    @property
    def head_vocab_size(self) -> int:
        """Columns of a head's logits."""
        return self.truncated_vocab_size or self.vocab_size


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b) with weight and bias zero at the start, so that a new block is the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + functional.silu(self.linear(hidden))


class DraftHeads(nn.ModuleList):
    """What every kind of heads shares: K heads that end in a vocabulary matrix, their own, the LM head or truncated.

    A kind says how a head's features come about; `sees_path` tells whether from the hidden state alone, or also from
    the tokens between that state and the token to guess (medusa/hydra.py).
    """

    kind: ClassVar[str]
    sees_path: ClassVar[bool]
    token_map: torch.Tensor

    def __init__(self, config: HeadsConfig, token_map: torch.Tensor | None = None) -> None:
        super().__init__(
            nn.Sequential(*self._blocks(config, head), *_vocabulary_layer(config)) for head in range(config.num_heads)
        )
        self.config = config
        if config.vocabulary == "truncated":
            self.register_buffer("token_map", _checked_token_map(config, token_map))
        elif token_map is not None:
            raise ValueError(f"a token map goes with vocabulary 'truncated', not {config.vocabulary!r}")

    @classmethod
    def _blocks(cls, config: HeadsConfig, head: int) -> list[nn.Module]:
        """The head's layers before its vocabulary matrix."""
        raise NotImplementedError

    @classmethod
    def initialised(
        cls, config: HeadsConfig, lm_head_weight: torch.Tensor, token_map: torch.Tensor | None = None
    ) -> Self:
        """Heads that start as the LM head: identity blocks and a copy of its rows (paper, section 2.1.1)."""
        heads = cls(config, token_map).to(lm_head_weight.device, lm_head_weight.dtype)
        if config.vocabulary != "shared":
            rows = lm_head_weight if config.vocabulary == "own" else lm_head_weight[heads.token_map]
            for head in range(config.num_heads):
                heads._layers(head)[-1].weight.data.copy_(rows)
        return heads

    def features(self, head: int, hidden: torch.Tensor, ahead: torch.Tensor | None = None) -> torch.Tensor:
        """The head's own hidden state, before its vocabulary matrix: [..., d] -> [..., d]. Heads with `sees_path` need
        `ahead` [..., >= head + 1, d], the embeddings of the tokens after `hidden`'s."""
        raise NotImplementedError

    def vocabulary_weight(self, head: int, lm_head_weight: torch.Tensor) -> torch.Tensor:
        """The matrix [V or V_t, d] that turns the head's features into logits."""
        return lm_head_weight if self.config.vocabulary == "shared" else self._layers(head)[-1].weight

    def best(
        self, logits: torch.Tensor, width: int, cap: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `width` best tokens of a head's raw logits, best first: ids of the backbone's vocabulary, and
        log-probabilities."""
        if width > self.config.head_vocab_size:
            raise ValueError(f"{width} guesses asked of heads over {self.config.head_vocab_size} tokens")
        capped = cap(logits).float()
        top = capped.topk(width, dim=-1)
        ids = self.token_map[top.indices] if self.config.vocabulary == "truncated" else top.indices
        return ids, top.values - capped.logsumexp(-1, keepdim=True)

    def _layers(self, head: int) -> Any:
        return self[head]


class MedusaHeads(DraftHeads):
    """K heads on the hidden state alone. As a module list of sequentials its state dict has the layout that Medusa's
    loaders read: `{head}.{layer}.linear.weight|bias`, `{head}.{num_layers}.weight`, and `token_map` when truncated.
    """

    kind = "medusa"
    sees_path = False

    @classmethod
    def _blocks(cls, config: HeadsConfig, head: int) -> list[nn.Module]:
        return [ResidualBlock(config.hidden_size) for _ in range(config.num_layers)]

    def features(self, head: int, hidden: torch.Tensor, ahead: torch.Tensor | None = None) -> torch.Tensor:
        for layer in range(self.config.num_layers):
            hidden = self._layers(head)[layer](hidden)
        return hidden

    def logits(
        self, hidden: torch.Tensor, lm_head_weight: torch.Tensor, num_heads: int | None = None
    ) -> list[torch.Tensor]:
        """Raw logits [..., V or V_t] of the first `num_heads` heads (default: all); the caller applies the backbone's
        logit scale and soft-cap."""
        features = [self.features(k, hidden) for k in range(self.config.num_heads if num_heads is None else num_heads)]
        if self.config.vocabulary == "shared":  # one product, so that the matrix is read once
            return list(linear(torch.stack(features), lm_head_weight).unbind())
        return [linear(x, self.vocabulary_weight(k, lm_head_weight)) for k, x in enumerate(features)]

    def guess(
        self,
        hidden_Bd: torch.Tensor,
        lm_head_weight: torch.Tensor,
        width: int,
        cap: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
        num_heads: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each head's `width` best guesses, best first: token ids of the backbone's vocabulary and log-probabilities.

        Both are [B, K, S]. `cap` is the backbone's logit scale and soft-cap (`Backbone.cap`). `num_heads` asks the
        first heads only.
        """
        best = [self.best(logits, width, cap) for logits in self.logits(hidden_Bd, lm_head_weight, num_heads)]
        return torch.stack([ids for ids, _ in best], 1), torch.stack([logprobs for _, logprobs in best], 1)


def _vocabulary_layer(config: HeadsConfig) -> list[nn.Module]:
    if config.vocabulary == "shared":
        return []
    return [nn.Linear(config.hidden_size, config.head_vocab_size, bias=False)]


def _checked_token_map(config: HeadsConfig, token_map: torch.Tensor | None) -> torch.Tensor:
    if token_map is None or token_map.shape != (config.truncated_vocab_size,):
        shape = None if token_map is None else tuple(token_map.shape)
        raise ValueError(f"truncated heads need a token map of shape ({config.truncated_vocab_size},), got {shape}")
    token_map = token_map.long()
    if token_map.unique().numel() != token_map.numel():
        raise ValueError("the token map names a token more than once; each truncated row needs its own token")
    if int(token_map.min()) < 0 or int(token_map.max()) >= config.vocab_size:
        raise ValueError(f"the token map leaves the vocabulary of {config.vocab_size} tokens")
    return token_map
