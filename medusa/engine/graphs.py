"""CUDA graphs of functions over static buffers, captured at first use; on a CPU the functions are simply run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch

T = TypeVar("T")


class Graphs:
    """One graph a key, in one memory pool: they run one after another, never at once."""

    def __init__(self, device: torch.device, *, is_alone: bool = True) -> None:
        """Where the process is not alone, NCCL's threads look at their own events while a graph is captured."""
        self._capture_mode = "global" if is_alone else "thread_local"
        self._on_gpu = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._warm_up = torch.cuda.Stream(device) if self._on_gpu else None  # one: cuBLAS keeps memory for each stream
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def clear(self) -> None:
        """Lets go of all graphs. NCCL ends a communicator only when no graph holds a sum of it."""
        for graph, _ in self._captured.values():
            graph.reset()
        self._captured.clear()

    def has(self, key: Hashable) -> bool:
        """Whether `run` will find the graph; always so where functions are simply run."""
        return not self._on_gpu or key in self._captured

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        """What `function` does and returns (the tensors that the capture returned)."""
        if not self._on_gpu:
            return function()
        graph, result = self._captured[key]
        graph.replay()
        return cast(T, result)

    def capture(self, key: Hashable, function: Callable[[], object]) -> None:
        """Runs `function` once, so that its kernels are compiled, and captures it: its inputs must be such that this
        harms nothing."""
        stream = self._warm_up
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=self._capture_mode):
            result = function()
        self._captured[key] = (graph, result)
