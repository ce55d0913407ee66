"""The Kubernetes API from inside a pod: five verbs on named objects, a Lease, and runs of a RayJob.

The kubernetes client would be 30 MB of generated code for this. Address, token and certificate are those that every
pod's ServiceAccount gets.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from medusa.config import ConfigError
from registry.lease import Holder, TryAgain

logger = logging.getLogger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 15.0
HOLDER_ANNOTATION = "medusa/holder"
PIPELINE_LABEL, STARTED_BY_LABEL = "medusa/pipeline", "medusa/started-by"
_EXIT_CODE = re.compile(r"exit code (\d+)")
_ENDED = {"Complete", "Failed"}


class KubernetesUnavailable(TryAgain):
    """The API server cannot be reached, or answers with an error of its own."""


class Conflict(TryAgain):
    """The object has changed since it was read, or is there already."""


class KubernetesError(RuntimeError):
    """The API server refuses: no such object, no permission, an object that is not valid."""


@dataclass(frozen=True)
class Kubernetes:
    """`url` of the API server; `token` is read anew for each request, as it is replaced every hour."""

    url: str
    namespace: str
    token: Callable[[], str]
    certificate: str | bool = True

    @classmethod
    def in_cluster(cls) -> Kubernetes:
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if host is None or not ACCOUNT.is_dir():
            raise ConfigError(
                "this is no pod of a Kubernetes cluster (no KUBERNETES_SERVICE_HOST or ServiceAccount); run it there, "
                "as k8s/base does, or act on a Serve that can be reached: --service http://HOST:8265"
            )
        host = f"[{host}]" if ":" in host else host
        namespace = (ACCOUNT / "namespace").read_text().strip()
        return cls(f"https://{host}:{port}", namespace, (ACCOUNT / "token").read_text, str(ACCOUNT / "ca.crt"))

    def get(self, api: str, plural: str, name: str) -> dict[str, Any] | None:
        return self._ask("GET", api, plural, name, absent_is_none=True)

    def list(self, api: str, plural: str, labels: str) -> list[dict[str, Any]]:
        answer = self._ask("GET", api, plural, params={"labelSelector": labels})
        return list((answer or {}).get("items", []))

    def create(self, api: str, plural: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Conflict where one of this name is there."""
        return self._ask("POST", api, plural, content=content) or {}

    def replace(self, api: str, plural: str, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Conflict unless `content` carries the resourceVersion that the object has."""
        return self._ask("PUT", api, plural, name, content=content) or {}

    def patch(self, api: str, plural: str, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """A merge patch; with a resourceVersion in it, Conflict where the object has another."""
        return self._ask("PATCH", api, plural, name, content=content) or {}

    def _ask(
        self,
        verb: str,
        api: str,
        plural: str,
        name: str = "",
        *,
        content: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        absent_is_none: bool = False,
    ) -> dict[str, Any] | None:
        path = f"/apis/{api}/namespaces/{self.namespace}/{plural}{'/' if name else ''}{name}"
        headers = {"Authorization": f"Bearer {self.token().strip()}"}
        if verb == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        elif content is not None:
            headers["Content-Type"] = "application/json"
        try:
            answer = requests.request(
                verb,
                self.url + path,
                params=params,
                data=None if content is None else json.dumps(content),
                headers=headers,
                timeout=TIMEOUT_S,
                verify=self.certificate,
            )
        except requests.RequestException as error:
            raise KubernetesUnavailable(f"{verb} {path}: the API server cannot be reached: {error}") from error
        if answer.status_code == 404 and absent_is_none:
            return None
        if answer.ok:
            return answer.json()
        message = f"{verb} {path}: {answer.status_code} {_message(answer)}"
        if answer.status_code == 409:
            raise Conflict(message)
        if answer.status_code in (429,) or answer.status_code >= 500:
            raise KubernetesUnavailable(message)
        raise KubernetesError(message)


def _message(answer: requests.Response) -> str:
    try:
        return str(answer.json().get("message", answer.reason))
    except ValueError:
        return answer.reason


class KubernetesRecord:
    """A holder kept in a Lease object; its version is the resourceVersion."""

    def __init__(self, kubernetes: Kubernetes, name: str) -> None:
        self.where = f"lease {name} in namespace {kubernetes.namespace}"
        self._kubernetes, self._name = kubernetes, name

    def locked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self) -> tuple[Holder | None, Any]:
        found = self._kubernetes.get(*_LEASES, self._name)
        if found is None:
            return None, None
        text = found["metadata"].get("annotations", {}).get(HOLDER_ANNOTATION)
        return (Holder(**json.loads(text)) if text else None), found["metadata"]["resourceVersion"]

    def swap(self, holder: Holder, version: Any) -> bool:
        content = self._lease(holder, version)
        try:
            if version is None:
                self._kubernetes.create(*_LEASES, content)
            else:
                self._kubernetes.replace(*_LEASES, self._name, content)
        except Conflict:
            return False
        return True

    def clear(self, version: Any) -> None:
        self.swap(Holder("nobody", None, 0, 0.0), version)

    def _lease(self, holder: Holder, version: Any) -> dict[str, Any]:
        """The annotation is what counts; the fields of the spec are for `kubectl get lease`."""
        left_s = max(1, round(holder.expires - time.time()))
        metadata: dict[str, Any] = {"name": self._name, "annotations": {HOLDER_ANNOTATION: json.dumps(asdict(holder))}}
        if version is not None:
            metadata["resourceVersion"] = version
        return {
            "apiVersion": _LEASES[0],
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": holder.owner,
                "leaseDurationSeconds": left_s,
                "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }


_LEASES = ("coordination.k8s.io/v1", "leases")
_RAY_JOBS = ("ray.io/v1", "rayjobs")


class RunActiveError(TryAgain):
    """Another run of this pipeline is under way."""


def submit_run(
    kubernetes: Kubernetes,
    template: str,
    started_by: str,
    *,
    poll_s: float = 10.0,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Makes a RayJob of the suspended one named `template`, waits for its end, and returns the command's exit code.

    A run that `started_by` has under way already is waited for, not started again: so whoever replaces a lost pod goes
    on where it was. RunActiveError while a run of somebody else is under way.
    """
    name = _active_run(kubernetes, template, started_by) or _start(kubernetes, template, started_by, now())
    last = None
    while True:
        job = kubernetes.get(*_RAY_JOBS, name)
        if job is None:
            raise KubernetesError(f"RayJob {name} was deleted while it ran")
        status = job.get("status", {})
        stage = status.get("jobDeploymentStatus") or "Initializing"
        if stage != last:
            logger.warning("%s: %s %s", name, stage, status.get("jobStatus") or "")
            last = stage
        if stage in _ENDED:
            return _exit_code(name, status)
        sleep(poll_s)


def _active_run(kubernetes: Kubernetes, template: str, started_by: str) -> str | None:
    for job in kubernetes.list(*_RAY_JOBS, f"{PIPELINE_LABEL}={template}"):
        if job.get("status", {}).get("jobDeploymentStatus") in _ENDED:
            continue
        name, owner = job["metadata"]["name"], job["metadata"]["labels"].get(STARTED_BY_LABEL)
        if owner == started_by:
            return name
        raise RunActiveError(f"RayJob {name}, started by {owner}, is under way; try again when it has ended")
    return None


def _start(kubernetes: Kubernetes, template: str, started_by: str, now: float) -> str:
    found = kubernetes.get(*_RAY_JOBS, template)
    if found is None:
        raise ConfigError(f"there is no RayJob {template} in namespace {kubernetes.namespace} to start a run from")
    if found["spec"].get("suspend") is not True:
        raise ConfigError(f"RayJob {template} is no template: its spec.suspend is not true")
    name = f"{template}-{int(now)}"
    labels = found["metadata"].get("labels", {}) | {PIPELINE_LABEL: template, STARTED_BY_LABEL: started_by}
    kubernetes.create(
        *_RAY_JOBS,
        {
            "apiVersion": _RAY_JOBS[0],
            "kind": "RayJob",
            "metadata": {"name": name, "labels": labels},
            "spec": found["spec"] | {"suspend": False},
        },
    )
    return name


def _exit_code(name: str, status: Mapping[str, Any]) -> int:
    """Ray's message names the command's exit code. Without one the command never began or was killed: failed."""
    message = str(status.get("message") or "")
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    found = _EXIT_CODE.search(message)
    logger.error("%s: %s %s %s", name, status.get("jobStatus"), status.get("reason") or "", message)
    return int(found[1]) if found else 1
