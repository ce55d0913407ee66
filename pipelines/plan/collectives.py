"""Seconds of NCCL's collectives: bytes over the links of a ring, one level inside a node and one across nodes.

A ring of n moves (n - 1) / n of the bytes through every link, once for a gather or a scatter and twice for an
all-reduce. Across nodes each GPU has a port of its own, so a node's GPUs each carry their share. One GPU takes no time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Bytes a second and GPU, in one direction: `inside` a node of `node_gpus`, and `across` nodes. `latency` is what
    a collective takes at each of the two levels whatever its size."""

    node_gpus: int
    inside: float
    across: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.node_gpus < 1 or min(self.inside, self.across) <= 0 or self.latency < 0:
            raise ValueError(f"a network needs GPUs in a node and rates above 0, got {self}")


def all_gather(whole: float, gpus: int, network: Network) -> float:
    """Every GPU ends with `whole` bytes, of which it had its part. A reduce-scatter takes the same."""
    inside, nodes = _levels(gpus, network)
    seconds = _ring(nodes) * whole / inside / network.across + _ring(inside) * whole / network.inside
    return seconds + network.latency * ((nodes > 1) + (inside > 1))


def all_reduce(size: float, gpus: int, network: Network) -> float:
    """A reduce-scatter and a gather of `size` bytes."""
    return 2 * all_gather(size, gpus, network)


def _levels(gpus: int, network: Network) -> tuple[int, int]:
    inside = min(gpus, network.node_gpus)
    if gpus % inside:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {network.node_gpus}; give a multiple of it, or fewer")
    return inside, gpus // inside


def _ring(members: int) -> float:
    return (members - 1) / members
