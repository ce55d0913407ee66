"""Who runs: in order of arrival, each with pages for its whole reply, and everything given back."""

from __future__ import annotations

import pytest
import torch

from medusa import SamplingParams
from medusa.engine.kv_cache import PAGE_SIZE, KVCache
from medusa.engine.scheduler import Scheduler
from medusa.engine.sequence import Sequence
from medusa.tokenizer import ChatTokenizer

MAX_NODES = 8


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return ChatTokenizer(make_tokenizer())


@pytest.fixture
def scheduler():
    """Three rows and ten pages."""
    cache = KVCache(
        num_layers=1,
        kv_shape=(1, 2),
        num_pages=10,
        max_batch_size=3,
        max_pages=10,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return Scheduler(cache, max_batch_size=3, max_nodes=MAX_NODES)


@pytest.fixture
def wait(scheduler, tokenizer):
    """Puts a request of so many pages in line."""

    def wait(request_id, pages=1, index=0):
        prompt = [5] * (pages * PAGE_SIZE - MAX_NODES - 1)
        sequence = Sequence(
            request_id, index, prompt, SamplingParams(max_tokens=1), seed=0, tokenizer=tokenizer, max_new_tokens=1
        )
        scheduler.waiting.append(sequence)
        return sequence

    return wait


def names(sequences):
    return "".join(sequence.request_id for sequence in sequences)


def pages_used(scheduler):
    return scheduler._cache.pages_used


def test_sequences_run_in_order_while_rows_last(scheduler, wait):
    sequences = [wait(name) for name in "abcd"]
    assert names(scheduler.admit()) == names(scheduler.running) == "abc"
    assert names(scheduler.waiting) == "d"
    assert sorted(sequence.row for sequence in sequences[:3]) == [0, 1, 2] and sequences[3].row == -1
    assert scheduler.admit() == []


def test_a_finished_sequence_makes_room_for_the_next(scheduler, wait):
    a, *_ = [wait(name) for name in "abcd"]
    scheduler.admit()
    row = a.row
    assert names(scheduler.unfinished) == "abc"
    a.append([9])
    assert names(scheduler.unfinished) == "bc" and names(scheduler.running) == "abc"
    scheduler.retire()
    assert names(scheduler.running) == "bc" and a.row == -1
    assert names(scheduler.admit()) == "d" and scheduler.running[-1].row == row


def test_pages_are_reserved_for_prompt_reply_and_tree(scheduler, wait):
    wait("a", pages=4)
    scheduler.admit()
    assert pages_used(scheduler) == 4
    one_more = wait("b", pages=4)
    one_more.max_new_tokens += 1
    scheduler.admit()
    assert pages_used(scheduler) == 4 + 5


def test_a_large_request_that_does_not_fit_yet_is_not_overtaken(scheduler, wait):
    """Otherwise small ones could keep it waiting for ever."""
    a, _, _ = wait("a", pages=6), wait("b", pages=5), wait("c", pages=1)
    assert names(scheduler.admit()) == "a"
    assert names(scheduler.waiting) == "bc" and pages_used(scheduler) == 6
    a.append([9])
    scheduler.retire()
    assert names(scheduler.admit()) == "bc" and pages_used(scheduler) == 6


def test_a_request_is_taken_out_wherever_its_replies_are(scheduler, wait):
    for name, index in [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0)]:
        wait(name, index=index)
    scheduler.admit()
    assert scheduler.holds("b") and not scheduler.holds("x")
    assert sorted(sequence.index for sequence in scheduler.remove("b")) == [0, 1, 2]
    assert names(scheduler.running) == "a" and names(scheduler.waiting) == "c"
    assert pages_used(scheduler) == 1 and not scheduler.holds("b")
    assert scheduler.remove("b") == []
    assert names(scheduler.admit()) == "c"


def test_rows_and_pages_all_come_back(scheduler, wait):
    for round_ in range(20):
        sequences = [wait(name, pages=1 + (round_ + i) % 4) for i, name in enumerate("abcd")]
        scheduler.admit()
        for sequence in sequences[: 2 * (round_ % 2)]:
            sequence.append([9])
        scheduler.retire()
        if round_ % 3:
            for name in "abcd":
                scheduler.remove(name)
        else:
            scheduler.clear()
        assert pages_used(scheduler) == 0 and not scheduler.running and not scheduler.waiting
    for name in "abc":
        wait(name, pages=3)
    assert names(scheduler.admit()) == "abc"
