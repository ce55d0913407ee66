"""Who runs and on which pages: in order of age, pages as they are needed, the youngest giving way to the oldest."""

from __future__ import annotations

import random

import pytest
import torch

from medusa import SamplingParams, TokenTree
from medusa.engine.kv_cache import PAGE_SIZE, KVCache
from medusa.engine.scheduler import Scheduler
from medusa.engine.sequence import Sequence
from medusa.tokenizer import ChatTokenizer

MAX_NODES = 8
ROOT = TokenTree.root()
CHAIN = TokenTree.from_paths([(0,), (0, 0), (0, 0, 0)])


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return ChatTokenizer(make_tokenizer())


@pytest.fixture
def new_scheduler():
    def new_scheduler(num_pages=10, max_batch_size=3, max_prefill_tokens=10_000):
        cache = KVCache(
            num_layers=1,
            kv_shape=(1, 2),
            num_pages=num_pages,
            max_batch_size=max_batch_size,
            max_pages=num_pages + 1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        return Scheduler(
            cache, max_batch_size=max_batch_size, max_nodes=MAX_NODES, max_prefill_tokens=max_prefill_tokens
        )

    return new_scheduler


@pytest.fixture
def scheduler(new_scheduler):
    """Three rows and ten pages."""
    return new_scheduler()


@pytest.fixture
def wait(tokenizer):
    """Puts a request in line whose prompt and first tree take so many pages; by default no two begin alike."""

    def wait(scheduler, request_id, pages=1, index=0, max_new_tokens=1000, prompt=None, priority=0):
        if prompt is None:
            prompt = [ord(request_id)] * (pages * PAGE_SIZE - MAX_NODES)
        sequence = Sequence(
            request_id,
            index,
            prompt,
            SamplingParams(max_tokens=max_new_tokens, priority=priority),
            seed=0,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
        )
        scheduler.add(sequence)
        return sequence

    return wait


def names(sequences):
    return "".join(sequence.request_id for sequence in sequences)


def pool(scheduler):
    return scheduler._cache.pool


def step(scheduler, tree=ROOT, gives=1):
    """Plans a step and does on the host what the loop does: each decoding sequence gains `gives` tokens."""
    plan = scheduler.schedule(lambda sequences: [tree] * len(sequences))
    for chunk in plan.chunks:
        scheduler.note_launch(chunk)
        if chunk.gives_token:
            chunk.sequence.append([200], decoded=False)
    for sequence in plan.decoding:
        sequence.append([201] * gives)
        sequence.num_cached = min(sequence.num_cached + gives, sequence.num_tokens)
        scheduler.register(sequence)
    scheduler.retire()
    return plan


# Rows and the queue


def test_sequences_run_in_order_while_rows_last(scheduler, wait):
    sequences = [wait(scheduler, name) for name in "abcd"]
    assert names(scheduler.admit()) == names(scheduler.running) == "abc"
    assert names(scheduler.waiting) == "d"
    assert sorted(sequence.row for sequence in sequences[:3]) == [0, 1, 2] and sequences[3].row == -1
    assert scheduler.admit() == []


def test_a_finished_sequence_makes_room_for_the_next(scheduler, wait):
    a, *_ = [wait(scheduler, name, max_new_tokens=1) for name in "abcd"]
    scheduler.admit()
    row = a.row
    a.append([9])
    scheduler.retire()
    assert names(scheduler.running) == "bc" and a.row == -1
    assert names(scheduler.admit()) == "d" and scheduler.running[-1].row == row


def test_a_lower_priority_comes_first_and_age_decides_within_one(scheduler, wait):
    for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5), ("f", -1)]:
        wait(scheduler, name, priority=priority)
    assert names(scheduler.waiting) == "dfacbe"
    assert names(scheduler.admit()) == "dfa"


def test_an_urgent_latecomer_keeps_its_pages_and_a_patient_one_gives_way(scheduler, wait):
    """It is the last to have come, but not the last in turn."""
    for name, priority in [("a", 5), ("b", 5)]:
        wait(scheduler, name, pages=4, priority=priority)
    step(scheduler)
    wait(scheduler, "c", pages=2, priority=0)
    step(scheduler)
    assert names(scheduler.running) == "cab"
    for _ in range(MAX_NODES):
        step(scheduler)
    assert names(scheduler.running) == "ca" and names(scheduler.waiting) == "b"
    wait(scheduler, "d", priority=5)
    assert names(scheduler.waiting) == "bd"
    scheduler.remove("c")
    scheduler.remove("a")
    assert names(scheduler.admit()) == "bd"


def test_a_large_request_that_does_not_fit_yet_is_not_overtaken(scheduler, wait):
    """Otherwise small ones could keep it waiting for ever."""
    for name, pages in [("a", 6), ("b", 5), ("c", 1)]:
        wait(scheduler, name, pages=pages)
    assert names(scheduler.admit()) == "a"
    assert names(scheduler.waiting) == "bc"
    step(scheduler)
    assert names(scheduler.running) == "a"
    scheduler.remove("a")
    assert names(scheduler.admit()) == "bc"


def test_pages_promised_to_prompts_that_are_being_filled_are_not_promised_again(new_scheduler, wait):
    scheduler = new_scheduler(max_prefill_tokens=PAGE_SIZE)
    for name, pages in [("a", 5), ("b", 5), ("c", 1)]:
        wait(scheduler, name, pages=pages)
    step(scheduler)
    assert names(scheduler.running) == "ab" and pool(scheduler).num_used == 1
    for _ in range(10):
        step(scheduler)
    assert scheduler.num_preemptions == 0


def test_a_request_is_taken_out_wherever_its_replies_are(scheduler, wait):
    for name, index in [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0)]:
        wait(scheduler, name, index=index)
    step(scheduler)
    assert scheduler.holds("b") and not scheduler.holds("x")
    assert sorted(sequence.index for sequence in scheduler.remove("b")) == [0, 1, 2]
    assert names(scheduler.running) == "a" and names(scheduler.waiting) == "c"
    assert pool(scheduler).num_used == 1 and not scheduler.holds("b")
    assert scheduler.remove("b") == []
    assert names(scheduler.admit()) == "c"


def test_rows_and_pages_all_come_back(scheduler, wait):
    for round_ in range(20):
        sequences = [wait(scheduler, name, pages=1 + (round_ + i) % 4) for i, name in enumerate("abcd")]
        step(scheduler)
        for sequence in sequences[: 2 * (round_ % 2)]:
            sequence.finish_reason = "stop"
        scheduler.retire()
        if round_ % 3:
            for name in "abcd":
                scheduler.remove(name)
        else:
            scheduler.clear()
        assert pool(scheduler).num_used == 0 and not scheduler.running and not scheduler.waiting
        assert pool(scheduler).num_available == 10
    assert sorted(scheduler._rows) == [0, 1, 2]


# Pages


def test_pages_come_with_the_tokens_and_the_next_tree(scheduler, wait):
    wait(scheduler, "a", prompt=[5] * 60)
    used = []
    for _ in range(80):
        step(scheduler, CHAIN)  # writes four positions, commits one
        used.append(pool(scheduler).num_used)
    assert used[:2] == [1, 2]  # 60 + 4 positions, then 61 + 4
    assert used.index(3) == 128 - 4 - 60 + 1
    assert max(used) == 3


def test_room_is_kept_for_what_steps_in_flight_may_add(scheduler, wait):
    a = wait(scheduler, "a", prompt=[5] * 50)
    step(scheduler)
    a.most_ahead = 64 - 51 - 4
    scheduler.schedule(lambda sequences: [CHAIN] * len(sequences))
    assert pool(scheduler).num_used == 1
    a.most_ahead += 1
    scheduler.schedule(lambda sequences: [CHAIN] * len(sequences))
    assert pool(scheduler).num_used == 2


def test_a_sequence_that_ends_with_what_is_launched_is_not_decoded_again(scheduler, wait):
    a = wait(scheduler, "a", max_new_tokens=3)
    step(scheduler)
    assert len(a.output_ids) == 2
    a.least_ahead = 1
    plan = scheduler.schedule(lambda sequences: [ROOT] * len(sequences))
    assert plan.chunks == [] and plan.decoding == [] and plan.trees == []


def test_when_pages_run_out_the_youngest_gives_way_and_comes_back_first(new_scheduler, wait):
    scheduler = new_scheduler(num_pages=4)
    a, b, c = (wait(scheduler, name, prompt=[ord(name)] * 55) for name in "abc")
    wait(scheduler, "d")
    for _ in range(9):
        step(scheduler)
    assert names(scheduler.running) == "abc" and pool(scheduler).num_used == 3
    step(scheduler)  # each needs a second page; there is one
    assert names(scheduler.running) == "ab" and names(scheduler.waiting) == "cd"
    assert (c.row, c.num_cached, scheduler.num_preemptions) == (-1, 0, 1)
    reply = list(c.output_ids)
    b.finish_reason = "stop"
    scheduler.retire()
    plan = step(scheduler)
    assert names(scheduler.running)[:2] == "ac"
    (chunk,) = (chunk for chunk in plan.chunks if chunk.sequence is c)
    assert chunk.is_last and not chunk.gives_token and chunk.next_token == reply[-1]
    assert chunk.token_ids == [*c.prompt_ids, *reply[:-1]][chunk.start :]
    assert c.output_ids[: len(reply)] == reply and len(c.output_ids) == len(reply) + 1
    assert a.num_cached == a.num_to_fill


def test_nothing_is_planned_nor_taken_from_anyone_while_steps_are_in_flight(new_scheduler, wait):
    scheduler = new_scheduler(num_pages=2)
    wait(scheduler, "a", prompt=[5] * 60), wait(scheduler, "b", prompt=[6] * 50)
    for _ in range(4):
        step(scheduler)
    assert scheduler.schedule(lambda sequences: [CHAIN] * len(sequences), may_preempt=False) is None
    assert names(scheduler.running) == "ab" and scheduler.num_preemptions == 0
    plan = scheduler.schedule(lambda sequences: [CHAIN] * len(sequences))
    assert names(plan.decoding) == "a" and names(scheduler.waiting) == "b"


@pytest.mark.parametrize("seed", range(10))
def test_however_short_pages_are_the_oldest_gets_on_and_everyone_ends(new_scheduler, wait, seed):
    rng = random.Random(seed)
    scheduler = new_scheduler(num_pages=5, max_batch_size=4, max_prefill_tokens=rng.choice([7, 64, 100, 1000]))
    requests = []
    for i in range(12):
        length = rng.randrange(1, 200)
        reply = rng.randrange(1, 5 * PAGE_SIZE - MAX_NODES - length)
        requests.append(wait(scheduler, f"{i:x}", prompt=[rng.randrange(3)] * length, max_new_tokens=min(reply, 150)))
    for _ in range(5000):
        if not scheduler.running and not scheduler.waiting:
            break
        oldest = (scheduler.running or scheduler.waiting)[0]
        before = (len(oldest.output_ids), oldest.num_cached)
        step(scheduler, rng.choice([ROOT, CHAIN]), gives=rng.randrange(1, 5))
        assert oldest.finish_reason or (len(oldest.output_ids), oldest.num_cached) > before
        order = [int(s.request_id, 16) for s in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
        owned = {page for pages in scheduler._cache._owned for page in pages}
        assert len(owned) == pool(scheduler).num_used
    assert all(len(s.output_ids) == s.max_new_tokens for s in requests)
    assert scheduler.num_preemptions > 0
    assert pool(scheduler).num_used == 0 and pool(scheduler).num_available == 5


# Prefill in chunks


def sizes(plan):
    return {chunk.sequence.request_id: (chunk.start, len(chunk.token_ids), chunk.is_last) for chunk in plan.chunks}


def test_a_steps_prefill_is_within_its_budget_and_the_oldest_comes_first(new_scheduler, wait):
    scheduler = new_scheduler(max_prefill_tokens=100)
    for name, length in [("a", 150), ("b", 30), ("c", 100)]:
        wait(scheduler, name, prompt=[ord(name)] * length)
    plans = [step(scheduler) for _ in range(4)]
    assert [sizes(plan) for plan in plans] == [
        {"a": (0, 100, False)},
        {"a": (100, 50, True), "b": (0, 30, True), "c": (0, 20, False)},
        {"c": (20, 80, True)},
        {},
    ]
    assert [names(plan.decoding) for plan in plans] == ["", "ab", "abc", "abc"]


@pytest.mark.parametrize(
    ("gives", "budgets"), [(1, [20, 20, 20, 20]), (2, [40, 40, 40, 40]), (2.5, [40, 60, 40, 60]), (4, [80, 80, 80, 80])]
)
def test_the_prefill_budget_grows_with_the_tokens_of_a_step(new_scheduler, wait, gives, budgets):
    """In whole shares; what is left over is the next step's."""
    scheduler = new_scheduler(num_pages=20, max_prefill_tokens=20)
    runs = wait(scheduler, "a", prompt=[5])
    step(scheduler)
    runs.accepted_per_step = [int(gives), round(2 * gives) - int(gives)] * 4
    wait(scheduler, "b", prompt=[6] * 500)
    wait(scheduler, "c", prompt=[7] * 500)
    for budget in budgets:
        plan = scheduler.schedule(lambda sequences: [ROOT] * len(sequences))
        assert sum(len(chunk.token_ids) for chunk in plan.chunks) == budget
        for chunk in plan.chunks:
            scheduler.note_launch(chunk)


def test_only_recent_steps_of_replies_that_run_count_for_the_budget(new_scheduler, wait):
    scheduler = new_scheduler(num_pages=20, max_prefill_tokens=20)
    runs, again = wait(scheduler, "a", prompt=[5]), wait(scheduler, "b", prompt=[6] * 500)
    again.accepted_per_step = [5] * 8  # it lost its pages: it waits for no prompts now
    assert sizes(step(scheduler)) == {"a": (0, 1, True), "b": (0, 19, False)}
    runs.accepted_per_step = [5] * 100 + [1] * 8
    assert sizes(step(scheduler)) == {"b": (19, 20, False)}


def test_nothing_of_the_budget_is_saved_up_while_there_are_no_prompts(new_scheduler, wait):
    scheduler = new_scheduler(num_pages=20, max_prefill_tokens=20)
    runs = wait(scheduler, "a", prompt=[5])
    step(scheduler)
    for name in "bc":
        wait(scheduler, name, prompt=[ord(name)] * 40, max_new_tokens=1)
        runs.accepted_per_step = [1, 2] * 4
        assert sizes(step(scheduler)) == {name: (0, 20, False)}
        runs.accepted_per_step = [1] * 8
        assert sizes(step(scheduler)) == {name: (20, 20, True)}
        assert sizes(step(scheduler)) == {}


# Text that is in the cache already


def test_a_prompt_takes_over_the_full_pages_that_begin_it(scheduler, wait):
    prompt = list(range(200))
    wait(scheduler, "a", prompt=prompt)
    step(scheduler)
    b = wait(scheduler, "b", prompt=[*prompt[:150], *range(300, 350)])
    plan = step(scheduler)
    assert sizes(plan) == {"b": (128, 72, True)}
    assert scheduler._cache.tables[b.row, :2].tolist() == scheduler._cache.tables[scheduler.running[0].row, :2].tolist()
    assert scheduler.num_reused_tokens == 128
    assert pool(scheduler).num_used == 4 + 2


@pytest.mark.parametrize(("length", "reused"), [(127, 64), (128, 64), (129, 128), (64, 0), (65, 64)])
def test_the_last_token_of_a_prompt_is_always_computed(scheduler, wait, length, reused):
    for name in "ab":
        wait(scheduler, name, prompt=[7] * length, max_new_tokens=1)
        plan = step(scheduler)
    assert sizes(plan) == {"b": (reused, length - reused, True)}


def test_a_second_turn_computes_only_what_is_new_and_replies_are_known_as_their_pages_fill(scheduler, wait):
    a = wait(scheduler, "a", prompt=list(range(100)), max_new_tokens=60)
    for _ in range(20):
        step(scheduler, CHAIN, gives=3)
    assert a.finish_reason == "length"
    turn = [*a.prompt_ids, *a.output_ids, *range(300, 310)]
    wait(scheduler, "b", prompt=turn)
    assert sizes(step(scheduler)) == {"b": (128, len(turn) - 128, True)}


def test_text_after_a_stop_is_not_known(scheduler, wait):
    """A step that was cut commits no more than what is left of the reply."""
    a = wait(scheduler, "a", prompt=[5] * 60, max_new_tokens=5)
    for _ in range(3):
        step(scheduler, CHAIN, gives=4)
    assert a.num_tokens == 65 and a.finish_reason == "length"
    assert len(pool(scheduler)._page_of) == 1
    wait(scheduler, "b", prompt=[5] * 60 + [200, 201, 201, 201, 201, 201, 9])
    assert sizes(step(scheduler)) == {"b": (64, 3, True)}


def test_of_equal_prompts_the_first_computes_and_the_others_follow(new_scheduler, wait):
    scheduler = new_scheduler(max_prefill_tokens=128)
    for index in range(3):
        wait(scheduler, "n", prompt=list(range(200)), index=index)
    plans = [step(scheduler) for _ in range(4)]
    chunks = [[(c.sequence.index, c.start, len(c.token_ids)) for c in plan.chunks] for plan in plans]
    assert chunks == [[(0, 0, 128)], [(0, 128, 72)], [(1, 192, 8), (2, 192, 8)], []]
    assert pool(scheduler).num_used == 3 + 3 * 1
    assert scheduler.num_reused_tokens == 2 * 192


def test_a_follower_computes_for_itself_when_the_one_before_it_is_gone(new_scheduler, wait):
    scheduler = new_scheduler(max_prefill_tokens=64)
    wait(scheduler, "a", prompt=list(range(200)))
    wait(scheduler, "b", prompt=list(range(200)))
    assert sizes(step(scheduler)) == {"a": (0, 64, False)}
    scheduler.remove("a")
    assert sizes(step(scheduler)) == {"b": (64, 64, False)}


def test_another_page_before_makes_it_another_page(scheduler, wait):
    """Equal tokens after another beginning hold other values."""
    wait(scheduler, "a", prompt=[1] * 64 + [2] * 64 + [3])
    step(scheduler)
    wait(scheduler, "b", prompt=[9] * 64 + [2] * 64 + [3])
    assert sizes(step(scheduler)) == {"b": (0, 129, True)}
    wait(scheduler, "c", prompt=[2] * 64 + [3])
    assert sizes(step(scheduler)) == {"c": (0, 65, True)}
