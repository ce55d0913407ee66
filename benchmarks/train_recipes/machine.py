"""The model and the device that a run works with."""

from __future__ import annotations

import argparse
import gc
import sys

import torch

from medusa import Engine
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer


def load(arguments: argparse.Namespace) -> tuple[Backbone, ChatTokenizer]:
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    backbone = Backbone.from_pretrained(arguments.backbone, dtype=dtype, device=arguments.device)
    return backbone, ChatTokenizer.from_pretrained(arguments.backbone)


def make_engine(backbone: Backbone, tokenizer: ChatTokenizer, arguments: argparse.Namespace) -> Engine:
    return Engine(
        backbone,
        tokenizer,
        max_batch_size=arguments.batch_size,
        max_model_len=arguments.max_model_len,
        speculation="off",
    )


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()  # an engine and its graphs are a circle of references
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
