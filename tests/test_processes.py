"""What the sharing out among processes knows of the tests (processes.py) is so."""

from __future__ import annotations

import pytest

from tests.processes import CLUSTER, LONGEST, ROOT, file_of, needs_ray


def test_the_longest_files_are_where_it_says():
    assert [file for file in LONGEST if not (ROOT / file).is_file()] == []


def test_every_test_on_ray_is_in_a_file_that_is_kept_with_the_others_on_ray(request: pytest.FixtureRequest):
    on_ray = {
        file_of(item.nodeid)
        for item in request.session.items
        if item.get_closest_marker("ray") or CLUSTER in getattr(item, "fixturenames", ())
    }
    assert sorted(file for file in on_ray if not needs_ray(file)) == []
    assert not needs_ray("tests/test_layering.py")
