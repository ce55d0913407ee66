"""`medusa bench quantization`: what weights of one byte change in a model's replies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from cli.models import DEFAULT_BACKBONE
from medusa.config import ConfigError
from pipelines.quantization_effect import Effect, EffectConfig, EffectReport, measure_effects
from pipelines.run import ModelConfig


def quantization(
    prompts: Annotated[Path, typer.Option(help="A prompt file, of any shape that the pipeline reads.")],
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id.")] = DEFAULT_BACKBONE,
    kind: Annotated[list[str] | None, typer.Option(help="int8 or fp8; may be given twice. Default: both.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts that are taken, the first of the file.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Of each reply.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of the replies that KL and perplexity are measured on.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU by default, if there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the figures go as JSON.")] = None,
) -> None:
    """Compares a model with itself quantised: weights, distributions over its own replies, and greedy replies.

    Example: `medusa bench quantization --prompts prompts.jsonl --output runs/quantization.json`
    """
    console = Console()
    try:
        config = EffectConfig(
            kinds=kind or ["int8", "fp8"], limit=limit, max_tokens=max_tokens, temperature=temperature
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    report = measure_effects(ModelConfig(backbone=model, dtype=_dtype(dtype), device=device), prompts, config, console)
    console.print(_table(report))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.partial")
        partial.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        partial.replace(output)
        console.print(f"figures: {output}", highlight=False)


def _table(report: EffectReport) -> Table:
    title = f"{report.model}, {report.dtype}: {report.prompts} prompts, {report.positions} reply tokens"
    table = Table("", *(effect.quantization for effect in report.effects), title=title)
    for label, figure in _ROWS:
        table.add_row(label, *(figure(effect, report) for effect in report.effects))
    return table


def _dtype(name: str | None) -> Literal["float32", "bfloat16", "float16"] | None:
    if name not in (None, "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{name!r} is not float32, bfloat16 or float16", param_hint="--dtype")
    return name  # type: ignore[return-value]


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _errors(effect: Effect, report: EffectReport) -> str:
    return f"{_percent(effect.weight_error)} ({_percent(effect.worst_weight_error)})"


_ROWS: tuple[tuple[str, Callable[[Effect, EffectReport], str]], ...] = (
    ("decoder weights, bytes to before", lambda e, r: _percent(e.weight_bytes / r.weight_bytes)),
    ("relative weight error (worst layer)", _errors),
    ("KL(original || quantised), nats a token", lambda e, r: f"{e.kl:.2e}"),
    ("... its 99th percentile", lambda e, r: f"{e.kl_p99:.2e}"),
    ("perplexity (original)", lambda e, r: f"{e.perplexity:.4f} ({r.perplexity:.4f})"),
    ("same best token", lambda e, r: _percent(e.same_best)),
    ("greedy tokens before the first difference", lambda e, r: _percent(e.same_greedy_tokens)),
    ("greedy replies that are equal", lambda e, r: _percent(e.same_greedy_replies)),
)
