"""`medusa bench attention`: one layer's tree attention beside FlashInfer's XQA and torch's own, by shape.

This file is the command; benchmarks/attending.py does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medusa.config import ConfigError

SHAPES = "1x1,1x16,1x64,4x32,16x8,64x1,64x2"


def attention(
    shapes: Annotated[str, typer.Option(help="Sequences x nodes of each one's tree, comma-separated.")] = SHAPES,
    heads: Annotated[str, typer.Option(help="Query heads / key-value heads, comma-separated.")] = "32/32,32/8",
    contexts: Annotated[str, typer.Option(help="Tokens ahead of each tree, comma-separated.")] = "1000,4000",
    head_size: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    contenders: Annotated[
        str | None, typer.Option(help="medusa, medusa-written, xqa, rope+xqa, sdpa; default: all that can run.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed replays of each graph.")] = 20,
    pdl: Annotated[bool, typer.Option(help="Let launches begin while their predecessors end, on Hopper.")] = True,
    out: Annotated[Path, typer.Option(help="Folder of attention.json and attention.md.")] = Path(
        "runs/bench/attention"
    ),
) -> None:
    """Times tree attention over paged keys and values in CUDA graphs, with each contender's error against float64.

    XQA takes part where `flashinfer` can be imported and the GPU is Hopper or later. Needs a CUDA GPU.

    Example: `medusa bench attention --shapes 1x1,1x64 --heads 32/8`
    """
    _require_gpu()
    from benchmarks.attending import AttentionConfig, time_attention

    config = AttentionConfig(
        out=out,
        shapes=_pairs(shapes, "x", "--shapes lists sequences x nodes such as 1x1,4x32"),
        heads=_pairs(heads, "/", "--heads lists query heads / key-value heads such as 32/32,32/8"),
        contexts=_numbers(contexts),
        head_size=head_size,
        dtype=dtype,
        contenders=tuple(contenders.split(",")) if contenders else None,
        repeats=repeats,
        pdl=pdl,
    )
    typer.echo(time_attention(config))


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "medusa bench attention times GPU kernels in CUDA graphs, and torch sees no CUDA GPU here; run it on a "
            "machine with one and a CUDA build of torch (for FlashInfer's XQA: Hopper or later)"
        )


def _pairs(text: str, separator: str, allowed: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(left), int(right)) for left, right in (each.split(separator) for each in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"{allowed}, got {text!r}") from error


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--contexts lists numbers of tokens such as 1000,4000, got {text!r}") from error


if __name__ == "__main__":
    typer.run(attention)
