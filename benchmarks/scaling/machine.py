"""What a part was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

NVLS = "NCCL_NVLS_ENABLE"


@dataclass(frozen=True)
class Machine:
    """`device` is where workers compute; `gpus` and `cores` are the whole cluster's."""

    device: str
    gpus: int
    gpu: str
    cores: int
    cpu: str
    nodes: int
    torch: str
    ray: str
    nvls: str

    @property
    def workers_apart(self) -> bool:
        """Whether each worker has a device of its own, without which growth says nothing."""
        return self.device == "cuda"

    @property
    def words(self) -> str:
        gpus = f"{self.gpus} x {self.gpu}, " if self.device == "cuda" else ""
        nvls = f", {NVLS}={self.nvls}" if self.device == "cuda" else ""
        nodes = f", {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{gpus}{self.cores} cores of {self.cpu}{nodes}, torch {self.torch}, ray {self.ray}{nvls}"


def describe(device: str | None) -> Machine:
    """Of the Ray that is initialised. `device` None: cuda where the cluster has a GPU."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = int(ray.cluster_resources().get("GPU", 0))
    name = ray.get(ray.remote(num_gpus=1, num_cpus=0)(_gpu_name).remote()) if gpus else ""
    return Machine(
        device=device or ("cuda" if gpus else "cpu"),
        gpus=gpus,
        gpu=name,
        cores=os.cpu_count() or 1,
        cpu=_cpu_name(),
        nodes=len(nodes),
        torch=torch.__version__,
        ray=ray.__version__,
        nvls=os.environ.get(NVLS, "unset"),
    )


def _gpu_name() -> str:
    """In a worker: the driver's process keeps no memory of a GPU."""
    return torch.cuda.get_device_name()


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
