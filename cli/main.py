"""The `medusa` command: commands and exit codes; the work is done by pipelines, registry and deployments.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 a gate refused, 4 try again (a lease is held, MLflow
is away): a scheduled Job may retry 4 and only 4.
"""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.markup import escape

from cli import bench, export, pipeline, plan, registry, rollout, serving
from cli.demo import demo
from deployments.kubernetes import KubernetesError
from medusa.checkpoint import CheckpointError
from medusa.config import ConfigError
from medusa.model import UnsupportedModelError
from medusa.quantization import QuantizationError
from medusa.weights import ModelNotFoundError
from pipelines.artifact import StepMissingError
from pipelines.bench import EvaluateError
from pipelines.calibrate import CalibrateError
from pipelines.distill import DistillError
from pipelines.distilled import DistilledTableError
from pipelines.manifest import DamagedStepError
from pipelines.report import ReportError
from pipelines.train import TrainError
from registry.connection import MlflowUnavailable
from registry.gate import GateRefused
from registry.lease import TryAgain
from registry.versions import RegistryError

FAILED, USAGE, REFUSED, TRY_AGAIN = 1, 2, 3, 4
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (GateRefused, REFUSED),
    (TryAgain, TRY_AGAIN),
    (MlflowUnavailable, TRY_AGAIN),
    (ConfigError, USAGE),
    (UnsupportedModelError, USAGE),
    (QuantizationError, USAGE),
    (CheckpointError, USAGE),
    (ModelNotFoundError, USAGE),
    (StepMissingError, USAGE),
    (DistillError, FAILED),
    (DistilledTableError, FAILED),
    (TrainError, FAILED),
    (CalibrateError, FAILED),
    (EvaluateError, FAILED),
    (ReportError, FAILED),
    (DamagedStepError, FAILED),
    (RegistryError, FAILED),
    (KubernetesError, FAILED),
)

app = typer.Typer(
    help="Makes your own language model decode several tokens a step: distils, trains, proves and serves its heads.\n\n"
    "Examples: `medusa demo`, `medusa run CONFIG`, `medusa serve --model models/chat-8m`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pipeline.add_commands(app)
registry.add_commands(app)
serving.add_commands(app)
export.add_commands(app)
plan.add_commands(app)
rollout.add_commands(app)
app.add_typer(bench.app, name="bench")
app.command()(demo)


def main() -> None:
    """Entry point of the console script: known errors become one clear message and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except tuple(kind for kind, _ in _EXIT_CODES) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(next(code for kind, code in _EXIT_CODES if isinstance(error, kind)))


if __name__ == "__main__":
    main()
