"""What a replica counts, on /metrics, through Ray, and on the dashboard."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from deployments.autoscaling import load_of
from deployments.metrics import Metrics, RayMirror, StepTokens
from medusa import Engine, SamplingParams
from tests.deployments.conftest import HeldSteps

DASHBOARD = Path(__file__).resolve().parents[2] / "deployments" / "dashboard.json"
# vLLM's stems, which dashboards and alerts are written for.
STEMS = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
}


@pytest.fixture
def engine(scripted):
    engine = AsyncEngine(scripted, max_queued=4, metrics=Metrics("tiny", replica="r7"))
    yield engine
    scripted.gate.set()
    engine.close()


@pytest.fixture
async def client(engine, tokenizer):
    transport = httpx.ASGITransport(app=build_api(engine, tokenizer, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def samples(text):
    """{(name, labels without model and replica): value}"""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("replica")) == ("tiny", "r7")
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


async def scraped(client):
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(response.text)


async def test_what_a_request_leaves_behind(client):
    await client.post("/v1/completions", json={"prompt": [5] * 7, "max_tokens": 12, "n": 2})
    found = await scraped(client)

    def value(name, **labels):
        return found["medusa_" + name, tuple(sorted(labels.items()))]

    assert value("generation_tokens_total") == 24
    assert value("request_success_total", finished_reason="length") == 2
    # Each reply: the prefill's token, then steps of 3, 3, 3 and 2 kept tokens under a tree of 3 nodes.
    assert value("spec_decode_num_drafts_total") == 8
    assert value("spec_decode_num_draft_tokens_total") == 16
    assert value("spec_decode_num_accepted_tokens_total") == 14
    assert value("spec_decode_num_accepted_tokens_per_pos_total", position="0") == 8
    assert value("spec_decode_num_accepted_tokens_per_pos_total", position="1") == 6
    assert value("tree_size") == 3
    assert value("prompt_tokens_total") == value("prefix_cache_queries_total") == 14  # each reply's own prefill
    assert value("prefix_cache_hits_total") == value("num_preemptions_total") == 0
    assert value("request_tokens_per_step_sum") == pytest.approx(2 * 11 / 4)
    assert value("time_to_first_token_seconds_count") == 1
    assert value("request_queue_time_seconds_count") == 1
    assert value("request_prompt_tokens_sum") == 7
    assert value("request_generation_tokens_sum") == 24
    assert value("inter_token_latency_seconds_count") == 8
    assert value("e2e_request_latency_seconds_count") == 2
    assert value("num_requests_running") == value("num_requests_waiting") == value("queued_prompt_tokens") == 0
    assert value("engine_healthy") == 1
    assert value("model_info", version="none", digest="none") == 1


async def test_what_runs_and_what_was_refused_or_left(client, engine, scripted):
    scripted.gate.clear()
    stream = await engine.submit([([5] * 10, SamplingParams(max_tokens=9, n=8))])
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 429
    found = await scraped(client)
    assert found["medusa_queued_prompt_tokens", ()] == 10
    assert found["medusa_requests_refused_total", (("status", "429"),)] == 1
    stream.close()
    scripted.gate.set()
    deadline = time.monotonic() + 10
    while engine.stats().running or not scripted.aborted:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = await scraped(client)
    assert found["medusa_request_success_total", (("finished_reason", "abort"),)] == 8
    assert found["medusa_kv_cache_usage_perc", ()] == 0


@pytest.fixture
def held(tiny_llama):
    """(The thread over a real engine, that engine, its steps)"""
    real = Engine.from_pretrained(tiny_llama, max_batch_size=4, max_model_len=256)
    steps = HeldSteps(real)
    engine = AsyncEngine(real, max_queued=4, metrics=Metrics("tiny", replica="r7"))
    yield engine, real, steps
    steps.open()
    engine.close()


async def test_what_runs_waits_and_fills_pages_shows_while_it_does(held):
    """Six replies in a batch of four, held before the fourth step; then all have left."""
    engine, real, steps = held
    stream = await engine.submit([([5] * 70, SamplingParams(max_tokens=40, n=6, ignore_eos=True))])
    steps.let_go(3)
    while len(steps.found) < 4:
        await asyncio.sleep(0.005)
    transport = httpx.ASGITransport(app=build_api(engine, real.tokenizer, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        found, load, pool = await scraped(client), load_of(engine), real._cache.pool
        assert found["medusa_num_requests_running", ()] == 4
        assert found["medusa_num_requests_waiting", ()] == 2
        assert pool.num_used >= 4
        assert found["medusa_kv_cache_usage_perc", ()] == load["page_use"] == pool.num_used / pool.num_pages
        assert load["replies"] == 6
        assert load["step_s"] == engine.step_seconds > 0
        assert found["medusa_step_time_seconds_count", ()] == 3
        steps.open()
        assert len({output.index async for _, output in stream}) == 6
        while engine.stats().running:
            await asyncio.sleep(0.005)
        assert load_of(engine) == {"replies": 0, "page_use": 0, "queued_tokens": 0, "step_s": 0}
        engine.close()  # after its last step has been counted
        found = await scraped(client)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [found[f"medusa_{name}", ()] for name in names] == [0, 0, 0]


async def test_a_sick_engine_shows(client, scripted):
    scripted.fault = RuntimeError("broken")
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 503
    assert (await scraped(client))["medusa_engine_healthy", ()] == 0


async def test_the_names_are_those_that_dashboards_know(client):
    await client.post("/v1/completions", json={"prompt": "x"})
    names = {name.removeprefix("medusa_") for name, _ in await scraped(client)}
    assert names >= STEMS


class FakeGauge:
    def __init__(self, name, description, tag_keys):
        self.name, self.tag_keys, self.values = name, set(tag_keys), {}

    def set(self, value, tags):
        assert set(tags) <= self.tag_keys
        self.values[tuple(sorted(tags.items()))] = value


async def test_ray_gets_the_same_samples(client, engine):
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 12})
    gauges = {}
    mirror = RayMirror(engine.metrics, lambda *args: gauges.setdefault(args[0], FakeGauge(*args)))
    mirror.push()
    mirror.push()
    expected = {}
    for (name, labels), value in (await scraped(client)).items():
        if not name.endswith("_created"):
            expected[name, tuple(sorted({"model_name": "tiny", **dict(labels)}.items()))] = value
    assert {(name, tags): value for name, gauge in gauges.items() for tags, value in gauge.values.items()} == expected


def test_a_version_that_is_gone_reads_zero_in_ray():
    """Ray keeps a gauge's last value for as long as its process lives."""
    metrics, gauges = Metrics("tiny"), {}
    mirror = RayMirror(metrics, lambda *args: gauges.setdefault(args[0], FakeGauge(*args)))
    for version in ("3", "4"):
        metrics.serves(version, "sha256:0")
        mirror.push()
    served = {dict(tags)["version"]: value for tags, value in gauges["medusa_model_info"].values.items()}
    assert served == {"3": 0, "4": 1}


def test_the_dashboard_names_only_metrics_that_exist():
    metrics = Metrics("tiny")
    tokens = StepTokens(tokens=3)
    tokens.drafted(2)
    metrics.generated(tokens)
    metrics.refused(429)
    metrics.swapped("taken")
    metrics.aborted(1)
    metrics.serves("3", "sha256:0")
    metrics._steps.labels(model_name="tiny", replica="local", tree_size="1").inc()
    labels = {}
    for metric in metrics.collect():
        for sample in metric.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(queries) > 16
    for query in queries:
        named = re.findall(r"ray_(medusa_\w+)", query)
        assert named, query
        assert [name for name in named if name not in labels] == [], query
        for group in re.findall(r"by \(([\w, ]+)\)", query):
            wanted = set(group.split(", "))
            assert wanted <= set.union(*(labels[name] for name in named)), query


def test_panels_do_not_overlap():
    places = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, panel["title"]
        places |= cells
