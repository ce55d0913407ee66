"""The page pool: who refers to which page, which pages hold known text, and which is given up first. Host data only.

A page is free, in use by one or more sequences, or idle: in use by none, but kept because it holds text that another
request may begin with. Idle pages are given up when no free one is left, the least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

TRASH_PAGE = 0


class PagePool:
    """Pages 1 to `num_pages`; page 0 is the trash page, which nobody owns.

    Text is known by digest: `root_digest` (of what the cached values depend on beside the text, `salt`), then one link
    of the chain a page.
    """

    def __init__(self, num_pages: int, salt: str = "") -> None:
        self.num_pages = num_pages
        self.root_digest = hashlib.sha256(salt.encode()).digest()
        self._free = list(range(num_pages, 0, -1))
        self._references = [0] * (num_pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Pages that can be taken: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """So many pages for one owner, their content unknown; None, with nothing changed, when too few are left."""
        if count > self.num_available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of as many leading digests as are known, with one more reference each."""
        pages: list[int] = []
        for digest in digests:
            if (page := self._page_of.get(digest)) is None:
                break
            self._references[page] += 1
            self._idle.pop(page, None)
            pages.append(page)
        return pages

    def num_shareable_in_use(self, digests: Iterable[bytes]) -> int:
        """How many leading digests are known on pages that sharing would not take from the available ones."""
        count = 0
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None or not self._references[page]:
                break
            count += 1
        return count

    def register(self, page: int, digest: bytes) -> None:
        """Says what text a full page holds, and all before it. Of two pages with the same text the first is known."""
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Takes one reference away from each, the last page first: a text's end is given up before its beginning."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page


def chain(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a page's text and of all before it."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
