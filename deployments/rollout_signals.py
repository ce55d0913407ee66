"""How well a service does: errors among its requests, and tokens a step, from what its replicas count.

Read from the service's own /metrics (each answer is one replica's, so it is asked several times) or from Prometheus,
which sees all replicas. Counters only grow while a replica lives: what happened since a reading is the difference, and
all of the count for a replica that was not there then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import requests

from deployments.rollout_target import ServiceUnavailable
from medusa.config import ConfigError

TIMEOUT_S = 15.0
_SAMPLE = re.compile(r"^(?P<name>medusa_\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ANSWERED, _REFUSED = "medusa_request_success_total", "medusa_requests_refused_total"
_DRAFTS, _ACCEPTED = "medusa_spec_decode_num_drafts_total", "medusa_spec_decode_num_accepted_tokens_total"


@dataclass(frozen=True)
class Counts:
    """What one replica has counted, or several together. `errors` are answers of 5xx."""

    answered: float = 0.0
    errors: float = 0.0
    drafts: float = 0.0
    accepted: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def since(self, before: Counts) -> Counts:
        """A smaller number than before means that the replica has begun anew."""
        if any(getattr(self, f.name) < getattr(before, f.name) for f in fields(self)):
            return self
        return Counts(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    @property
    def requests(self) -> float:
        return self.answered + self.errors

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def tokens_per_step(self) -> float | None:
        """None where nothing was drafted."""
        return 1 + self.accepted / self.drafts if self.drafts else None

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


Reading = Mapping[str, Counts]  # by replica


class Signals(Protocol):
    def read(self) -> Reading:
        """ServiceUnavailable where nobody answers."""
        ...


def total(reading: Reading) -> Counts:
    return sum(reading.values(), Counts())


def since(now: Reading, before: Reading) -> Counts:
    return total({replica: counts.since(before.get(replica, Counts())) for replica, counts in now.items()})


class ServiceMetrics:
    """The service's /metrics, asked until `answers` answers in a row brought no new replica."""

    def __init__(self, url: str, answers: int = 6) -> None:
        self._url, self._answers = f"{url.rstrip('/')}/metrics", answers

    def read(self) -> Reading:
        found: dict[str, Counts] = {}
        known = 0
        while known < self._answers:
            replica, counts = _parse(_get(self._url).text)
            known = known + 1 if replica in found else 0
            found[replica] = counts
        return found


class Prometheus:
    """Ray's agents export what the replicas count as ray_medusa_*; a replica is Serve's label `replica`."""

    def __init__(self, url: str) -> None:
        self._url = f"{url.rstrip('/')}/api/v1/query"

    def read(self) -> Reading:
        series = {
            "answered": f"sum by (replica) (ray_{_ANSWERED})",
            "errors": f'sum by (replica) (ray_{_REFUSED}{{status=~"5.."}})',
            "drafts": f"sum by (replica) (ray_{_DRAFTS})",
            "accepted": f"sum by (replica) (ray_{_ACCEPTED})",
        }
        found: dict[str, dict[str, float]] = {}
        for name, query in series.items():
            for sample in _get(self._url, {"query": query}).json()["data"]["result"]:
                found.setdefault(sample["metric"].get("replica", ""), {})[name] = float(sample["value"][1])
        return {replica: Counts(**values) for replica, values in found.items()}


def _parse(text: str) -> tuple[str, Counts]:
    replica, values = "", {"answered": 0.0, "errors": 0.0, "drafts": 0.0, "accepted": 0.0}
    for sample in _SAMPLE.finditer(text):
        labels: dict[str, Any] = dict(_LABEL.findall(sample["labels"]))
        replica = labels.get("replica", replica)
        name, value = sample["name"], float(sample["value"])
        if name == _ANSWERED:
            values["answered"] += value
        elif name == _REFUSED and labels.get("status", "").startswith("5"):
            values["errors"] += value
        elif name == _DRAFTS:
            values["drafts"] += value
        elif name == _ACCEPTED:
            values["accepted"] += value
    return replica, Counts(**values)


def _get(url: str, params: Mapping[str, str] | None = None) -> requests.Response:
    try:
        answer = requests.get(url, params=params, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise ServiceUnavailable(f"GET {url}: no answer ({error})") from error
    if answer.status_code == 404:
        raise ConfigError(
            f"GET {url}: 404; there is nothing there to judge by (--url is the service's, --prometheus its)"
        )
    if not answer.ok:
        raise ServiceUnavailable(f"GET {url}: {answer.status_code}")
    return answer
