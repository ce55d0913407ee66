"""What an engine guesses with: its heads, their trees, and the sizes that it has for both."""

from __future__ import annotations

from dataclasses import dataclass

from medusa.checkpoint import Checkpoint, CheckpointMeta
from medusa.engine.limits import Limits
from medusa.growth import GrownTree, grown_tree
from medusa.tree import TokenTree


@dataclass(frozen=True)
class Drafting:
    """The heads in use, their ladder of trees, and how the largest of these grows. Without heads there are neither, and
    decoding is plain."""

    checkpoint: Checkpoint | None
    trees: tuple[TokenTree, ...]
    grown: GrownTree | None
    limits: Limits

    def with_heads(self, checkpoint: Checkpoint) -> Drafting:
        """The same with other heads. Raises ValueError for heads or trees that there is no room for."""
        trees = ladder_of(checkpoint.meta)
        return Drafting(checkpoint, trees, grown_tree(checkpoint.meta), self.limits.with_heads(checkpoint, trees))

    def has_shape_of(self, checkpoint: Checkpoint) -> bool:
        """Whether these heads fit into the buffers of the ones in use."""
        assert self.checkpoint is not None
        limits = self.limits.with_heads(checkpoint, ladder_of(checkpoint.meta))
        kind, other = ((c.meta.head_kind, c.config) for c in (self.checkpoint, checkpoint))
        return kind == other and limits == self.limits


def ladder_of(meta: CheckpointMeta) -> tuple[TokenTree, ...]:
    """The checkpoint's trees, smallest first and always with the single root; empty without calibration."""
    if meta.calibration is None or not meta.trees:
        return ()
    trees = {TokenTree.root(), *(TokenTree.from_paths(paths) for paths in meta.trees)}
    return tuple(sorted(trees, key=lambda tree: tree.num_nodes))
