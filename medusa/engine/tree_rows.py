"""Which token tree each batch row holds on the device; uploads only what changes.

Trees lie in an order in which any first nodes are a tree too. All trees of the policy are beginnings of one growth, so
a row that holds the growth needs no upload when its tree gets larger or smaller: only the count of nodes changes.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from medusa.engine.staging import staged, uploaded
from medusa.kernels.state import Trees
from medusa.tree import Path, TokenTree


@dataclass(frozen=True)
class _Template:
    """A tree in its order of upload, padded to a row."""

    parent_N: torch.Tensor
    depth_N: torch.Tensor
    rank_N: torch.Tensor
    bits_NW: torch.Tensor
    ancestors_NN: torch.Tensor


class TreeRows:
    """Keeps `trees` (the device tables) as the steps need them. `growth`: paths in the order in which trees grow."""

    def __init__(self, trees: Trees, growth: Items[Path] = ()) -> None:
        self._trees = trees
        self._device = trees.parent_RN.device
        self._held: dict[int, tuple[Path, ...]] = {}
        self.regrow(growth)

    def regrow(self, growth: Items[Path]) -> None:
        """Other trees grow from now on, in this order; rows hold what they held."""
        room = self._trees.parent_RN.shape[1]
        self._growth: tuple[Path, ...] = ((), *(tuple(path) for path in growth if path))[:room]
        self._templates: dict[tuple[Path, ...], _Template] = {}
        self._orders: dict[TokenTree, tuple[Path, ...]] = {}

    def place(self, rows: list[int], trees: Items[TokenTree]) -> list[int]:
        """Makes each row hold its tree; returns the counts of nodes."""
        changed: dict[tuple[Path, ...], list[int]] = {}
        for row, tree in zip(rows, trees, strict=True):
            order = self._order(tree)
            held = self._held.get(row, ((),))
            if held is not order and held[: tree.num_nodes] != order[: tree.num_nodes]:
                changed.setdefault(order, []).append(row)
                self._held[row] = order
        for order, its_rows in changed.items():
            self._write(self._template(order), its_rows)
        return [tree.num_nodes for tree in trees]

    def arranged(self, tree: TokenTree) -> tuple[torch.Tensor, torch.Tensor]:
        """The tree's ancestors [N, N] and depths [N] in the order in which its nodes lie on the device."""
        template, count = self._template(self._order(tree)), tree.num_nodes
        return template.ancestors_NN[:count, :count], template.depth_N[:count].long()

    def parents(self, tree: TokenTree) -> list[int]:
        """Each node's parent in that order; -1 for the root."""
        order = self._order(tree)[: tree.num_nodes]
        index = {path: node for node, path in enumerate(order)}
        return [index[path[:-1]] if path else -1 for path in order]

    def _order(self, tree: TokenTree) -> tuple[Path, ...]:
        if tree not in self._orders:
            begins = set(self._growth[: tree.num_nodes]) == set(tree.paths)
            self._orders[tree] = self._growth if begins else tree.paths
        return self._orders[tree]

    def _template(self, order: tuple[Path, ...]) -> _Template:
        if order not in self._templates:
            self._templates[order] = self._build(order)
        return self._templates[order]

    def _build(self, order: tuple[Path, ...]) -> _Template:
        room, words = self._trees.bits_RNW.shape[1:]
        if len(order) > room:
            raise ValueError(f"the tree has {len(order)} nodes, but a row has room for {room}")
        index = {path: node for node, path in enumerate(order)}
        parent = [index[path[:-1]] if path else -1 for path in order]
        ancestors = torch.eye(room, dtype=torch.bool)
        for node, above in enumerate(parent):
            if above >= 0:
                ancestors[node] |= ancestors[above]
        bit = torch.ones(64, dtype=torch.int64) << torch.arange(64)
        unused = self._trees.parent_RN.shape[1] - len(order)
        never = 1 << 20  # deeper than any heads guess

        def column(values: list[int], fill: int) -> torch.Tensor:
            return staged([*values, *[fill] * unused], torch.int32, self._device)

        return _Template(
            parent_N=column(parent, -1),
            depth_N=column([len(path) for path in order], never),
            rank_N=column([path[-1] if path else -1 for path in order], -1),
            bits_NW=uploaded((ancestors.view(room, words, 64).long() * bit).sum(-1), self._device),
            ancestors_NN=uploaded(ancestors, self._device),
        )

    def _write(self, template: _Template, rows: list[int]) -> None:
        index = staged(rows, torch.int64, self._device)
        self._trees.parent_RN[index] = template.parent_N
        self._trees.depth_RN[index] = template.depth_N
        self._trees.rank_RN[index] = template.rank_N
        self._trees.bits_RNW[index] = template.bits_NW
