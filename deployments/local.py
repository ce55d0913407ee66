"""The service on this machine, for `medusa serve`, the demo and tests: on Ray Serve, or in one process without Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
import uvicorn
from ray import serve

from deployments import logs
from deployments.config import ServerConfig
from deployments.server import build_app, load_engine, load_service, settle_process
from medusa import Engine
from medusa.config import ConfigError

APP_NAME = "medusa"
LOGGING = {"enable_access_log": False, "log_level": "WARNING"}


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
            wait_until_healthy(url)
            yield url
        finally:
            if serve_was_running:
                serve.delete(APP_NAME)
            else:
                serve.shutdown()


def serve_without_ray(config: ServerConfig, load: Callable[[ServerConfig], Engine] = load_engine) -> None:
    """Serves from this process alone until SIGINT or SIGTERM."""
    logs.install(requests=config.log_requests)
    service = load_service(config, load=load)
    settle_process()
    try:
        with _stop_signals():  # uvicorn raises the signal again once it has ended, for whoever handled it before
            uvicorn.run(
                service.api,
                host=config.host,
                port=config.port,
                access_log=False,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=int(config.graceful_shutdown_timeout_s),
            )
    finally:
        service.close()


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


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def wait_until_healthy(url: str, timeout_s: float = 60.0, *, is_alive: Callable[[], bool] = lambda: True) -> None:
    """Raises RuntimeError when /health does not answer 200 in time, or at once when what serves it is not alive."""
    deadline = time.monotonic() + timeout_s
    while True:
        if not is_alive():
            raise RuntimeError(f"what was to serve {url} has ended; its own output says why")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{url}/health did not answer 200 within {timeout_s:.0f} s: {error}") from error
            time.sleep(0.1)
