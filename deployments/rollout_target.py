"""The running service that a rollout changes: a Serve that answers its REST API, or a RayService in Kubernetes.

Both are one Serve configuration (serve.yaml's shape): which heads it names, and how to name others in it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import requests
import yaml

from deployments.kubernetes import Kubernetes
from medusa.config import ConfigError
from registry.lease import TryAgain

APPLICATION, DEPLOYMENT = "medusa", "MedusaServer"
TIMEOUT_S = 15.0
_FIELDS = ("heads", "heads_version", "heads_digest")
State = Literal["ready", "changing", "failed"]


class ServiceUnavailable(TryAgain):
    """The service, or what controls it, cannot be reached."""


@dataclass(frozen=True)
class Heads:
    """What the service is told to serve; all None: plain decoding."""

    folder: str | None = None
    version: str | None = None
    digest: str | None = None

    def to_config(self) -> dict[str, str | None]:
        return dict(zip(_FIELDS, (self.folder, self.version, self.digest), strict=True))


@dataclass(frozen=True)
class Observed:
    """What replicas answer: `digests` of the heads seen in several answers, and the backbone's."""

    digests: frozenset[str | None]
    backbone_digest: str | None


class Target(Protocol):
    name: str  # in tags and messages

    def config(self) -> dict[str, Any]:
        """The Serve configuration as asked for now."""
        ...

    def deploy(self, config: Mapping[str, Any]) -> None: ...

    def state(self) -> tuple[State, str]:
        """Whether what was asked for is there, and what is said about it."""
        ...


def heads_of(config: Mapping[str, Any]) -> Heads:
    """The heads that a Serve configuration names: the deployment's user_config where there is one, else the args."""
    application = _application(config)
    found = _user_config(application) or application.get("args", {})
    return Heads(*(found.get(name) for name in _FIELDS))


def model_of(config: Mapping[str, Any]) -> str:
    return str(_application(config).get("args", {}).get("model"))


def with_heads(
    config: Mapping[str, Any],
    heads: Heads,
    *,
    in_place: bool,
    model: str | None = None,
    backbone_digest: str | None = None,
) -> dict[str, Any]:
    """The configuration with other heads. In place: by user_config, which running replicas take. Otherwise by the args,
    whose change makes Serve replace the replicas one after another; then `model` may be another folder, and where the
    args pin the backbone's digest it becomes `backbone_digest`, or is pinned no longer."""
    changed = copy.deepcopy(dict(config))
    application = _application(changed)
    others = [one for one in application.get("deployments", []) if one["name"] != DEPLOYMENT]
    ours = next((one for one in application.get("deployments", []) if one["name"] == DEPLOYMENT), {"name": DEPLOYMENT})
    if in_place:
        ours["user_config"] = heads.to_config()
    else:
        ours.pop("user_config", None)
        application["args"] = application.get("args", {}) | heads.to_config()
        if model is not None:
            application["args"]["model"] = model
        if application["args"].pop("backbone_digest", None) is not None and backbone_digest is not None:
            application["args"]["backbone_digest"] = backbone_digest
    deployments = [*others, ours] if len(ours) > 1 else others
    application["deployments"] = deployments
    return changed


def observe(url: str, answers: int = 8) -> Observed:
    """What /version says, asked several times as each answer is one replica's. ServiceUnavailable where none comes."""
    digests: set[str | None] = set()
    backbone = None
    for _ in range(answers):
        found = _get(f"{url.rstrip('/')}/version")
        digests.add(found.get("heads_digest"))
        backbone = found.get("backbone_digest")
    return Observed(frozenset(digests), backbone)


class ServeTarget:
    """A Serve whose REST API is at `address` (http://HOST:8265), deployed from a configuration."""

    def __init__(self, address: str, token: str | None = None) -> None:
        parts = urlsplit(address)
        self.name = f"serve-{parts.hostname}-{parts.port or 80}"
        self._url = f"{address.rstrip('/')}/api/serve/applications/"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def config(self) -> dict[str, Any]:
        details = self._details()
        deployed = [one.get("deployed_app_config") for one in details.get("applications", {}).values()]
        if None in deployed or not deployed:
            raise ConfigError(
                f"{self.name} serves nothing that was deployed from a configuration; start the service with "
                "`serve deploy deployments/serve.yaml`"
            )
        kept = {name: details[name] for name in ("proxy_location", "http_options") if details.get(name)}
        return kept | {"applications": deployed}

    def deploy(self, config: Mapping[str, Any]) -> None:
        answer = _request("PUT", self._url, json=dict(config), headers=self._headers)
        if answer.status_code == 400:
            raise ConfigError(f"{self.name} refuses the configuration: {answer.text[:500]}")
        _require_ok(answer)

    def state(self) -> tuple[State, str]:
        application = self._details().get("applications", {}).get(APPLICATION)
        if application is None:
            return "changing", "the application is not there yet"
        deployment = application.get("deployments", {}).get(DEPLOYMENT, {})
        return _state(application["status"], deployment.get("status"), application.get("message", ""))

    def _details(self) -> dict[str, Any]:
        return _get(self._url, headers=self._headers)


class RayServiceTarget:
    """A RayService: its serveConfigV2 is patched, and KubeRay brings it to the cluster."""

    def __init__(self, kubernetes: Kubernetes, service: str) -> None:
        self.name = f"rayservice-{service}"
        self._kubernetes, self._service = kubernetes, service

    def config(self) -> dict[str, Any]:
        return yaml.safe_load(self._read()["spec"]["serveConfigV2"])

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Conflict where somebody else has changed the RayService in this moment."""
        version = self._read()["metadata"]["resourceVersion"]
        text = yaml.safe_dump(dict(config), sort_keys=False)
        content = {"metadata": {"resourceVersion": version}, "spec": {"serveConfigV2": text}}
        self._kubernetes.patch("ray.io/v1", "rayservices", self._service, content)

    def state(self) -> tuple[State, str]:
        found = self._read()
        status = found.get("status", {})
        if status.get("observedGeneration") != found["metadata"].get("generation"):
            return "changing", "KubeRay has not looked at it yet"
        applications = status.get("activeServiceStatus", {}).get("applicationStatuses", {})
        if APPLICATION not in applications:
            return "changing", "the application is not there yet"
        application = applications[APPLICATION]
        deployment = application.get("serveDeploymentStatuses", {}).get(DEPLOYMENT, {})
        return _state(application.get("status", ""), deployment.get("status"), application.get("message", ""))

    def _read(self) -> dict[str, Any]:
        found = self._kubernetes.get("ray.io/v1", "rayservices", self._service)
        if found is None:
            raise ConfigError(f"there is no RayService {self._service} in namespace {self._kubernetes.namespace}")
        return found


def _state(application: str, deployment: str | None, message: str) -> tuple[State, str]:
    said = f"application {application}, deployment {deployment}{': ' if message else ''}{message}"
    if application == "RUNNING" and deployment == "HEALTHY":
        return "ready", said
    if application == "DEPLOY_FAILED" or deployment == "DEPLOY_FAILED":
        return "failed", said
    return "changing", said


def _application(config: Mapping[str, Any]) -> dict[str, Any]:
    for application in config.get("applications", []):
        if application.get("name") == APPLICATION:
            return application
    raise ConfigError(f"the Serve configuration has no application named {APPLICATION}")


def _user_config(application: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for deployment in application.get("deployments", []):
        if deployment["name"] == DEPLOYMENT:
            return deployment.get("user_config")
    return None


def _get(url: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    answer = _request("GET", url, headers=headers)
    _require_ok(answer)
    return answer.json()


def _request(verb: str, url: str, **more: Any) -> requests.Response:
    try:
        return requests.request(verb, url, timeout=TIMEOUT_S, **more)
    except requests.RequestException as error:
        raise ServiceUnavailable(f"{verb} {url}: no answer ({error})") from error


def _require_ok(answer: requests.Response) -> None:
    if answer.status_code == 401:
        raise ConfigError(f"{answer.url} asks for a token: set RAY_AUTH_TOKEN")
    if not answer.ok:
        raise ServiceUnavailable(f"{answer.url}: {answer.status_code} {answer.text[:200]}")
