"""`medusa bench steps`: what a decoding step costs by its sequences and nodes, and where its time goes.

This file is the command; benchmarks/stepping.py does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medusa.config import ConfigError

HEADS = (
    "Heads, comma-separated, an engine for each: Medusa heads over the LM head's vocabulary matrix (shared) or with "
    "matrices of their own (own), or Hydra heads over either (hydra, hydra-own), which guess at the beginning of a "
    "step, one depth of the tree after another."
)
SHAPES = "1x1,1x8,1x16,1x32,1x64,2x1,2x64,4x1,4x16,4x32,16x1,16x4,16x8,32x1,32x4,64x1,64x2"


def steps(
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id.")] = "models/chat-8m",
    inflate: Annotated[str | None, typer.Option(help="Embed it in a larger shape: vicuna-7b, ...")] = None,
    shapes: Annotated[str, typer.Option(help="Sequences x nodes of each one's tree, comma-separated.")] = SHAPES,
    heads: Annotated[str, typer.Option(help=HEADS)] = "shared",
    head_layers: Annotated[int, typer.Option(help="Layers of a head before its vocabulary matrix.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Timed steps of each shape.")] = 40,
    profile: Annotated[bool, typer.Option("--profile", help="Also list each GPU kernel's part.")] = False,
    quantization: Annotated[str | None, typer.Option(help="Weights of one byte: int8 or fp8.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the engine's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    kv_cache_gb: Annotated[float | None, typer.Option(help="Memory of the KV cache.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of steps.json and steps.md.")] = Path("runs/bench/steps"),
) -> None:
    """Times decoding steps of any number of sequences and nodes, with heads of random worth.

    Example: `medusa bench steps --inflate vicuna-7b --shapes 1x1,1x64,4x32 --profile`
    """
    from benchmarks.stepping import StepsConfig, time_steps

    config = StepsConfig(
        out=out,
        shapes=_shapes(shapes),
        model=model,
        inflate=inflate,
        heads=tuple(heads.split(",")),
        head_layers=head_layers,
        context=context,
        repeats=repeats,
        profile=profile,
        quantization=quantization,
        dtype=dtype,
        device=device,
        kv_cache_gb=kv_cache_gb,
    )
    typer.echo(time_steps(config))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(batch), int(nodes)) for batch, nodes in (each.split("x") for each in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--shapes lists sequences x nodes such as 1x1,4x32, got {text!r}") from error


if __name__ == "__main__":
    typer.run(steps)
