"""`medusa bench overload`: what a service does with more requests than it sustains.

This file is the command; benchmarks/overloading.py does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medusa.config import ConfigError


def overload(
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id.")] = "models/chat-8m",
    heads: Annotated[str | None, typer.Option(help="Medusa heads; without them decoding is plain.")] = None,
    speculation: Annotated[str, typer.Option(help="auto, off, or a tree size of the checkpoint's ladder.")] = "off",
    loads: Annotated[str, typer.Option(help="Multiples of the sustained rate, comma-separated.")] = "0.8,2",
    seconds: Annotated[float, typer.Option(help="For how long requests come, each load.")] = 60.0,
    batch: Annotated[int, typer.Option(help="Replies decoded at once.")] = 16,
    queued: Annotated[int, typer.Option(help="Replies that may wait; more are refused.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.")] = 128,
    reply_tokens: Annotated[int, typer.Option(help="Mean length of a reply.")] = 128,
    paced: Annotated[
        bool, typer.Option(help="An engine that only passes a 7B model's step times: no speed of decoding.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the engine's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of overload.json and overload.md.")] = Path("runs/bench/overload"),
) -> None:
    """Offers a service multiples of what it sustains: latencies of what it takes, and how soon it refuses the rest.

    Example: `medusa bench overload --model models/chat-8m --loads 0.8,1.5,2 --seconds 30`
    """
    from benchmarks.overloading import overload as measure
    from benchmarks.paced import pacing_of
    from benchmarks.serving import Load
    from deployments.config import ServerConfig
    from deployments.one_process import free_port
    from medusa.config import validate

    if paced and (heads or speculation != "off"):
        raise ConfigError("--paced has an engine of its own; leave --heads and --speculation")
    if seconds <= 0:
        raise ConfigError(f"--seconds is above 0, got {seconds:g}")
    factors = _factors(loads)
    size = int(speculation) if speculation.isdigit() else speculation
    given = {"model": model, "heads": heads, "speculation": size, "device": device, "dtype": dtype}
    given |= {"max_batch_size": batch, "max_queued_requests": queued, "port": free_port()}
    config = validate(ServerConfig, given, source="the command line")
    load = Load(prompt_tokens=prompt_tokens, reply_tokens=reply_tokens)
    pacing = pacing_of(None) if paced else None
    typer.echo(measure(config, load, factors, seconds, out, pacing=pacing, say=typer.echo).read_text())


def _factors(text: str) -> tuple[float, ...]:
    try:
        factors = tuple(float(each) for each in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--loads lists multiples such as 0.8,2, got {text!r}") from error
    if min(factors) <= 0:
        raise ConfigError(f"--loads are above 0, got {text!r}")
    return factors
