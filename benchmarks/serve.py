"""`medusa bench serve`: what REST costs beside the engine alone. Also `python benchmarks/serve.py`.

This file is the command; benchmarks/serving.py does it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id.")] = "models/chat-8m",
    heads: Annotated[str | None, typer.Option(help="Medusa heads; without them decoding is plain.")] = None,
    speculation: Annotated[str, typer.Option(help="auto, off, or a tree size of the checkpoint's ladder.")] = "off",
    concurrency: Annotated[str, typer.Option(help="Requests in flight, comma-separated.")] = "1,4,16,64",
    requests: Annotated[int, typer.Option(help="Requests a concurrency.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt.")] = 128,
    reply_tokens: Annotated[
        int, typer.Option(help="Mean length of a reply; lengths are drawn from half to one and a half of it.")
    ] = 128,
    route: Annotated[str, typer.Option(help="completions (token ids) or chat (a template and text).")] = "completions",
    paced: Annotated[
        bool,
        typer.Option(help="An engine that only passes a 7B model's step times: the host's cost, no speed of decoding."),
    ] = False,
    step_times: Annotated[
        Path | None, typer.Option(help="With --paced: a profile's JSON, in the form of StepTimes.to_dict.")
    ] = None,
    through: Annotated[str, typer.Option(help="uvicorn (one process) or ray (Ray Serve).")] = "uvicorn",
    inflate: Annotated[
        str | None,
        typer.Option(help="Embed model and heads in a larger shape, in a folder of --out: vicuna-7b, ..."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the engine's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of serve.json and serve.md.")] = Path("runs/bench/serve"),
) -> None:
    """Measures tokens a second and the time to the first token, through REST and of the engine alone.

    Example: `medusa bench serve --model models/chat-8m --concurrency 1,8 --requests 16`. Without a GPU
    `medusa bench serve --paced` measures what the host costs beside one.
    """
    from functools import partial

    import torch

    from benchmarks.inflated import inflated_folder
    from benchmarks.paced import pacing_of
    from benchmarks.serving import Load, compare
    from benchmarks.serving_report import write_engine_alone, write_report
    from deployments.config import ServerConfig
    from deployments.one_process import free_port
    from medusa.config import ConfigError, validate

    if through not in ("uvicorn", "ray"):
        raise ConfigError(f"--through is uvicorn or ray, got {through}")
    if route not in ("completions", "chat"):
        raise ConfigError(f"--route is completions or chat, got {route}")
    pacing = pacing_of(step_times) if paced else None
    if paced and (through == "ray" or heads or speculation != "off"):
        raise ConfigError("--paced has an engine of its own, through uvicorn; leave --through, --heads, --speculation")
    if step_times is not None and not paced:
        raise ConfigError("--step-times goes with --paced; without it the engine takes the time it takes")
    numbers = concurrency.replace(" ", "").split(",")
    if not all(number.isdigit() and int(number) for number in numbers):
        raise ConfigError(f"--concurrency is numbers from 1 on with commas between, got {concurrency!r}")
    load = Load(tuple(map(int, numbers)), requests, prompt_tokens, reply_tokens, route)
    if inflate is not None:
        dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        model, heads = inflated_folder(model, heads, inflate, dtype, out / "inflated")
    size = int(speculation) if speculation.isdigit() else speculation
    given = {"model": model, "heads": heads, "speculation": size, "device": device, "dtype": dtype}
    config = validate(ServerConfig, given | {"port": free_port()}, source="the command line")
    typer.echo(f"measuring {config.served_name} alone, then through {through} ...")
    keep_engine = partial(write_engine_alone, out, config, load, through, pacing)
    rows = compare(config, load, through=through, pacing=pacing, keep_engine=keep_engine)
    report = write_report(out, config, load, through, rows, pacing)
    typer.echo(report.read_text())
    typer.echo(f"figures: {out / 'serve.json'}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    typer.run(serve)
