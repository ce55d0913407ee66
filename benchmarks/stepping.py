"""What a decoding step costs by its sequences and nodes, and where its time goes.

The engine decodes prompts of any tokens: a step costs the same whatever they say. Every sequence has the same tree, and
the policy has no part. A step's time is the median of consecutive steps, host included.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.backbones import check_dtype, check_quantization, load_timed
from benchmarks.clock import Clock, watched_clock
from benchmarks.results import write_atomically
from medusa import Engine, HeadsConfig, MedusaHeads, SamplingParams
from medusa.checkpoint import BackboneRef, Checkpoint, CheckpointMeta
from medusa.config import ConfigError
from medusa.heads import DraftHeads, Vocabulary
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.tree import grow

HEADS: dict[str, tuple[type[DraftHeads], Vocabulary]] = {
    "shared": (MedusaHeads, "shared"),
    "own": (MedusaHeads, "own"),
    "hydra": (HydraHeads, "shared"),
    "hydra-own": (HydraHeads, "own"),
}
NUM_HEADS = 4
ACCURACY = [[0.5 / (k + 1) ** 0.5 * 0.5**rank for rank in range(8)] for k in range(NUM_HEADS)]
WARM_STEPS = 6
PROFILED_STEPS = 5
MAX_NODES = 64
MIN_REPEATS = 3
NOISE = 0.02


@dataclass(frozen=True)
class StepRow:
    """`batch` sequences with `nodes` nodes each and `heads` of HEADS. `over_plain` is over the step of one node a
    sequence; `of_copy` the bytes that it has to read over its time, as a share of the copy rate (all heads', though a
    step of fewer than five nodes asks not all of Hydra's); `clock_mhz` what the GPU's multiprocessors were clocked at
    meanwhile, where that can be read."""

    heads: str
    batch: int
    nodes: int
    step_ms: float
    low_ms: float
    high_ms: float
    over_plain: float | None
    of_copy: float
    clock_mhz: float | None


@dataclass(frozen=True)
class KernelRow:
    """One GPU kernel in the steps of a shape."""

    heads: str
    batch: int
    nodes: int
    kernel: str
    launches: float
    mean_us: float
    step_ms: float


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """The options of `medusa bench steps`; see there."""

    out: Path
    shapes: tuple[tuple[int, int], ...]
    model: str = "models/chat-8m"
    inflate: str | None = None
    heads: tuple[str, ...] = ("shared",)
    head_layers: int = 1
    context: int = 1000
    repeats: int = 40
    profile: bool = False
    quantization: str | None = None
    dtype: str | None = None
    device: str | None = None
    kv_cache_gb: float | None = None

    def __post_init__(self) -> None:
        if not self.heads or not set(self.heads) <= set(HEADS):
            raise ConfigError(f"--heads lists any of {', '.join(HEADS)}, got {','.join(self.heads)!r}")
        if self.head_layers < 1:
            raise ConfigError(f"--head-layers is at least 1, got {self.head_layers}")
        check_dtype(self.dtype)
        check_quantization(self.quantization)
        if self.repeats < MIN_REPEATS or self.context < 1:
            raise ConfigError(
                f"--repeats is at least {MIN_REPEATS} and --context at least 1, got {self.repeats} and {self.context}"
            )
        if min(min(pair) for pair in self.shapes) < 1 or max(nodes for _, nodes in self.shapes) > MAX_NODES:
            raise ConfigError(f"--shapes has at least one sequence and 1 to {MAX_NODES} nodes each, got {self.shapes}")


def time_steps(config: StepsConfig) -> str:
    """Times every shape, writing after each, and returns the Markdown page."""
    tokenizer = ChatTokenizer.from_pretrained(config.model)
    _, backbone = load_timed(config.model, config.inflate, config.dtype, config.device, config.quantization)
    settings = _settings(backbone, config)
    rows: list[StepRow] = []
    kernels: list[KernelRow] = []
    copy_rate = settings["copy rate, GB/s"] * 1e9
    with watched_clock(backbone.device) as clock:
        for heads in config.heads:
            hardware.release_memory()  # of the engine before, from whose room the next one's cache is cut
            for row, its_kernels in _time_heads(heads, backbone, tokenizer, config, copy_rate, clock):
                rows.append(row)
                kernels += its_kernels
                print(f"{heads} {row.batch} x {row.nodes}: {row.step_ms:.3f} ms", file=sys.stderr, flush=True)
                _write(config.out, settings, rows, kernels)
    return _markdown(settings, rows, kernels)


def _time_heads(
    name: str, backbone: Backbone, tokenizer: ChatTokenizer, config: StepsConfig, copy_rate: float, clock: Clock
) -> Iterator[tuple[StepRow, list[KernelRow]]]:
    """Each shape with an engine that is gone at the end."""
    checkpoint = _fresh_heads(backbone, name, config.head_layers, tokenizer)
    engine = Engine(
        backbone,
        tokenizer,
        checkpoint,
        max_batch_size=max(batch for batch, _ in config.shapes),
        kv_cache_gb=config.kv_cache_gb,
        speculation="off",
    )
    plain_ms: dict[int, float] = {}
    for batch, nodes in config.shapes:
        timed = _measure(engine, batch, nodes, config, clock)
        low, median, high = (1e3 * seconds for seconds in statistics.quantiles(timed.seconds, n=4))
        over_plain = median / plain_ms[batch] if batch in plain_ms else None
        if nodes == 1:
            plain_ms.setdefault(batch, median)
        read = hardware.weight_bytes(backbone) + batch * timed.context * hardware.kv_bytes_per_token(backbone)
        read += hardware.heads_bytes(checkpoint.heads, backbone) if nodes > 1 else 0
        of_copy = read / (median / 1e3) / copy_rate
        row = StepRow(name, batch, nodes, median, low, high, over_plain, of_copy, timed.clock_mhz)
        yield row, [KernelRow(name, batch, nodes, *each) for each in timed.kernels]


@dataclass(frozen=True)
class _Timed:
    seconds: list[float]
    context: float
    clock_mhz: float | None
    kernels: list[tuple[str, float, float, float]]


def _measure(engine: Engine, batch: int, nodes: int, config: StepsConfig, clock: Clock) -> _Timed:
    engine.set_tree(grow(ACCURACY, nodes))
    _fill(engine, batch, config.context, WARM_STEPS + config.repeats + PROFILED_STEPS)
    for _ in range(WARM_STEPS):
        engine.step()
    seconds = []
    start, before = time.time(), time.perf_counter()
    for _ in range(config.repeats):
        engine.step()
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    clock_mhz = clock.between(start, time.time())
    stats = engine.stats()
    if stats.running != batch:
        raise RuntimeError(f"{batch} sequences were started, {stats.running} still run; lower --repeats or --context")
    kernels = _profiled(engine) if config.profile and engine.backbone.device.type == "cuda" else []
    for index in range(batch):
        engine.abort(str(index))
    while engine.has_unfinished():
        engine.step()
    return _Timed(seconds, config.context + WARM_STEPS + config.repeats / 2, clock_mhz, kernels)


def _fill(engine: Engine, batch: int, context: int, num_steps: int) -> None:
    """Steps until every sequence decodes."""
    rng = random.Random(0)
    params = SamplingParams(max_tokens=num_steps * (NUM_HEADS + 1) + 1, temperature=0.0, ignore_eos=True)
    waiting = set()
    for index in range(batch):
        prompt = [rng.randrange(3, engine.backbone.vocab_size) for _ in range(context)]
        waiting.add(engine.add(prompt, params, request_id=str(index)))
    while waiting:
        waiting -= {output.request_id for output in engine.step()}


def _profiled(engine: Engine) -> list[tuple[str, float, float, float]]:
    """Name, launches a step, microseconds a launch and milliseconds a step of each kernel, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    spans: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans[event.name].append(event.time_range.end - event.time_range.start)
    found = [
        (name, len(times) / PROFILED_STEPS, statistics.mean(times), sum(times) / PROFILED_STEPS / 1e3)
        for name, times in spans.items()
    ]
    return sorted(found, key=lambda each: -each[3])


def _fresh_heads(backbone: Backbone, name: str, num_layers: int, tokenizer: ChatTokenizer) -> Checkpoint:
    """Untrained heads: they cost what trained ones do. Noise in their blocks, so that no kernel sees zeros."""
    kind, vocabulary = HEADS[name]
    config = HeadsConfig(
        num_heads=NUM_HEADS,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_layers=num_layers,
        vocabulary=vocabulary,
    )
    heads = kind.initialised(config, backbone.lm_head_weight).eval().requires_grad_(False)
    generator = torch.Generator(backbone.device).manual_seed(0)
    for block in (head[layer] for head in heads for layer in range(num_layers)):  # type: ignore[index]
        block.linear.weight.normal_(0, NOISE, generator=generator)
    reference = BackboneRef(name=backbone.name, weights_digest=backbone.digest, tokenizer_digest=tokenizer.digest)
    return Checkpoint(heads, CheckpointMeta.of(heads, reference))


def _settings(backbone: Backbone, config: StepsConfig) -> dict[str, Any]:
    return {
        "model": backbone.name,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "quantization": backbone.quantization or "none",
        "device": hardware.device_name(backbone.device),
        "torch": torch.__version__,
        "copy rate, GB/s": round(hardware.copy_rate(backbone.device) / 1e9, 1),
        "weights, GB": round(hardware.weight_bytes(backbone) / 1e9, 3),
        "layers of a head": config.head_layers,
        "context": config.context,
        "steps": config.repeats,
    }


def _write(out: Path, settings: dict[str, Any], rows: Sequence[StepRow], kernels: Sequence[KernelRow]) -> None:
    content = {"settings": settings, "rows": list(map(asdict, rows)), "kernels": list(map(asdict, kernels))}
    write_atomically(out / "steps.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    write_atomically(out / "steps.md", lambda path: path.write_text(_markdown(settings, rows, kernels)))


def _markdown(settings: dict[str, Any], rows: Sequence[StepRow], kernels: Sequence[KernelRow]) -> str:
    lines = ["# Decoding steps", "", *(f"- {name}: {value}" for name, value in settings.items()), ""]
    lines += [
        "| sequences x nodes | heads | step, ms | over plain | of copy | clock, MHz |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row.over_plain:.3f}" if row.over_plain else ""
        timed = f"{row.step_ms:.3f} ({row.low_ms:.3f} to {row.high_ms:.3f})"
        clock = f"{row.clock_mhz:,.0f}" if row.clock_mhz else ""
        lines.append(f"| {row.batch} x {row.nodes} | {row.heads} | {timed} | {ratio} | {row.of_copy:.0%} | {clock} |")
    for batch, nodes, heads in dict.fromkeys((k.batch, k.nodes, k.heads) for k in kernels):
        lines += ["", f"## {batch} x {nodes}, {heads} heads", "", "| kernel | launches | us | ms a step |"]
        lines.append("|---|---|---|---|")
        for each in [k for k in kernels if (k.batch, k.nodes, k.heads) == (batch, nodes, heads)][:15]:
            lines.append(f"| {each.kernel[:70]} | {each.launches:g} | {each.mean_us:.2f} | {each.step_ms:.3f} |")
    return "\n".join(lines) + "\n"
