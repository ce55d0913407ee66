"""The paged key-value cache: pages shared by all sequences, a table of pages for each row of the batch."""

from __future__ import annotations

import torch

PAGE_SIZE = 64
TRASH_PAGE = 0


class KVCache:
    """Keys and values of all layers in pages, [layers, 2, pages, page size, key-value heads, head size].

    Page 0 is the trash page: padding is written there and never read. Host lists own the free pages; the tables that a
    step reads are on the device.
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
    ) -> None:
        self.data = torch.zeros(num_layers, 2, num_pages + 1, PAGE_SIZE, *kv_shape, dtype=dtype, device=device)
        self.tables = torch.full((max_batch_size, max_pages), TRASH_PAGE, dtype=torch.int64, device=device)
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._owned: dict[int, list[int]] = {}

    @property
    def pages_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, row: int, num_tokens: int) -> bool:
        """Gives the batch row pages for `num_tokens` positions; False, with nothing changed, when too few are free."""
        needed = pages_for(num_tokens)
        if needed > len(self._free):
            return False
        pages = [self._free.pop() for _ in range(needed)]
        self._owned[row] = pages
        self.tables[row] = TRASH_PAGE
        self.tables[row, :needed] = torch.tensor(pages, device=self.tables.device)
        return True

    def free(self, row: int) -> None:
        """Takes the row's pages back."""
        self._free.extend(reversed(self._owned.pop(row)))
        self.tables[row] = TRASH_PAGE

    def compact(self, rows_B: torch.Tensor, length_B: torch.Tensor, path_BD: torch.Tensor) -> None:
        """Moves the accepted nodes' keys and values next to the committed ones, in order, in all layers.

        The node at depth d of `path_BD` was written at length + path[d] and belongs at length + d; -1 moves nothing.
        """
        depth_D = torch.arange(path_BD.shape[1], device=path_BD.device)
        moved_BD = path_BD > depth_D
        source = self._locate(rows_B, length_B[:, None] + path_BD.clamp(min=0), moved_BD)
        target = self._locate(rows_B, length_B[:, None] + depth_D, moved_BD)
        # Indexing copies before it writes, so overlapping sources and targets are safe.
        self.data[:, :, target[0], target[1]] = self.data[:, :, source[0], source[1]]

    def _locate(
        self, rows_B: torch.Tensor, position_BD: torch.Tensor, wanted_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pages_BD = self.tables[rows_B].gather(1, position_BD // PAGE_SIZE)
        return torch.where(wanted_BD, pages_BD, TRASH_PAGE), position_BD % PAGE_SIZE


def pages_for(num_tokens: int) -> int:
    """How many pages hold that many positions."""
    return (num_tokens + PAGE_SIZE - 1) // PAGE_SIZE
