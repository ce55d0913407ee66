"""The paged key-value cache: pages shared by all sequences, a table of pages for each row of the batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from medusa.engine.page_pool import TRASH_PAGE, PagePool
from medusa.engine.staging import staged

PAGE_SIZE = 64


class KVCache:
    """Keys and values of all layers in pages, [layers, 2, pages, page size, key-value heads, head size].

    Page 0 is the trash page: padding is written there and never read. The pool keeps the books on the host; the tables
    that a step reads, one a row of the batch and one of trash pages for padding, are on the device.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        kv_shape: tuple[int, int],
        num_pages: int,
        max_batch_size: int,
        max_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        salt: str = "",
    ) -> None:
        self.data = empty_pages(num_layers, num_pages, kv_shape, dtype, device)
        self.tables = torch.full((max_batch_size + 1, max_pages), TRASH_PAGE, dtype=torch.int32, device=device)
        self.pool = PagePool(num_pages, salt)
        self._owned: list[list[int]] = [[] for _ in range(max_batch_size)]
        self._known = [0] * max_batch_size

    def num_owned(self, row: int) -> int:
        """Pages in the row's table."""
        return len(self._owned[row])

    def num_known(self, row: int) -> int:
        """Leading pages of the row whose text the pool knows."""
        return self._known[row]

    def grow(self, row: int, num_tokens: int) -> bool:
        """Gives the row what it lacks of pages for `num_tokens` positions; False, with nothing changed, when too few
        are left."""
        missing = pages_for(num_tokens) - len(self._owned[row])
        pages = self.pool.take(max(missing, 0))
        if pages is None:
            return False
        self._extend(row, pages)
        return True

    def share(self, row: int, digests: Iterable[bytes]) -> int:
        """Puts pages of known text behind the row's own, as many leading digests as are known; returns how many."""
        pages = self.pool.share(digests)
        self._extend(row, pages)
        self._known[row] += len(pages)
        return len(pages)

    def register(self, row: int, digests: list[bytes]) -> None:
        """Says what text the row's first pages hold, one digest a full page."""
        for i in range(self._known[row], len(digests)):
            self.pool.register(self._owned[row][i], digests[i])
        self._known[row] = len(digests)

    def free(self, row: int) -> None:
        """Takes the row's pages back."""
        self.pool.release(self._owned[row])
        self._owned[row], self._known[row] = [], 0
        self.tables[row] = TRASH_PAGE

    def _extend(self, row: int, pages: list[int]) -> None:
        if pages:
            owned = self._owned[row]
            end = len(owned) + len(pages)
            self.tables[row, len(owned) : end] = staged(pages, torch.int32, self.tables.device)
            owned += pages

    def compact(self, rows_B: torch.Tensor, length_B: torch.Tensor, path_BD: torch.Tensor) -> None:
        """Moves the accepted nodes' keys and values next to the committed ones, in order, in all layers.

        The node at depth d of `path_BD` was written at length + path[d] and belongs at length + d; -1 moves nothing.
        """
        depth_D = torch.arange(path_BD.shape[1], device=path_BD.device)
        moved_BD = path_BD > depth_D
        source = self._locate(rows_B, length_B[:, None] + path_BD.clamp(min=0), moved_BD)
        target = self._locate(rows_B, length_B[:, None] + depth_D, moved_BD)
        self.move(torch.stack(source), torch.stack(target))

    def move(self, source_2BD: torch.Tensor, target_2BD: torch.Tensor) -> None:
        """Copies keys and values of all layers between places, each a page and a position in it."""
        move(self.data, source_2BD, target_2BD)

    def _locate(
        self, rows_B: torch.Tensor, position_BD: torch.Tensor, wanted_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pages_BD = self.tables[rows_B].long().gather(1, position_BD // PAGE_SIZE)
        return torch.where(wanted_BD, pages_BD, TRASH_PAGE), position_BD % PAGE_SIZE


def empty_pages(
    num_layers: int, num_pages: int, kv_shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`num_pages` and the trash page, as `KVCache` lays them out."""
    return torch.zeros(num_layers, 2, num_pages + 1, PAGE_SIZE, *kv_shape, dtype=dtype, device=device)


def move(data: torch.Tensor, source_2BD: torch.Tensor, target_2BD: torch.Tensor) -> None:
    """As `KVCache.move`, of such pages; indexing copies before it writes, so sources and targets may overlap."""
    data[:, :, target_2BD[0], target_2BD[1]] = data[:, :, source_2BD[0], source_2BD[1]]


def pages_for(num_tokens: int) -> int:
    """How many pages hold that many positions."""
    return (num_tokens + PAGE_SIZE - 1) // PAGE_SIZE
