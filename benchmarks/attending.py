"""Times one layer's tree attention by shape: this project's kernel, FlashInfer's XQA, torch over dense keys.

Each contender attends once in every one of several layers, in one CUDA graph: the layers' keys and values together are
far beyond the L2 cache, so that each launch reads its own from memory, as in a decoding step. What a launch costs is
the graph's time over its layers. Contenders' errors are against the plain twin in float64.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import hardware
from benchmarks.attention_contenders import XQA_CAPABILITIES, Contender, Problem, Shape, error, medusa, sdpa, xqa
from benchmarks.results import write_atomically
from medusa.config import ConfigError
from medusa.engine.kv_cache import PAGE_SIZE
from medusa.kernels.launch import supports_pdl

CONTENDERS = ("medusa", "medusa-written", "xqa", "rope+xqa", "sdpa")
NEED_FLASHINFER = ("xqa", "rope+xqa")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
UNCACHED_BYTES = 512 * 2**20  # ten times an H100's L2
MIN_LAYERS, MAX_LAYERS = 2, 64
CUDA = torch.device("cuda")
OVER = "rope+xqa over medusa"
MAX_NODES = 64
MIN_REPEATS = 3


@dataclass(frozen=True)
class AttentionRow:
    """One contender at one shape: microseconds a layer, what the keys' and values' bytes take at the copy rate, and
    the largest error over the root mean square of the result."""

    batch: int
    nodes: int
    heads: int
    groups: int
    context: int
    contender: str
    us: float
    low_us: float
    high_us: float
    copy_us: float
    error: float
    layers: int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The options of `medusa bench attention`; see there. `contenders` None: all that can run."""

    out: Path
    shapes: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]
    head_size: int = 128
    dtype: str = "bfloat16"
    contenders: tuple[str, ...] | None = None
    repeats: int = 20
    pdl: bool = True

    def __post_init__(self) -> None:
        if self.contenders is not None and not set(self.contenders) <= set(CONTENDERS):
            raise ConfigError(f"--contenders lists {', '.join(CONTENDERS)}, got {','.join(self.contenders)!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if any(groups < 1 or heads < 1 or heads % groups for heads, groups in self.heads):
            raise ConfigError(f"--heads has query heads a multiple of key-value heads, got {self.heads}")
        if min(min(pair) for pair in self.shapes) < 1 or max(nodes for _, nodes in self.shapes) > MAX_NODES:
            raise ConfigError(f"--shapes has at least one sequence and 1 to {MAX_NODES} nodes each, got {self.shapes}")
        if self.repeats < MIN_REPEATS or min(self.contexts) < 1:
            raise ConfigError(
                f"--repeats is at least {MIN_REPEATS} and --contexts at least 1, got {self.repeats} and {self.contexts}"
            )
        if self.head_size % 16 or self.head_size < 16:
            raise ConfigError(f"--head-size is a multiple of 16, got {self.head_size}")

    def grid(self) -> Iterator[Shape]:
        for context in self.contexts:
            for heads, groups in self.heads:
                for batch, nodes in self.shapes:
                    yield Shape(batch, nodes, heads, groups, context, self.head_size, PAGE_SIZE)


def time_attention(config: AttentionConfig, device: torch.device = CUDA) -> str:
    """Times every shape, writing after each, and returns the Markdown page."""
    names, notes = chosen(config.contenders, device)
    settings = _settings(config, device)
    rows: list[AttentionRow] = []
    for shape in config.grid():
        kv_bytes = shape.kv_bytes(DTYPES[config.dtype].itemsize)
        copy_us = 1e6 * kv_bytes / (settings["copy rate, GB/s"] * 1e9)
        layers = min(MAX_LAYERS, max(MIN_LAYERS, -(-UNCACHED_BYTES // kv_bytes)))
        problem = Problem(shape, layers=layers, dtype=DTYPES[config.dtype], device=device)
        expected = problem.expected(layer=0)
        for contender in contenders(names, problem, pdl=settings["launches overlap"]):
            off = error(contender, problem, expected, layer=0)
            low, median, high = statistics.quantiles(_microseconds(contender, problem, config.repeats), n=4)
            place = (shape.batch, shape.nodes, shape.heads, shape.groups, shape.context)
            rows.append(AttentionRow(*place, contender.name, median, low, high, copy_us, off, layers))
            print(f"{shape}: {contender.name} {median:.1f} us, error {off:.4f}", file=sys.stderr, flush=True)
        _write(config.out, settings, rows, notes)
    return markdown(settings, rows, notes)


def chosen(asked: Sequence[str] | None, device: torch.device) -> tuple[tuple[str, ...], list[str]]:
    """The contenders that can run here, and a note of those that cannot; one that was asked for by name must."""
    reason = None
    if importlib.util.find_spec("flashinfer") is None:
        reason = "flashinfer is not installed (pip install flashinfer-python)"
    elif (capability := torch.cuda.get_device_capability(device))[0] not in XQA_CAPABILITIES:
        known = ", ".join(f"{major}.x" for major in XQA_CAPABILITIES)
        reason = f"it needs a GPU of compute capability {known}, this one has {capability[0]}.{capability[1]}"
    if reason is None:
        return tuple(asked or CONTENDERS), []
    if asked and set(asked) & set(NEED_FLASHINFER):
        raise ConfigError(f"--contenders names FlashInfer's XQA, which cannot run here: {reason}")
    others = tuple(name for name in asked or CONTENDERS if name not in NEED_FLASHINFER)
    return others, [f"FlashInfer's XQA took no part: {reason}."]


def contenders(names: Sequence[str], problem: Problem, *, pdl: bool) -> Iterator[Contender]:
    """One at a time, since each may hold a copy of the keys and values."""
    for name in names:
        if name == "sdpa":
            yield sdpa(problem)
        elif name in NEED_FLASHINFER:
            yield xqa(problem, pdl=pdl, writes=name == "rope+xqa")
        else:
            yield medusa(problem, pdl=pdl, writes=name == "medusa")


def _microseconds(contender: Contender, problem: Problem, repeats: int) -> list[float]:
    """Of one launch, in each replay of a graph of all layers; `error` has compiled it before. The replay ahead of the
    timed one keeps the GPU busy while that is launched."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(problem.layers):
            contender.launch(layer)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / problem.layers)
    return times


def _settings(config: AttentionConfig, device: torch.device) -> dict[str, Any]:
    try:
        flashinfer = version("flashinfer-python")
    except PackageNotFoundError:
        flashinfer = "none"
    return {
        "device": hardware.device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flashinfer": flashinfer,
        "dtype": config.dtype,
        "head size": config.head_size,
        "page size": PAGE_SIZE,
        "launches overlap": config.pdl and supports_pdl(device),
        "copy rate, GB/s": round(hardware.copy_rate(device) / 1e9, 1),
        "replays": config.repeats,
    }


def _write(out: Path, settings: dict[str, Any], rows: Sequence[AttentionRow], notes: Sequence[str]) -> None:
    content = {"settings": settings, "notes": list(notes), "rows": [asdict(row) for row in rows]}
    write_atomically(out / "attention.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    write_atomically(out / "attention.md", lambda path: path.write_text(markdown(settings, rows, notes)))


def markdown(settings: dict[str, Any], rows: Sequence[AttentionRow], notes: Sequence[str]) -> str:
    """A line for each shape, with each contender's time and, below, its error."""
    names = list(dict.fromkeys(row.contender for row in rows))
    shapes = list(dict.fromkeys((r.batch, r.nodes, r.heads, r.groups, r.context) for r in rows))
    by = {((r.batch, r.nodes, r.heads, r.groups, r.context), r.contender): r for r in rows}
    lines = ["# Tree attention, one layer", "", *(f"- {name}: {value}" for name, value in settings.items())]
    lines += [f"- {note}" for note in notes]
    lines += ["", "Microseconds, and those that the bytes of keys and values take at the copy rate:", ""]
    ratio = [OVER] if {"medusa", "rope+xqa"} <= set(names) else []
    lines += _table(["copy", *names, *ratio], shapes, lambda shape, name: _time(by, shape, name))
    lines += ["", "Largest error against float64, over the root mean square of the result:", ""]
    lines += _table(names, shapes, lambda shape, name: f"{by[shape, name].error:.4f}" if (shape, name) in by else "")
    lines += [
        "",
        "medusa and rope+xqa rotate the step's keys and write them with its values, as a decoding step has to;",
        "medusa-written and xqa find that done, and sdpa finds keys and values gathered from their pages as well.",
    ]
    return "\n".join(lines) + "\n"


Place = tuple[int, int, int, int, int]


def _time(by: dict[tuple[Place, str], AttentionRow], shape: Place, name: str) -> str:
    if name == "copy":
        return f"{next(row.copy_us for (place, _), row in by.items() if place == shape):.1f}"
    if name == OVER:
        pair = [by.get((shape, each)) for each in ("rope+xqa", "medusa")]
        return f"{pair[0].us / pair[1].us:.2f}" if pair[0] and pair[1] else ""
    return f"{by[shape, name].us:.1f}" if (shape, name) in by else ""


def _table(names: Sequence[str], shapes: Sequence[Place], cell: Any) -> list[str]:
    lines = [f"| sequences x nodes | heads | context | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for shape in shapes:
        batch, nodes, heads, groups, context = shape
        cells = " | ".join(cell(shape, name) for name in names)
        lines.append(f"| {batch} x {nodes} | {heads}/{groups} | {context} | {cells} |")
    return lines
