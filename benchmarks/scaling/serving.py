"""Replicas behind one Ray Serve endpoint: tokens a second at rising concurrency, and how soon a new one helps.

Every replica brings `concurrency` requests at once, from a client of its own; each concurrency answers WAVES times as
many requests, after one wave that is not counted and reaches every replica.
"""

from __future__ import annotations

import statistics
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.scaling.clients import Answered, Clients, Request, requests_of, tokens_per_second
from benchmarks.scaling.config import TARGETS, ScaleConfig
from benchmarks.scaling.points import CutShort, Deadline, LeftOut, Point
from benchmarks.serving import Load
from deployments.config import ServerConfig
from deployments.local import local_service
from deployments.one_process import free_port
from medusa.config import validate
from medusa.tokenizer import ChatTokenizer

WAVES = 4
POLL_S = 0.05
TOKENS_TOTAL = "medusa_generation_tokens_total"


def serving(config: ScaleConfig, deadline: Deadline) -> Iterator[Point]:
    took = 0.0
    for workers in config.workers:
        deadline.ensure(took, f"{workers} replica(s)")
        started = time.monotonic()
        with running(config, workers, workers) as (_, clients):
            for concurrency in config.concurrency:
                deadline.ensure(0.0, f"{concurrency} at once a replica")
                yield _measured(config, clients, workers, concurrency, deadline)
        took = max(took, time.monotonic() - started)


def _measured(config: ScaleConfig, clients: Clients, workers: int, concurrency: int, deadline: Deadline) -> Point:
    """As many runs as there is time for, one at least."""
    at_once = workers * concurrency
    clients.answer(_requests(config, at_once, concurrency, 0), concurrency)
    runs: list[list[Answered]] = []
    took = 0.0
    while len(runs) < config.repeats and deadline.left > took:
        started = time.monotonic()
        runs.append(clients.answer(_requests(config, at_once * WAVES, concurrency, len(runs) + 1), concurrency))
        took = time.monotonic() - started
    if not runs:
        raise CutShort(f"no time for {concurrency} at once on {workers} replica(s)")
    first = sorted(a.first_token_s for run in runs for a in run)
    return Point(
        f"serve, {concurrency} at once a replica",
        workers,
        "tokens/s",
        tuple(tokens_per_second(run) for run in runs),
        target=TARGETS["serve"],
        told={
            "requests": at_once * WAVES,
            "first token median, s": statistics.median(first),
            "first token p95, s": first[int(0.95 * (len(first) - 1))],
        },
    )


def autoscale(config: ScaleConfig, deadline: Deadline) -> Iterator[Point]:
    """From the moment that one replica's load jumps to what all of them should hold: until the first new one has given
    a token, and until all have. Replicas are told apart by what /metrics answers, asked every POLL_S."""
    if config.most == 1:
        raise LeftOut("a jump needs more than one worker: give --workers 1,2 or more")
    concurrency = max(config.concurrency)
    with running(config, 1, config.most, target=max(1.0, concurrency / 2)) as (url, clients):
        requests = _requests(config, config.most * concurrency * WAVES, concurrency, 0)
        clients.answer(requests[:1], 1)
        known = set(_replicas_with_tokens(url))
        jumped = time.monotonic()
        under_way = clients.start(requests, concurrency, again=True)
        try:
            seen = _wait_for_replicas(url, known, config.most, deadline, jumped, under_way)
        finally:
            clients.stop()
        ray.get(under_way)
    settings = {"upscale delay, s": config.upscale_delay_s, "requests at once": config.most * concurrency}
    for number, (name, at) in enumerate((("first new replica", seen[0]), ("all replicas", seen[-1]))):
        if number == 0 or len(seen) == config.most - 1:
            yield Point(f"load jump to token of {name}", config.most, "s", (at,), told=settings)
    if len(seen) < config.most - 1:
        raise CutShort(f"{len(seen)} of {config.most - 1} new replicas gave a token in time")


def _wait_for_replicas(
    url: str, known: set[str], most: int, deadline: Deadline, jumped: float, under_way: list[ray.ObjectRef]
) -> list[float]:
    """Seconds after the jump at which each new replica was first seen with tokens."""
    seen: dict[str, float] = {}
    while len(seen) < most - len(known):
        broken, _ = ray.wait(under_way, timeout=0)
        if broken:
            ray.get(broken)
        for name in _replicas_with_tokens(url):
            if name not in known:
                seen.setdefault(name, time.monotonic() - jumped)
        if deadline.left < 0:
            if not seen:
                raise CutShort("no new replica gave a token in time")
            break
        time.sleep(POLL_S)
    return sorted(seen.values())


@contextmanager
def running(config: ScaleConfig, fewest: int, most: int, target: float | None = None) -> Iterator[tuple[str, Clients]]:
    largest = max(config.concurrency)
    given = {
        "model": config.model,
        "heads": config.heads,
        "dtype": config.dtype,
        "device": config.device,
        "kv_cache_gb": config.kv_cache_gb,
        "speculation": "auto" if config.heads else "off",
        "max_batch_size": max(config.max_batch_size, largest),
        "max_queued_requests": 8 * most * largest,
        "port": free_port(),
        "min_replicas": fewest,
        "max_replicas": most,
        "target_ongoing_requests": target,
        "upscale_delay_s": config.upscale_delay_s,
        "look_back_s": max(1.0, config.upscale_delay_s),
        "graceful_shutdown_timeout_s": 10.0,
    }
    server = validate(ServerConfig, given, source="the command line")
    with local_service(server) as url:
        clients = Clients(url, most)
        try:
            yield url, clients
        finally:
            clients.close()


def _requests(config: ScaleConfig, number: int, concurrency: int, run: int) -> list[Request]:
    """Other prompts for each run at each concurrency: a replica would find those of another in its cache."""
    vocabulary = ChatTokenizer.from_pretrained(config.model).vocab_size
    seed = concurrency * (config.repeats + 1) + run
    load = Load(requests=number, prompt_tokens=config.prompt_tokens, reply_tokens=config.reply_tokens, seed=seed)
    return requests_of(load.prompts(vocabulary), config.reply_tokens)


def _replicas_with_tokens(url: str) -> list[str]:
    """The replica that took this request, if it has generated a token."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == TOKENS_TOTAL]
    return [sample.labels["replica"] for sample in samples if sample.value > 0]
