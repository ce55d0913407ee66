"""The model that all parts load by its folder: the one that is named, or a larger shape that says what it says."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.inflate import inflate, inflate_checkpoint
from benchmarks.scaling.config import ScaleConfig
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import ConfigError
from medusa.model import Backbone, model_directory, weights_digest

NOT_COPIED = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "config.json", "README*")


@contextmanager
def inflated(config: ScaleConfig) -> Iterator[ScaleConfig]:
    """The config with model and heads as they are to be loaded. An inflated model is written to a temporary folder,
    since every worker reads it from there: 13 GB for a 7B shape, 65 GB for 33B."""
    if config.inflate is None:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="scale-model-") as folder:
        yield write_inflated(config, Path(folder))


def write_inflated(config: ScaleConfig, folder: Path) -> ScaleConfig:
    small = Backbone.from_pretrained(config.model, dtype=torch.float32, device="cpu")
    checkpoint = load_checkpoint(Path(config.heads), small) if config.heads else None
    dtype = getattr(torch, config.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    try:
        big = inflate(small, str(config.inflate), dtype=dtype, device="cpu")
    except ValueError as error:
        raise ConfigError(f"--inflate {config.inflate}: {error}") from error
    model = folder / f"{small.name}@{config.inflate}"
    shutil.copytree(model_directory(config.model), model, ignore=shutil.ignore_patterns(*NOT_COPIED))
    big.model.save_pretrained(model)
    if checkpoint is None:
        return replace(config, model=str(model))
    large = inflate_checkpoint(checkpoint, big)
    of_files = replace(large.meta.backbone, weights_digest=weights_digest(model))
    save_checkpoint(folder / "heads", large.heads, replace(large.meta, backbone=of_files))
    return replace(config, model=str(model), heads=str(folder / "heads"))
