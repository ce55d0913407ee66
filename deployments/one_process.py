"""The service in one process, by uvicorn and without Ray: for `medusa serve --without-ray` and `medusa bench serve`."""

from __future__ import annotations

import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from deployments import logs
from deployments.config import ServerConfig
from deployments.loading import load_engine, load_service, settle_process
from medusa import Engine


def serve_without_ray(config: ServerConfig, load: Callable[[ServerConfig], Engine] = load_engine) -> None:
    """Serves from this process alone until SIGINT or SIGTERM."""
    logs.install(requests=config.log_requests)
    service = load_service(config, load=load)
    settle_process()
    try:
        with stop_signals():  # uvicorn raises the signal again once it has ended, for whoever handled it before
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
def stop_signals() -> Iterator[threading.Event]:
    """Set by SIGINT or SIGTERM, which otherwise do nothing meanwhile."""
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
