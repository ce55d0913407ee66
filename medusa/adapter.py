"""The backbone of Medusa-2: a base model and a LoRA adapter, served merged in memory or as a folder of its own.

Both are the same weights: W + scale * B A, computed in float32 and rounded once to the base's own type, tensor by
tensor. So a merged folder has one digest wherever it is made, and the heads are pinned to it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medusa.checkpoint import ADAPTER, CheckpointMeta, CheckpointMismatchError, read_meta
from medusa.model import Backbone
from medusa.quantization import Quantization
from medusa.weights import Hashing, model_directory, weights_digest

_PREFIX = "base_model.model."  # peft's, before the name of a module


class AdapterError(ValueError):
    """The adapter is not one that can be merged; the message says what was found."""


@dataclass(frozen=True)
class LoraAdapter:
    """`deltas`: module name -> (A [r, in], B [out, r]); a module's weight gains scale * B A."""

    deltas: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    @classmethod
    def read(cls, folder: Path) -> LoraAdapter:
        """From peft's files, plain LoRA only."""
        config = json.loads((folder / "adapter_config.json").read_text())
        unusual = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")
        if config.get("peft_type") != "LORA" or any(config.get(name) for name in unusual):
            raise AdapterError(f"{folder} is not a plain LoRA adapter; of {unusual} none may be set")
        tensors = load_file(folder / "adapter_model.safetensors")
        names = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}
        deltas = {
            name: tuple(tensors[f"{_PREFIX}{name}.lora_{side}.weight"] for side in "AB") for name in sorted(names)
        }
        rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        return cls(deltas, config["lora_alpha"] / rank)

    def merged(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        a, b = (side.to(weight.device, torch.float32) for side in self.deltas[module])
        return (weight.float() + self.scale * (b @ a)).to(weight.dtype)


def runs_merged(hashing: Hashing, heads: Path) -> bool:
    """Whether these heads run on the backbone whose digest this is only with their adapter merged into it."""
    meta = read_meta(heads)
    return meta.adapter is not None and hashing.result() != meta.backbone.weights_digest


def load_with_adapter(
    backbone: str | Path,
    heads: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantization: Quantization | None = None,
    hashing: Hashing | None = None,
) -> Backbone:
    """The backbone that these heads run on: `backbone` itself, or with the checkpoint's adapter merged in memory;
    quantised after that. `hashing` is the digest of `backbone`, already under way.

    Raises CheckpointMismatchError where it is neither the adapter's base nor the merged model.
    """
    meta = read_meta(heads)
    hashing = hashing or Hashing(model_directory(backbone))
    load = partial(Backbone.from_pretrained, backbone, dtype=dtype, device=device, hashing=hashing)
    if meta.adapter is None:
        return load(quantization=quantization)
    if quantization is None:
        model = load()  # whichever of the two it is: its weights are hashed meanwhile
        return model if _is_merged(hashing, meta, backbone) else _merged_in_memory(model, heads, meta)
    if _is_merged(hashing, meta, backbone):
        return load(quantization=quantization)
    merged = _merged_in_memory(load(), heads, meta)
    merged.quantize(quantization)
    return merged


def _is_merged(hashing: Hashing, meta: CheckpointMeta, backbone: str | Path) -> bool:
    """Whether it is the merged model; False for the adapter's base."""
    assert meta.adapter is not None
    digest = hashing.result()
    if digest not in (meta.backbone.weights_digest, meta.adapter.base.weights_digest):
        raise CheckpointMismatchError(
            f"these heads run on {meta.adapter.base.name} ({meta.adapter.base.weights_digest}) with their adapter, or "
            f"on the two merged ({meta.backbone.weights_digest}), but the backbone is {backbone} ({digest})"
        )
    return digest == meta.backbone.weights_digest


def write_merged(base: Path, adapter: Path, destination: Path) -> str:
    """A model folder like `base` with the adapter merged into its weights; returns its digest. One file of weights is
    in memory at a time. `destination` must not exist."""
    lora = LoraAdapter.read(adapter)
    shutil.copytree(
        base, destination, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "*.pth", "README*")
    )
    done: set[str] = set()
    for file in sorted(base.glob("*.safetensors")):
        tensors = {}
        with safe_open(file, "pt") as source:
            metadata = source.metadata()
            for name in source.keys():  # noqa: SIM118 (not a dict)
                module = name.removesuffix(".weight")
                merges = name.endswith(".weight") and module in lora.deltas
                tensors[name] = lora.merged(module, source.get_tensor(name)) if merges else source.get_tensor(name)
                done |= {module} if merges else set()
        save_file(tensors, destination / file.name, metadata=metadata)
    if missing := sorted(set(lora.deltas) - done):
        raise AdapterError(f"{base} holds no weights of {missing[:3]} ({len(missing)} in all) that {adapter} changes")
    return weights_digest(destination)


def _merged_in_memory(backbone: Backbone, heads: Path, meta: CheckpointMeta) -> Backbone:
    lora = LoraAdapter.read(heads / ADAPTER)
    with torch.no_grad():
        for module, weight in _weights(backbone, lora):
            weight.copy_(lora.merged(module, weight))
    merged = Backbone(backbone.model, name=backbone.name, digest=meta.backbone.weights_digest)
    merged.hashing = backbone.hashing
    return merged


def _weights(backbone: Backbone, lora: LoraAdapter) -> Iterator[tuple[str, torch.Tensor]]:
    for module in lora.deltas:
        yield module, backbone.model.get_submodule(module).weight
