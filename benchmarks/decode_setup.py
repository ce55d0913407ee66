"""What the decode benchmark is given: its options, the models they name, and the settings that its report lists."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import hardware
from benchmarks.backbones import check_dtype, check_quantization, load_timed
from benchmarks.host_steps import check_grammar_rows
from benchmarks.inflate import inflate_checkpoint
from benchmarks.planning import MIN_REPEATS
from benchmarks.workload import MIN_REPLY
from medusa.checkpoint import Checkpoint, load_checkpoint
from medusa.config import ConfigError
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """The options of `medusa bench decode`; see there."""

    prompts: Path
    out: Path
    model: str = "models/chat-8m"
    heads: Path | None = None
    draft: str | None = None
    exclude: Path | None = None
    num_prompts: int = 256
    context: int = 0
    max_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    repeats: int = 5
    trees: tuple[int, ...] = ()
    typical: bool = True
    grammar: bool = False
    peers: bool = True
    peers_at: tuple[int, ...] = ()
    inflate: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    device: str | None = None
    kv_cache_gb: float | None = None
    time_budget: float | None = None

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError(f"--concurrency lists numbers of at least 1, got {self.concurrency}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigError(f"--temperatures lists numbers of at least 0, got {self.temperatures}")
        if self.repeats < MIN_REPEATS:
            raise ConfigError(f"--repeats is at least {MIN_REPEATS}, for a median with quartiles; got {self.repeats}")
        if self.num_prompts < 1 or self.max_tokens < MIN_REPLY or self.context < 0:
            raise ConfigError(f"--num-prompts is at least 1, --max-tokens at least {MIN_REPLY}, --context at least 0")
        check_dtype(self.dtype)
        check_quantization(self.quantization)
        if self.grammar:
            check_grammar_rows(self.temperatures)
        if not set(self.peers_at) <= set(self.concurrency):
            raise ConfigError(f"--peers-at {self.peers_at} must be among --concurrency {self.concurrency}")


def load(config: DecodeConfig) -> tuple[Backbone, Checkpoint | None, ChatTokenizer]:
    tokenizer = ChatTokenizer.from_pretrained(config.model)
    small, backbone = load_timed(config.model, config.inflate, config.dtype, config.device, config.quantization)
    checkpoint = load_checkpoint(config.heads, small) if config.heads else None
    if checkpoint is not None and backbone is not small:
        checkpoint = inflate_checkpoint(checkpoint, backbone)
    return backbone, checkpoint, tokenizer


def load_draft(name: str, backbone: Backbone) -> PreTrainedModel:
    draft = AutoModelForCausalLM.from_pretrained(name, dtype=backbone.dtype).to(backbone.device).eval()
    if draft.config.vocab_size != backbone.vocab_size:
        raise ConfigError(
            f"--draft {name} has a vocabulary of {draft.config.vocab_size} tokens, the model {backbone.vocab_size}; "
            "assisted generation is compared with a draft of the same vocabulary"
        )
    return draft


def settings_of(config: DecodeConfig, backbone: Backbone, copy_rate: float) -> dict[str, Any]:
    return {
        "model": backbone.name,
        "heads": str(config.heads) if config.heads else "none",
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "quantization": backbone.quantization or "none",
        "device": hardware.device_name(backbone.device),
        "threads": torch.get_num_threads() if backbone.device.type == "cpu" else os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy rate, GB/s": round(copy_rate / 1e9, 1),
        "weights, GB": round(hardware.weight_bytes(backbone) / 1e9, 3),
        "context": config.context or "the prompts' own",
        "max tokens": config.max_tokens,
        "time budget, s": config.time_budget or "none",
    }
