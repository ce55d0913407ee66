"""`medusa export` and `medusa import`: heads for other programs, and heads that others published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from medusa.export.write import FORMATS, READERS, export_checkpoint

FormatOption = Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.", show_default=False)]


def add_commands(app: typer.Typer) -> None:
    app.command(name="export")(export)
    app.command(name="import")(import_)


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A Medusa checkpoint folder.", show_default=False)],
    format: FormatOption,
    output: Annotated[Path | None, typer.Option(help="The folder to write; default: DIR-FORMAT.")] = None,
    backbone: Annotated[str | None, typer.Option(help="The backbone's folder or hub id.")] = None,
) -> None:
    """Writes a checkpoint in the layout of vLLM, TGI or the Medusa reference, or merged as one Transformers model.

    Other programs read Medusa heads only (train.heads.kind=medusa), not Hydra's, which are trained by default.

    Example: `medusa export runs/demo/calibrate/KEY/checkpoint --format vllm`
    """
    if format not in READERS:
        raise typer.BadParameter(f"{format!r} is none of {', '.join(FORMATS)}", param_hint="--format")
    target = output or directory.with_name(f"{directory.resolve().name}-{format}")
    exported = export_checkpoint(directory, format, target, backbone)
    _tell(f"wrote {exported.path}", exported.notes)


def import_(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A published Medusa folder.", show_default=False)],
    backbone: Annotated[str, typer.Option(help="The backbone's folder or hub id.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The checkpoint folder to write.", show_default=False)],
) -> None:
    """Makes a checkpoint of this project from published heads, pinned to the backbone that you name.

    A pipeline with `heads: OUTPUT` calibrates it (which finds its trees), evaluates and registers it. Example:
    `medusa import medusa-vicuna-7b-v1.3 --backbone lmsys/vicuna-7b-v1.3 --output heads/vicuna-7b`
    """
    from medusa.export.reference import import_checkpoint
    from medusa.model import Backbone
    from medusa.tokenizer import ChatTokenizer

    loaded = Backbone.from_pretrained(backbone, device="cpu")
    imported = import_checkpoint(source, output, loaded, ChatTokenizer.from_pretrained(backbone).digest)
    heads = imported.heads
    shape = f"{heads.num_heads} heads of {heads.num_layers} block(s), {heads.vocabulary} vocabulary"
    _tell(f"wrote {imported.path}: {shape}", imported.notes)


def _tell(first: str, notes: tuple[str, ...]) -> None:
    console = Console()
    for line in (first, *(f"note: {note}" for note in notes)):
        console.print(line, highlight=False, markup=False)
