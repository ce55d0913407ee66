"""Importing heads that others published: the layout of the Medusa reference and of TGI.

    config.json                  medusa_num_heads, medusa_num_layers, base_model_name_or_path
    medusa_lm_head.safetensors   or medusa_lm_head.pt: {h}.{l}.linear.weight|bias, {h}.{L}.weight

The number of heads is that of the weights: published configs are known to say less than the file holds. The folder
does not say which weights it was trained on, so the heads are pinned to the backbone that the caller names.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from medusa.checkpoint import BackboneRef, CheckpointError, CheckpointMeta, save_checkpoint
from medusa.digests import file_sha256
from medusa.export.layouts import REFERENCE_WEIGHTS, WEIGHTS
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone

PREFIXES = ("medusa_heads.", "medusa_head.")
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_MATRIX = re.compile(r"(\d+)\.(\d+)\.weight")


@dataclass(frozen=True)
class Imported:
    """What was made of the folder. `notes` tell where its config and its weights disagree."""

    path: Path
    heads: HeadsConfig
    notes: tuple[str, ...]


def import_checkpoint(source: Path, output: Path, backbone: Backbone, tokenizer_digest: str | None = None) -> Imported:
    """Writes the heads of `source` as a checkpoint of this project for `backbone`; `output` must not exist.

    The weights stay bit for bit. CheckpointError for a folder that is not in this layout, an archive that holds more
    than tensors, sizes that are not the backbone's, or values that are not finite.
    """
    config, file = _read_config(source), _weights_file(source)
    tensors = {_without_prefix(name): tensor for name, tensor in _read_tensors(file).items()}
    shape = _heads_config(tensors, file, backbone)
    heads = _loaded(shape, tensors, file)
    reference = BackboneRef(name=backbone.name, weights_digest=backbone.digest, tokenizer_digest=tokenizer_digest)
    told = {"imported": {"file": file.name, "sha256": file_sha256(file), "config": config}}
    save_checkpoint(output, heads, CheckpointMeta(heads=shape, backbone=reference, training=told))
    return Imported(output, shape, tuple(_disagreements(config, shape, backbone)))


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a published Medusa folder has one") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(config).__name__}")
    return config


def _weights_file(source: Path) -> Path:
    for name in (WEIGHTS, REFERENCE_WEIGHTS):
        if (source / name).is_file():
            return source / name
    raise CheckpointError(f"{source} has neither {WEIGHTS} nor {REFERENCE_WEIGHTS}; it holds no Medusa heads")


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """A .pt archive is a pickle, which could run code: torch's weights_only mode loads tensors and nothing else."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is refused: it holds more than tensors, and loading it could run code. Ask its publisher for "
            f"{WEIGHTS}, or convert it on a machine where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is no torch archive, or damaged: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file} must hold a mapping of names to tensors, got {type(content).__name__}")
    return content


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _heads_config(tensors: dict[str, torch.Tensor], file: Path, backbone: Backbone) -> HeadsConfig:
    """What the weights are; without vocabulary matrices (TGI's second kind) they share the backbone's LM head."""
    blocks = [match for name in tensors if (match := _BLOCK.fullmatch(name))]
    matrices = [match.string for name in tensors if (match := _MATRIX.fullmatch(name))]
    unknown = sorted(set(tensors) - {match.string for match in blocks} - set(matrices))
    if not blocks or unknown:
        raise CheckpointError(
            f"{file} is not in the layout {{head}}.{{layer}}.linear.weight|bias, {{head}}.{{layers}}.weight; "
            f"unexpected: {unknown[:5] or 'no residual block at all'}"
        )
    hidden_size = tensors[blocks[0].string].shape[0]
    vocab_size = tensors[matrices[0]].shape[0] if matrices else backbone.vocab_size
    if (hidden_size, vocab_size) != (backbone.hidden_size, backbone.vocab_size):
        raise CheckpointError(
            f"{file} is for a hidden size of {hidden_size} and {vocab_size} tokens, but {backbone.name} has "
            f"{backbone.hidden_size} and {backbone.vocab_size}; give the backbone that these heads were trained on"
        )
    return HeadsConfig(
        num_heads=1 + max(int(match[1]) for match in blocks),
        num_layers=1 + max(int(match[2]) for match in blocks),
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        vocabulary="own" if matrices else "shared",
    )


def _loaded(config: HeadsConfig, tensors: dict[str, torch.Tensor], file: Path) -> MedusaHeads:
    """The heads with these tensors themselves: nothing is cast or copied."""
    with torch.device("meta"):
        heads = MedusaHeads(config)
    try:
        heads.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not hold {config.num_heads} whole heads: {error}") from error
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise CheckpointError(f"{file} holds tensors of {sorted(map(str, dtypes))}; heads have one floating dtype")
    bad = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if bad:
        raise CheckpointError(f"tensor {bad[0]} of {file} holds NaN or infinite values")
    return heads


def _disagreements(config: dict[str, Any], heads: HeadsConfig, backbone: Backbone) -> list[str]:
    notes = []
    for key, found in (("medusa_num_heads", heads.num_heads), ("medusa_num_layers", heads.num_layers)):
        if config.get(key, found) != found:
            notes.append(f"config.json says {key}={config[key]}, the weights hold {found}: the weights are taken")
    named = config.get("base_model_name_or_path")
    if named and Path(str(named)).name != Path(backbone.name).name:
        notes.append(
            f"config.json names the backbone {named}, you gave {backbone.name}: heads of another backbone guess badly, "
            "which `medusa evaluate` would show"
        )
    return notes
