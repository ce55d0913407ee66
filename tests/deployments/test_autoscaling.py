"""How many replicas a load needs: the policy alone, then inside Ray Serve's own delays on a clock of the test's."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig

from deployments.autoscaling import LoadPolicy, autoscaling_options, load_of
from deployments.config import ServerConfig
from medusa import SamplingParams


def context(loads, *, target=None, queued=0.0, **more):
    """`loads`: one dict of reports a replica."""
    replicas = [f"r{i}" for i in range(len(loads))]
    names = {name for load in loads for name in load}
    return SimpleNamespace(
        target_num_replicas=target if target is not None else len(loads),
        running_replicas=replicas,
        aggregated_metrics={
            n: {r: load[n] for r, load in zip(replicas, loads, strict=True) if n in load} for n in names
        },
        total_queued_requests=queued,
        **more,
    )


def needed(loads, **more):
    policy = LoadPolicy(replies=12, page_use=0.8, queued_tokens=1000, step_s=0.05)
    return policy(context(loads, **more))[0]


def test_an_idle_replica_needs_none():
    assert needed([{"replies": 0, "page_use": 0.0, "queued_tokens": 0, "step_s": 0.0}]) == 0


@pytest.mark.parametrize(
    "load",
    [{"replies": 36}, {"page_use": 2.4}, {"queued_tokens": 3000}, {"step_s": 0.15}],
    ids=lambda load: next(iter(load)),
)
def test_each_target_alone_calls_for_replicas(load):
    assert needed([load]) == pytest.approx(3.0)


def test_the_fullest_target_of_each_replica_counts():
    assert needed([{"replies": 6, "page_use": 0.8}, {"replies": 24, "page_use": 0.1}], target=2) == pytest.approx(3.0)


def test_a_replica_that_has_not_reported_counts_as_empty():
    assert needed([{"replies": 24}, {}]) == pytest.approx(2.0)


def test_reports_of_replicas_that_are_gone_do_not_count():
    ctx = context([{"replies": 12}])
    ctx.aggregated_metrics["replies"]["gone"] = 500
    assert LoadPolicy(replies=12)(ctx)[0] == pytest.approx(1.0)


def test_requests_that_wait_in_the_proxies_count():
    assert needed([{"replies": 12}], queued=24.0) == pytest.approx(3.0)


def test_the_number_does_not_swing_around_a_boundary():
    assert needed([{"replies": 12}, {"replies": 11.5}, {"replies": 0}]) == 3  # 1.96 replicas' worth: not yet two
    assert needed([{"replies": 10}, {"replies": 10}, {"replies": 0}]) == pytest.approx(
        20 / 12
    )  # two would be 83 % full


def test_a_target_of_none_is_not_looked_at():
    policy = LoadPolicy(replies=12, page_use=None)
    assert policy(context([{"replies": 6, "page_use": 1.0, "step_s": 9.0}]))[0] == 1  # as many as there are
    assert policy(context([{"replies": 6, "page_use": 1.0, "step_s": 9.0}], target=0))[0] == pytest.approx(0.5)


def test_up_after_its_delay_and_down_after_a_longer_one(monkeypatch):
    """Ray's own rules around the policy, second by second: a burst for 20 s, then silence."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda: clock.now)
    options = autoscaling_options(ServerConfig(model="m", max_replicas=3, upscale_delay_s=5, downscale_delay_s=30))
    config = AutoscalingConfig(**options)
    policy = _apply_autoscaling_config(LoadPolicy(**options["policy"]["policy_kwargs"]))
    replicas, state, history = 1, {}, []
    for second in range(90):
        load = {"replies": 36 / replicas if second < 20 else 0.0}
        ctx = context(
            [load] * replicas,
            policy_state=state,
            config=config,
            current_num_replicas=replicas,
            total_num_requests=0,
        )
        wanted, state = policy(ctx)
        replicas = max(config.min_replicas, min(config.max_replicas, wanted))
        history.append(replicas)
        clock.now += 1
    changes = [second for second in range(1, 90) if history[second] != history[second - 1]]
    assert [history[second] for second in changes] == [3, 1]
    assert changes == [5, 50]


async def test_what_a_replica_reports(async_engine, scripted):
    scripted.gate.clear()
    stream = await async_engine.submit([([5] * 20, SamplingParams(max_tokens=8, n=2))])
    load = load_of(async_engine)
    assert load["replies"] == 2
    assert load["queued_tokens"] == 20
    assert all(isinstance(value, float) for value in load.values())
    scripted.gate.set()
    async for _ in stream:
        pass
    assert load_of(async_engine) == {"replies": 0.0, "page_use": 0.0, "queued_tokens": 0.0, "step_s": 0.0}


def test_the_controller_needs_nothing_but_the_standard_library():
    code = "import sys, deployments.autoscaling; print([m for m in ('torch', 'ray', 'fastapi') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
