"""Attention of tree nodes over paged keys and values: committed tokens of the sequence, then the node's ancestors.

This is the torch reference, and what runs on a CPU. Shapes: B sequences, N nodes, T cached positions looked at,
H heads (the cache may hold fewer, grouped), D head size, P pages of S positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional


@dataclass
class PagedTree:
    """One step's nodes against one cache. Node n of a sequence is written at its committed length + n, invalid nodes
    on the trash page, where nothing is ever read.

    `tables_BP` are the sequences' pages, `length_B` their committed tokens, `cache` the keys and values of all layers,
    [layers, 2, pages, S, H, D].
    """

    cache: torch.Tensor
    tables_BP: torch.Tensor
    length_B: torch.Tensor
    depth_BN: torch.Tensor
    valid_BN: torch.Tensor
    ancestors_BNN: torch.Tensor
    trash_page: int = 0
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        page_size = self.cache.shape[3]
        num_nodes = self.depth_BN.shape[1]
        self._num_pages = (int(self.length_B.max()) + num_nodes + page_size - 1) // page_size
        self._tables = self.tables_BP[:, : self._num_pages].flatten()
        position_BN = self.length_B[:, None] + torch.arange(num_nodes, device=self.length_B.device)
        pages_BN = self.tables_BP.gather(1, position_BN // page_size)
        self._pages_BN = torch.where(self.valid_BN, pages_BN, self.trash_page)
        self._offsets_BN = position_BN % page_size
        self._position_BN = position_BN
        self._dead = self._columns_without_content()

    def attend(
        self,
        layer: int,
        query_BHND: torch.Tensor,
        key_BHND: torch.Tensor,
        value_BHND: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Writes the nodes' keys and values, then attends: [B, N, H, D]."""
        groups = query_BHND.shape[1] // key_BHND.shape[1]
        mask = self._mask(sliding_window, groups, query_BHND.dtype)
        keys = self._extended(self.cache[layer, 0], key_BHND)
        values = self._extended(self.cache[layer, 1], value_BHND)
        return _grouped_attention(query_BHND, keys, values, mask, scaling, softcap)

    def _extended(self, pool: torch.Tensor, new_BHND: torch.Tensor) -> torch.Tensor:
        """Writes the nodes' rows into a layer's pages, then reads the sequences' pages: [B, H, T, D]."""
        pool[self._pages_BN, self._offsets_BN] = new_BHND.transpose(1, 2)
        pages = pool.index_select(0, self._tables)  # several times as fast as indexing
        # Whatever a page held before may be NaN or infinite, which no mask takes out of a product.
        pages.view(-1, *pool.shape[2:]).index_fill_(0, self._dead, 0.0)
        return pages.view(len(new_BHND), -1, *pool.shape[2:]).transpose(1, 2)

    def _columns_without_content(self) -> torch.Tensor:
        """The read positions that neither committed tokens nor this step's nodes fill, as indices into [B * T]."""
        column_T = torch.arange(self._num_pages * self.cache.shape[3], device=self.length_B.device)
        filled_BT = (column_T < self.length_B[:, None]).scatter_(1, self._position_BN, self.valid_BN)
        return (~filled_BT).flatten().nonzero()[:, 0]

    def _mask(self, sliding_window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """What each node sees, to be added to its scores, [B, 1, groups * N, T]; built once a step for each window."""
        if sliding_window not in self._masks:
            hidden_BNT = ~self._visible(sliding_window)
            mask_BNT = torch.zeros(hidden_BNT.shape, dtype=dtype, device=hidden_BNT.device)
            mask_BNT.masked_fill_(hidden_BNT, float("-inf"))
            self._masks[sliding_window] = mask_BNT.repeat(1, groups, 1)[:, None]
        return self._masks[sliding_window]

    def _visible(self, sliding_window: int | None) -> torch.Tensor:
        column = torch.arange(self._num_pages * self.cache.shape[3], device=self.length_B.device)
        shape_BNN = self.ancestors_BNN.shape
        committed_BT = column < self.length_B[:, None]
        visible_BNT = committed_BT[:, None].repeat(1, shape_BNN[1], 1)
        visible_BNT.scatter_(2, self._position_BN[:, None].expand(shape_BNN), self.ancestors_BNN)
        if sliding_window is not None:
            # Distances count depth, not slots: two nodes of one depth stand at the same position.
            node_position_BN = self.length_B[:, None] + self.depth_BN
            column_position_BT = column.repeat(shape_BNN[0], 1).scatter_(1, self._position_BN, node_position_BN)
            visible_BNT &= node_position_BN[:, :, None] - column_position_BT[:, None] < sliding_window
        return visible_BNT


def _grouped_attention(
    query_BHND: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    mask_B1MT: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Masked attention; the G query heads that share a key head become its rows, M = G * N, so no key is repeated."""
    batch, heads, nodes, size = query_BHND.shape
    packed = query_BHND.reshape(batch, key_BHTD.shape[1], -1, size)
    if softcap is None:
        out = functional.scaled_dot_product_attention(packed, key_BHTD, value_BHTD, attn_mask=mask_B1MT, scale=scaling)
    else:
        scores = (packed.float() @ key_BHTD.float().transpose(-1, -2)) * scaling
        scores = softcap * torch.tanh(scores / softcap) + mask_B1MT
        out = (scores.softmax(-1) @ value_BHTD.float()).to(query_BHND.dtype)
    return out.reshape(batch, heads, nodes, size).transpose(1, 2).contiguous()
