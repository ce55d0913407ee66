"""Step times: what is looked up between, below and beyond the measured shapes, and the two forms of the file."""

from __future__ import annotations

import json

import pytest

from medusa import StepTimes

TIMES = StepTimes.of_uniform_trees({(1, 1): 4.0, (1, 5): 6.0, (1, 9): 7.0, (4, 1): 8.0, (4, 9): 16.0})


@pytest.mark.parametrize(
    ("batch_size", "num_nodes", "seconds"),
    [
        (1, 1, 4.0),  # measured
        (1, 9, 7.0),
        (1, 3, 5.0),  # between tree sizes
        (1, 7, 6.5),
        (4, 5, 12.0),
        (2, 1, 4.0 + 4.0 / 3),  # between batch sizes
        (2, 5, 6.0 + 6.0 / 3),  # between both
        (8, 1, 16.0),  # beyond: in proportion
        (8, 9, 32.0),
        (1, 18, 14.0),
        (8, 18, 64.0),
    ],
)
def test_uniform_trees_are_looked_up_between_and_beyond_the_measured_sizes(batch_size, num_nodes, seconds):
    assert TIMES.lookup(batch_size, num_nodes) == pytest.approx(seconds)
    assert TIMES.at(batch_size, batch_size * num_nodes) == pytest.approx(seconds)


def test_ragged_trees_are_looked_up_by_their_nodes_in_all():
    assert TIMES.at(4, 4 + 16) == pytest.approx(12.0)
    assert TIMES.at(4, 4 + 1) == pytest.approx(8.0 + 8.0 / 32)


@pytest.mark.parametrize(
    ("context", "seconds"), [(0, 2.0), (100, 2.0), (300, 3.0), (500, 4.0), (700, 5.0), (1000, 5.0 + 300 / 200)]
)
def test_the_context_is_interpolated_and_continued(context, seconds):
    times = StepTimes({(1, 1, 100): 2.0, (1, 1, 500): 4.0, (1, 1, 700): 5.0})
    assert times.at(1, 1, context) == pytest.approx(seconds)


def test_noise_in_a_profile_never_makes_a_longer_context_look_faster_beyond_it():
    assert StepTimes({(1, 1, 100): 2.0, (1, 1, 500): 1.9}).at(1, 1, 4000) == 1.9


def test_one_measured_context_serves_all():
    assert TIMES.at(1, 9, 5) == TIMES.at(1, 9, 5000) == 7.0


def test_below_the_smallest_measured_size_its_own_time_holds():
    times = StepTimes.of_uniform_trees({(4, 8): 3.0, (8, 8): 5.0})
    assert times.lookup(1, 1) == 3.0


def test_step_times_survive_a_round_trip_through_json():
    times = StepTimes({(1, 1, 128): 4.0, (2, 7, 128): 6.0, (2, 7, 1024): 6.5})
    assert StepTimes.from_dict(json.loads(json.dumps(times.to_dict()))) == times


def test_files_of_an_earlier_release_still_load():
    rows = [{"batch": 1, "nodes": 1, "seconds": 4.0}, {"batch": 4, "nodes": 9, "seconds": 16.0}]
    assert StepTimes.from_dict({"step_times": rows}) == StepTimes.of_uniform_trees({(1, 1): 4.0, (4, 9): 16.0})


def test_step_times_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="step times are empty"):
        StepTimes.from_dict({"step_times": []})
    with pytest.raises(ValueError, match="4 sequences, 3 nodes in all"):
        StepTimes({(4, 3, 128): 1.0})
    with pytest.raises(ValueError, match="cannot take 0"):
        StepTimes({(4, 8, 128): 0.0})


def test_each_batch_size_is_asked_at_its_own_contexts() -> None:
    times = StepTimes({(1, 1, 100): 1.0, (1, 1, 1000): 2.0, (8, 8, 100): 4.0, (8, 8, 300): 5.0})
    assert times.at(1, 1, 300) == pytest.approx(1.0 + 200 / 900)
    assert times.at(8, 8, 300) == 5.0
    assert times.at(8, 8, 1000) == pytest.approx(5.0 + 700 / 200)  # along its last slope
    assert times.at(4, 4, 100) == pytest.approx(1.0 + 3.0 * 3 / 7)
