"""How the backbone of Medusa-2 learns, and what it was before: the two sides of self-distillation.

With LoRA both are one model: the adapter switched off is the base, to the last bit and without a second copy. Full
fine-tuning keeps a frozen copy. The student runs in training mode (dropout, activation checkpointing), the teacher not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from medusa.model import Backbone
from medusa.training.batch import Batch
from medusa.training.hidden import forward
from medusa.training.schedule import JointConfig, TrainerConfig


class AdaptationError(ValueError):
    """This backbone cannot be trained as asked; the message says why and what to do."""


class Adaptation(Protocol):
    """A backbone whose weights, some or all, have become trainable. `backbone` is the student, `base` the model as it
    was where that is a copy of its own."""

    backbone: Backbone
    base: nn.Module | None

    def student(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states [N, d] and the LM head's matrix [V, d], with gradient."""
        ...

    def teacher(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same of the base model, without; hidden states that the batch brings are taken as they are."""
        ...

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes what the base needs to become the student: an adapter (LoRA) or a model folder (full). `weights` are
        those that learn, by their names in the model."""
        ...


def adapt(backbone: Backbone, config: TrainerConfig) -> Adaptation:
    """Makes the backbone trainable, in place."""
    joint = config.joint
    if joint is None:
        raise ValueError("the backbone learns only with a joint configuration, got none")
    lora = joint.method == "lora"
    adaptation = LoraAdaptation(backbone, joint, config.seed) if lora else FullAdaptation(backbone, joint)
    if config.activation_checkpointing:
        backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adaptation


class LoraAdaptation:
    """Adapters on every linear layer but the LM head; on that too where `train_lm_head` asks for it."""

    def __init__(self, backbone: Backbone, joint: JointConfig, seed: int) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        head = backbone.model.get_output_embeddings()
        if joint.train_lm_head and head.weight is backbone.model.get_input_embeddings().weight:
            raise AdaptationError(
                f"{backbone.name} ties its LM head to its embeddings, which an adapter on one of them would part; "
                "set train_lm_head to false"
            )
        names = [name for name, module in backbone.model.named_modules() if type(module) is nn.Linear]
        head_name = next(name for name, module in backbone.model.named_modules() if module is head)
        targets = [name for name in names if name != head_name] + ([head_name] if joint.train_lm_head else [])
        self.backbone = backbone
        self.base: nn.Module | None = None  # it is this model with its adapters switched off
        lora = LoraConfig(
            r=joint.rank, lora_alpha=joint.alpha, lora_dropout=joint.dropout, target_modules=targets, bias="none"
        )
        with torch.random.fork_rng([backbone.device] if backbone.device.type == "cuda" else []):
            torch.manual_seed(seed)  # every worker and every start draws the same A
            self._peft = get_peft_model(backbone.model, lora)
        self._layers = [module for module in backbone.model.modules() if isinstance(module, BaseTunerLayer)]

    def student(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.backbone.model.train()
        return forward(self.backbone, batch), self._student_weight()

    @torch.no_grad()
    def teacher(self, batch: Batch) -> tuple[Tensor, Tensor]:
        weight_Vd = self.backbone.lm_head_weight.detach()
        if batch.hidden_Nd is not None:
            return batch.hidden_Nd, weight_Vd
        with self._switched_off():
            self.backbone.model.eval()
            return forward(self.backbone, batch), weight_Vd

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
        self._peft.peft_config["default"].base_model_name_or_path = self.backbone.name  # not a path of this machine
        self._peft.save_pretrained(directory, state_dict=named, save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # a template of peft's with nothing filled in

    def _student_weight(self) -> Tensor:
        """W + scale * B A as one matrix, since the chunked losses multiply by the matrix themselves."""
        head = self.backbone.model.get_output_embeddings()
        if head not in self._layers:
            return head.weight
        a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
        return head.weight + (head.scaling["default"] * (b @ a)).to(head.weight.dtype)

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        """The flag alone: peft's own context manager also turns off the adapters' requires_grad, which wrappers of
        distributed training do not expect."""
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False


class FullAdaptation:
    """Every weight learns, in float32 at least; the base stays beside it as it was."""

    def __init__(self, backbone: Backbone, joint: JointConfig) -> None:
        self.backbone = backbone
        self._base_dtype = backbone.dtype
        self._base: Backbone | None = None
        self.base: nn.Module | None = None
        if joint.needs_base:
            self._base = Backbone(copy.deepcopy(backbone.model), name=backbone.name, digest="")
            self.base = self._base.model.requires_grad_(False)
        backbone.model.requires_grad_(True).to(torch.promote_types(backbone.dtype, torch.float32))

    def student(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.backbone.model.train()
        return forward(self.backbone, batch), self.backbone.lm_head_weight

    @torch.no_grad()
    def teacher(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._base is None:
            raise ValueError("without distillation no copy of the base was kept")
        hidden_Nd = batch.hidden_Nd if batch.hidden_Nd is not None else forward(self._base, batch)
        return hidden_Nd, self._base.lm_head_weight

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        named = {name: weight.to(self._base_dtype) for name, weight in weights.items()}
        self.backbone.model.config.dtype = self._base_dtype
        self.backbone.model.save_pretrained(directory, state_dict=named)
