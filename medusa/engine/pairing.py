"""That heads and backbone belong together, found out at an engine's start while the weights are still being hashed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from medusa.checkpoint import CheckpointMeta, check_pair
from medusa.model import Backbone


@contextmanager
def pair_checked(meta: CheckpointMeta, backbone: Backbone, tokenizer_digest: str) -> Iterator[None]:
    """`check_pair` for a block that builds on the pair: before it or, while the weights are still being hashed, after
    it. Nothing that the block has built is to be used before it has ended.

    A block that fails is checked too: heads of another backbone are then what is raised.
    """
    if not _can_be_checked_late(meta, backbone):
        check_pair(meta, backbone, tokenizer_digest)
        yield
        return
    try:
        yield
    except Exception:
        check_pair(meta, backbone, tokenizer_digest)
        raise
    check_pair(meta, backbone, tokenizer_digest)


def _can_be_checked_late(meta: CheckpointMeta, backbone: Backbone) -> bool:
    """Whether building on the pair does no harm where it is none: kernels trust the heads' sizes, and what several
    processes have built together cannot be let go like an object."""
    fits = (meta.heads.hidden_size, meta.heads.vocab_size) == (backbone.hidden_size, backbone.vocab_size)
    return fits and backbone.rank is None and backbone.hashing is not None and not backbone.hashing.is_done
