"""What a replica counts: one set of Prometheus metrics, with vLLM's stems under `medusa_`.

GET /metrics answers for the replica that took the request, and says which. On Ray, `RayMirror` hands the same samples
to Ray's agent on each node, where Prometheus scrapes them as `ray_medusa_*`, of all replicas.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from medusa import Completion, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
PER_STEP = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0)


@dataclass
class StepTokens:
    """What a step gave all of its replies: tokens, trees that were checked, and of their guesses those kept, by head.
    `seconds_each` has, for every reply, the time since its last tokens, divided among the new ones."""

    tokens: int = 0
    drafts: int = 0
    kept_by_position: list[int] = field(default_factory=list)
    seconds_each: list[float] = field(default_factory=list)

    def drafted(self, num_kept: int) -> None:
        """One reply's tree, of which so many guesses were kept."""
        self.drafts += 1
        self.kept_by_position += [0] * (num_kept - len(self.kept_by_position))
        for position in range(num_kept):
            self.kept_by_position[position] += 1


class Metrics:
    """Recorded by the engine's thread and by the routes; every method may be called from any thread."""

    def __init__(self, model_name: str, *, replica: str = "local") -> None:
        self._registry = registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "replica": replica}
        names = tuple(self._labels)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"medusa_{name}", text, names, registry=registry).labels(**self._labels)

        def counter(name: str, text: str, *more: str) -> Counter:
            metric = Counter(f"medusa_{name}", text, (*names, *more), registry=registry)
            return metric if more else metric.labels(**self._labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"medusa_{name}", text, names, buckets=buckets, registry=registry).labels(**self._labels)

        self._running = gauge("num_requests_running", "Replies being decoded.")
        self._waiting = gauge("num_requests_waiting", "Replies that wait for a place in the batch.")
        self._pages = gauge("kv_cache_usage_perc", "Share of the cache's pages in use, 0 to 1.")
        self._tree = gauge("tree_size", "Nodes of the latest step's token tree; 1 is plain decoding.")
        self._healthy = gauge("engine_healthy", "1 while the engine takes requests, 0 once it is sick.")
        self._queued_tokens = gauge("queued_prompt_tokens", "Prompt tokens admitted whose reply has not begun.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self._prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._prefix_hits = counter("prefix_cache_hits", "Prompt tokens found there.")
        self._preemptions = counter("num_preemptions", "Replies that gave their pages back for a while.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._steps = counter("decode_steps", "Decode steps by the size of their tree.", "tree_size")
        self._drafts = counter("spec_decode_num_drafts", "Trees of guesses checked, one a reply and step.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Guesses checked.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Guesses kept.")
        self._by_position = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Guesses kept, by the head that made them.", "position"
        )
        self._finished = counter("request_success", "Replies that ended, by reason.", "finished_reason")
        self._refused = counter("requests_refused", "Requests refused, by status.", "status")
        self._swaps = counter("heads_swaps", "Changes of the heads in this replica, by outcome.", "outcome")
        self._ttft = histogram("time_to_first_token_seconds", "From the request to its first token.", LONG_S)
        self._itl = histogram("inter_token_latency_seconds", "Time a token, within a reply.", SHORT_S)
        self._e2e = histogram("e2e_request_latency_seconds", "From the request to the end of a reply.", LONG_S)
        self._queue = histogram(
            "request_queue_time_seconds", "From the request to the step of its first token.", LONG_S
        )
        self._step_time = histogram("step_time_seconds", "Time of one step of the engine.", SHORT_S)
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._reply_length = histogram("request_generation_tokens", "Tokens of a reply.", TOKENS)
        self._acceptance = histogram("request_tokens_per_step", "Tokens a decode step, over a reply.", PER_STEP)
        self._model = Gauge(
            "medusa_model_info",
            "1 for the heads that new requests get.",
            (*names, "version", "digest"),
            registry=registry,
        )
        self._healthy.set(1)

    def stepped(self, before: EngineStats, now: EngineStats, seconds: float) -> None:
        """One step of the engine; the counters are what it counted in between."""
        self._running.set(now.running)
        self._waiting.set(now.waiting)
        self._pages.set(now.pages_used / now.pages_total if now.pages_total else 0.0)
        self._tree.set(now.tree_size)
        self._step_time.observe(seconds)
        computed, reused = now.prefill_tokens - before.prefill_tokens, now.reused_tokens - before.reused_tokens
        self._prompt_tokens.inc(computed)
        self._prefix_queries.inc(computed + reused)
        self._prefix_hits.inc(reused)
        self._preemptions.inc(now.preemptions - before.preemptions)
        self._draft_tokens.inc(now.drafted_tokens - before.drafted_tokens)
        self._accepted.inc(now.accepted_tokens - before.accepted_tokens)
        if now.steps > before.steps:
            self._steps.labels(**self._labels, tree_size=str(now.tree_size)).inc(now.steps - before.steps)

    def idle(self, now: EngineStats) -> None:
        """What the engine holds after a command, such as an abort."""
        self._running.set(now.running)
        self._waiting.set(now.waiting)
        self._pages.set(now.pages_used / now.pages_total if now.pages_total else 0.0)

    def queued(self, prompt_tokens: int) -> None:
        self._queued_tokens.set(prompt_tokens)

    def began(self, *, waited_s: float, first_token_s: float, prompt_tokens: int) -> None:
        self._queue.observe(waited_s)
        self._ttft.observe(first_token_s)
        self._prompt_length.observe(prompt_tokens)

    def generated(self, step: StepTokens) -> None:
        """All tokens of one step. Metrics are under locks of their own, so one update a step costs less than many."""
        self._generated.inc(step.tokens)
        if step.drafts:
            self._drafts.inc(step.drafts)
        for position, kept in enumerate(step.kept_by_position):
            self._by_position.labels(**self._labels, position=str(position)).inc(kept)
        for seconds in step.seconds_each:
            self._itl.observe(seconds)

    def finished(self, completion: Completion, seconds: float) -> None:
        self._finished.labels(**self._labels, finished_reason=completion.finish_reason).inc()
        self._e2e.observe(seconds)
        self._reply_length.observe(len(completion.token_ids))
        if completion.num_steps:
            self._acceptance.observe(completion.mean_acceptance_length)

    def aborted(self, num_replies: int) -> None:
        self._finished.labels(**self._labels, finished_reason="abort").inc(num_replies)

    def refused(self, status: int) -> None:
        self._refused.labels(**self._labels, status=str(status)).inc()

    def sick(self) -> None:
        self._healthy.set(0)

    def serves(self, version: str | None, digest: str | None) -> None:
        self._model.clear()
        self._model.labels(**self._labels, version=version or "none", digest=digest or "none").set(1)

    def swapped(self, outcome: str) -> None:
        """`outcome`: "taken" or "failed"."""
        self._swaps.labels(**self._labels, outcome=outcome).inc()

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> list[Metric]:
        return list(self._registry.collect())


class SampleGauge(Protocol):
    def set(self, value: float, tags: Mapping[str, str]) -> None: ...


class RayMirror:
    """Hands every sample to Ray as a gauge of the sample's own name, each `period_s`, from a thread of its own.

    A gauge even for counters and for the buckets of histograms: Ray's histograms would have to be observed again value
    by value, which costs at every token; a cumulative value under the same name reads the same in PromQL.
    """

    def __init__(
        self, metrics: Metrics, make_gauge: Callable[[str, str, tuple[str, ...]], SampleGauge], period_s: float = 5.0
    ) -> None:
        self._metrics = metrics
        self._make_gauge = make_gauge
        self._gauges: dict[str, SampleGauge] = {}
        self._pushed: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="medusa-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def push(self) -> None:
        pushed: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for metric in self._metrics.collect():
            for sample in metric.samples:
                if sample.name.endswith("_created"):
                    continue
                # Serve adds the replica itself.
                tags = tuple((name, value) for name, value in sample.labels.items() if name != "replica")
                if sample.name not in self._gauges:
                    names = tuple(name for name, _ in tags)
                    self._gauges[sample.name] = self._make_gauge(sample.name, metric.documentation, names)
                pushed[sample.name, tags] = sample.value
        # What is gone, such as the version served before, would keep its last value for ever.
        for (name, tags), value in (dict.fromkeys(self._pushed, 0.0) | pushed).items():
            self._gauges[name].set(value, tags=dict(tags))
        self._pushed |= pushed.keys()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.push()


def clock() -> float:
    """Seconds of the clock that durations are measured with."""
    return time.perf_counter()
