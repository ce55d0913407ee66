"""`medusa bench ...`: measurements of the whole, most of them a file of benchmarks/."""

from __future__ import annotations

import typer

from benchmarks.attention import attention
from benchmarks.decode import decode
from benchmarks.overload import overload
from benchmarks.serve import serve
from benchmarks.start import start
from benchmarks.steps import steps
from benchmarks.trees import trees
from cli.bench_distill import distill
from cli.bench_scale import scale
from cli.quantization import quantization

app = typer.Typer(
    help="Measures this project beside its peers. Example: `medusa bench decode --prompts prompts.jsonl`",
    no_args_is_help=True,
)
app.command()(decode)
app.command()(steps)
app.command()(attention)
app.command()(serve)
app.command()(overload)
app.command()(start)
app.command()(trees)
app.command()(quantization)
app.command()(distill)
app.command()(scale)
