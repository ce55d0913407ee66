"""`medusa plan train` and `medusa plan serve`: memory, hours and GPUs before anything is rented."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.pipeline import Overrides
from cli.plan_scale import scale
from medusa.checkpoint import read_meta
from medusa.config import ConfigError
from medusa.heads import HeadsConfig
from medusa.tree import TokenTree
from pipelines.plan.figures import BASIS_WORDS, Figure, Figures, load_figures
from pipelines.plan.recipe import recipe_of
from pipelines.plan.serving import Load, ServePlan, expected_ladder, plan_serving
from pipelines.plan.shapes import HeadsCost, HeadsKind, ModelShape, model_shape
from pipelines.plan.training import Data, TrainPlan, plan_training
from pipelines.run import load_pipeline

GpuOption = Annotated[str, typer.Option(help="A kind of GPU in pipelines/plan/figures.yaml.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Everything that was computed, as JSON.")]
plan_app = typer.Typer(
    help="Computes memory, hours and GPUs, and says what each figure rests on. Examples: `medusa plan train CONFIG`, "
    "`medusa plan serve MODEL --requests-per-second 40`",
    no_args_is_help=True,
)


plan_app.command()(scale)


def add_commands(app: typer.Typer) -> None:
    app.add_typer(plan_app, name="plan")


@plan_app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The pipeline's YAML file.", show_default=False)],
    overrides: Overrides = None,
    gpu: GpuOption = "h100-80gb",
    conversations: Annotated[int | None, typer.Option(help="Default: prompts.limit of the config.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Mean length of a conversation's prompts.")] = 200,
    reply_tokens: Annotated[int, typer.Option(help="Mean length of its replies, all turns together.")] = 800,
    num_gpus: Annotated[int | None, typer.Option(help="Default: as few as do.")] = None,
    max_hours: Annotated[float | None, typer.Option(help="As many GPUs as this asks for.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Memory, GPUs and hours of a pipeline's distillation and training.

    Example: `medusa plan train pipelines/configs/vicuna-7b.yaml --gpu a100-80gb --max-hours 12`
    """
    figures = load_figures()
    pipeline = load_pipeline(config, overrides or [])
    backbone = pipeline.model.backbone
    shape = model_shape(backbone, figures.models)
    count = conversations or pipeline.prompts.limit
    if count is None:
        raise ConfigError(f"{config} does not limit its prompts; say how many there are with --conversations")
    data = Data(conversations=count, prompt_tokens=prompt_tokens, reply_tokens=reply_tokens)
    plan = plan_training(
        backbone, shape, recipe_of(pipeline, shape), data, gpu, figures, num_gpus=num_gpus, max_hours=max_hours
    )
    if as_json:
        _print_json(plan, data)
    else:
        _print_training(backbone, data, plan)


@plan_app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A model folder, or an id that plan knows.", show_default=False)],
    requests_per_second: Annotated[float, typer.Option(help="At the busiest time.", show_default=False)],
    prompt_tokens: Annotated[int, typer.Option(help="Mean length of a prompt.")] = 300,
    reply_tokens: Annotated[int, typer.Option(help="Mean length of a reply.")] = 200,
    gpu: GpuOption = "h100-80gb",
    heads: Annotated[
        str, typer.Option(help="A calibrated checkpoint, or hydra, medusa (Medusa-1), joint (Medusa-2) or none.")
    ] = "hydra",
    num_heads: Annotated[int, typer.Option(help="Without a checkpoint.")] = 4,
    num_layers: Annotated[int, typer.Option(help="Of a head, without a checkpoint.")] = 1,
    vocabulary: Annotated[str, typer.Option(help="own or shared, without a checkpoint.")] = "own",
    tokens_per_step: Annotated[float | None, typer.Option(help="With 64 nodes, where you measured it.")] = None,
    max_batch_size: Annotated[int, typer.Option(help="As the service is configured.")] = 256,
    max_ms_per_token: Annotated[float | None, typer.Option(help="The slowest pace of a reply.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Replicas (one GPU each) for a load, and the pace of its replies.

    Example: `medusa plan serve lmsys/vicuna-7b-v1.5 --requests-per-second 40 --max-ms-per-token 15`
    """
    figures = load_figures()
    shape = model_shape(model, figures.models)
    cost: HeadsCost | None = None
    if heads == "none":
        ladder, basis = {1: 1.0}, Figure(1.0, "measured", "plain decoding")
    elif heads in ("hydra", "medusa", "joint"):
        kind: HeadsKind = "hydra" if heads == "hydra" else "medusa"
        cost = HeadsCost.of(_heads(shape, num_heads, num_layers, vocabulary), kind)
        ladder, basis = expected_ladder(model, heads, figures, tokens_per_step)  # type: ignore[arg-type]
    elif Path(heads).is_dir():
        cost, ladder, basis = _calibrated(Path(heads))
    else:
        said = f"{heads!r} is neither hydra, medusa, joint, none nor the folder of a calibrated checkpoint"
        raise typer.BadParameter(said, param_hint="--heads")
    load = Load(requests_per_second=requests_per_second, prompt_tokens=prompt_tokens, reply_tokens=reply_tokens)
    plan = plan_serving(
        model,
        shape,
        cost,
        ladder,
        basis,
        load,
        gpu,
        figures,
        max_batch_size=max_batch_size,
        max_ms_per_token=max_ms_per_token,
    )
    if as_json:
        _print_json(plan, load)
    else:
        _print_serving(model, load, plan, figures)


def _heads(shape: ModelShape, num_heads: int, num_layers: int, vocabulary: str) -> HeadsConfig:
    if vocabulary not in ("own", "shared"):
        raise typer.BadParameter(f"{vocabulary!r} is neither own nor shared", param_hint="--vocabulary")
    return HeadsConfig(
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        num_heads=num_heads,
        num_layers=num_layers,
        vocabulary=vocabulary,  # type: ignore[arg-type]
    )


def _calibrated(folder: Path) -> tuple[HeadsCost, Mapping[int, float], Figure]:
    """The ladder that calibration measured for these very heads."""
    meta = read_meta(folder)
    if meta.calibration is None or not meta.calibration.tokens_per_step:
        raise ConfigError(f"{folder} is not calibrated; run `medusa calibrate`, or give --heads {meta.head_kind}")
    sizes = [TokenTree.from_paths(paths).num_nodes for paths in meta.trees]
    ladder = {1: 1.0} | dict(zip(sizes, meta.calibration.tokens_per_step, strict=True))
    return (
        HeadsCost.of(meta.heads, meta.head_kind),
        ladder,
        Figure(max(ladder.values()), "measured", f"calibration of {folder}"),
    )


def _print_json(plan: TrainPlan | ServePlan, asked: Data | Load) -> None:
    content: dict[str, Any] = {"asked": asdict(asked), **asdict(plan)}
    if isinstance(plan, TrainPlan):
        content["hours"] = asdict(plan.hours)
    print(json.dumps(content, indent=2))


def _print_training(model: str, data: Data, plan: TrainPlan) -> None:
    table = Table("what", "figure", "rests on", title=f"Training {model} on {plan.num_gpus} x {plan.gpu}")
    for name, gib in plan.memory.items():
        table.add_row(name, f"{gib:.1f} GiB", "formula")
    table.add_row("memory of each GPU, training", f"{plan.memory_each:.1f} of {plan.memory_gpu:.1f} GiB", plan.strategy)
    distilling = " + ".join(f"{name} {gib:.1f}" for name, gib in plan.distill_memory.items())
    table.add_row("memory of each GPU, distilling", f"{sum(plan.distill_memory.values()):.1f} GiB", distilling)
    for name, hours in (("distil", plan.distill_hours), ("train", plan.train_hours), ("both", plan.hours)):
        table.add_row(name, _time(hours.value), f"{BASIS_WORDS[hours.basis]} ({hours.how})")
    console = Console()
    console.print(table)
    console.print(
        f"for {data.conversations:,} conversations of {data.prompt_tokens} + {data.reply_tokens} tokens",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _print_serving(model: str, load: Load, plan: ServePlan, figures: Figures) -> None:
    table = Table("replies at a time", "nodes", "ms a step", "ms a token", "tokens/s", "requests/s", "step time")
    table.title = f"One {plan.gpu} with {model}"
    for point in plan.points:
        mark = " *" if point.batch == plan.point.batch else ""
        table.add_row(
            f"{point.batch}{mark}",
            str(point.nodes),
            f"{point.step.value * 1e3:.1f}",
            f"{point.ms_per_token:.1f}",
            f"{point.tokens_per_second:,.0f}",
            f"{point.requests_per_second:.2f}",
            point.step.basis,
        )
    console = Console()
    console.print(table)
    plain = "plain decoding cannot keep that pace"
    if plan.plain_replicas is not None:
        plain = f"plain decoding would take {plan.plain_replicas}"
    console.print(
        f"{plan.replicas} GPU(s) at {plan.utilisation:.0%} of their capacity for {load.requests_per_second:g} requests "
        f"a second of {load.prompt_tokens} + {load.reply_tokens} tokens; {plain}\n"
        f"{plan.point.ms_per_token:.1f} ms a token, first token after {plan.first_token_ms.value:.0f} ms, "
        f"{plan.memory['KV cache']:.1f} GiB of KV cache a replica\n"
        f"{BASIS_WORDS[plan.basis]}; tokens a step: {plan.tokens_per_step.basis} ({plan.tokens_per_step.how})",
        highlight=False,
        soft_wrap=True,
    )
