"""A model inflated to a larger shape, in a folder that any process can load."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.inflate import inflate, inflate_checkpoint
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import ConfigError
from medusa.model import Backbone
from medusa.weights import model_directory, weights_digest

NOT_COPIED = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "config.json", "README*")


def inflated_folder(model: str, heads: str | None, shape: str, dtype: str, where: Path) -> tuple[str, str | None]:
    """The folders of the inflated model and of its heads, below `where`, written there where they are not: 13 GB for a
    7B shape in 16 bits, 65 GB for 33B. Raises ConfigError for a model or shape that does not fit."""
    named = hashlib.sha256(f"{model} {heads}".encode()).hexdigest()[:8]
    folder = (where / f"{shape}-{dtype}-{named}").resolve()
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(model, heads, shape, getattr(torch, dtype), partial)
        partial.rename(folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the GPU is for those who will load it
    return str(folder / "model"), str(folder / "heads") if heads else None


def _write(name: str, heads: str | None, shape: str, dtype: torch.dtype, folder: Path) -> None:
    small = Backbone.from_pretrained(name, dtype=torch.float32, device="cpu")
    checkpoint = load_checkpoint(Path(heads), small) if heads else None
    try:
        big = inflate(small, shape, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise ConfigError(f"--inflate {shape}: {error}") from error
    model = folder / "model"
    shutil.copytree(model_directory(name), model, ignore=shutil.ignore_patterns(*NOT_COPIED))
    big.model.save_pretrained(model)
    if checkpoint is not None:
        large = inflate_checkpoint(checkpoint, big)
        of_files = replace(large.meta.backbone, weights_digest=weights_digest(model))
        save_checkpoint(folder / "heads", large.heads, replace(large.meta, backbone=of_files))
