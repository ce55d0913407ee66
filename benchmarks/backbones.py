"""The backbone that a benchmark times: a model as it is or in a larger shape, its weights whole or of one byte."""

from __future__ import annotations

from typing import cast, get_args

import torch

from benchmarks.inflate import inflate
from medusa.config import ConfigError
from medusa.model import Backbone
from medusa.quantization import Quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str | None) -> None:
    """Raises ConfigError for what is none of DTYPES; None stands for the engine's own."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype is one of {', '.join(DTYPES)}, got {dtype!r}")


def check_quantization(quantization: str | None) -> None:
    """Raises ConfigError for what is no kind of weights of one byte; None stands for whole ones."""
    if quantization not in (None, *get_args(Quantization)):
        raise ConfigError(f"--quantization is one of {', '.join(get_args(Quantization))}, got {quantization!r}")


def load_timed(
    model: str,
    shape: str | None,
    dtype: str | None,
    device: str | torch.device | None,
    quantization: str | None = None,
) -> tuple[Backbone, Backbone]:
    """The model to which heads belong, and what is timed: the same one, or what it was inflated to, quantised if so
    asked. Default device: a GPU if there is one. Raises ConfigError for a shape that the model does not fit, and
    QuantizationError for a model or device without such weights."""
    small, timed = _load(model, shape, dtype, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if quantization is not None:
        timed.quantize(cast(Quantization, quantization))
    return small, timed


def _load(model: str, shape: str | None, dtype: str | None, device: torch.device) -> tuple[Backbone, Backbone]:
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
