"""Tensor parallelism: each process of a group holds a share of every decoder layer, and they sum what they find.

The shares are those of the model's own plan in transformers, cut by PyTorch's DTensor as the weights are read, so that
no process ever holds the whole. Column-split layers (query, key, value, gate, up) need nothing from the others;
row-split ones (attention's output, down) give partial sums, which are added over all processes: two sums a layer.
Embeddings, norms and the LM head are whole in every process, so that hidden states and logits are too.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Lock

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_LAYERS = "layers."  # of a plan's names, those that are followed
_HOST = "127.0.0.1"
# All processes of a group are on one machine, and nobody else is to reach them. NVLink multicast fails to start on
# machines whose fabric manager does not allow it. An aborted sum is told by the engine; torch would end the process.
_SETTINGS = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}
_leaving = Lock()


class ShardingError(ValueError):
    """The model cannot be shared out among so many processes; the message says why."""


@dataclass(frozen=True)
class Rank:
    """This process's place in a group. `meet` returns when all of them have come to the same point: it waits longer
    than a sum may."""

    index: int
    mesh: DeviceMesh
    meet: Callable[[], None]

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def device(self) -> torch.device:
        return device_of(self.mesh.device_type, self.index)

    def sum(self, partial: torch.Tensor) -> None:
        """Adds up over the group, in place; every process then holds the same bits."""
        distributed.all_reduce(partial, group=self.mesh.get_group())


def device_of(device_type: str, index: int) -> torch.device:
    """Of the process `index`: a GPU of its own, or the CPU that they share."""
    return torch.device(device_type, index) if device_type == "cuda" else torch.device(device_type)


def local_store(size: int, timeout: timedelta) -> distributed.TCPStore:
    """Where a group of this machine's processes meets: a port of its own, which other machines do not reach."""
    listener = socket.socket()
    listener.bind((_HOST, 0))
    listener.listen()
    port = listener.getsockname()[1]
    return distributed.TCPStore(
        _HOST,
        port,
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )


def join(
    store: distributed.TCPStore,
    index: int,
    size: int,
    *,
    device_type: str,
    timeout: timedelta,
    meet: Callable[[], None],
) -> Rank:
    """Becomes one of `size` processes. `timeout` bounds each sum that is not part of a CUDA graph. torch has one
    default group a process: this is it."""
    device = device_of(device_type, index) if device_type == "cuda" else None
    if device is not None:
        torch.cuda.set_device(device)
    with _settings():
        distributed.init_process_group(
            BACKENDS[device_type], store=store, rank=index, world_size=size, timeout=timeout, device_id=device
        )
        mesh = init_device_mesh(device_type, (size,), mesh_dim_names=("tp",))
    return Rank(index, mesh, meet)


@contextmanager
def _settings() -> Iterator[None]:
    """Those that the user has not chosen, while the group is made; other groups of the process are none of ours."""
    ours = [name for name in _SETTINGS if name not in os.environ]
    os.environ.update({name: _SETTINGS[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def leave() -> None:
    """Ends this process's membership, whether the others are there or not. Graphs with sums must be gone before."""
    with _leaving:  # who watches the followers may be at it
        if not distributed.is_initialized():
            return
        if distributed.get_backend() == "nccl":
            distributed.distributed_c10d._abort_process_group()  # a sum that nobody answers would be waited for
        else:
            distributed.destroy_process_group()


def plan_of(config: PretrainedConfig, size: int) -> dict[str, str]:
    """transformers' plan for the decoder's layers. Raises ShardingError for a model without one, and for sizes that
    `size` processes cannot share evenly."""
    kind = config.model_type
    plan = {name: style for name, style in (config.base_model_tp_plan or {}).items() if name.startswith(_LAYERS)}
    if not plan:
        raise ShardingError(f"{kind} has no tensor-parallel plan in transformers; serve it with tensor_parallel=1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        count = getattr(config, name, None)
        if count is not None and count % size:
            raise ShardingError(f"{kind} has {name}={count}, which tensor_parallel={size} does not divide evenly")
    prefix = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix
    return {f"{prefix}.{name}": style for name, style in plan.items()}


def load_share(
    directory: Path, config: PretrainedConfig, rank: Rank, *, dtype: torch.dtype | str, attention: str
) -> PreTrainedModel:
    """This process's share of the model in `directory`, each weight read as far as it is needed."""
    with _local_rank(rank.index):
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            device_mesh=rank.mesh,
            distributed_config=DistributedConfig(tp_size=rank.size, tp_plan=plan_of(config, rank.size)),
        )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _hold_locally(module)
    return model


def _hold_locally(layer: nn.Linear) -> None:
    """A linear layer computes on its share alone; the plan's forward sums after it where that is due."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            setattr(layer, name, nn.Parameter(parameter.to_local(), requires_grad=False))
    layer.out_features, layer.in_features = layer.weight.shape


@contextmanager
def _local_rank(index: int) -> Iterator[None]:
    """transformers asks the environment which of a machine's devices is this process's, as torchrun tells it."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(index)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
