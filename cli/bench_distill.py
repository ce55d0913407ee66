"""`medusa bench distill`: what Ray Data costs beside the engine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from cli.cluster import ray_cluster
from cli.pipeline import Overrides
from pipelines.run import RunContext, load_pipeline, run_pipeline
from pipelines.tracking import Tracker, TrackingConfig


def distill(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The pipeline's YAML file.", show_default=False)],
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option(help="Prompts of the config to answer.")] = 512,
    repeats: Annotated[int, typer.Option(help="Pairs of runs.")] = 3,
    output: Annotated[Path, typer.Option(help="The folder for distill.json and distill.md.")] = Path("runs/bench"),
) -> None:
    """The engine behind Ray Data actors against the engine alone, on the same device and prompts.

    Example: `medusa bench distill pipelines/configs/demo.yaml --limit 256`
    """
    from pipelines.distill_bench import bench_distill, markdown, write_result
    from pipelines.prompts import load_prompts

    pipeline = load_pipeline(config, [*(overrides or []), "tracking.uri=null"])
    console, root = Console(), Path(pipeline.root).resolve()
    with ray_cluster():
        prompts = load_prompts(run_pipeline(pipeline, last="prompts", console=console)["prompts"])[:limit]
        with Tracker.open(TrackingConfig(uri=None), root, "bench", {}) as tracker:
            context = RunContext(root, pipeline.model.located, tracker, console)
            result = bench_distill(context, pipeline.distill, prompts, repeats=repeats)
    write_result(result, output)
    console.print(Markdown(markdown(result)))
    console.print(f"written to {output}", highlight=False)
