"""A Ray of its own in another process, with the dashboard whose REST API deploys Serve's configurations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.integration.services import free_port, listens, wait_until

CODE = """
import sys, time
import ray
ray.init(
    address="local", num_cpus=int(sys.argv[2]), num_gpus=0, include_dashboard=True, dashboard_port=int(sys.argv[1]),
    object_store_memory=256 * 2**20, log_to_driver=False, _temp_dir=None,
)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()  # until whoever started this closes it
ray.shutdown()
"""


@dataclass
class LocalRay:
    dashboard: str  # http://...
    address: str  # for RAY_ADDRESS
    environment: dict[str, str]


@contextmanager
def local_ray(folder: Path, num_cpus: int = 6, environment: dict[str, str] | None = None) -> Iterator[LocalRay]:
    port = free_port()
    env = {**os.environ, **(environment or {}), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(port), str(num_cpus)],
        cwd=folder,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "ray.log").open("wb"),
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert line[:1] == ["address"], (folder / "ray.log").read_text()
        wait_until(lambda: listens(port), 60, "Ray's dashboard")
        yield LocalRay(f"http://127.0.0.1:{port}", line[1], env)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def serve_config(model: Path, port: int, **args: Any) -> dict[str, Any]:
    """As deployments/serve.yaml, on this machine."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "medusa",
                "route_prefix": "/",
                "import_path": "deployments.server:build_app",
                "args": {
                    "model": str(model),
                    "model_name": "tiny",
                    "device": "cpu",
                    "num_cpus": 0.5,
                    "max_batch_size": 4,
                    "health_check_period_s": 0.5,
                    "graceful_shutdown_timeout_s": 5,
                }
                | args,
            }
        ],
    }


def deploy(ray: LocalRay, config: dict[str, Any], url: str) -> None:
    answer = httpx.put(f"{ray.dashboard}/api/serve/applications/", json=config, timeout=120)
    assert answer.status_code == 200, answer.text
    wait_until(lambda: answers(url), 180, "the service answering")


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def ask(url: str, prompt: str = "The fox", tokens: int = 24) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()
