"""The backbone that a benchmark times: a model as it is, or inflated to a larger shape."""

from __future__ import annotations

import torch

from benchmarks.inflate import inflate
from medusa.config import ConfigError
from medusa.model import Backbone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str | None) -> None:
    """Raises ConfigError for what is none of DTYPES; None stands for the engine's own."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype is one of {', '.join(DTYPES)}, got {dtype!r}")


def load_timed(
    model: str, shape: str | None, dtype: str | None, device: str | torch.device | None
) -> tuple[Backbone, Backbone]:
    """The model to which heads belong, and what is timed: the same one, or what it was inflated to. Default device: a
    GPU if there is one. Raises ConfigError for a shape that the model does not fit."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = DTYPES[dtype] if dtype else None
    if shape is None:
        backbone = Backbone.from_pretrained(model, dtype=chosen, device=device)
        return backbone, backbone
    small = Backbone.from_pretrained(model, dtype=torch.float32, device="cpu")
    try:
        return small, inflate(small, shape, dtype=chosen or _usual(device), device=device)
    except ValueError as error:
        raise ConfigError(f"--inflate {shape}: {error}") from error


def _usual(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
