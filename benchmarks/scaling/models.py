"""The model that all parts load by its folder: the one that is named, or a larger shape that says what it says."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.inflate import inflate, inflate_checkpoint
from benchmarks.scaling.config import ScaleConfig
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import ConfigError
from medusa.model import Backbone, model_directory, weights_digest

NOT_COPIED = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "config.json", "README*")


def inflated(config: ScaleConfig) -> ScaleConfig:
    """The config with model and heads as workers are to load them. An inflated model stands in <out>/inflated, where
    every worker and the next run find it: 13 GB for a 7B shape, 65 GB for 33B."""
    if config.inflate is None:
        return config
    dtype = config.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    named = hashlib.sha256(f"{config.model} {config.heads}".encode()).hexdigest()[:8]
    folder = (config.out / "inflated" / f"{config.inflate}-{dtype}-{named}").resolve()
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_inflated(config, getattr(torch, dtype), partial)
        partial.rename(folder)
    heads = str(folder / "heads") if config.heads else None
    return replace(config, model=str(folder / "model"), heads=heads, dtype=dtype)


def _write_inflated(config: ScaleConfig, dtype: torch.dtype, folder: Path) -> None:
    small = Backbone.from_pretrained(config.model, dtype=torch.float32, device="cpu")
    checkpoint = load_checkpoint(Path(config.heads), small) if config.heads else None
    try:
        big = inflate(small, str(config.inflate), dtype=dtype, device="cpu")
    except ValueError as error:
        raise ConfigError(f"--inflate {config.inflate}: {error}") from error
    model = folder / "model"
    shutil.copytree(model_directory(config.model), model, ignore=shutil.ignore_patterns(*NOT_COPIED))
    big.model.save_pretrained(model)
    if checkpoint is not None:
        large = inflate_checkpoint(checkpoint, big)
        of_files = replace(large.meta.backbone, weights_digest=weights_digest(model))
        save_checkpoint(folder / "heads", large.heads, replace(large.meta, backbone=of_files))
