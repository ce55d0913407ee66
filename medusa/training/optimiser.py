"""The optimiser: parameters by name in groups of one rate, and its state by those names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medusa.heads import DraftHeads
from medusa.training.schedule import TrainerConfig

SCALE = "rate_scale"  # a group's rate as a multiple of the heads'


Named = dict[str, nn.Parameter]


def named_groups(heads: DraftHeads, model: nn.Module | None, config: TrainerConfig) -> dict[float, Named]:
    """Rate scale -> what learns at it, by name. Biases too: the heads' rate is that of all their parameters."""
    groups: dict[float, Named] = {1.0: {f"heads.{name}": parameter for name, parameter in heads.named_parameters()}}
    if model is not None and config.joint is not None:
        backbone = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
        groups.setdefault(1 / config.joint.heads_lr_scale, {}).update(backbone)
    return groups


class Optimiser:
    """AdamW, or its form with 8-bit moments, over the named groups."""

    def __init__(self, groups: Mapping[float, Mapping[str, nn.Parameter]], config: TrainerConfig) -> None:
        self.parameters = {name: parameter for group in groups.values() for name, parameter in group.items()}
        of_groups = [{"params": list(group.values()), SCALE: scale} for scale, group in groups.items()]
        make = torch.optim.AdamW if config.optimizer == "adamw" else _adamw_8bit()
        more: dict[str, Any] = {"fused": True} if config.optimizer == "adamw" else {}
        self.torch = make(
            of_groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, **more
        )

    def step(self, rate: float) -> None:
        for group in self.torch.param_groups:
            group["lr"] = rate * group[SCALE]
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """name/key -> tensor, flat."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.torch.state.get(parameter, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        of_name: dict[str, dict[str, Tensor]] = {}
        for entry, value in state.items():
            name, _, key = entry.rpartition("/")
            of_name.setdefault(name, {})[key] = value
        entries = self.torch.state_dict()
        entries["state"] = {index: of_name[name] for index, name in enumerate(self.parameters) if name in of_name}
        self.torch.load_state_dict(entries)


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "optimizer adamw_8bit needs bitsandbytes: pip install 'medusa-on-ray[quantized]', or set it to adamw"
        ) from error
    return AdamW8bit
