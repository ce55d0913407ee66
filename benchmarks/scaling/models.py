"""The model that all parts load by its folder: the one that is named, or a larger shape that says what it says."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.inflated import inflated_folder
from benchmarks.scaling.config import ScaleConfig


def inflated(config: ScaleConfig) -> ScaleConfig:
    """The config with model and heads as workers are to load them. An inflated model stands in <out>/inflated, where
    every worker and the next run find it."""
    if config.inflate is None:
        return config
    dtype = config.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    model, heads = inflated_folder(config.model, config.heads, config.inflate, dtype, config.out / "inflated")
    return replace(config, model=model, heads=heads, dtype=dtype)
