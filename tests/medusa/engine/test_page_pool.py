"""The pool's books: every page is free, in use or idle, and idle ones are given up the least recently used first."""

from __future__ import annotations

import random

import pytest

from medusa.engine.page_pool import TRASH_PAGE, PagePool, chain


def digests_of(pool, text, count):
    """A chain of so many pages of a text that a letter stands for."""
    digests = []
    for i in range(count):
        digests.append(chain(digests[-1] if digests else pool.root_digest, [ord(text), i]))
    return digests


def keep(pool, text, count):
    """Takes pages, fills them with the text and lets them go."""
    pages = pool.take(count)
    for page, digest in zip(pages, digests_of(pool, text, count), strict=True):
        pool.register(page, digest)
    pool.release(pages)
    return pages


def known(pool, text, count):
    """How many of the text's pages could be shared, leaving things as they are but for the order of use."""
    pages = pool.share(digests_of(pool, text, count))
    pool.release(pages)
    return len(pages)


def test_pages_are_taken_once_and_come_back():
    pool = PagePool(4)
    pages = pool.take(3)
    assert len(set(pages)) == 3 and TRASH_PAGE not in pages
    assert (pool.num_used, pool.num_available, pool.num_idle) == (3, 1, 0)
    assert pool.take(2) is None and pool.num_available == 1
    pool.release(pages)
    assert (pool.num_used, pool.num_available) == (0, 4)
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    assert pool.take(0) == []


def test_known_text_is_shared_by_count_of_its_users():
    pool = PagePool(6)
    pages = keep(pool, "a", 3)
    assert (pool.num_used, pool.num_idle, pool.num_available) == (0, 3, 6)
    digests = digests_of(pool, "a", 5)
    first, second = pool.share(digests), pool.share(digests[:2])
    assert first == pages and second == pages[:2]
    assert (pool.num_used, pool.num_idle) == (3, 0)
    pool.release(first)
    assert (pool.num_used, pool.num_idle) == (2, 1)
    pool.release(second)
    assert pool.num_idle == 3


def test_sharing_ends_at_the_first_unknown_page():
    pool = PagePool(6)
    keep(pool, "a", 3)
    digests = digests_of(pool, "a", 3)
    assert pool.share([digests[0], b"unknown", digests[1]]) == [pool._page_of[digests[0]]]


def test_free_pages_go_first_then_the_text_that_was_used_longest_ago_from_its_end():
    pool = PagePool(6)
    a, b = keep(pool, "a", 2), keep(pool, "b", 2)
    assert not {*pool.take(2)} & {*a, *b}
    assert known(pool, "a", 2) == 2  # and a is now the last used
    assert pool.take(1) == [b[1]] and known(pool, "b", 2) == 1
    pool.share(digests_of(pool, "b", 1))
    assert pool.take(1) == [a[1]]
    assert (known(pool, "a", 2), known(pool, "b", 2)) == (1, 1)


def test_a_page_in_use_is_never_given_up():
    pool = PagePool(3)
    pages = keep(pool, "a", 2)
    held = pool.share(digests_of(pool, "a", 1))
    assert pool.take(3) is None
    assert {*pool.take(2)} == {1, 2, 3} - {*held} and held == pages[:1]
    assert known(pool, "a", 2) == 1


def test_of_two_pages_with_one_text_the_first_stays_known():
    pool = PagePool(4)
    first = keep(pool, "a", 1)
    second = pool.take(1)
    pool.register(second[0], digests_of(pool, "a", 1)[0])
    assert pool.share(digests_of(pool, "a", 1)) == first
    pool.release(second)
    assert pool.num_idle == 0 and pool.num_available == 3  # the second is plainly free


def test_a_chain_tells_texts_apart_by_what_precedes_them_and_pools_by_their_salt():
    pool, other = PagePool(1, "one model"), PagePool(1, "another")
    assert chain(pool.root_digest, [1, 2]) == chain(PagePool(9, "one model").root_digest, [1, 2])
    assert chain(pool.root_digest, [1, 2]) != chain(other.root_digest, [1, 2])
    assert chain(chain(pool.root_digest, [1]), [2]) != chain(chain(pool.root_digest, [3]), [2])
    assert chain(pool.root_digest, [1, 256]) != chain(pool.root_digest, [1, 0, 1])


@pytest.mark.parametrize("seed", range(5))
def test_a_long_life_keeps_the_books(seed):
    rng, pool, held = random.Random(seed), PagePool(12), []
    for _ in range(600):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            text = digests_of(pool, rng.choice("abcd"), rng.randrange(1, 5))
            pages = pool.share(text)
            if (fresh := pool.take(len(text) - len(pages))) is None:
                pool.release(pages)
                continue
            for page, digest in zip(pages + fresh, text, strict=True):
                pool.register(page, digest)
            held.append(pages + fresh)
        used = {page for pages in held for page in pages}
        assert len(used) == pool.num_used
        assert pool.num_used + pool.num_available == 12
        assert all(pool._references[page] == sum(pages.count(page) for pages in held) for page in range(1, 13))
        assert {*pool._free, *pool._idle}.isdisjoint(used)
        assert len(pool._page_of) == len(pool._digest_of) and pool._digest_of.keys() <= {*pool._idle, *used}
