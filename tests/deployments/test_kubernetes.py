"""Leases, RayServices and RayJobs through an API server that a test plays: paths, verbs, versions, conflicts."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from deployments.kubernetes import (
    Conflict,
    Kubernetes,
    KubernetesError,
    KubernetesRecord,
    KubernetesUnavailable,
    RunActiveError,
    submit_run,
)
from deployments.rollout_target import Heads, RayServiceTarget, heads_of, with_heads
from medusa.config import ConfigError
from registry.lease import Lease, LeaseHeldError, LeaseLostError

SERVE = {"applications": [{"name": "medusa", "import_path": "x:y", "args": {"model": "/m", "heads_version": "1"}}]}


@dataclass
class ApiServer:
    """Objects by (plural, name). A write raises the resourceVersion; a change of spec raises the generation."""

    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # verb, path, content type
    fail_with: int | None = None
    after_write: Callable[[ApiServer], None] | None = None
    lock: Any = field(default_factory=threading.Lock)
    versions: int = 0

    def put(self, plural: str, content: dict[str, Any]) -> dict[str, Any]:
        self.versions += 1
        name = content["metadata"]["name"]
        before = self.objects.get((plural, name), {"metadata": {"generation": 0}})
        generation = before["metadata"]["generation"] + (content.get("spec") != before.get("spec"))
        content["metadata"] |= {"resourceVersion": str(self.versions), "generation": generation}
        self.objects[plural, name] = content
        return content

    def answer(self, verb: str, path: str, labels: str, body: Any) -> tuple[int, Any]:
        if self.fail_with:
            return self.fail_with, {"message": "out of order"}
        parts = path.strip("/").split("/")
        assert parts[0] == "apis" and parts[3] == "namespaces" and parts[4] == "medusa", path
        plural, name = parts[5], parts[6] if len(parts) > 6 else ""
        found = self.objects.get((plural, name))
        if verb == "GET" and not name:
            key, _, value = labels.partition("=")
            chosen = [
                one
                for (kind, _), one in self.objects.items()
                if kind == plural and one["metadata"].get("labels", {}).get(key) == value
            ]
            return 200, {"items": chosen}
        if verb == "POST":
            key = (plural, body["metadata"]["name"])
            return (409, {"message": "already exists"}) if key in self.objects else (201, self.put(plural, body))
        if found is None:
            return 404, {"message": f'{plural} "{name}" not found'}
        if verb == "GET":
            return 200, found
        given = body["metadata"].get("resourceVersion")
        if given != found["metadata"]["resourceVersion"] and (verb == "PUT" or given is not None):
            return 409, {"message": "the object has been modified"}
        return 200, self.put(plural, body if verb == "PUT" else merged(found, body))


def merged(base: Any, patch: Any) -> Any:
    if not isinstance(patch, dict) or not isinstance(base, dict):
        return copy.deepcopy(patch)
    return base | {key: merged(base.get(key), value) for key, value in patch.items()}


@pytest.fixture
def server() -> ApiServer:
    return ApiServer()


@pytest.fixture
def kubernetes(server: ApiServer) -> Iterator[Kubernetes]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            parts = urlsplit(self.path)
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
            assert self.headers["Authorization"] == "Bearer a-token"
            with server.lock:
                server.requests.append((self.command, parts.path, self.headers.get("Content-Type")))
                labels = parse_qs(parts.query).get("labelSelector", [""])[0]
                status, content = server.answer(self.command, parts.path, labels, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,))
    thread.start()
    yield Kubernetes(f"http://127.0.0.1:{http.server_port}", "medusa", lambda: "a-token\n")
    http.shutdown()
    thread.join()
    http.server_close()


def test_outside_a_cluster_one_is_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no pod of a Kubernetes cluster"):
        Kubernetes.in_cluster()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (403, KubernetesError),
        (422, KubernetesError),
        (409, Conflict),
        (429, KubernetesUnavailable),
        (503, KubernetesUnavailable),
    ],
)
def test_answers_are_told_apart(server: ApiServer, kubernetes: Kubernetes, status: int, error: type[Exception]):
    server.fail_with = status
    with pytest.raises(error, match=f"{status} out of order"):
        kubernetes.get("ray.io/v1", "rayservices", "medusa")


def test_a_server_that_is_away_is_a_reason_to_try_again(kubernetes: Kubernetes):
    with pytest.raises(KubernetesUnavailable, match="cannot be reached"):
        replace(kubernetes, url="http://127.0.0.1:9").get("ray.io/v1", "rayservices", "medusa")


# Leases


def test_of_many_one_gets_the_lease(kubernetes: Kubernetes, server: ApiServer):
    start, wins, refusals = threading.Barrier(5), [], []

    def contend() -> None:
        lease = Lease(KubernetesRecord(kubernetes, "medusa-rollout"))
        start.wait()
        try:
            lease.acquire()
            wins.append(lease)
        except LeaseHeldError:
            refusals.append(lease)

    threads = [threading.Thread(target=contend) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(wins), len(refusals)) == (1, 4)
    assert server.objects["leases", "medusa-rollout"]["spec"]["holderIdentity"] == wins[0].owner
    wins[0].release()
    again = Lease(KubernetesRecord(kubernetes, "medusa-rollout"))
    again.acquire()
    again.release()


def test_a_lease_that_ran_out_is_taken_over(kubernetes: Kubernetes):
    record = KubernetesRecord(kubernetes, "medusa-rollout")
    first, second = Lease(record), Lease(record)
    first.acquire()
    holder, version = record.read()
    assert holder is not None and record.swap(replace(holder, expires=0.0), version)
    second.acquire()
    with pytest.raises(LeaseLostError), first.while_held():
        pass
    with second.while_held():
        pass
    first.release()
    second.release()


# A RayService


def ray_service(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "medusa"},
        "spec": {"serveConfigV2": yaml.safe_dump(SERVE), "rayClusterConfig": {"rayVersion": "2.60.0"}},
        "status": status,
    }


def applications(application: str, deployment: str, message: str = "") -> dict[str, Any]:
    found = {
        "status": application,
        "message": message,
        "serveDeploymentStatuses": {"MedusaServer": {"status": deployment}},
    }
    return {"applicationStatuses": {"medusa": found}}


def test_a_patch_changes_the_serve_config_alone(server: ApiServer, kubernetes: Kubernetes):
    server.put("rayservices", ray_service())
    target = RayServiceTarget(kubernetes, "medusa")
    heads = Heads("/versions/x", "2", "sha256:x")
    target.deploy(with_heads(target.config(), heads, in_place=True))
    assert heads_of(target.config()) == heads
    spec = server.objects["rayservices", "medusa"]["spec"]
    assert spec["rayClusterConfig"] == {"rayVersion": "2.60.0"}  # so KubeRay starts no new cluster
    assert server.requests[-2] == (
        "PATCH",
        "/apis/ray.io/v1/namespaces/medusa/rayservices/medusa",
        "application/merge-patch+json",
    )


def test_a_change_by_somebody_else_in_between_is_a_conflict(server: ApiServer, kubernetes: Kubernetes, monkeypatch):
    server.put("rayservices", ray_service())
    target = RayServiceTarget(kubernetes, "medusa")
    read = target._read

    def read_then_others_write() -> dict[str, Any]:
        found = copy.deepcopy(read())
        server.put("rayservices", ray_service())
        return found

    monkeypatch.setattr(target, "_read", read_then_others_write)
    with pytest.raises(Conflict):
        target.deploy(SERVE)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({"observedGeneration": 0}, "changing"),
        ({"observedGeneration": 1}, "changing"),
        ({"observedGeneration": 1, "activeServiceStatus": applications("DEPLOYING", "UPDATING")}, "changing"),
        ({"observedGeneration": 1, "activeServiceStatus": applications("RUNNING", "UPDATING")}, "changing"),
        ({"observedGeneration": 1, "activeServiceStatus": applications("RUNNING", "HEALTHY")}, "ready"),
        ({"observedGeneration": 0, "activeServiceStatus": applications("RUNNING", "HEALTHY")}, "changing"),
        ({"observedGeneration": 1, "activeServiceStatus": applications("UNHEALTHY", "UNHEALTHY")}, "changing"),
        (
            {"observedGeneration": 1, "activeServiceStatus": applications("DEPLOY_FAILED", "x", "no such folder")},
            "failed",
        ),
    ],
)
def test_states_of_a_ray_service(server: ApiServer, kubernetes: Kubernetes, status: dict[str, Any], state: str):
    server.put("rayservices", ray_service(**status))
    found, said = RayServiceTarget(kubernetes, "medusa").state()
    assert found == state
    assert state != "failed" or "no such folder" in said


def test_a_ray_service_that_is_not_there_is_named(kubernetes: Kubernetes):
    with pytest.raises(ConfigError, match="no RayService other in namespace medusa"):
        RayServiceTarget(kubernetes, "other").config()


# Runs of the pipeline

TEMPLATE = {
    "metadata": {"name": "medusa-pipeline", "labels": {"app.kubernetes.io/part-of": "medusa"}},
    "spec": {"suspend": True, "entrypoint": "medusa run /etc/medusa/pipeline.yaml"},
}


def submit(server: ApiServer, kubernetes: Kubernetes, status: dict[str, Any], started_by: str = "nightly-1") -> int:
    """Starts a run that ends with `status` at the second look."""
    looks = iter(range(100))

    def sleep(_: float) -> None:
        for (plural, name), one in server.objects.items():
            if plural == "rayjobs" and name != "medusa-pipeline" and "jobDeploymentStatus" not in one.get("status", {}):
                one["status"] = {"jobDeploymentStatus": "Running"} if next(looks) == 0 else status
            elif plural == "rayjobs" and one.get("status", {}).get("jobDeploymentStatus") == "Running":
                one["status"] = status

    return submit_run(kubernetes, "medusa-pipeline", started_by, now=lambda: 1_795_000_000.5, sleep=sleep)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "message": "Job entrypoint command failed with exit code 4, last available logs:\nexit code 1",
            },
            4,
        ),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "failed with exit code 3. No logs"}, 3),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "over its deadline"}, 1),
    ],
)
def test_a_run_ends_with_the_commands_exit_code(
    server: ApiServer, kubernetes: Kubernetes, status: dict[str, Any], code: int
):
    server.put("rayjobs", copy.deepcopy(TEMPLATE))
    assert submit(server, kubernetes, status) == code
    run = server.objects["rayjobs", "medusa-pipeline-1795000000"]
    assert run["spec"] == TEMPLATE["spec"] | {"suspend": False}
    assert run["metadata"]["labels"]["medusa/started-by"] == "nightly-1"
    assert server.objects["rayjobs", "medusa-pipeline"]["spec"]["suspend"] is True


def test_ray_writes_the_exit_code_as_it_is_read_here():
    """The message comes from Ray's job supervisor: this is the text that the code is read from."""
    from pathlib import Path

    from ray.dashboard.modules.job import job_supervisor

    assert "failed with exit code {return_code}" in Path(job_supervisor.__file__).read_text()


def test_a_run_under_way_is_waited_for_by_who_started_it_and_refused_to_others(
    server: ApiServer, kubernetes: Kubernetes
):
    server.put("rayjobs", copy.deepcopy(TEMPLATE))
    run = copy.deepcopy(TEMPLATE)
    run["metadata"] = {
        "name": "medusa-pipeline-7",
        "labels": {"medusa/pipeline": "medusa-pipeline", "medusa/started-by": "nightly-1"},
    }
    run["status"] = {"jobDeploymentStatus": "Running"}
    server.put("rayjobs", run)
    done = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    with pytest.raises(RunActiveError, match="medusa-pipeline-7, started by nightly-1, is under way"):
        submit(server, kubernetes, done, started_by="somebody")
    assert submit(server, kubernetes, done) == 0
    assert len([plural for plural, _ in server.objects if plural == "rayjobs"]) == 2  # none was started anew
    # It has ended: now another may begin.
    assert submit(server, kubernetes, done, started_by="somebody") == 0
    assert len([plural for plural, _ in server.objects if plural == "rayjobs"]) == 3


def test_a_template_must_be_there_and_suspended(server: ApiServer, kubernetes: Kubernetes):
    with pytest.raises(ConfigError, match="no RayJob medusa-pipeline"):
        submit_run(kubernetes, "medusa-pipeline", "me")
    server.put("rayjobs", {"metadata": {"name": "medusa-pipeline"}, "spec": {}})
    with pytest.raises(ConfigError, match="suspend is not true"):
        submit_run(kubernetes, "medusa-pipeline", "me")


def test_a_run_that_is_deleted_has_failed(server: ApiServer, kubernetes: Kubernetes):
    server.put("rayjobs", copy.deepcopy(TEMPLATE))

    def delete(_: float) -> None:
        server.objects.pop(("rayjobs", "medusa-pipeline-5"))

    with pytest.raises(KubernetesError, match="was deleted while it ran"):
        submit_run(kubernetes, "medusa-pipeline", "me", now=lambda: 5.0, sleep=delete)
