"""The service on Ray Serve on this machine, for `medusa serve`, the demo and tests."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray import serve

from deployments.config import ServerConfig
from deployments.one_process import stop_signals, wait_until_healthy
from deployments.server import build_app
from medusa.config import ConfigError

APP_NAME = "medusa"
LOGGING = {"enable_access_log": False, "log_level": "WARNING"}


def serve_local(config: ServerConfig, *, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Serves until SIGINT or SIGTERM; `on_ready` gets the URL once /health answers. For the main thread."""
    with local_service(config) as url:
        with stop_signals() as stop:
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
            wait_until_healthy(url)
            yield url
        finally:
            if serve_was_running:
                serve.delete(APP_NAME)
            else:
                serve.shutdown()


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
