"""`medusa plan scale`: simulated growth to many GPUs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines.plan.figures import BASIS_WORDS, load_figures
from pipelines.plan.scaling import Question, Scaled, ScalePlan, limits, plan_scaling
from pipelines.plan.shapes import model_shape


def scale(
    model: Annotated[str, typer.Argument(help="A model folder, or an id that plan knows.", show_default=False)],
    gpu: Annotated[str, typer.Option(help="A kind of GPU in pipelines/plan/figures.yaml.")] = "h200-141gb",
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, comma-separated, 64 at most.")] = "1,2,4,8,16,32,64",
    prompt_tokens: Annotated[int, typer.Option(help="Mean length of a prompt.")] = 300,
    reply_tokens: Annotated[int, typer.Option(help="Mean length of a reply.")] = 200,
    batch: Annotated[int, typer.Option(help="Replies at once, an engine.")] = 64,
    rows: Annotated[int, typer.Option(help="Prompts to distil, an actor.")] = 1024,
    rows_per_block: Annotated[int, typer.Option(help="Prompts that an actor is given at a time.")] = 64,
    merge_chunks: Annotated[float, typer.Option(help="Seconds between chunks of a stream (merge_chunks_s).")] = 0.02,
    step_tokens: Annotated[int, typer.Option(help="Training tokens a step, a GPU.")] = 16384,
    heads: Annotated[str, typer.Option(help="Heads to train: hydra, or medusa (Medusa-1).")] = "hydra",
    num_heads: Annotated[int, typer.Option(help="How many.")] = 4,
    vocabulary: Annotated[str, typer.Option(help="Of the heads: own or shared.")] = "own",
    node_gpus: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    inside: Annotated[str, typer.Option(help="The link of a node's GPUs, of figures.yaml.")] = "nvlink-4",
    across: Annotated[str, typer.Option(help="The link of nodes, a port for each GPU.")] = "ndr-400",
    as_json: Annotated[bool, typer.Option("--json", help="Everything that was computed, as JSON.")] = False,
) -> None:
    """Shares of linear growth in distillation, training and serving. Simulated: nothing of it ran on several GPUs.

    Example: `medusa plan scale lmsys/vicuna-7b-v1.5 --gpus 1,8,64 --across ethernet-100`
    """
    figures = load_figures()
    numbers = [part.strip() for part in gpus.split(",") if part.strip()]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise typer.BadParameter(f"{gpus!r} is no list of numbers with commas between", param_hint="--gpus")
    question = Question(
        gpus=tuple(sorted(set(map(int, numbers)))),
        prompt_tokens=prompt_tokens,
        reply_tokens=reply_tokens,
        batch=batch,
        rows=rows,
        rows_per_block=rows_per_block,
        merge_chunks_s=merge_chunks,
        step_tokens=step_tokens,
        heads=heads,  # type: ignore[arg-type]
        num_heads=num_heads,
        vocabulary=vocabulary,
        node_gpus=node_gpus,
        inside=inside,
        across=across,
    )
    plan = plan_scaling(model, model_shape(model, figures.models), gpu, figures, question)
    if as_json:
        print(json.dumps({"simulated": True, "asked": asdict(question), **asdict(plan)}, indent=2))
    else:
        _print(model, gpu, plan)


def _print(model: str, gpu: str, plan: ScalePlan) -> None:
    console = Console()
    ways = list(plan.rows[0].training)
    table = Table(
        "GPUs", "distil", *ways, "serve, one proxy", "serve, a proxy a node", title=f"Simulated: {model} on {gpu}"
    )
    for row in plan.rows:
        trained = [f"{row.training[way].share:.2f}" for way in ways]
        table.add_row(str(row.gpus), f"{row.distil:.2f}", *trained, *_served(row))
    console.print(table)
    console.print("Shares of linear growth; serving from all of a proxy on one core to its threads beside each other.")
    console.print(f"\nWhat limits {plan.rows[-1].gpus} GPUs:")
    for words in limits(plan.rows[-1]):
        console.print(f"  {words}", highlight=False)
    console.print("\nWhat went in:")
    for name, figure in plan.inputs.items():
        console.print(f"  {name}: {figure.value:.3g} ({figure.basis}: {figure.how})", highlight=False)
    for name, basis in plan.basis.items():
        console.print(f"{name}: {BASIS_WORDS[basis]}", highlight=False)


def _served(row: Scaled) -> list[str]:
    return [f"{min(ends):.2f} to {max(ends):.2f}" for ends in (row.one_proxy, row.proxy_a_node)]
