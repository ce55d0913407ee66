"""New heads in a running replica: taken between two steps, or refused with the old ones kept."""

from __future__ import annotations

import asyncio
import shutil
import time

import httpx
import pytest

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from deployments.config import HeadsConfig
from deployments.heads_slot import HeadsSlot, verified
from deployments.open_streams import EngineUnavailable
from deployments.streams import HeadsVersion
from medusa import SamplingParams
from medusa.checkpoint import CheckpointError, CheckpointMismatchError
from medusa.digests import directory_digest
from medusa.model import Backbone

NEW = HeadsVersion("2", "sha256:22")


@pytest.fixture(scope="module")
def backbone(tiny_llama):
    return Backbone.from_pretrained(tiny_llama)


@pytest.fixture
def slot(async_engine, backbone):
    return HeadsSlot(async_engine, backbone)


@pytest.fixture
async def client(async_engine, tokenizer):
    transport = httpx.ASGITransport(app=build_api(async_engine, tokenizer, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


async def version_of_a_reply(client, **fields):
    body = {"prompt": "x", "max_tokens": 4} | fields
    return (await client.post("/v1/completions", json=body)).json()["usage"]["medusa"]["heads_version"]


async def test_new_heads_are_verified_taken_and_named(client, async_engine, scripted, slot, tiny_heads):
    digest = directory_digest(tiny_heads)
    assert await version_of_a_reply(client) is None
    await slot.take(HeadsConfig(heads=str(tiny_heads), heads_version="8", heads_digest=digest))
    (checkpoint,) = scripted.swapped
    assert checkpoint.config.num_heads == 2
    assert await version_of_a_reply(client) == "8"
    assert (await client.get("/health")).json()["heads"] == {"version": "8", "digest": digest}
    assert (await client.get("/version")).json()["heads_version"] == "8"
    answer = (await client.post("/v1/completions", json={"prompt": "x"})).json()
    assert answer["system_fingerprint"] == f"medusa-{digest.removeprefix('sha256:')[:12]}"
    metrics = (await client.get("/metrics")).text
    assert 'version="8"' in metrics and 'version="none"' not in metrics
    assert 'medusa_heads_swaps_total{model_name="model",outcome="taken",replica="local"} 1.0' in metrics


async def test_the_same_heads_again_change_nothing(scripted, slot, tiny_heads):
    config = HeadsConfig(heads=str(tiny_heads), heads_version="8")
    for _ in range(3):
        await slot.take(config)
    assert len(scripted.swapped) == 1


def damaged(folder):
    weights = folder / "medusa_lm_head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def with_pickle(folder):
    (folder / "extra.bin").write_bytes(b"\x80\x04.")


def without_meta(folder):
    (folder / "medusa.json").unlink()


@pytest.mark.parametrize("damage", [damaged, with_pickle, without_meta, shutil.rmtree])
@pytest.mark.parametrize("pinned", [True, False])
async def test_heads_that_cannot_be_served_leave_the_last_good_ones(
    client, async_engine, scripted, slot, tiny_heads, tmp_path, damage, pinned
):
    await slot.take(HeadsConfig(heads=str(tiny_heads), heads_version="8"))
    folder = tmp_path / "heads"
    shutil.copytree(tiny_heads, folder)
    digest = directory_digest(folder) if pinned else None
    damage(folder)
    await slot.take(HeadsConfig(heads=str(folder), heads_version="9", heads_digest=digest))
    assert len(scripted.swapped) == 1
    assert await version_of_a_reply(client) == "8"
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json()["heads"]["version"] == "8"
    failed = response.json()["failed_heads"]
    assert (failed["version"], failed["digest"]) == ("9", digest)
    assert str(tmp_path) not in response.text
    assert 'outcome="failed",replica="local"} 1.0' in (await client.get("/metrics")).text
    await slot.take(HeadsConfig(heads=str(tiny_heads), heads_version="8"))
    assert (await client.get("/health")).json()["failed_heads"] is None


async def test_heads_of_another_backbone_are_refused(async_engine, scripted, tiny_heads, make_backbone_dir):
    slot = HeadsSlot(async_engine, Backbone.from_pretrained(make_backbone_dir(seed=1)))
    await slot.take(HeadsConfig(heads=str(tiny_heads), heads_version="9"))
    assert scripted.swapped == []
    assert async_engine.failed_heads.version == "9"


async def test_what_the_engine_refuses_is_told_and_not_taken(async_engine, scripted, slot, tiny_heads, monkeypatch):
    monkeypatch.setattr(slot, "_load", lambda folder: ValueError("the trees are too large"))
    await slot.take(HeadsConfig(heads=str(tiny_heads), heads_version="9"))
    assert async_engine.heads == HeadsVersion()
    assert async_engine.failed_heads.version == "9"
    async_engine.check_health()


async def test_heads_whose_trees_do_not_fit_are_refused_before_the_swap(async_engine, scripted, monkeypatch):
    def too_large(checkpoint):
        raise ValueError("the tree has 80 nodes, but this engine is sized for 64")

    monkeypatch.setattr(scripted, "must_be_idle_for", too_large)
    with pytest.raises(ValueError, match="80 nodes"):
        await async_engine.swap_heads("new heads", NEW)
    async_engine.check_health()


@pytest.mark.parametrize("close", [True, False])
async def test_an_engine_that_ends_tells_those_who_wait_and_not_those_who_left(scripted, close):
    engine = AsyncEngine(scripted)
    scripted.must_be_idle = True
    scripted.pause_after = 1
    old = await engine.submit([("hello", SamplingParams(max_tokens=40))])
    await anext(old)
    waiting, gone = [asyncio.ensure_future(engine.swap_heads("new heads", NEW)) for _ in range(2)]
    await until(lambda: engine._thread._postponed or not engine._thread._inbox.empty())
    gone.cancel()
    await asyncio.sleep(0.01)
    if not close:
        scripted.fault = RuntimeError("broken")
    engine._thread._inbox.put(None) if close else None
    scripted.gate.set()
    with pytest.raises(EngineUnavailable):
        await waiting
    await until(lambda: not engine._thread.is_alive())
    with pytest.raises(EngineUnavailable):
        engine.check_health()


@pytest.mark.parametrize("wrong", [{"heads": "models:/m@champion"}, {"head": "x"}, {"heads": 5}, [], "x"])
async def test_a_configuration_that_is_none_keeps_the_heads(async_engine, slot, wrong):
    await slot.take_config(wrong)
    assert async_engine.failed_heads is not None
    async_engine.check_health()


async def test_taking_heads_away_is_refused(async_engine, scripted, slot, tiny_heads):
    await slot.take(HeadsConfig(heads=str(tiny_heads), heads_version="8"))
    await slot.take(HeadsConfig())
    assert async_engine.heads.version == "8"
    assert async_engine.failed_heads is not None


def test_what_is_verified_before_a_replica_starts(tiny_heads, tmp_path):
    assert verified(HeadsConfig()) == HeadsVersion()
    digest = directory_digest(tiny_heads)
    assert verified(HeadsConfig(heads=str(tiny_heads), heads_version="1")) == HeadsVersion("1", digest)
    with pytest.raises(CheckpointMismatchError, match=f"{digest}.*sha256:00"):
        verified(HeadsConfig(heads=str(tiny_heads), heads_digest="sha256:00"))
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        verified(HeadsConfig(heads=str(tmp_path / "missing")))


async def test_a_running_request_keeps_its_version_and_later_ones_get_the_new(async_engine, scripted):
    scripted.pause_after = 2
    first = await async_engine.submit([("hello", SamplingParams(max_tokens=40))])
    await anext(first)
    swap = asyncio.ensure_future(async_engine.swap_heads("new heads", NEW))
    await asyncio.sleep(0.05)
    scripted.gate.set()
    await swap
    second = await async_engine.submit([("hello", SamplingParams(max_tokens=4))])
    assert (first.heads, second.heads) == (HeadsVersion(), NEW)
    finished = [output.finished async for _, output in first if output.finished]
    assert len(finished[0].token_ids) == 40


async def test_heads_that_need_an_idle_engine_wait_for_what_runs_and_new_requests_for_them(async_engine, scripted):
    scripted.must_be_idle = True
    scripted.pause_after = 1
    old = await async_engine.submit([("hello", SamplingParams(max_tokens=40))])
    await anext(old)
    swap = asyncio.ensure_future(async_engine.swap_heads("new heads", NEW))
    await until(lambda: async_engine._thread._postponed or not async_engine._thread._inbox.empty())
    scripted.pause_after = 2
    scripted.gate.set()  # one step more, and the swap is seen while the reply still runs
    await until(lambda: async_engine._thread._postponed)
    new = asyncio.ensure_future(async_engine.submit([("hello", SamplingParams(max_tokens=4))]))
    gone = asyncio.ensure_future(async_engine.submit([("hello", SamplingParams(max_tokens=4))]))
    await asyncio.sleep(0.01)
    gone.cancel()
    assert not swap.done() and not new.done()
    scripted.gate.set()
    await swap
    stream = await new
    assert (old.heads, stream.heads) == (HeadsVersion(), NEW)
    assert [output.finished.token_ids async for _, output in stream if output.finished] == [scripted.script[:4]]
    async for _ in old:
        pass
    await until(lambda: not async_engine._open)
    assert not scripted.has_unfinished()


async def test_an_engine_that_fails_meanwhile_tells_who_waits_for_a_swap(scripted):
    engine = AsyncEngine(scripted)
    scripted.must_be_idle = True
    scripted.gate.clear()
    stream = await engine.submit([("hello", SamplingParams(max_tokens=40))])
    swap = asyncio.ensure_future(engine.swap_heads("new heads", NEW))
    await asyncio.sleep(0.01)
    scripted.fault = RuntimeError("broken")
    scripted.gate.set()
    with pytest.raises(EngineUnavailable):
        await swap
    with pytest.raises(EngineUnavailable):
        async for _ in stream:
            pass
    with pytest.raises(EngineUnavailable):
        await engine.swap_heads("new heads", NEW)


async def test_a_swap_whose_caller_left_while_it_waited_is_not_made(async_engine, scripted):
    scripted.must_be_idle = True
    scripted.pause_after = 1
    old = await async_engine.submit([("hello", SamplingParams(max_tokens=40))])
    await anext(old)
    swap = asyncio.ensure_future(async_engine.swap_heads("new heads", NEW))
    await until(lambda: async_engine._thread._postponed or not async_engine._thread._inbox.empty())
    swap.cancel()
    with pytest.raises(asyncio.CancelledError):
        await swap
    scripted.gate.set()
    async for _ in old:
        pass
    await until(lambda: async_engine._thread._inbox.empty() and not async_engine._thread._postponed)
    assert scripted.swapped == [] and async_engine.heads == HeadsVersion()
    async_engine.check_health()
