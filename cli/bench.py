"""`medusa bench`: measurements on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from cli.models import DEFAULT_BACKBONE
from cli.serving import Heads, Model, Speculation, parse_speculation
from medusa.config import ConfigError

bench = typer.Typer(
    help="Measures on this machine, with figures as JSON and Markdown. Example: `medusa bench serve`",
    no_args_is_help=True,
)


@bench.callback()
def _group() -> None:
    """Keeps `serve` a command of its own while it is the only one."""


@bench.command()
def serve(
    model: Model = DEFAULT_BACKBONE,
    heads: Heads = None,
    speculation: Speculation = "off",
    concurrency: Annotated[str, typer.Option(help="Requests in flight, one run each.")] = "1,4,16,64",
    requests: Annotated[int, typer.Option(help="Requests a run.")] = 64,
    prompt_tokens: int = 128,
    reply_tokens: int = 128,
    through: Annotated[str, typer.Option(help="uvicorn (one process) or ray (Ray Serve).")] = "uvicorn",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/bench"),
) -> None:
    """What REST costs beside the engine alone: tokens a second, and the time to the first token.

    Example: `medusa bench serve --model models/chat-8m --concurrency 1,8 --requests 16`
    """
    from deployments import bench as bench_serve
    from deployments.config import ServerConfig
    from deployments.local import free_port

    if through not in ("uvicorn", "ray"):
        raise ConfigError(f"--through is uvicorn or ray, got {through}")
    load = bench_serve.Load(_numbers(concurrency), requests, prompt_tokens, reply_tokens)
    config = ServerConfig(
        model=model, heads=heads, speculation=parse_speculation(speculation), device=device, port=free_port()
    )
    console = Console()
    console.print(f"measuring {config.served_name} alone, then through {through} ...", highlight=False)
    rows = bench_serve.compare(config, load, through=through)
    report = bench_serve.write_report(out, config, load, through, rows)
    console.print(Markdown(report.read_text()))
    console.print(f"figures: {out / 'serve.json'}", highlight=False)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--concurrency is numbers from 1 on with commas between, got {text!r}")
    return tuple(int(part) for part in parts)
