"""`medusa bench trees`: does a tree made at every step beat the one that calibration made? Tokens a step of each.

This file is the command, also `python benchmarks/trees.py`; benchmarks/tree_kinds.py does it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def trees(
    prompts: Annotated[Path, typer.Option(help="Prompts: JSON Lines, JSON, text or parquet.", show_default=False)],
    heads: Annotated[Path, typer.Option(help="Medusa heads.", show_default=False)],
    model: Annotated[str, typer.Option(help="The backbone: a folder or hub id.")] = "models/chat-8m",
    exclude: Annotated[Path | None, typer.Option(help="A prompt file whose first turns are left out.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken, evenly over the file; half of them fit.")] = 300,
    max_tokens: Annotated[int, typer.Option(help="The longest reply.")] = 128,
    temperatures: Annotated[str, typer.Option(help="Comma-separated.")] = "0,0.7",
    sizes: Annotated[str, typer.Option(help="Nodes, comma-separated.")] = "8,16,32,64",
) -> None:
    """Compares kinds of trees without decoding again: fitted on half of the model's own replies, walked on the other.

    Example: `medusa bench trees --prompts heldout.jsonl --heads runs/chat-8m/calibrate/KEY/checkpoint`
    """
    from benchmarks.tree_kinds import compare

    table = compare(
        prompts=prompts,
        heads=heads,
        model=model,
        exclude=exclude,
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        temperatures=[float(part) for part in temperatures.split(",")],
        sizes=[int(part) for part in sizes.split(",")],
    )
    typer.echo(table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed
    typer.run(trees)
