"""Cluster state in Redis: the GCS is killed under load, requests go on, and a new GCS finds everything as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.local_ray import LocalRay, ask, deploy, serve_config
from tests.integration.services import free_port, listens, redis_server, wait_until
from tests.integration.test_local_serve import Traffic

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE_S = "300"  # of Ray's processes with an absent GCS; 60 by default

CODE = """
import sys
import ray

ray.init(
    address="local", num_cpus=4, num_gpus=0, include_dashboard=True, dashboard_port=int(sys.argv[1]),
    object_store_memory=256 * 2**20, log_to_driver=False,
)
from ray._private.worker import _global_node as node

(gcs,) = node.all_processes["gcs_server"]
print("address", ray.get_runtime_context().gcs_address, gcs.process.pid, flush=True)
for line in sys.stdin:
    if line.strip() == "killed":
        node.kill_gcs_server(check_alive=False)  # it is dead: this only tells the node so
    elif line.strip() == "start":
        node.start_gcs_server()
    print("done", flush=True)
ray.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalRay, subprocess.Popen[str], int]]:
    folder: Path = tmp_path_factory.mktemp("gcs")
    with redis_server(folder) as redis:
        dashboard = free_port()
        env = os.environ | {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis.port}",
            "RAY_external_storage_namespace": "medusa-test",
            "RAY_gcs_rpc_server_reconnect_timeout_s": PATIENCE_S,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(dashboard)],
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
            wait_until(lambda: listens(dashboard), 60, "Ray's dashboard")
            yield LocalRay(f"http://127.0.0.1:{dashboard}", line[1], dict(env)), process, int(line[2])
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    assert process.stdout.readline().strip() == "done"


def test_requests_go_on_while_the_gcs_is_away(cluster: tuple[LocalRay, subprocess.Popen[str], int], tiny_llama: Path):
    ray, process, gcs = cluster
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    deploy(ray, serve_config(tiny_llama, port), url)
    plain = ask(url)["choices"][0]["text"]
    replica = replicas(ray)
    with Traffic(url) as traffic:
        wait_until(lambda: len(traffic.answers) > 5, 60, "traffic")
        os.kill(gcs, signal.SIGKILL)
        at_kill = len(traffic.answers)
        # The first may have been under way. Answers are slower meanwhile: every process of Ray tries to reconnect.
        wait_until(lambda: len(traffic.answers) > at_kill + 6, 120, "answers without a GCS")
        tell(process, "killed")
        tell(process, "start")
        before_back = len(traffic.answers)
        wait_until(lambda: len(traffic.answers) > before_back + 10, 60, "traffic after the GCS is back")
        # The controller, its applications and the replica are those there were, and it takes orders again.
        wait_until(lambda: replicas(ray) == replica, 120, "Serve's state")
    assert traffic.failures == []
    assert set(traffic.answers) == {plain}
    changed = serve_config(tiny_llama, port, model_name="renamed")
    wait_until(lambda: put(ray, changed), 120, "a change being taken")
    wait_until(lambda: name(url) == "renamed", 180, "the change")


def put(ray: LocalRay, config: dict) -> bool:
    try:
        return httpx.put(f"{ray.dashboard}/api/serve/applications/", json=config, timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


def name(url: str) -> str | None:
    try:
        return httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
    except httpx.HTTPError:
        return None


def replicas(ray: LocalRay) -> set[str]:
    try:
        details = httpx.get(f"{ray.dashboard}/api/serve/applications/", timeout=30).json()
        found = details["applications"]["medusa"]["deployments"]["MedusaServer"]["replicas"]
    except (httpx.HTTPError, KeyError, ValueError):
        return set()
    return {replica["replica_id"] for replica in found}
