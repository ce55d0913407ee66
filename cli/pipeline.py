"""`medusa run` and a command for each step of the pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cli.cluster import ray_cluster
from pipelines.artifact import StepOutput
from pipelines.run import STEPS, Step, load_pipeline, run_pipeline

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The pipeline's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Changes to it, e.g. train.trainer.lr=1e-3.", show_default=False),
]
StepOption = Annotated[str, typer.Option(help=f"One of {', '.join(STEPS)}.")]


def add_commands(app: typer.Typer) -> None:
    app.command()(run)
    for step in STEPS:
        app.command(step, help=f"{_HELP[step]} Example: `medusa {step} pipelines/configs/demo.yaml`")(
            _step_command(step)
        )


def run(
    config: ConfigFile,
    overrides: Overrides = None,
    first: Annotated[str, typer.Option("--from", help="Steps before this one must be complete.")] = STEPS[0],
    last: Annotated[str, typer.Option("--to", help="The last step to run.")] = STEPS[-1],
) -> None:
    """Runs the pipeline: prompts, distill, train, calibrate, evaluate, register. Finished steps are skipped.

    Example: `medusa run pipelines/configs/demo.yaml distill.temperature=0.3 --to train`
    """
    _run(config, overrides, _checked(first, "--from"), _checked(last, "--to"))


def _run(config: Path, overrides: list[str] | None, first: Step, last: Step) -> None:
    pipeline = load_pipeline(config, overrides or [])
    console = Console()
    if not console.is_terminal:  # a scheduled run: its summary belongs into the log
        logging.getLogger("pipelines.summary").setLevel(logging.INFO)
    with ray_cluster():
        outputs = run_pipeline(pipeline, first=first, last=last, console=console)
    console.print(_table(outputs))


def _step_command(step: Step):  # noqa: ANN202 - typer reads the inner function's signature
    def command(config: ConfigFile, overrides: Overrides = None) -> None:
        _run(config, overrides, STEPS[0], step)

    return command


def _checked(name: str, option: str) -> Step:
    if name not in STEPS:
        raise typer.BadParameter(f"{name!r} is no step; it is one of {', '.join(STEPS)}", param_hint=option)
    return name  # type: ignore[return-value]


def _table(outputs: dict[Step, StepOutput]) -> Table:
    table = Table("step", "key", "counts", "folder", title="Steps")
    for step, output in outputs.items():
        counts = ", ".join(f"{name} {number}" for name, number in output.manifest.get("counts", {}).items())
        table.add_row(step, output.key[:16], counts, str(output.path))
    return table


_HELP: dict[Step, str] = {
    "prompts": "Reads and selects the prompts.",
    "distill": "Has the model answer the prompts itself.",
    "train": "Trains the heads on the model's answers: Hydra's on soft targets, unless CONFIG names train.heads.kind "
    "(medusa: also for other engines) and train.trainer.loss.kind (tokens: the paper's; joint training's default).",
    "calibrate": "Measures heads, trees and step times.",
    "evaluate": "Compares with plain decoding on unseen prompts.",
    "register": "Registers the heads and promotes them through the gate.",
}
