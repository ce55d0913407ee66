"""What an engine can take: sizes that are settled when it starts, and the requests and trees they leave room for."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from medusa.checkpoint import Checkpoint
from medusa.engine.kv_cache import PAGE_SIZE, pages_for
from medusa.model import Backbone
from medusa.sampling import SamplingParams
from medusa.tree import TokenTree

MAX_NODES = 64  # the largest tree a step is sized for, unless the checkpoint has a larger one
GUESS_WIDTH = 10  # guesses a head, unless a tree needs more (Medusa's TOPK)
MAX_PREFILL_TOKENS = {"cuda": 512, "cpu": 256}  # what a token of the others waits for
FREE_MEMORY_SHARE = 0.85  # of what a GPU has free when the cache is made; the rest is for a step's own tensors


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of an engine. Without heads `num_heads` is 0."""

    max_batch_size: int
    max_model_len: int
    max_nodes: int
    max_prefill_tokens: int
    num_pages: int
    num_heads: int
    guess_width: int
    vocab_size: int

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        checkpoint: Checkpoint | None,
        trees: Items[TokenTree],
        *,
        max_batch_size: int,
        max_model_len: int | None,
        max_prefill_tokens: int | None,
        kv_cache_gb: float | None,
    ) -> Limits:
        """Raises ValueError for sizes that are out of range, or a cache too small for any sequence."""
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if max_model_len is not None and not 2 <= max_model_len <= backbone.max_positions:
            raise ValueError(
                f"max_model_len must be 2 to the model's {backbone.max_positions} positions, got {max_model_len}"
            )
        if max_prefill_tokens is not None and max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens must be at least 1, got {max_prefill_tokens}")
        max_model_len = max_model_len or backbone.max_positions
        max_nodes = max([MAX_NODES, *(tree.num_nodes for tree in trees)])
        most_pages = max_batch_size * pages_for(max_model_len + max_nodes)
        widest = max([GUESS_WIDTH - 1, *(tree.max_rank for tree in trees)]) + 1
        return cls(
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
            max_nodes=max_nodes,
            max_prefill_tokens=max_prefill_tokens or MAX_PREFILL_TOKENS[backbone.device.type],
            num_pages=_num_pages(backbone, most_pages, pages_for(2 + max_nodes), kv_cache_gb),
            num_heads=checkpoint.config.num_heads if checkpoint else 0,
            guess_width=min(widest, checkpoint.config.head_vocab_size) if checkpoint else 1,
            vocab_size=backbone.vocab_size,
        )

    def with_heads(self, checkpoint: Checkpoint, trees: Items[TokenTree]) -> Limits:
        """The same sizes with other heads. Raises ValueError for trees that they leave no room for."""
        widest = max([GUESS_WIDTH - 1, *(tree.max_rank for tree in trees)]) + 1
        guess_width = min(widest, checkpoint.config.head_vocab_size)
        limits = replace(self, num_heads=checkpoint.config.num_heads, guess_width=guess_width)
        for tree in trees:
            limits.check_tree(tree)
        if limits.table_width > self.table_width:
            raise ValueError(
                f"{limits.num_heads} heads write further ahead than this engine's {self.num_heads}; start it with them"
            )
        return limits

    def max_new_tokens(self, prompt_ids: Items[int], params: SamplingParams) -> int:
        """How long the reply can become before its request or the context ends it."""
        return min(params.max_tokens, self.max_model_len - len(prompt_ids))

    def pages_needed(self, num_tokens: int) -> int:
        """Pages of a sequence that commits so many tokens: a step writes its tree behind them."""
        return pages_for(num_tokens + self.max_nodes)

    @property
    def table_width(self) -> int:
        """Pages of the longest sequence, with a step in flight before the last one."""
        return self.pages_needed(self.max_model_len + self.num_heads + 1)

    @property
    def most_prefill_tokens(self) -> int:
        """Of one step: `max_prefill_tokens` for each token that it can give a sequence."""
        return self.max_prefill_tokens * (self.num_heads + 1)

    def check_request(self, prompt_ids: Items[int], params: SamplingParams) -> None:
        """Raises ValueError for a request that could never run."""
        if not prompt_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(prompt_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, but the context holds {self.max_model_len} with the reply; "
                f"give at most {self.max_model_len - 1}"
            )
        asked = (*prompt_ids, *params.logit_bias, *params.stop_token_ids)
        unknown = [token for token in asked if not 0 <= token < self.vocab_size]
        if unknown:
            raise ValueError(f"token ids {unknown[:5]} are outside the vocabulary of {self.vocab_size} tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if (wanted := getattr(params, name)) is not None and wanted > self.vocab_size:
                raise ValueError(f"{name}={wanted} asks for more tokens than the vocabulary's {self.vocab_size}")
        needed = self.pages_needed(len(prompt_ids) + self.max_new_tokens(prompt_ids, params))
        if needed > self.num_pages:
            raise ValueError(
                f"the request can need {needed} pages of {PAGE_SIZE} tokens, but the cache holds {self.num_pages}; "
                "lower max_tokens or raise kv_cache_gb"
            )

    def check_tree(self, tree: TokenTree) -> None:
        """Raises ValueError for a tree that the heads or the cache cannot carry."""
        if tree.max_depth > self.num_heads:
            raise ValueError(
                f"the tree of {tree.num_nodes} nodes is {tree.max_depth} deep, but this engine has {self.num_heads} "
                "Medusa heads; every level needs one"
            )
        if tree.max_rank >= self.guess_width:
            raise ValueError(
                f"the tree uses rank {tree.max_rank}, but heads give {self.guess_width} guesses, from 0 on"
            )
        if tree.num_nodes > self.max_nodes:
            raise ValueError(f"the tree has {tree.num_nodes} nodes, but this engine is sized for {self.max_nodes}")


def _num_pages(backbone: Backbone, most_pages: int, least_pages: int, kv_cache_gb: float | None) -> int:
    """Pages of the cache: as asked, or what rows of the longest sequences fill; on a GPU as much again, as far as it
    has memory free, for text to be found in later."""
    if kv_cache_gb is not None:
        source, num_bytes = f"kv_cache_gb={kv_cache_gb}", kv_cache_gb * 2**30
    elif backbone.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(backbone.device)
        source = f"{FREE_MEMORY_SHARE:.0%} of the GPU's {free_bytes / 2**30:.2f} GiB of free memory"
        num_bytes = FREE_MEMORY_SHARE * free_bytes
    else:
        return most_pages
    heads, head_size = backbone.kv_shape
    page_bytes = 2 * backbone.num_layers * PAGE_SIZE * heads * head_size * backbone.dtype.itemsize
    num_pages = int(num_bytes / page_bytes) - 1  # one is the trash page
    if num_pages < least_pages:
        raise ValueError(
            f"{source} holds {num_pages} pages of {PAGE_SIZE} tokens, but one sequence needs {least_pages} at least; "
            f"give more\nmemory: {page_bytes} bytes a page (keys and values of {backbone.num_layers} layers, {heads} "
            f"heads of {head_size}, {backbone.dtype}), {(least_pages + 1) * page_bytes / 2**30:.6f} GiB at least, "
            f"{(most_pages + 1) * page_bytes / 2**30:.6f} GiB for a full batch of the longest sequences"
        )
    return num_pages if kv_cache_gb is not None else min(num_pages, 2 * most_pages)
