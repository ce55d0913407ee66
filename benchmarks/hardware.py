"""What the machine could do: the rate at which it copies memory, the bytes that a step has to read, its idle share."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable

import psutil
import torch

from medusa.engine.limits import FREE_MEMORY_SHARE
from medusa.heads import DraftHeads
from medusa.model import Backbone
from medusa.quantized_linear import QuantizedLinear

COPY_BYTES = {"cuda": 2 * 2**30, "cpu": 256 * 2**20}  # far beyond any cache
REPEATS = 15


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy on the device: the median of several."""
    source = torch.empty(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    seconds = [_timed(lambda: target.copy_(source), device) for _ in range(REPEATS)]
    return 2 * source.nbytes / statistics.median(seconds[2:])


def weight_bytes(backbone: Backbone) -> int:
    """Of the backbone's weights that every step reads whole: all but the embedding, of which it reads single rows."""
    embedding = backbone.model.get_input_embeddings().weight
    parameters = {id(p): p for p in backbone.model.parameters()}
    read = sum(p.nbytes for p in parameters.values() if p is not embedding)
    quantised = (module for module in backbone.model.modules() if isinstance(module, QuantizedLinear))
    read += sum(module.values.nbytes + module.scale.nbytes for module in quantised)
    return read + (embedding.nbytes if embedding is backbone.lm_head_weight else 0)


def heads_bytes(heads: DraftHeads, backbone: Backbone) -> int:
    """Of what the heads read; a shared vocabulary matrix is the LM head, read again: once for all Medusa heads, once
    for each of heads that see their path, which wait for each other."""
    own = sum(parameter.nbytes for parameter in heads.parameters())
    times = heads.config.num_heads if heads.sees_path else 1
    return own + (times * backbone.lm_head_weight.nbytes if heads.config.vocabulary == "shared" else 0)


def kv_bytes_per_token(backbone: Backbone) -> int:
    kv_heads, head_size = backbone.kv_shape
    return 2 * backbone.num_layers * kv_heads * head_size * backbone.lm_head_weight.itemsize


def bytes_for_cache(device: torch.device) -> float:
    """What a KV cache may take of the memory that is free now: on a GPU as much as an engine takes by itself, of main
    memory half."""
    if device.type == "cuda":
        return FREE_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    return 0.5 * psutil.virtual_memory().available


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory() -> None:
    """Gives back what no object holds any more: an engine's cache is sized by what the driver says is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def idle_share(work: Callable[[], object], device: torch.device) -> float | None:
    """The part of the time from a GPU's first operation in `work` to its last in which it did nothing. Measured under
    torch's profiler, which slows the host: an upper bound. None where the profiler saw nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return idle_part(spans)


def idle_part(spans: Iterable[tuple[float, float]]) -> float | None:
    """The part of the time from the first start to the last end that no span covers."""
    ordered = sorted(spans)
    if not ordered or ordered[0][0] == max(end for _, end in ordered):
        return None
    covered, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - covered / (reached - ordered[0][0])


def _timed(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start
