"""`medusa serve` and `medusa chat`: a model behind REST, and a model in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cli.models import DEFAULT_BACKBONE, served_model

Model = Annotated[
    str, typer.Option(help="The backbone (folder or hub id), or heads from the registry: models:/NAME@champion.")
]
Heads = Annotated[str | None, typer.Option(help="A Medusa checkpoint folder; without one decoding is plain.")]
Backbone = Annotated[str | None, typer.Option(help="With --model models:/...: the folder of its backbone.")]
TrackingUri = Annotated[str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow.")]
Speculation = Annotated[str, typer.Option(help="auto (measured), off, or a tree size of the checkpoint's ladder.")]


def add_commands(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(chat)


def serve(
    model: Model = DEFAULT_BACKBONE,
    heads: Heads = None,
    backbone: Backbone = None,
    tracking_uri: TrackingUri = None,
    speculation: Speculation = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch_size: int = 16,
    without_ray: Annotated[bool, typer.Option("--without-ray", help="One process, no Ray Serve.")] = False,
) -> None:
    """Serves OpenAI's REST API until Ctrl-C: one Ray Serve deployment, or one process.

    Example: `medusa serve --model models:/medusa-chat-8m@champion --tracking-uri sqlite:///runs/demo/mlflow.db`
    """
    from deployments.config import ServerConfig
    from deployments.local import serve_local, serve_without_ray

    console = Console()
    served = served_model(model, heads, backbone, tracking_uri)
    config = ServerConfig(
        model=served.backbone,
        heads=served.heads,
        heads_version=served.version,
        heads_digest=served.digest,
        speculation=_speculation(speculation),
        max_batch_size=max_batch_size,
        host=host,
        port=port,
    )
    console.print(f"serving {config.served_name}, heads: {served.described}", highlight=False)
    if without_ray:
        console.print(f"OpenAI API on http://{host}:{port}/v1, Ctrl-C stops it", highlight=False)
        serve_without_ray(config)
    else:
        serve_local(config, on_ready=lambda url: console.print(f"OpenAI API on {url}/v1, Ctrl-C stops it"))


def chat(
    model: Model = DEFAULT_BACKBONE,
    heads: Heads = None,
    backbone: Backbone = None,
    tracking_uri: TrackingUri = None,
    speculation: Speculation = "auto",
    temperature: float = 0.0,
    max_tokens: int = 256,
) -> None:
    """Talks to the model in the terminal; what a step with accepted guesses added is green.

    Example: `medusa chat --heads runs/demo/calibrate/KEY/checkpoint`
    """
    from medusa import Engine, SamplingParams

    console = Console()
    served = served_model(model, heads, backbone, tracking_uri)
    engine = Engine.from_pretrained(
        served.backbone, served.heads, max_batch_size=1, speculation=_speculation(speculation)
    )
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    conversation: list[int] = []
    console.print(f"[dim]{Path(served.backbone).name}, heads: {served.described}. An empty line ends.[/]")
    while question := _question(console):
        tokenizer = engine.tokenizer
        prompt = (
            tokenizer.next_turn(conversation, question)
            if conversation
            else tokenizer.encode_chat([{"role": "user", "content": question}])
        )
        conversation = prompt + _stream(engine, prompt, params, console)


def _question(console: Console) -> str:
    """What the user types; an empty line or the end of the input ends the chat."""
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""


def _stream(engine, prompt: list[int], params, console: Console) -> list[int]:  # noqa: ANN001 - imported late
    """Prints the reply as it comes and returns its tokens."""
    engine.add(prompt, params)
    reply: list[int] = []
    completion = None
    while engine.has_unfinished():
        for output in engine.step():
            reply += output.token_ids
            console.print(Text(output.text, style="green" if output.num_draft_accepted else ""), end="")
            completion = output.finished or completion
    length = completion.mean_acceptance_length if completion else 1.0
    console.print(f"\n[dim]{len(reply)} tokens, {length:.2f} a step[/]")
    return reply


def _speculation(text: str) -> str | int:
    if text in ("auto", "off"):
        return text
    if not text.isdigit():
        raise typer.BadParameter(f"{text!r} is not auto, off or a number of nodes", param_hint="--speculation")
    return int(text)
