"""What a replica takes and refuses, on a clock of the test's own."""

from __future__ import annotations

import pytest

from deployments.admission import Admission, Bounds, Demand, QueueFull


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_replies_beyond_batch_and_queue_are_refused():
    admission = Admission(Bounds(batch=4, queue=2, pages=100))
    for _ in range(6):
        admission.admit(Demand(1))
    with pytest.raises(QueueFull, match="6 of 6 places are taken and the request needs 1"):
        admission.admit(Demand(1))
    admission.release(Demand(2))
    admission.admit(Demand(2))
    assert admission.held == Demand(6)


def test_long_requests_are_bounded_by_pages():
    """A queue half as long as the batch may need half as many pages again as there are."""
    admission = Admission(Bounds(batch=4, queue=2, pages=100))
    admission.admit(Demand(1, pages=100))
    admission.admit(Demand(1, pages=50))
    with pytest.raises(QueueFull, match="150 of 150 pages"):
        admission.admit(Demand(1, pages=1))
    admission.release(Demand(1, pages=100))
    admission.admit(Demand(1, pages=100))


def test_a_request_larger_than_the_bound_runs_alone():
    """The engine itself refuses what can never run; what it can run is not refused for ever."""
    admission = Admission(Bounds(batch=1, queue=0, pages=10, prompt_tokens=10))
    admission.admit(Demand(1, pages=10, prompt_tokens=50))
    admission.release(Demand(1, pages=10, prompt_tokens=50))
    assert admission.held == Demand(0)


def test_prompt_tokens_count_until_their_reply_begins():
    admission = Admission(Bounds(batch=8, queue=8, pages=1000, prompt_tokens=100))
    admission.admit(Demand(1, prompt_tokens=80))
    with pytest.raises(QueueFull, match="80 of 100 prompt tokens"):
        admission.admit(Demand(1, prompt_tokens=30))
    admission.began(80)
    admission.admit(Demand(1, prompt_tokens=30))
    assert admission.held == Demand(2, 0, 30)


def test_more_than_an_empty_replica_holds_is_no_matter_of_time():
    admission = Admission(Bounds(batch=4, queue=2, pages=100))
    with pytest.raises(ValueError, match="asks for 7 replies .* holds 6 at once"):
        admission.admit(Demand(7))
    assert admission.held == Demand(0)


def test_the_time_to_come_back_follows_the_rate_of_replies(clock):
    admission = Admission(Bounds(batch=1, queue=0, pages=10), clock)
    assert admission.retry_after_s(1) == 1  # nothing known yet
    for _ in range(5):
        admission.admit(Demand(1))
        clock.now += 4.0
        admission.release(Demand(1))
    assert admission.retry_after_s(1) == 4
    assert admission.retry_after_s(5) == 16
    clock.now += 10_000
    assert admission.retry_after_s(1) == 60  # never further than a client may care to wait


def test_a_refusal_changes_nothing():
    admission = Admission(Bounds(batch=1, queue=1, pages=10, prompt_tokens=5))
    admission.admit(Demand(1, 5, 5))
    for demand in (Demand(2), Demand(1, 16), Demand(1, 0, 1)):
        with pytest.raises(QueueFull):
            admission.admit(demand)
    assert admission.held == Demand(1, 5, 5)
