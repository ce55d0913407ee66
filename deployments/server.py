"""The service: one Ray Serve deployment, whose replicas each hold an engine and answer HTTP themselves.

`build_app` is the import path of serve.yaml; `serve_local` is `medusa serve` on this machine, `serve_without_ray` the
same app in one process.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
import uvicorn
from fastapi import FastAPI
from ray import serve

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from medusa import Engine, Typical
from medusa.checkpoint import CheckpointMismatchError
from medusa.config import ConfigError, strict, to_dict, validate
from medusa.digests import directory_digest

logger = logging.getLogger(__name__)

APP_NAME = "medusa"
# A full replica refuses by itself, at once and in OpenAI's shape. Serve's own limits only bound what is on its way:
# requests beside the replies that an engine holds, and requests waiting in a proxy.
SPARE_ONGOING = 64
PROXY_QUEUE = 1000
LOGGING = {"enable_access_log": False, "log_level": "WARNING"}


@strict
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What is served and how. Paths must be readable where the replicas run.

    `heads` is a checkpoint folder; a registry reference such as models:/NAME@champion is resolved before, once, so
    that all replicas serve one version: `heads_version` and `heads_digest` say which, and a replica that finds
    another digest refuses to start.
    """

    model: str
    heads: str | None = None
    heads_version: str | None = None
    heads_digest: str | None = None
    model_name: str | None = None  # in the API; the model's folder name by default
    # the engine
    speculation: Literal["auto", "off"] | int = "auto"
    acceptance: Literal["exact"] | Typical = "exact"
    max_batch_size: int = 16
    max_model_len: int | None = None
    kv_cache_gb: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None  # None: cuda where this process (or the cluster) has a GPU
    # limits
    max_queued_requests: int = 256  # replies that may wait in a replica; more are answered 429
    max_ongoing_requests: int | None = None  # None: as many as the replica holds
    max_body_bytes: int = 32 * 2**20
    stall_timeout_s: float = 600.0  # a step that takes longer makes the replica unhealthy
    # the deployment
    host: str = "127.0.0.1"
    port: int = 8000
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float | None = None  # what autoscaling aims at; None: three quarters of a batch
    num_cpus: float = 1.0
    num_gpus: float | None = None  # None: 1 on cuda
    health_check_period_s: float = 2.0
    graceful_shutdown_timeout_s: float = 60.0  # a stopped replica may take this long to end what it runs

    def __post_init__(self) -> None:
        for name in ("model", "heads"):
            if str(getattr(self, name)).startswith("models:/"):
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} is a registry reference; resolve it to a folder first, "
                    "as `medusa serve --model models:/NAME@champion` does"
                )
        if self.speculation == 0:
            raise ConfigError(
                f"speculation is 'auto', 'off' or a tree size, got {self.speculation!r} "
                "(YAML 1.1 reads a bare off as false: write it in quotes)"
            )
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ConfigError(
                "max_replicas must be at least 1 and min_replicas 0 to max_replicas, "
                f"got {self.min_replicas} and {self.max_replicas}"
            )
        for name in ("max_batch_size", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_queued_requests < 0:
            raise ConfigError(f"max_queued_requests must be 0 or more, got {self.max_queued_requests}")

    @property
    def served_name(self) -> str:
        return self.model_name or Path(self.model).name


def load_service(config: ServerConfig, *, send_request_id: bool = True) -> tuple[AsyncEngine, FastAPI]:
    """The engine, loaded and running, and the API over it."""
    digest = _verified_digest(config)
    engine = Engine.from_pretrained(
        config.model,
        config.heads,
        device=config.device,
        dtype=getattr(torch, config.dtype) if config.dtype else None,
        max_batch_size=config.max_batch_size,
        max_model_len=config.max_model_len,
        kv_cache_gb=config.kv_cache_gb,
        speculation=config.speculation,
        acceptance=config.acceptance,
    )
    running = AsyncEngine(engine, max_queued=config.max_queued_requests, stall_timeout_s=config.stall_timeout_s)
    api = build_api(
        running,
        engine.tokenizer,
        config.served_name,
        served={
            "backbone": engine.backbone.name,
            "backbone_digest": engine.backbone.digest,
            "heads_version": config.heads_version,
            "heads_digest": digest,
        },
        fingerprint=f"medusa-{(digest or engine.backbone.digest).removeprefix('sha256:')[:12]}",
        max_body_bytes=config.max_body_bytes,
        send_request_id=send_request_id,
    )
    return running, api


def _verified_digest(config: ServerConfig) -> str | None:
    if config.heads is None:
        return None
    digest = directory_digest(Path(config.heads))
    if config.heads_digest not in (None, digest):
        raise CheckpointMismatchError(
            f"{config.heads} has the digest {digest}, but {config.heads_digest} was to be served; "
            "fetch the registered version again"
        )
    return digest


@serve.deployment
@serve.ingress()
class MedusaServer:
    """A replica: Ray Serve asks it for its app, its health, and to end."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        loaded = validate(ServerConfig, config, source="the deployment's config")
        # Serve's proxy answers with X-Request-ID itself.
        self._engine, self._api = load_service(loaded, send_request_id=False)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api

    async def check_health(self) -> None:
        self._engine.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def build_app(args: Mapping[str, Any] | ServerConfig) -> serve.Application:
    """The Serve application of a config; raises ConfigError for args that are none."""
    config = args if isinstance(args, ServerConfig) else validate(ServerConfig, args, source="args")
    config = _placed(config)
    return MedusaServer.options(**_deployment_options(config)).bind(to_dict(config))


def _placed(config: ServerConfig) -> ServerConfig:
    """With paths that hold in a replica's working directory, and the device named."""
    device = config.device or ("cuda" if ray.is_initialized() and ray.cluster_resources().get("GPU") else "cpu")
    return replace(
        config,
        model=_absolute(config.model),
        heads=_absolute(config.heads) if config.heads else None,
        device=device,
    )


def _absolute(path: str) -> str:
    """A folder's full path; anything else (a hub id, a folder of another machine) as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def _deployment_options(config: ServerConfig) -> dict[str, Any]:
    capacity = config.max_batch_size + config.max_queued_requests + SPARE_ONGOING
    num_gpus = config.num_gpus if config.num_gpus is not None else float((config.device or "").startswith("cuda"))
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests or capacity,
        "max_queued_requests": PROXY_QUEUE,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": config.num_cpus, "num_gpus": num_gpus},
        "health_check_period_s": config.health_check_period_s,
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": min(0.5, config.graceful_shutdown_timeout_s),
        "max_constructor_retry_count": 3,
    }
    if config.min_replicas == config.max_replicas:
        return options | {"num_replicas": config.min_replicas}
    target = config.target_ongoing_requests or max(1.0, 0.75 * config.max_batch_size)
    scaling = {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": target,
    }
    return options | {"autoscaling_config": scaling}


def serve_local(config: ServerConfig, *, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Serves until SIGINT or SIGTERM; `on_ready` gets the URL once /health answers. For the main thread."""
    with local_service(config) as url:
        with _stop_signals() as stop:
            on_ready(url)
            stop.wait()


@contextmanager
def local_service(config: ServerConfig) -> Iterator[str]:
    """The URL of the service on Ray; on leaving, ends what it started itself: the app, or Serve, or Ray too.

    Ray is the one this process has, else the cluster at RAY_ADDRESS, else one of its own. Where Serve runs already,
    its host and port hold.
    """
    with _ray():
        serve_was_running = bool(serve.status().proxies)
        if not serve_was_running:
            _check_port(config.host, config.port)
            serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port})
        try:
            serve.run(build_app(config), name=APP_NAME, route_prefix="/", logging_config=LOGGING)
            url = f"http://{_reachable(config.host)}:{config.port}"
            _wait_until_healthy(url)
            yield url
        finally:
            if serve_was_running:
                serve.delete(APP_NAME)
            else:
                serve.shutdown()


def serve_without_ray(config: ServerConfig) -> None:
    """Serves from this process alone until SIGINT or SIGTERM."""
    engine, api = load_service(config)
    try:
        with _stop_signals():  # uvicorn raises the signal again once it has ended, for whoever handled it before
            uvicorn.run(
                api,
                host=config.host,
                port=config.port,
                access_log=False,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=int(config.graceful_shutdown_timeout_s),
            )
    finally:
        engine.close()


@contextmanager
def _ray() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    """Ray Serve would go on trying; here the user learns it at once."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); choose another port") from error


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "") else host


def _wait_until_healthy(url: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url}/health did not answer 200 within {timeout_s:.0f} s: {error}") from error
            time.sleep(0.1)
