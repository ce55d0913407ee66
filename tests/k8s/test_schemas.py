"""Every object against its schema, unknown fields refused: core kinds, KubeRay's, Serve's part of a RayService."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deployments.server import ServerConfig, build_app
from medusa.config import validate
from tests.k8s.support import ROOT, of_kind, the

KUBERAY = {"RayService", "RayJob", "RayCluster", "RayCronJob"}
PROMETHEUS = {"PodMonitor", "PrometheusRule"}
KUBERNETES_VERSION = "1.32"


def test_every_core_object_holds_only_what_kubernetes_knows(manifests: list[dict[str, Any]]) -> None:
    checked = 0
    for manifest in manifests:
        if manifest["kind"] not in KUBERAY | PROMETHEUS:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
            checked += 1
    assert checked > 25


def test_the_check_finds_an_unknown_field(manifests: list[dict[str, Any]]) -> None:
    cron = the(manifests, "CronJob", "medusa-nightly")
    typo = cron | {"spec": cron["spec"] | {"concurencyPolicy": "Forbid"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        kubernetes_validate.validate(typo, KUBERNETES_VERSION, strict=True)


@pytest.fixture(scope="session")
def kuberay_check() -> tuple[Path, Path]:
    tool, schemas = (ROOT.parent / "shared" / name for name in ("tools/validate_crds.py", "kuberay/crds-v1.7.0"))
    if not (tool.is_file() and schemas.is_dir()):
        pytest.skip(f"KubeRay's schemas and the tool that reads them are not part of the project ({tool}, {schemas})")
    return tool, schemas


def run_kuberay_check(tool: Path, schemas: Path, text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tool), str(schemas), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_every_kuberay_object_matches_its_schema(manifest_text: str, kuberay_check: tuple[Path, Path]) -> None:
    done = run_kuberay_check(*kuberay_check, manifest_text)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 0 failed" in done.stdout  # the RayService and the RayJob


def test_the_kuberay_check_finds_an_unknown_field(manifest_text: str, kuberay_check: tuple[Path, Path]) -> None:
    broken = manifest_text.replace("rayClusterDeletionDelaySeconds", "rayClusterDeletionDelay")
    done = run_kuberay_check(*kuberay_check, broken)
    assert done.returncode == 1
    assert "rayClusterDeletionDelay" in done.stdout


def serve_config(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return yaml.safe_load(the(manifests, "RayService", "medusa")["spec"]["serveConfigV2"])


def test_the_serve_config_is_what_serve_and_the_server_take(manifests: list[dict[str, Any]]) -> None:
    from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    config = serve_config(manifests)
    ServeDeploySchema.model_validate(config)
    # Serve lets unknown keys pass in silence; a typo must not.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    (application,) = config["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    for deployment in application.get("deployments", []):
        assert set(deployment) <= set(DeploymentSchema.model_fields)
    assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
    # The file of keys is where the pods are; where this runs it cannot be read.
    build_app({name: value for name, value in application["args"].items() if name != "api_key_file"})
    assert set(application["args"]) <= {field.name for field in dataclasses.fields(ServerConfig)}


def test_replicas_fit_the_pods(manifests: list[dict[str, Any]]) -> None:
    """As many workers as replicas, each large enough for one; and more time to end than the drain takes."""
    service = the(manifests, "RayService", "medusa")["spec"]
    (application,) = serve_config(manifests)["applications"]
    args = validate(ServerConfig, application["args"], source="args")
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert group["minReplicas"] >= args.min_replicas
    assert group["maxReplicas"] >= args.max_replicas
    (container,) = group["template"]["spec"]["containers"]
    assert float(container["resources"]["requests"]["cpu"]) >= args.num_cpus
    gpus = float(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert gpus == (args.num_gpus or 0) == (1 if args.device == "cuda" else 0)
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][-1].removeprefix("sleep "))
    assert grace > wait > args.graceful_shutdown_timeout_s
    assert service["rayClusterDeletionDelaySeconds"] > grace


def test_monitors_select_ports_that_the_pods_have(manifests: list[dict[str, Any]], overlay: str) -> None:
    monitors = of_kind(manifests, "PodMonitor")
    assert len(monitors) == (2 if overlay == "prod" else 0)
    for monitor in monitors:
        role = monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"]
        cluster = the(manifests, "RayService", "medusa")["spec"]["rayClusterConfig"]
        template = cluster["headGroupSpec" if role == "head" else "workerGroupSpecs"]
        template = (template if role == "head" else template[0])["template"]
        ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
