"""`medusa serve` and `medusa chat`: a model behind REST, and a model in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.text import Text

from cli.models import DEFAULT_BACKBONE, served_model
from medusa.quantization import Quantization

Model = Annotated[
    str, typer.Option(help="The backbone (folder or hub id), or heads from the registry: models:/NAME@champion.")
]
Heads = Annotated[str | None, typer.Option(help="A Medusa checkpoint folder; without one decoding is plain.")]
Backbone = Annotated[str | None, typer.Option(help="With --model models:/...: the folder of its backbone.")]
TrackingUri = Annotated[str | None, typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow.")]
Speculation = Annotated[str, typer.Option(help="auto (measured), off, or a tree size of the checkpoint's ladder.")]

TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel", min=1, help="Processes that share the model, with a GPU each.")
]
Quantize = Annotated[str | None, typer.Option("--quantization", help="int8 or fp8: the decoder's weights in one byte.")]


def add_commands(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(chat)


def serve(
    model: Model = DEFAULT_BACKBONE,
    heads: Heads = None,
    backbone: Backbone = None,
    tracking_uri: TrackingUri = None,
    speculation: Speculation = "auto",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    max_batch_size: Annotated[int, typer.Option(help="Replies decoded at once.")] = 16,
    quantization: Quantize = None,
    tensor_parallel: TensorParallel = 1,
    max_queued: Annotated[int, typer.Option(help="Replies that may wait; more are answered 429.")] = 256,
    api_key_file: Annotated[str | None, typer.Option(help="Hashes of the keys that are let in, one a line.")] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A JSON line for every request.")] = False,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="Where OpenTelemetry traces go: http://COLLECTOR:4318/v1/traces.")
    ] = None,
    without_ray: Annotated[bool, typer.Option("--without-ray", help="One process, no Ray Serve.")] = False,
    new_api_key: Annotated[bool, typer.Option("--new-api-key", help="Draw a key, print it and its hash.")] = False,
) -> None:
    """Serves OpenAI's REST API until Ctrl-C: one Ray Serve deployment, or one process. A page to try it is at /.

    Example: `medusa serve --model models:/medusa-chat-8m@champion --tracking-uri sqlite:///runs/demo/mlflow.db`
    """
    from deployments.config import ServerConfig
    from deployments.local import serve_local
    from deployments.one_process import serve_without_ray

    console = Console()
    if new_api_key:
        _print_new_key(console)
        return
    served = served_model(model, heads, backbone, tracking_uri)
    config = ServerConfig(
        model=served.backbone,
        heads=served.heads,
        heads_version=served.version,
        heads_digest=served.digest,
        speculation=parse_speculation(speculation),
        max_batch_size=max_batch_size,
        quantization=_quantization(quantization),
        tensor_parallel=tensor_parallel,
        max_queued_requests=max_queued,
        api_key_file=api_key_file,
        log_requests=log_requests,
        otlp_traces_endpoint=otlp_traces_endpoint,
        host=host,
        port=port,
    )
    console.print(f"serving {config.served_name}, heads: {served.described}", highlight=False)
    if without_ray:
        console.print(f"a page on http://{host}:{port}/, OpenAI API on /v1, Ctrl-C stops it", highlight=False)
        serve_without_ray(config)
    else:
        serve_local(config, on_ready=lambda url: console.print(f"a page on {url}/, OpenAI API on /v1, Ctrl-C stops it"))


def _print_new_key(console: Console) -> None:
    from deployments.auth import hash_of, new_key

    key = new_key()
    console.print(f"key, for its user alone:   {key}", highlight=False, soft_wrap=True)
    console.print(f"hash, for --api-key-file:  {hash_of(key)}", highlight=False, soft_wrap=True)


def chat(
    model: Model = DEFAULT_BACKBONE,
    heads: Heads = None,
    backbone: Backbone = None,
    tracking_uri: TrackingUri = None,
    speculation: Speculation = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="The longest reply.")] = 256,
    quantization: Quantize = None,
    tensor_parallel: TensorParallel = 1,
) -> None:
    """Talks to the model in the terminal; what a step with accepted guesses added is green.

    Example: `medusa chat --heads runs/demo/calibrate/KEY/checkpoint`
    """
    from medusa import Engine, SamplingParams

    console = Console()
    served = served_model(model, heads, backbone, tracking_uri)
    engine = Engine.from_pretrained(
        served.backbone,
        served.heads,
        max_batch_size=1,
        speculation=parse_speculation(speculation),
        quantization=_quantization(quantization),
        tensor_parallel=tensor_parallel,
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


def parse_speculation(text: str) -> str | int:
    if text in ("auto", "off"):
        return text
    if not text.isdigit():
        raise typer.BadParameter(f"{text!r} is not auto, off or a number of nodes", param_hint="--speculation")
    return int(text)


def _quantization(text: str | None) -> Quantization | None:
    if text not in (None, *get_args(Quantization)):
        raise typer.BadParameter(f"{text!r} is not int8 or fp8", param_hint="--quantization")
    return text  # type: ignore[return-value]
