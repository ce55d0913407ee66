"""`medusa bench decode`: plain decoding, Medusa and Hugging Face side by side. Also `python benchmarks/decode.py`.

This file is the command; benchmarks/decoding.py does it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def decode(
    prompts: Annotated[Path, typer.Option(help="Prompts: JSON Lines, JSON, text or parquet.", show_default=False)],
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id.")] = "models/chat-8m",
    heads: Annotated[Path | None, typer.Option(help="Medusa heads; without them plain decoding and peers.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="A draft model of the same vocabulary, for assisted generation.")
    ] = None,
    exclude: Annotated[Path | None, typer.Option(help="A prompt file whose first turns are left out.")] = None,
    num_prompts: Annotated[
        int,
        typer.Option(
            help="Prompts taken, evenly over the file; a concurrency runs those that fit the KV cache together, and a "
            "steady load of N takes at least 2 N."
        ),
    ] = 256,
    context: Annotated[
        int, typer.Option(help="Fill every prompt with earlier conversations up to so many tokens.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(help="The longest reply.")] = 128,
    temperatures: Annotated[str, typer.Option(help="Comma-separated.")] = "0,0.7,1.0",
    concurrency: Annotated[str, typer.Option(help="Requests at once, comma-separated.")] = "1,2,4,8,16,32,64,128",
    repeats: Annotated[int, typer.Option(help="Runs of each contender, in turn: waves, then the steady load.")] = 5,
    trees: Annotated[str, typer.Option(help="Tree sizes to run at temperature 0 besides the policy's choice.")] = "",
    typical: Annotated[bool, typer.Option(help="A row for typical acceptance at temperature 0.7.")] = True,
    grammar: Annotated[
        bool,
        typer.Option(
            help="Rows at temperature 0 in which one of the requests has a grammar (any text), so that steps wait for "
            "the host."
        ),
    ] = False,
    peers: Annotated[bool, typer.Option(help="Rows for Hugging Face.")] = True,
    peers_at: Annotated[str, typer.Option(help="Concurrency at which peers run; default: all.")] = "",
    inflate: Annotated[
        str | None, typer.Option(help="Embed the model and heads in a larger shape: vicuna-7b, ...")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Weights of one byte, for Hugging Face's rows too: int8 or fp8.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the engine's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    kv_cache_gb: Annotated[
        float | None, typer.Option(help="Memory of the KV cache; default: for all prompts, if there is as much.")
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds from start to end; fewer prompts and runs are made to keep it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of decode.json, decode.md and the plots.")] = Path(
        "runs/bench/decode"
    ),
) -> None:
    """Measures tokens a second, tokens a step and step times of plain decoding, Medusa and Hugging Face.

    Requests run in waves, which start together and end with the slowest, and but for Hugging Face as a steady load.
    Under that the next takes the place of each that ends; N at once take at least 2 N prompts.

    Example: `medusa bench decode --prompts prompts.jsonl --heads runs/demo/calibrate/KEY/checkpoint --concurrency 1,4`
    """
    from benchmarks.decoding import DecodeBenchmark, DecodeConfig

    config = DecodeConfig(
        prompts=prompts,
        model=model,
        heads=heads,
        draft=draft,
        exclude=exclude,
        num_prompts=num_prompts,
        context=context,
        max_tokens=max_tokens,
        temperatures=_numbers(temperatures, float, "--temperatures"),
        concurrency=_numbers(concurrency, int, "--concurrency"),
        repeats=repeats,
        trees=_numbers(trees, int, "--trees"),
        typical=typical,
        grammar=grammar,
        peers=peers,
        peers_at=_numbers(peers_at, int, "--peers-at"),
        inflate=inflate,
        quantization=quantization,
        dtype=dtype,
        device=device,
        kv_cache_gb=kv_cache_gb,
        time_budget=time_budget,
        out=out,
    )
    typer.echo(DecodeBenchmark(config).run())


def _numbers(text: str, kind: type, option: str) -> tuple:
    try:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no comma-separated list of numbers", param_hint=option) from error


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed
    typer.run(decode)
