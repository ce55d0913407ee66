"""Every Triton kernel compiles for the A100 (sm_80) and Hopper (sm_90) without a GPU, fits, does not spill; see aot.py.

The fast set compiles the largest configurations of each kernel, the slow set all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = 163 * 1024  # what one block may have on sm_80; sm_90 has more

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module", params=["--largest", pytest.param("", marks=pytest.mark.slow, id="all")])
def compilations(request, tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    script = Path(__file__).with_name("aot.py")
    run = subprocess.run(
        [sys.executable, script, *filter(None, [request.param])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    listing, *cases = map(json.loads, run.stdout.splitlines())
    return listing, cases


def test_every_kernel_is_compiled(compilations):
    listing, cases = compilations
    assert listing["kernels"] == listing["listed"]
    for capability in (80, 90):
        assert {case["kernel"] for case in cases if case["capability"] == capability} == set(listing["kernels"])


def test_shared_memory_fits_an_a100(compilations):
    assert [case for case in compilations[1] if case["shared"] >= SHARED_MEMORY] == []


def test_nothing_spills(compilations):
    assert [case for case in compilations[1] if case["spilled"]] == []


def test_dependent_launch_is_for_hopper_alone(compilations):
    for case in compilations[1]:
        assert case["pdl"] == (case["capability"] == 90)
        assert sorted(case["order"]) == (["launch_dependents", "wait"] if case["pdl"] else []), case


def test_a_kernel_lets_the_next_start_before_it_waits_only_where_it_is_early(compilations):
    for case in compilations[1]:
        if case["pdl"]:
            early = case["constants"].get("EARLY") == "True"
            assert case["order"][0] == ("launch_dependents" if early else "wait"), case
    norms = [case for case in compilations[1] if case["kernel"] == "norm._add_norm"]
    assert {case["constants"]["EARLY"] for case in norms} == {"True", "False"}


def test_noise_uses_exact_logarithms(compilations):
    """The fast one errs by more than the distance of the largest uniform numbers from 1."""
    sampling = [case for case in compilations[1] if case["kernel"] == "sample._sample"]
    assert sampling
    assert not any(case["fast_logarithms"] for case in sampling)
