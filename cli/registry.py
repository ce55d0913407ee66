"""`medusa promote` and `medusa rollback`: moving the alias that decides what is served."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from registry.versions import Registry

Name = Annotated[str, typer.Argument(help="The registered model, e.g. medusa-chat-8m.", show_default=False)]
Uri = Annotated[
    str,
    typer.Option(
        "--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow: a server, or sqlite:///FILE.", show_default=False
    ),
]


def add_commands(app: typer.Typer) -> None:
    app.command()(promote)
    app.command()(rollback)


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="The version to serve.", show_default=False)],
    tracking_uri: Uri,
) -> None:
    """Makes a version that passed the gate the champion; the champion so far becomes `previous`.

    Example: `medusa promote medusa-chat-8m 3 --tracking-uri sqlite:///runs/demo/mlflow.db`
    """
    ref = Registry(tracking_uri).promote(name, version)
    Console().print(f"{name}: champion is version {ref.version} ({ref.digest})", highlight=False)


def rollback(name: Name, tracking_uri: Uri) -> None:
    """Swaps champion and previous, without the gate: previous has served before.

    Example: `medusa rollback medusa-chat-8m --tracking-uri sqlite:///runs/demo/mlflow.db`
    """
    ref = Registry(tracking_uri).rollback(name)
    Console().print(f"{name}: champion is version {ref.version} again ({ref.digest})", highlight=False)
