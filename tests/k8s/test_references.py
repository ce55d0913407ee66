"""What the manifests name exists: images, commands and their options, configurations, volumes, secrets, alerts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from cli.main import app
from medusa.config import validate
from pipelines.run import PipelineConfig
from tests.k8s.support import ROOT, containers, of_kind, pod_templates, the

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
THIRD_PARTY = {"postgres", "redis"}
GUIDE = ROOT / "docs" / "operating.md"


def all_pods(manifests: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [found for manifest in manifests for found in pod_templates(manifest)]


def test_every_image_is_pinned_and_ours_have_a_dockerfile(manifests: list[dict[str, Any]]) -> None:
    for where, template in all_pods(manifests):
        for container in containers(template):
            repository, _, tag = container["image"].rpartition(":")
            assert tag and tag != "latest", f"{where}: {container['image']}"
            name = repository.rpartition("/")[2]
            kind = name.removeprefix("medusa-on-ray-")
            assert name in THIRD_PARTY or (ROOT / "docker" / f"{kind}.Dockerfile").is_file(), f"{where}: {name}"


def test_every_medusa_command_and_option_exists(manifests: list[dict[str, Any]]) -> None:
    lines = [
        container["args"]
        for _, template in all_pods(manifests)
        for container in containers(template)
        if container.get("args", [""])[0] == "medusa"
    ]
    lines += [job["spec"]["entrypoint"].split() for job in of_kind(manifests, "RayJob")]
    assert {line[1] for line in lines} == {"run", "rollout", "submit"}
    for line in lines:
        assert line[0] == "medusa"
        command = COMMANDS[line[1]]
        options = {option for param in command.params for option in getattr(param, "opts", [])}
        given = {word.partition("=")[0] for word in line[2:] if word.startswith("--")}
        assert given <= options, f"{line}: unknown {given - options}"


def test_mlflows_server_takes_its_options_and_its_settings(manifests: list[dict[str, Any]]) -> None:
    from mlflow import environment_variables
    from mlflow.cli import server

    (container,) = the(manifests, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    assert container["args"][:2] == ["mlflow", "server"]
    options = {option for param in server.params for option in param.opts}
    assert {word.partition("=")[0] for word in container["args"][2:]} <= options
    given = {one["name"] for one in container["env"]}
    from_click = {param.envvar for param in server.params if param.envvar}
    assert given - from_click <= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION"} and "MLFLOW_BACKEND_STORE_URI" in given
    assert hasattr(environment_variables, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION")
    hosts = next(word for word in container["args"] if word.startswith("--allowed-hosts=")).partition("=")[2].split(",")
    (port,) = the(manifests, "Service", "mlflow")["spec"]["ports"]
    assert f"mlflow:{port['port']}" in hosts  # or it answers 403 to every client


def test_the_pipeline_configuration_is_one_and_is_mounted_where_it_is_read(manifests: list[dict[str, Any]]) -> None:
    (config_map,) = [
        one for one in of_kind(manifests, "ConfigMap") if one["metadata"]["name"] == "medusa-pipeline-config"
    ]
    (name, text), *more = config_map["data"].items()
    assert not more
    config = validate(PipelineConfig, yaml.safe_load(text), source=name)
    job = the(manifests, "RayJob", "medusa-pipeline")["spec"]
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (container,) = head["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"{mounts['config']}/{name}" in job["entrypoint"].split()
    assert config.root.startswith(mounts["shared"])
    assert config.prompts.samples is not None and config.prompts.samples.path == mounts["samples"]
    assert config.tracking.uri == _service_url(manifests, "mlflow")
    (rollout,) = the(manifests, "Deployment", "medusa-rollout")["spec"]["template"]["spec"]["containers"]
    assert config.register.name == rollout["args"][2]


def _service_url(manifests: list[dict[str, Any]], name: str) -> str:
    (port,) = the(manifests, "Service", name)["spec"]["ports"]
    return f"http://{name}:{port['port']}"


def test_rollout_acts_on_the_service_there_is(manifests: list[dict[str, Any]]) -> None:
    (container,) = the(manifests, "Deployment", "medusa-rollout")["spec"]["template"]["spec"]["containers"]
    options = dict(arg.removeprefix("--").split("=", 1) for arg in container["args"] if arg.startswith("--"))
    kind, _, name = options["service"].partition("/")
    assert kind == "rayservice"
    the(manifests, "RayService", name)
    assert options["url"].startswith(f"http://{name}-serve-svc:")  # KubeRay's name for it
    assert any(options["versions"].startswith(mount["mountPath"]) for mount in container["volumeMounts"])
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["MLFLOW_TRACKING_URI"] == _service_url(manifests, "mlflow")


def test_every_volume_mount_service_account_and_configmap_exists(manifests: list[dict[str, Any]]) -> None:
    claims = {one["metadata"]["name"] for one in of_kind(manifests, "PersistentVolumeClaim")}
    maps = {one["metadata"]["name"] for one in of_kind(manifests, "ConfigMap")}
    accounts = {one["metadata"]["name"] for one in of_kind(manifests, "ServiceAccount")}
    for where, template in all_pods(manifests):
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}, where
            assert volume.get("configMap", {}).get("name") in {None, *maps}, where
        templated = {"data"} if where.startswith("StatefulSet") else set()
        for container in containers(template):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes) | templated, where
        assert spec.get("serviceAccountName") in {None, *accounts}, where


def test_secrets_are_referred_to_and_none_is_here_and_the_guide_makes_each(manifests: list[dict[str, Any]]) -> None:
    assert of_kind(manifests, "Secret") == []
    named: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            for key in ("secretKeyRef", "secretRef"):
                if key in value:
                    named.add(value[key]["name"])
            if isinstance(value.get("secretName"), str):
                named.add(value["secretName"])
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list):
            for inner in value:
                visit(inner)

    visit(manifests)
    assert "medusa-ray-auth" in named
    guide = GUIDE.read_text()
    assert [name for name in sorted(named) if f"create secret generic {name}" not in guide] == []


def test_every_alert_stands_in_the_guide_and_asks_for_metrics_there_are(
    manifests: list[dict[str, Any]], overlay: str
) -> None:
    rules = [
        rule
        for one in of_kind(manifests, "PrometheusRule")
        for group in one["spec"]["groups"]
        for rule in group["rules"]
    ]
    assert bool(rules) == (overlay == "prod")
    guide = GUIDE.read_text()
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in guide] == []
    assert {rule["labels"]["severity"] for rule in rules} <= {"critical", "warning"}
    metrics = set(re.findall(r"ray_(medusa_\w+)", json.dumps(rules)))
    bare = {re.sub(r"_(bucket|total|sum|count)$", "", name) for name in metrics}
    assert bare <= metrics_of_the_service(), sorted(bare - metrics_of_the_service())


def metrics_of_the_service() -> set[str]:
    """The stems that deployments/metrics.py exports."""
    text = (ROOT / "deployments" / "metrics.py").read_text()
    stems = re.findall(r"(?:gauge|counter|histogram)\(\s*\"(\w+)\"", text)
    return {f"medusa_{stem}" for stem in stems} | set(re.findall(r"\"(medusa_\w+)\"", text))


def test_the_dashboard_is_the_services(overlay: str, manifests: list[dict[str, Any]]) -> None:
    copy = ROOT / "k8s" / "components" / "monitoring" / "dashboard.json"
    content = json.loads(copy.read_text())
    assert content["title"] and content["panels"]
    original = ROOT / "deployments" / "dashboard.json"
    assert copy.read_bytes() == original.read_bytes(), f"copy {original} to {copy}: kustomize reads only below itself"
    if overlay == "prod":
        (config_map,) = [
            one for one in of_kind(manifests, "ConfigMap") if one["metadata"]["name"] == "medusa-dashboard"
        ]
        assert json.loads(config_map["data"]["medusa.json"]) == content


def test_dockerfiles_copy_what_is_there_and_do_not_run_as_root() -> None:
    files = sorted((ROOT / "docker").glob("*.Dockerfile"))
    assert [file.name for file in files] == ["cpu.Dockerfile", "gpu.Dockerfile"]
    ignored = {
        line.strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")
    }
    for file in files:
        lines = [line.split() for line in file.read_text().replace("\\\n", " ").splitlines() if line.strip()]
        sources = [Path(name) for line in lines if line[0] == "COPY" for name in line[1:-1]]
        assert [str(source) for source in sources if not (ROOT / source).exists()] == []
        assert not {str(source).removeprefix("./") for source in sources} & ignored
        assert [line[1] for line in lines if line[0] == "USER"][-1] == "1000:1000"
        (base,) = [line[1] for line in lines if line[0] == "FROM"]
        assert re.fullmatch(r"python:3\.11-slim-bookworm", base)
        text = file.read_text()
        assert "wget" in text  # KubeRay's probes
        packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
        assert packages <= {source.name for source in sources}


def test_compiled_kernels_lie_on_a_volume_that_replicas_may_write(manifests: list[dict[str, Any]]) -> None:
    spec = the(manifests, "RayService", "medusa")["spec"]["rayClusterConfig"]
    for group in spec["workerGroupSpecs"]:
        (container,) = containers(group["template"])
        environment = {one["name"]: one.get("value") for one in container.get("env", [])}
        uses_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert ("TRITON_CACHE_DIR" in environment) == uses_gpu
        if uses_gpu:
            (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == environment["TRITON_CACHE_DIR"]]
            assert not mount.get("readOnly", False)
            claims = {v["name"]: v.get("persistentVolumeClaim") for v in group["template"]["spec"]["volumes"]}
            assert claims[mount["name"]] is not None
