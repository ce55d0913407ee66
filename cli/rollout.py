"""`medusa rollout` and `medusa submit`: the champion into a service, and a run of the pipeline on a cluster."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.registry import Name, Uri
from medusa.config import ConfigError

logger = logging.getLogger(__name__)

RAY_SERVICE = "rayservice/"
LEASE = "medusa-rollout"


def add_commands(app: typer.Typer) -> None:
    app.command()(rollout)
    app.command()(submit)


def rollout(
    name: Name,
    tracking_uri: Uri,
    service: Annotated[str, typer.Option(help="rayservice/NAME, or the address of Serve's REST API.")] = (
        "http://127.0.0.1:8265"
    ),
    url: Annotated[str, typer.Option(help="Where the service answers requests.")] = "http://127.0.0.1:8000",
    versions: Annotated[Path, typer.Option(help="Folder for fetched versions; replicas must see it there.")] = Path(
        "runs/versions"
    ),
    backbone: Annotated[str | None, typer.Option(help="Folder of the backbone, for versions of another one.")] = None,
    prometheus: Annotated[str | None, typer.Option(help="Read errors and acceptance there, not at --url.")] = None,
    every: Annotated[float | None, typer.Option(help="Go on for ever and look every so many seconds.")] = None,
    baseline: Annotated[float, typer.Option(help="Seconds to measure the service before it is changed.")] = 60.0,
    watch: Annotated[float, typer.Option(help="Seconds to watch a new version.")] = 600.0,
    settle_timeout: Annotated[float, typer.Option(help="Seconds for all replicas to take it.")] = 900.0,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at it meanwhile.")] = 5.0,
    min_requests: Annotated[int, typer.Option(help="Judge once there were so many.")] = 50,
    max_more_errors: Annotated[float, typer.Option(help="Error rate above the one before.")] = 0.02,
    acceptance_tolerance: Annotated[float, typer.Option(help="Tokens a step below those before.")] = 0.10,
    retry: Annotated[bool, typer.Option("--retry", help="Try a champion again that failed here.")] = False,
) -> None:
    """Brings the champion into a running service, watches it, and goes back to `previous` by itself if it is worse.

    Example: `medusa rollout medusa-chat-8m --service rayservice/medusa --url http://medusa-serve-svc:8000 --every 30`
    """
    from deployments.kubernetes import Kubernetes, KubernetesRecord
    from deployments.rollout import Rollout
    from deployments.rollout_signals import Prometheus, ServiceMetrics
    from deployments.rollout_state import RolloutConfig
    from deployments.rollout_target import RayServiceTarget, ServeTarget
    from registry.lease import FileRecord, Lease
    from registry.versions import Registry

    config = RolloutConfig(
        baseline_s=baseline,
        watch_s=watch,
        settle_timeout_s=settle_timeout,
        poll_s=poll,
        min_requests=min_requests,
        max_more_errors=max_more_errors,
        acceptance_tolerance=acceptance_tolerance,
    )
    versions.mkdir(parents=True, exist_ok=True)
    if service.startswith(RAY_SERVICE):
        kubernetes = Kubernetes.in_cluster()
        target = RayServiceTarget(kubernetes, service.removeprefix(RAY_SERVICE))
        record = KubernetesRecord(kubernetes, LEASE)
    elif service.startswith(("http://", "https://")):
        target = ServeTarget(service, os.environ.get("RAY_AUTH_TOKEN"))
        folder = versions / f".{target.name}"
        folder.mkdir(exist_ok=True)
        record = FileRecord(folder)
    else:
        raise ConfigError(f"--service {service!r} is neither rayservice/NAME nor an address such as http://HOST:8265")
    signals = Prometheus(prometheus) if prometheus else ServiceMetrics(url)

    def once(lease: Lease, forget: bool) -> str:
        work = Rollout(
            Registry(tracking_uri), name, target, signals, lease,
            url=url, versions=versions, backbone=backbone, config=config,
        )  # fmt: skip
        if forget:
            work.forget_failure()
        return work.reconcile()

    if every is not None:
        _for_ever(lambda: Lease(record), once, every, retry)
    lease = Lease(record)
    lease.acquire()
    try:
        outcome = once(lease, retry)
    finally:
        lease.release()
    Console().print(f"{target.name}: {outcome}", highlight=False)
    if outcome == "went back":
        raise typer.Exit(1)


def _for_ever(make_lease, once, every: float, retry: bool) -> None:  # noqa: ANN001 - imported late
    """Waits for the lease, then looks again and again. What is down or refused now is looked at again later; a lost
    lease ends the process, so that whoever starts it anew begins from what is there."""
    from registry.connection import MlflowUnavailable
    from registry.gate import GateRefused
    from registry.lease import LeaseHeldError, LeaseLostError, TryAgain
    from registry.versions import RegistryError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the lease is given back
    lease = make_lease()
    while True:
        try:
            lease.acquire()
            break
        except LeaseHeldError as held:
            logger.warning("%s", held)
        except TryAgain as away:
            logger.warning("%s", away)
        time.sleep(every)
    said = ""
    try:
        while True:
            try:
                outcome = once(lease, retry)
                retry = False
            except LeaseLostError:
                raise
            except (TryAgain, MlflowUnavailable, GateRefused, RegistryError, ConfigError) as error:
                outcome = f"{type(error).__name__}: {error}"
            if outcome != said:
                logger.warning("%s", outcome)
                said = outcome
            time.sleep(every)
    finally:
        lease.release()


def submit(
    template: Annotated[str, typer.Argument(help="The suspended RayJob to make a run of.", show_default=False)],
    started_by: Annotated[
        str | None,
        typer.Option(envvar="MEDUSA_STARTED_BY", help="Who starts it; the same name waits for the same run."),
    ] = None,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at it.")] = 10.0,
) -> None:
    """Starts a run of the pipeline on Kubernetes, waits for its end, and ends with its exit code.

    Example: `medusa submit medusa-pipeline`
    """
    from deployments.kubernetes import Kubernetes, submit_run

    owner = started_by or f"{socket.gethostname()}-{os.getpid()}"
    label = re.sub(r"[^A-Za-z0-9._-]", "-", owner).strip("-._")[:63].rstrip("-._")
    if not label:
        raise ConfigError(f"--started-by {owner!r} holds no letter or digit to make a label of")
    raise typer.Exit(submit_run(Kubernetes.in_cluster(), template, label, poll_s=poll))
