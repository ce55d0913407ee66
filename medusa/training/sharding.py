"""What does not fit one GPU: the objective sharded over the workers by FSDP2, its state in a distributed checkpoint.

Each decoder layer is a shard group of its own, gathered when it runs; embeddings, LM head and heads are the root's,
gathered once a step, since the losses multiply by their matrices directly. A module in main memory is moved group by
group, so that a GPU never holds more than its shards and one group. A state is written by all workers and read
by any number of them. torch's distributed checkpoints hold a pickled index (`.metadata`): read only your own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from medusa.training.optimiser import Optimiser


def shard(objective: nn.Module) -> nn.Module:
    """Shards the module in place over the default process group; returns it."""
    names = set(getattr(getattr(objective, "model", None), "_no_split_modules", None) or ())
    for module in list(objective.modules()):
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(objective)
    return objective


def is_sharded(parameters: dict[str, nn.Parameter]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (every worker must ask), another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_sharded(directory: Path, optimiser: Optimiser) -> None:
    """Weights and moments of what learns, each worker its part; all workers call it."""
    dcp.save(_state(optimiser), checkpoint_id=directory)


def load_sharded(directory: Path, optimiser: Optimiser) -> None:
    """The reverse, into the same or another number of workers."""
    state = _state(optimiser)
    dcp.load(state, checkpoint_id=directory)
    with torch.no_grad():
        for name, parameter in optimiser.parameters.items():
            parameter.copy_(state[f"weights/{name}"])
    moments = {key.removeprefix("moments/"): value for key, value in state.items() if key.startswith("moments/")}
    optimiser.load_state_dict(moments)


def _state(optimiser: Optimiser) -> dict[str, Any]:
    """Moments that have not begun count as zeros, so that what is written and what is read name the same tensors."""
    weights = {f"weights/{name}": parameter.detach() for name, parameter in optimiser.parameters.items()}
    moments = {
        f"moments/{name}/{key}": value
        for name, parameter in optimiser.parameters.items()
        for key, value in (optimiser.torch.state.get(parameter) or _unbegun(parameter)).items()
    }
    return weights | moments


def _unbegun(parameter: nn.Parameter) -> dict[str, Tensor]:
    zeros = torch.zeros_like(parameter, requires_grad=False)
    return {"step": torch.zeros((), device=parameter.device), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
