"""A backbone and cache of which this process holds one share, and tells the others what to do with theirs.

To the runner they are a backbone and a cache like any other: each pass and each move of keys and values is told to the
followers (`followers.py`), then done here. Sampling, heads, trees and sequences exist in this process alone.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from transformers import AutoConfig

from medusa.adapter import load_with_adapter, runs_merged
from medusa.attention import PackedRows, TreeAttention
from medusa.engine.followers import STEP_TIMEOUT_S, Followers
from medusa.engine.kv_cache import KVCache
from medusa.engine.messages import (
    Load,
    MakePages,
    MakeStep,
    Move,
    PlainPass,
    Proceed,
    TreePass,
    on_host,
)
from medusa.kernels.tree_attention import PagedTree
from medusa.model import Backbone, check_supported, default_device
from medusa.parallel import BACKENDS, ShardingError, join, leave, local_store, plan_of
from medusa.quantization import Quantization, QuantizationError
from medusa.weights import Hashing, model_directory

if TYPE_CHECKING:
    from medusa.engine.team import Lead


class ShardedBackbone(Backbone):
    """Rank 0's share. Without followers, as while it is loaded, it is an ordinary member of the group.

    `pages` are those of the cache made last: the followers have one cache, and so this backbone one engine at a time.
    """

    followers: Followers | None = None
    pages: torch.Tensor | None = None
    is_closed = False

    def trainable_hidden_states(self, input_ids_BT: torch.Tensor, rows: PackedRows | None = None) -> torch.Tensor:
        """As Backbone's, but for inference alone, and of rows apart."""
        if torch.is_grad_enabled() or rows is not None:
            raise ShardingError("a backbone shared out by tensor_parallel is not trained; load it whole")
        if self.followers is None:
            return super().trainable_hidden_states(input_ids_BT)
        with self.followers.together():
            self.followers.send(PlainPass(on_host(input_ids_BT)))
            return super().trainable_hidden_states(input_ids_BT)

    def tree_hidden_states(
        self, input_ids_BN: torch.Tensor, position_ids_BN: torch.Tensor, tree: TreeAttention
    ) -> torch.Tensor:
        """As Backbone's. Passes over pages are told; those of a GPU's step are told by the step."""
        if self.followers is None or not isinstance(tree, PagedTree):
            return super().tree_hidden_states(input_ids_BN, position_ids_BN, tree)
        check_pages(self, tree.cache)
        with self.followers.together():
            self.followers.send(TreePass.of(input_ids_BN, position_ids_BN, tree))
            return super().tree_hidden_states(input_ids_BN, position_ids_BN, tree)

    def close(self) -> None:
        """Ends the followers and the group, once: a group that is there later is another's."""
        if self.is_closed:
            return
        self.is_closed = True
        if self.followers is not None:
            self.followers.close()
        leave()


class ShardedKVCache(KVCache):
    """Rank 0's share of the pages; the others have as many, with their own heads in them."""

    def __init__(self, backbone: ShardedBackbone, *, num_pages: int, **sizes: Any) -> None:
        super().__init__(num_pages=num_pages, **sizes)
        assert backbone.followers is not None
        self._backbone, self._followers = backbone, backbone.followers
        with self._followers.together():
            self._followers.send(MakePages(num_pages))
            self._followers.expect_done()
        backbone.pages = self.data

    def move(self, source_2BD: torch.Tensor, target_2BD: torch.Tensor) -> None:
        """As KVCache.move, in every share."""
        check_pages(self._backbone, self.data)
        with self._followers.together():
            self._followers.send(Move(on_host(source_2BD), on_host(target_2BD)))
        super().move(source_2BD, target_2BD)


def check_pages(backbone: ShardedBackbone, pages: torch.Tensor) -> None:
    """Raises RuntimeError for the pages of a cache that another has replaced."""
    if pages is not backbone.pages:
        raise RuntimeError(
            f"another engine was built on this share of {backbone.name}, and its processes have one cache; build one "
            "engine on a backbone of load_sharded, or load it again"
        )


def followers_of(backbone: Backbone) -> Followers | None:
    """None for a backbone that one process has whole."""
    return backbone.followers if isinstance(backbone, ShardedBackbone) else None


def lead_of(backbone: Backbone) -> Callable[[MakeStep], Lead] | None:
    """What makes this process the first of a GPU's step; None for one alone."""
    from medusa.engine.team import Lead  # Triton is not installed everywhere

    followers, rank = followers_of(backbone), backbone.rank
    return None if followers is None or rank is None else partial(Lead, followers, rank)


def make_cache(backbone: Backbone, *, num_pages: int, max_batch_size: int, max_pages: int) -> KVCache:
    """The cache of this backbone's engine; where it is shared out, of every process."""
    sizes: dict[str, Any] = {
        "num_layers": backbone.num_layers,
        "kv_shape": backbone.kv_shape,
        "num_pages": num_pages,
        "max_batch_size": max_batch_size,
        "max_pages": max_pages,
        "dtype": backbone.dtype,
        "device": backbone.device,
        "salt": f"{backbone.name} {backbone.dtype} {backbone.quantization}",
    }
    if isinstance(backbone, ShardedBackbone) and backbone.followers is not None:
        return ShardedKVCache(backbone, **sizes)
    return KVCache(**sizes)


def load_sharded(
    name: str | Path,
    size: int,
    *,
    heads: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    hashing: Hashing | None = None,
) -> ShardedBackbone:
    """Starts `size` - 1 followers, and loads the model's shares in all processes at once. `hashing` is the model's
    digest, already under way.

    Raises UnsupportedModelError or ShardingError for a model that cannot be shared out so, before anything is started,
    and TensorParallelError when a follower fails.
    """
    chosen = default_device(device)
    if chosen.index not in (None, 0):
        raise ShardingError(
            f"tensor_parallel takes the first GPUs that are visible, got device={str(device)!r}; give 'cuda', and "
            "choose them by CUDA_VISIBLE_DEVICES"
        )
    device_type = chosen.type
    directory = model_directory(name)
    _check(directory, size, device_type, heads, hashing)
    followers = Followers.start(size - 1)
    try:
        with followers.together():
            backbone = _loaded_together(followers, name, directory, size, device_type, dtype, hashing)
    except BaseException:
        followers.close()
        leave()
        raise
    backbone.followers = followers
    if device_type == "cuda":
        followers.watch(leave)
    return backbone


def _check(directory: Path, size: int, device_type: str, heads: Path | None, hashing: Hashing | None) -> None:
    config = AutoConfig.from_pretrained(directory)
    check_supported(config)
    plan_of(config, size)
    if device_type not in BACKENDS:
        raise ShardingError(f"tensor_parallel needs one of the devices {sorted(BACKENDS)}, got {device_type!r}")
    if device_type == "cuda" and size > torch.cuda.device_count():
        raise ShardingError(f"tensor_parallel={size} needs a GPU each, and {torch.cuda.device_count()} are visible")
    if distributed.is_initialized():
        raise ShardingError(
            "this process has a torch.distributed group, of a trainer or of a tensor-parallel engine that was not "
            "closed; torch has one default group a process"
        )
    if heads is not None and runs_merged(hashing or Hashing(directory), heads):
        raise ShardingError(
            f"the heads in {heads} run on {directory} with their adapter merged, and a share cannot take it in; "
            "give the merged backbone (training's step wrote it; `medusa export` writes it)"
        )


def _loaded_together(
    followers: Followers,
    name: str | Path,
    directory: Path,
    size: int,
    device_type: str,
    dtype: torch.dtype | None,
    hashing: Hashing | None,
) -> ShardedBackbone:
    timeout = timedelta(seconds=STEP_TIMEOUT_S)
    store = local_store(size, timeout)
    followers.send_each(
        [
            Load(
                port=store.port,
                index=index,
                size=size,
                directory=str(directory),
                device_type=device_type,
                dtype=dtype,
                timeout_s=STEP_TIMEOUT_S,
                num_threads=torch.get_num_threads(),
            )
            for index in range(1, size)
        ]
    )

    followers.expect_done()

    def meet() -> None:
        followers.expect_done()
        followers.send(Proceed())

    rank = join(store, 0, size, device_type=device_type, timeout=timeout, meet=meet)
    return ShardedBackbone.from_pretrained(name, dtype=dtype, rank=rank, hashing=hashing)


def load_backbone(
    name: str | Path,
    heads: Path | None,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    quantization: Quantization | None,
    tensor_parallel: int,
    hashing: Hashing | None,
) -> Backbone:
    """The backbone that an engine runs these heads on: whole, or shared out among `tensor_parallel` processes.
    `hashing` is its digest, already under way; with heads it is begun here."""
    if isinstance(tensor_parallel, bool) or not isinstance(tensor_parallel, int) or tensor_parallel < 1:
        raise ValueError(f"tensor_parallel is a number of processes from 1 on, got {tensor_parallel!r}")
    if heads is not None and hashing is None:
        hashing = Hashing(model_directory(name))
    if tensor_parallel > 1:
        if quantization is not None:
            raise QuantizationError(
                f"quantization={quantization!r} and tensor_parallel={tensor_parallel} do not go together: a share's "
                "scales would be others than the whole's; give one of the two"
            )
        return load_sharded(name, tensor_parallel, heads=heads, device=device, dtype=dtype, hashing=hashing)
    if heads is None:
        return Backbone.from_pretrained(name, device=device, dtype=dtype, quantization=quantization, hashing=hashing)
    return load_with_adapter(name, heads, device=device, dtype=dtype, quantization=quantization, hashing=hashing)
