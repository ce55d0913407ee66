"""Errors and tokens a step, from what replicas count: several replicas, replicas that begin anew, Prometheus."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from deployments import rollout_signals
from deployments.rollout_signals import Counts, Prometheus, ServiceMetrics, since, total
from deployments.rollout_target import ServiceUnavailable
from medusa.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def exposition(replica: str, answered: int, errors: int, drafts: int, accepted: int) -> str:
    labels = f'model_name="tiny \\"x\\"",replica="{replica}"'
    return f"""# HELP medusa_request_success_total Replies that ended, by reason.
# TYPE medusa_request_success_total counter
medusa_request_success_total{{finished_reason="stop",{labels}}} {answered - 1}.0
medusa_request_success_total{{finished_reason="length",{labels}}} 1.0
medusa_request_success_created{{finished_reason="stop",{labels}}} 1.7e+09
medusa_requests_refused_total{{{labels},status="429"}} 99.0
medusa_requests_refused_total{{{labels},status="500"}} {errors}.0
medusa_spec_decode_num_drafts_total{{{labels}}} {drafts}.0
medusa_spec_decode_num_accepted_tokens_total{{{labels}}} {accepted}.0
medusa_spec_decode_num_accepted_tokens_per_pos_total{{position="0",{labels}}} 5.0
"""


@pytest.fixture
def serve_texts(serve_live: Callable[[FastAPI], str]) -> Callable[[Iterator[Any]], str]:
    def serve(answers: Iterator[Any]) -> str:
        api = FastAPI()

        @api.get("/metrics")
        def metrics() -> Response:
            answer = next(answers)
            return answer if isinstance(answer, Response) else PlainTextResponse(answer)

        return serve_live(api)

    return serve


def test_all_replicas_behind_one_address_are_read(serve_texts):
    texts = [exposition("a", 10, 1, 100, 150), exposition("b", 20, 3, 200, 100)]
    reading = ServiceMetrics(serve_texts(itertools.cycle(texts))).read()
    assert reading == {"a": Counts(10, 1, 100, 150), "b": Counts(20, 3, 200, 100)}
    both = total(reading)
    assert both.requests == 34 and both.error_rate == 4 / 34  # 429 is the service at its limit, not an error
    assert both.tokens_per_step == 1 + 250 / 300


def test_what_happened_since_is_counted_by_replica():
    before = {"a": Counts(10, 0, 100, 100), "gone": Counts(5, 5, 5, 5), "restarted": Counts(50, 0, 500, 500)}
    now = {"a": Counts(30, 2, 300, 200), "new": Counts(4, 0, 40, 20), "restarted": Counts(7, 1, 70, 0)}
    assert since(now, before) == Counts(20 + 4 + 7, 2 + 0 + 1, 200 + 40 + 70, 100 + 20 + 0)


def test_without_drafts_nothing_is_said_about_them():
    assert Counts(10, 0, 0, 0).tokens_per_step is None
    assert Counts().error_rate == 0.0


@pytest.mark.parametrize(("status", "error"), [(404, ConfigError), (503, ServiceUnavailable)])
def test_a_wrong_address_and_a_sick_service_are_told_apart(serve_texts, status: int, error: type[Exception]):
    with pytest.raises(error, match=str(status)):
        ServiceMetrics(serve_texts(itertools.repeat(Response(status_code=status)))).read()


def test_nobody_there_is_no_answer():
    with pytest.raises(ServiceUnavailable, match="no answer"):
        ServiceMetrics("http://127.0.0.1:9").read()


def test_prometheus_sees_all_replicas(serve_live: Callable[[FastAPI], str]):
    api, asked = FastAPI(), []
    values = {"success": 10, "refused": 2, "drafts": 100, "accepted": 50}

    @api.get("/api/v1/query")
    def query(request: Request) -> Response:
        asked.append(request.query_params["query"])
        (name,) = [name for name in values if name in asked[-1]]
        results = [{"metric": {"replica": r}, "value": [0, str(values[name] * k)]} for k, r in ((1, "a"), (2, "b"))]
        if name == "refused":
            results = results[:1]  # a counter that a replica never raised is absent
        return Response(json.dumps({"data": {"result": results}}), media_type="application/json")

    reading = Prometheus(serve_live(api)).read()
    assert reading == {"a": Counts(10, 2, 100, 50), "b": Counts(20, 0, 200, 100)}
    assert all("by (replica)" in query and "ray_medusa_" in query for query in asked)


def test_the_service_counts_under_these_names():
    text = (ROOT / "deployments" / "metrics.py").read_text()
    names = [value for name, value in vars(rollout_signals).items() if name.startswith("_") and isinstance(value, str)]
    stems = [name.removeprefix("medusa_").removesuffix("_total") for name in names if name.startswith("medusa_")]
    assert len(stems) == 4
    assert [stem for stem in stems if f'"{stem}"' not in text] == []
