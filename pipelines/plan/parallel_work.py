"""Distillation and serving on N simulated engines, and what keeps N of them from N times one's throughput.

Distillation: the head hands out blocks of prompts one after the other, an actor takes its next block as one ends; at
the end actors run out of blocks at different times. Serving: clients ask again as soon as they are answered; each
request passes a proxy, one at a time, which asks two replicas drawn at random and takes the one that holds fewer, as
Ray Serve's router does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.plan.replicas import Events, Replica, Reply, StepSeconds

WARM_UP = 0.25  # of the replies of a serving run, which fill the replicas
STAGGER = 0.1  # clients begin over this share of a full batch's first reply; at once would be a herd


@dataclass(frozen=True)
class Engines:
    """What each of them is."""

    step_seconds: StepSeconds
    prefill_seconds: float
    max_batch: int

    def make(self, number: int) -> Events:
        return Events([Replica(self.step_seconds, self.prefill_seconds, self.max_batch) for _ in range(number)])


@dataclass(frozen=True)
class Distilled:
    """`idle_share` is the part of all actors' time that they had nothing to do, by the end or for want of blocks."""

    tokens_per_second: float
    idle_share: float
    dispatch_share: float


def distil(
    engines: Engines,
    actors: int,
    lengths: Sequence[int],
    rows_per_block: int,
    *,
    blocks_in_flight: int,
    dispatch_seconds: float = 0.0,
) -> Distilled:
    """All rows, of `lengths` tokens, by so many actors."""
    blocks = [lengths[start : start + rows_per_block] for start in range(0, len(lengths), rows_per_block)]
    events, left, last_ends = engines.make(actors), {}, [0.0] * actors
    head_free, given = 0.0, 0

    def give(now: float, actor: int) -> None:
        nonlocal head_free, given
        if given == len(blocks):
            return
        head_free = max(now, head_free) + dispatch_seconds
        left[given] = len(blocks[given])
        for length in blocks[given]:
            events.arrive(head_free, Reply(length, (actor, given)))
        given += 1

    for _ in range(blocks_in_flight):
        for actor in range(actors):
            give(0.0, actor)
    now = 0.0
    while (event := events.next()) is not None:
        now, index, reply = event
        actor, block = reply.tag
        if index < 0:
            events.assign(now, actor, reply)
            continue
        last_ends[actor] = now
        left[block] -= 1
        if not left[block]:
            give(now, actor)
    return Distilled(
        tokens_per_second=sum(lengths) / now,
        idle_share=1 - sum(last_ends) / (actors * now),
        dispatch_share=len(blocks) * dispatch_seconds / now,
    )


@dataclass(frozen=True)
class Served:
    """`imbalance` is the mean, over arrivals, of the fullest replica's replies over the average one's."""

    tokens_per_second: float
    proxy_share: float
    imbalance: float


def serve(
    engines: Engines,
    replicas: int,
    lengths: Sequence[int],
    at_once: int,
    *,
    proxies: int = 1,
    proxy_seconds: float = 0.0,
    choices: int = 2,
    seed: int = 0,
) -> Served:
    """`at_once` clients a replica until all replies, of `lengths` tokens, are given. `proxy_seconds` is a proxy's work
    for a whole reply, `choices` how many replicas it looks at."""
    draw, events = random.Random(seed), engines.make(replicas)
    proxy_free = [0.0] * proxies
    waiting = list(reversed(lengths))
    asked, fullest = 0, []

    def ask(now: float, client: int) -> None:
        nonlocal asked
        if waiting:
            asked += 1
            proxy = client % proxies
            proxy_free[proxy] = max(now, proxy_free[proxy]) + proxy_seconds
            events.arrive(proxy_free[proxy], Reply(waiting.pop(), client))

    clients = min(at_once * replicas, len(lengths))
    spread = STAGGER * lengths[0] * engines.step_seconds(min(at_once, engines.max_batch))
    for client in range(clients):
        ask(spread * client / clients, client)
    counted, since, ended, now = 0.0, 0.0, 0, 0.0
    first = int(WARM_UP * len(lengths))
    last = len(lengths) - clients  # from here on fewer are in flight
    while ended < last and (event := events.next()) is not None:
        now, index, reply = event
        if index < 0:
            seen = draw.sample(range(replicas), min(choices, replicas))
            events.assign(now, min(seen, key=lambda i: events.replicas[i].held), reply)
            if ended >= first:
                held = [replica.held for replica in events.replicas]
                fullest.append(max(held) * replicas / sum(held))
            continue
        ended += 1
        since = now if ended == first else since
        counted += reply.steps if ended > first else 0.0
        ask(now, reply.tag)
    if ended < last or now <= since or not counted:
        raise ValueError(f"{len(lengths)} replies are too few for {clients} clients; give several times as many")
    worked = asked * proxy_seconds - sum(max(0.0, free - now) for free in proxy_free)
    return Served(counted / (now - since), worked / now / proxies, sum(fullest) / len(fullest))
