from __future__ import annotations

import random
from collections import Counter

import pytest

from medusa.loops import LoopFinder, cut_at_loop


def plain_cut(token_ids: list[int], n: int, repeats: int) -> int:
    """The rule by counting every n-gram of every prefix."""
    for end in range(n, len(token_ids) + 1):
        grams = Counter(tuple(token_ids[i : i + n]) for i in range(end - n + 1))
        if max(grams.values()) >= repeats:
            return end - n
    return len(token_ids)


def test_a_reply_without_a_loop_is_kept_whole() -> None:
    assert cut_at_loop([]) == 0
    assert cut_at_loop([1, 2, 3]) == 3
    assert cut_at_loop(list(range(50))) == 50
    assert cut_at_loop([1, 2, 3, 4, 9, 1, 2, 3, 4]) == 9  # twice is allowed


def test_the_third_occurrence_is_where_the_reply_ends() -> None:
    phrase = [5, 6, 7, 8]
    reply = [1, *phrase, 2, *phrase, 3, *phrase, 4]
    assert cut_at_loop(reply) == 11
    assert reply[:11] == [1, *phrase, 2, *phrase, 3]


def test_occurrences_may_overlap() -> None:
    assert cut_at_loop([7] * 100) == 2  # 7777 starts at 0, 1 and 2
    assert cut_at_loop([1, 2] * 20) == 4


@pytest.mark.parametrize(("n", "repeats"), [(4, 3), (2, 3), (1, 2), (3, 1)])
def test_equals_the_count_over_every_prefix(n: int, repeats: int) -> None:
    rng = random.Random(0)
    for _ in range(200):
        reply = [rng.randrange(4) for _ in range(rng.randrange(60))]
        assert cut_at_loop(reply, n, repeats) == plain_cut(reply, n, repeats)


def test_the_cut_is_known_as_soon_as_the_loop_is_written() -> None:
    reply = [1, 2, 3, 4, 5] * 3 + [9] * 5
    finder = LoopFinder()
    at = next(i for i, token_id in enumerate(reply) if finder.push(token_id))
    assert finder.cut == cut_at_loop(reply) == cut_at_loop(reply[: at + 1])
    assert finder.push(0) and finder.cut == cut_at_loop(reply)


def test_senseless_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="n=0"):
        cut_at_loop([1], n=0)
