"""Rules that no schema holds: KubeRay's own (names, exclusive fields, gates), and ours about security and access."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.k8s.support import containers, of_kind, pod_templates, the

# KubeRay 1.7: what it appends to a name must still fit a DNS label.
NAME_LIMIT = {"RayService": 47, "RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
ALPHA_FIELDS = ("networkPolicy", "tlsOptions", "historyServerOptions")  # behind gates that are off


def clusters(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for service in of_kind(manifests, "RayService"):
        yield service["metadata"]["name"], service["spec"]["rayClusterConfig"]
    for job in of_kind(manifests, "RayJob"):
        yield job["metadata"]["name"], job["spec"]["rayClusterSpec"]


def test_names_leave_room_for_what_kuberay_appends(manifests: list[dict[str, Any]]) -> None:
    for kind, limit in NAME_LIMIT.items():
        for one in of_kind(manifests, kind):
            name = one["metadata"]["name"]
            assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
            # `medusa submit` appends a dash and ten digits.
            assert len(name) + (11 if kind == "RayJob" else 0) <= limit
    for _, cluster in clusters(manifests):
        groups = [group["groupName"] for group in cluster["workerGroupSpecs"]]
        assert len(groups) == len(set(groups)) and "headgroup" not in groups
        assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", group) for group in groups)


def test_a_ray_job_sets_no_fields_that_exclude_each_other(manifests: list[dict[str, Any]]) -> None:
    for job in of_kind(manifests, "RayJob"):
        spec = job["spec"]
        assert spec["entrypoint"]
        assert "clusterSelector" not in spec and "rayClusterSpec" in spec
        assert spec["shutdownAfterJobFinishes"] is True  # asked for by suspend, and by ttlSecondsAfterFinished
        assert "deletionStrategy" not in spec  # excludes ttlSecondsAfterFinished
        assert spec["submissionMode"] == "K8sJobMode"  # the only one with a submitterPodTemplate
        assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
        assert spec["ttlSecondsAfterFinished"] >= 0 and spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] >= 0


def test_the_template_starts_nothing_by_itself(manifests: list[dict[str, Any]]) -> None:
    assert the(manifests, "RayJob", "medusa-pipeline")["spec"]["suspend"] is True


def test_the_service_is_upgraded_without_downtime(manifests: list[dict[str, Any]]) -> None:
    spec = the(manifests, "RayService", "medusa")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}  # the incremental one needs a Gateway
    assert spec["excludeHeadPodFromServeSvc"] is True


def test_autoscaling_and_authentication_are_set_as_kuberay_asks(manifests: list[dict[str, Any]]) -> None:
    for name, cluster in clusters(manifests):
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert cluster["authOptions"]["mode"] == "token" and "enableK8sTokenAuth" not in cluster["authOptions"]
        assert tuple(int(part) for part in cluster["rayVersion"].split(".")) >= (2, 52, 0)
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert not set(cluster) & set(ALPHA_FIELDS)
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            assert group["template"]["spec"].get("restartPolicy", "Never") == "Never", name
            assert "labels" not in group["rayStartParams"]
            assert not ("resources" in group and "resources" in group["rayStartParams"])
            environment = [one["name"] for c in containers(group["template"]) for one in c.get("env", [])]
            assert "RAY_enable_autoscaler_v2" not in environment and "RAY_REDIS_ADDRESS" not in environment
        for group in cluster["workerGroupSpecs"]:
            assert group.get("numOfHosts", 1) == 1
            assert group["minReplicas"] <= group["maxReplicas"]


def test_the_ray_of_the_manifests_is_the_one_that_is_installed(manifests: list[dict[str, Any]]) -> None:
    import ray

    assert {cluster["rayVersion"] for _, cluster in clusters(manifests)} == {ray.__version__}


def test_fault_tolerance_is_set_in_one_place(manifests: list[dict[str, Any]], overlay: str) -> None:
    cluster = the(manifests, "RayService", "medusa")["spec"]["rayClusterConfig"]
    options = cluster.get("gcsFaultToleranceOptions")
    assert (options is None) == (overlay == "dev")
    if options:
        host, _, port = options["redisAddress"].partition(":")
        assert the(manifests, "Service", host)["spec"]["ports"][0]["port"] == int(port)
        assert "secretKeyRef" in options["redisPassword"]["valueFrom"]
        assert "externalStorageNamespace" not in options  # KubeRay's own is unique to a cluster
        assert "redis-password" not in cluster["headGroupSpec"]["rayStartParams"]


def test_no_container_may_become_root(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        for where, template in pod_templates(manifest):
            pod = template["spec"]["securityContext"]
            assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0, where
            assert pod["seccompProfile"]["type"] == "RuntimeDefault", where
            for container in containers(template):
                security = container["securityContext"]
                assert security["allowPrivilegeEscalation"] is False, f"{where} {container['name']}"
                assert security["capabilities"] == {"drop": ["ALL"]}, f"{where} {container['name']}"
    for _, cluster in clusters(manifests):
        assert cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False


def test_every_container_says_what_it_needs(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        for where, template in pod_templates(manifest):
            for container in template["spec"]["containers"]:
                resources = container["resources"]
                assert {"cpu", "memory"} <= set(resources["requests"]) and "memory" in resources["limits"], where


def test_gpu_pods_go_to_gpu_nodes_with_shared_memory(manifests: list[dict[str, Any]], overlay: str) -> None:
    found = 0
    for manifest in manifests:
        for where, template in pod_templates(manifest):
            for container in containers(template):
                if "nvidia.com/gpu" not in container.get("resources", {}).get("limits", {}):
                    continue
                found += 1
                assert "gpu" in container["image"], where
                assert "nvidia.com/gpu.product" in template["spec"]["nodeSelector"], where
                assert any(one["key"] == "nvidia.com/gpu" for one in template["spec"]["tolerations"]), where
                mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
                (shm,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == mounts["/dev/shm"]]
                assert shm["emptyDir"]["medium"] == "Memory", where
    assert found == (3 if overlay == "prod" else 0)


def test_the_nightly_job_does_one_thing_at_a_time_and_retries_only_code_4(manifests: list[dict[str, Any]]) -> None:
    cron = the(manifests, "CronJob", "medusa-nightly")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid" and cron["timeZone"] and cron["startingDeadlineSeconds"] > 0
    assert cron["successfulJobsHistoryLimit"] > 0 and cron["failedJobsHistoryLimit"] > 0
    job = cron["jobTemplate"]["spec"]
    ignore, fail = job["podFailurePolicy"]["rules"]
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    (container,) = job["template"]["spec"]["containers"]
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"] == {"containerName": container["name"], "operator": "NotIn", "values": [4]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    run = the(manifests, "RayJob", "medusa-pipeline")["spec"]
    assert job["activeDeadlineSeconds"] > run["activeDeadlineSeconds"]
    assert run["backoffLimit"] == 0  # it cannot tell 4 from the others


@pytest.mark.parametrize(
    ("account", "allowed"),
    [
        ("medusa-nightly", {("ray.io", "rayjobs"): {"create", "get", "list"}}),
        (
            "medusa-rollout",
            {
                ("ray.io", "rayservices"): {"get", "patch"},
                ("coordination.k8s.io", "leases"): {"create", "get", "update"},
            },
        ),
    ],
)
def test_accounts_may_do_just_what_they_need(
    manifests: list[dict[str, Any]], account: str, allowed: dict[tuple[str, str], set[str]]
) -> None:
    assert of_kind(manifests, "ClusterRole") == of_kind(manifests, "ClusterRoleBinding") == []
    bound = [
        binding["roleRef"]["name"]
        for binding in of_kind(manifests, "RoleBinding")
        if account in [subject["name"] for subject in binding["subjects"]]
    ]
    granted: dict[tuple[str, str], set[str]] = {}
    for name in bound:
        for rule in the(manifests, "Role", name)["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    granted.setdefault((group, resource), set()).update(rule["verbs"])
    assert granted == allowed


def test_only_who_talks_to_the_api_server_has_a_token(manifests: list[dict[str, Any]]) -> None:
    with_token = set()
    for manifest in manifests:
        for where, template in pod_templates(manifest):
            if template["spec"].get("automountServiceAccountToken", True):
                with_token.add(where)
                assert template["spec"].get("serviceAccountName"), f"{where} has the namespace's default account"
    assert with_token == {
        "RayService/medusa head",
        "RayJob/medusa-pipeline head",
        "Deployment/medusa-rollout",
        "CronJob/medusa-nightly",
    }


def test_the_network_is_closed_and_every_pod_has_a_role(manifests: list[dict[str, Any]]) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "NetworkPolicy")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule.get("from"), f"{name} lets everybody in"
    roles = {
        template["metadata"]["labels"].get("medusa/role")
        for manifest in manifests
        for _, template in pod_templates(manifest)
    }
    assert None not in roles
    named = str(policies)
    assert [role for role in roles if f"'{role}'" not in named] == []


def test_budgets_select_pods_there_are(manifests: list[dict[str, Any]]) -> None:
    labels = [template["metadata"]["labels"] for one in manifests for _, template in pod_templates(one)]
    budgets = of_kind(manifests, "PodDisruptionBudget")
    assert len(budgets) == 3
    for budget in budgets:
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= given.items() for given in labels), budget["metadata"]["name"]


def test_everything_is_in_the_namespace(manifests: list[dict[str, Any]]) -> None:
    for one in manifests:
        if one["kind"] != "Namespace":
            assert one["metadata"]["namespace"] == "medusa", one["metadata"]["name"]
