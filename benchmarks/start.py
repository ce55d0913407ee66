"""`medusa bench start`: how long a replica takes to start. Also `python -m benchmarks.start`.

This file is the command; benchmarks/starting.py does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def start(
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id.")] = "models/chat-8m",
    heads: Annotated[str | None, typer.Option(help="Medusa heads; without them decoding is plain.")] = None,
    speculation: Annotated[str, typer.Option(help="auto (measured at the start), off, or a tree size.")] = "auto",
    max_batch_size: Annotated[int, typer.Option(help="Replies decoded at once; auto measures up to it.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Starts with an empty compile cache, and with a warm one.")] = 3,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Leave the page cache as it is; otherwise files are read before each start.")
    ] = False,
    inflate: Annotated[
        str | None,
        typer.Option(help="Embed model and heads in a larger shape, in a folder of --out: vicuna-7b, ..."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the engine's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of start.json, start.md and the logs.")] = Path("runs/bench/start"),
) -> None:
    """Times a replica from the start of its process to its first answer, and the parts of it.

    Each start is a fresh process without Ray: first with an empty compile cache, then with the one it left.

    Example: `medusa bench start --inflate vicuna-7b --heads HEADS --repeats 2` on a GPU (writes 13 GB below --out).
    """
    import torch

    from benchmarks.inflated import inflated_folder
    from benchmarks.serving import in_new_process
    from benchmarks.starting import Plan, measure_starts
    from benchmarks.starting_report import write_report
    from deployments.config import ServerConfig
    from medusa.config import validate

    name = Path(model).name
    if inflate is not None:
        name = f"{name}@{inflate}"
        dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        typer.echo(f"{model} in the shape of {inflate} ...")
        model, heads = in_new_process(inflated_folder, model, heads, inflate, dtype, out / "inflated")
    size = int(speculation) if speculation.isdigit() else speculation
    given = {"model": model, "heads": heads, "speculation": size, "device": device, "dtype": dtype}
    given |= {"model_name": name, "max_batch_size": max_batch_size}
    config = validate(ServerConfig, given, source="the command line")
    plan = Plan(repeats, read_first=not as_is)
    measure_starts(config, plan, out, keep=lambda starts: write_report(out, config, plan, starts), say=typer.echo)
    typer.echo((out / "start.md").read_text())
    typer.echo(f"figures: {out / 'start.json'}")


if __name__ == "__main__":
    typer.run(start)
