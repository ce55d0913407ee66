"""Sizes of a model and of its heads, from what its config.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medusa.config import ConfigError, strict
from medusa.heads import HeadsConfig

BF16 = 2  # bytes
HeadsKind = Literal["medusa", "hydra"]


@strict
@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of the Llama kind: attention, a gated MLP, two norms a layer."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> ModelShape:
        """From a Hugging Face config.json; ConfigError for kinds whose sizes have other names."""
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        missing = [key for key in needed if key not in config]
        if missing:
            raise ConfigError(f"{source} has no {missing}; plan knows decoders of the Llama kind only")
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def linear_sizes(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's matrices."""
        d, attention, kv = self.hidden_size, self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        mlp = [(d, self.intermediate_size)] * 2 + [(self.intermediate_size, d)]
        return [(d, attention), (d, kv), (d, kv), (attention, d), *mlp]

    @property
    def layer_parameters(self) -> int:
        """Of all layers, without embeddings and LM head."""
        return self.num_layers * (sum(a * b for a, b in self.linear_sizes) + 2 * self.hidden_size)

    @property
    def vocabulary_parameters(self) -> int:
        """Of one vocabulary matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.layer_parameters + self.hidden_size + self.vocabulary_parameters * (1 if self.tied else 2)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * BF16

    def lora_parameters(self, rank: int) -> int:
        """Adapters on every matrix of every layer."""
        return self.num_layers * rank * sum(a + b for a, b in self.linear_sizes)


@dataclass(frozen=True)
class HeadsCost:
    """Heads in numbers: `parameters` of their own, those that a step reads (a shared LM head once more, by Hydra
    once for each head, as its heads run one after another), and those that one row is multiplied by."""

    parameters: int
    read: int
    multiplied: int
    kind: HeadsKind = "medusa"

    @classmethod
    def of(cls, heads: HeadsConfig, kind: HeadsKind = "medusa") -> HeadsCost:
        blocks, matrix = block_parameters(heads, kind), heads.head_vocab_size * heads.hidden_size
        matrices = heads.num_heads * matrix
        if heads.vocabulary == "shared":
            return cls(blocks, blocks + (matrices if kind == "hydra" else matrix), blocks + matrices, kind)
        return cls(blocks + matrices, blocks + matrices, blocks + matrices, kind)


def block_parameters(heads: HeadsConfig, kind: HeadsKind = "medusa") -> int:
    """Of the residual blocks. Hydra's head k reads k + 1 embeddings beside the hidden state in its first block."""
    d, count = heads.hidden_size, heads.num_heads
    seen_tokens = count * (count + 1) // 2 if kind == "hydra" else 0
    return count * heads.num_layers * (d**2 + d) + seen_tokens * d**2


def model_shape(backbone: str, known: Mapping[str, ModelShape]) -> ModelShape:
    """Of a model folder, else of a known id; ConfigError names the known ones."""
    file = Path(backbone) / "config.json"
    if file.is_file():
        return ModelShape.from_config(json.loads(file.read_text()), str(file))
    if backbone in known:
        return known[backbone]
    raise ConfigError(
        f"the sizes of {backbone!r} are not known: give a model folder with a config.json, or one of {', '.join(known)}"
    )
