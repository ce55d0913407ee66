"""The service on Ray Serve: configuration, then a real deployment of the tiny model."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import ray
import yaml
from fastapi.testclient import TestClient
from safetensors import SafetensorError

from deployments import local
from deployments.autoscaling import LoadPolicy
from deployments.config import ServerConfig
from deployments.loading import load_service
from deployments.open_streams import EngineUnavailable
from deployments.server import MedusaServer, build_app
from medusa import Engine, SamplingParams
from medusa.checkpoint import CheckpointMismatchError
from medusa.config import ConfigError, load_config, to_dict, validate
from medusa.digests import directory_digest
from tests.deployments.replicas import replica_pids

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def options_of(app):
    return app._bound_deployment


# Configuration, without a cluster


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "model: required but absent"),
        ({"model": "m", "max_batchsize": 4}, "did you mean max_batch_size?"),
        ({"model": "m", "speculation": False}, "write it in quotes"),
        ({"model": "m", "speculation": "on"}, "speculation"),
        ({"model": "m", "heads": "models:/medusa-m@champion"}, "resolve it to a folder first"),
        ({"model": "models:/medusa-m@champion"}, "resolve it to a folder first"),
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, "got 3 and 2"),
        ({"model": "m", "max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"model": "m", "dtype": "int8"}, "dtype"),
        ({"model": "m", "tensor_parallel": 0}, "from 1 on, got 0"),
        ({"model": "m", "tensor_parallel": 2, "quantization": "int8"}, "do not go together"),
        ({"model": "m", "device": "cuda", "tensor_parallel": 2, "num_gpus": 1}, "needs num_gpus=2"),
        ({"model": "m", "acceptance": {"epsilon": 2.0}}, "epsilon"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(args, words):
    with pytest.raises(ConfigError, match="args: ") as refusal:
        build_app(args)
    assert words in str(refusal.value)


def test_a_config_survives_its_way_to_a_replica(tmp_path):
    config = ServerConfig(model="m", speculation=8, acceptance="exact", max_queued_requests=3)
    (tmp_path / "server.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(ServerConfig, tmp_path / "server.yaml") == config


def test_the_deployment_follows_the_config():
    fixed = options_of(build_app({"model": "m", "device": "cuda", "min_replicas": 2, "max_replicas": 2}))
    assert fixed.num_replicas == 2
    assert fixed.ray_actor_options["num_gpus"] == 1
    assert fixed.max_ongoing_requests > 16 + 256  # the replica refuses, not the proxy
    for args in ({"device": "cuda"}, {"device": "cuda", "num_gpus": 2}, {"num_gpus": 2}):
        assert options_of(build_app({"model": "m", "tensor_parallel": 2, **args})).ray_actor_options["num_gpus"] == 2
    on_cpus = options_of(build_app({"model": "m", "device": "cpu", "tensor_parallel": 2}))
    assert on_cpus.ray_actor_options["num_gpus"] == 0
    scaled = options_of(build_app({"model": "m", "device": "cpu", "max_replicas": 4, "max_batch_size": 8}))
    assert scaled.ray_actor_options["num_gpus"] == 0
    scaling = scaled._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 6.0)
    assert scaling.policy.policy_function == "deployments.autoscaling:LoadPolicy"
    assert scaling.policy.policy_kwargs["replies"] == 6.0
    LoadPolicy(**scaling.policy.policy_kwargs)
    assert fixed._deployment_config.user_config == {"heads": None, "heads_version": None, "heads_digest": None}


def test_serve_yaml_is_what_serve_and_the_server_take():
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    text = yaml.safe_load((ROOT / "deployments" / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(text)
    # The schema lets unknown keys pass; a typo must not.
    assert set(text) <= set(ServeDeploySchema.model_fields)
    (application,) = text["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    assert application["import_path"] == "deployments.server:build_app"
    assert text["logging_config"]["enable_access_log"] is False
    build_app(application["args"])
    names = {field.name for field in dataclasses.fields(ServerConfig)}
    commented = re.findall(r"^      # ([a-z_]+): ", (ROOT / "deployments" / "serve.yaml").read_text(), re.MULTILINE)
    assert commented and set(commented) <= names


def test_heads_of_another_digest_are_not_served(tiny_llama, tiny_heads):
    config = ServerConfig(model=str(tiny_llama), heads=str(tiny_heads), heads_digest="0" * 64)
    with pytest.raises(CheckpointMismatchError, match=f"{directory_digest(tiny_heads)}.*{'0' * 64}"):
        load_service(config)


def test_a_quantised_service_says_that_it_is(tiny_llama, tiny_heads):
    config = validate(
        ServerConfig,
        {"model": str(tiny_llama), "heads": str(tiny_heads), "speculation": "off", "quantization": "int8"},
        source="test",
    )
    service = load_service(config)
    try:
        with TestClient(service.api) as client:
            assert client.get("/version").json()["quantization"] == "int8"
            body = {"model": config.served_name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
            reply = client.post("/v1/chat/completions", json=body).json()
        assert service.engine._engine.backbone.quantization == "int8"
        assert re.fullmatch("medusa-[0-9a-f]{12}-int8", reply["system_fingerprint"])
    finally:
        service.engine.close()


def test_an_unknown_quantisation_is_refused_with_what_is_allowed():
    with pytest.raises(ConfigError, match=r"quantization.*int8.*fp8"):
        validate(ServerConfig, {"model": "m", "quantization": "int4"}, source="test")


def test_a_backbone_of_another_digest_is_not_served(tiny_llama):
    config = ServerConfig(model=str(tiny_llama), backbone_digest="sha256:00", max_batch_size=1)
    with pytest.raises(CheckpointMismatchError, match="but sha256:00 was to be served"):
        load_service(config)


def test_a_damaged_backbone_is_not_served(tiny_llama, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_llama, folder)
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises((OSError, ValueError, SafetensorError)):
        load_service(ServerConfig(model=str(folder), max_batch_size=1))


@pytest.mark.usefixtures("logs_as_before")
async def test_a_replica_is_as_healthy_as_its_engine(tiny_llama, monkeypatch):
    written = MedusaServer.func_or_class.__mro__[1]  # what Serve wraps
    replica = written({"model": str(tiny_llama), "max_batch_size": 1})
    with pytest.raises(EngineUnavailable, match="nothing is loaded"):
        await replica.check_health()
    monkeypatch.setattr("deployments.server._replica_name", lambda: "r1")
    await replica.reconfigure({})
    await replica.check_health()
    engine = replica._service.engine

    def broken():
        raise RuntimeError("CUDA error")

    engine._engine.step = broken
    with pytest.raises(EngineUnavailable):
        async for _ in engine.generate("x", SamplingParams()):
            pass
    with pytest.raises(EngineUnavailable):
        await replica.check_health()
    replica.__del__()
    assert not engine._thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_service_and_its_handlers(monkeypatch, number):
    steps = []

    @contextmanager
    def service(config):
        steps.append("started")
        yield "http://here"
        steps.append("stopped")

    def ready(url):
        steps.append(url)
        signal.raise_signal(number)

    monkeypatch.setattr(local, "local_service", service)
    before = signal.getsignal(number)
    local.serve_local(ServerConfig(model="m"), on_ready=ready)
    assert steps == ["started", "http://here", "stopped"]
    assert signal.getsignal(number) is before


@pytest.mark.ray
def test_a_port_in_use_is_named_before_anything_is_loaded(ray_cluster):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            with local.local_service(ServerConfig(model="m", port=port)):
                pass


def test_without_ray_a_signal_ends_the_process_cleanly(tiny_llama):
    port = free_port()
    code = (
        "from deployments.config import ServerConfig\n"
        "from deployments.one_process import serve_without_ray\n"
        f"serve_without_ray(ServerConfig(model={str(tiny_llama)!r}, port={port}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}"), 60)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()


# On Ray Serve


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url):
    try:
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=10)
    except httpx.HTTPError:
        return False
    return response.status_code == 200


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def url(ray_cluster, tiny_llama, tiny_heads):
    config = ServerConfig(
        model=str(tiny_llama),
        heads=str(tiny_heads),
        heads_version="7",
        heads_digest=directory_digest(tiny_heads),
        model_name="tiny",
        speculation=6,
        max_batch_size=4,
        max_queued_requests=4,
        port=free_port(),
        num_cpus=0.5,
        health_check_period_s=0.5,
        graceful_shutdown_timeout_s=5,
        max_body_bytes=100_000,
    )
    with local.local_service(config) as url:
        yield url


@pytest.fixture(scope="module")
def plain(tiny_llama):
    return Engine.from_pretrained(tiny_llama, max_batch_size=4)


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def engine_stats(url):
    return httpx.get(f"{url}/health").json()["engine"]


@pytest.mark.ray
def test_the_openai_client_gets_what_the_engine_generates(client, plain):
    (expected,) = plain.generate(
        [plain.tokenizer.encode_chat(MESSAGES)], SamplingParams(max_tokens=40, temperature=0.0)
    )
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    chat = client.chat.completions.create(**asked)
    assert chat.choices[0].message.content == expected.text
    assert chat.usage.completion_tokens == len(expected.token_ids)
    assert chat.usage.medusa["mean_acceptance_length"] >= 1
    assert re.fullmatch("medusa-[0-9a-f]{12}", chat.system_fingerprint)

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[-1].usage == chat.usage

    (expected,) = plain.generate(["def fib"], SamplingParams(max_tokens=24, temperature=0.7, seed=11))
    asked = {"model": "tiny", "prompt": "def fib", "max_tokens": 24, "temperature": 0.7, "seed": 11}
    assert client.completions.create(**asked).choices[0].text == expected.text
    assert "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True)) == expected.text


@pytest.mark.ray
def test_models_version_and_health(client, url, tiny_heads):
    assert [model.id for model in client.models.list()] == ["tiny"]
    version = httpx.get(f"{url}/version").json()
    assert version["heads_version"] == "7"
    assert version["heads_digest"] == directory_digest(tiny_heads)
    health = httpx.get(f"{url}/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"


@pytest.mark.ray
def test_ray_exports_the_metrics_of_every_replica(client, url):
    client.completions.create(model="tiny", prompt="x", max_tokens=3)
    node = ray.nodes()[0]
    exported = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def tokens():
        lines = httpx.get(exported, timeout=10).text.splitlines()
        return [line for line in lines if line.startswith("ray_medusa_generation_tokens_total{")]

    wait_until(tokens, 60)
    (line,) = tokens()
    assert 'model_name="tiny"' in line and 'deployment="MedusaServer"' in line and "replica=" in line
    assert float(line.rpartition(" ")[2]) >= 3
    scraped = httpx.get(f"{url}/metrics").text
    replica = re.search(r'replica="(\w+)"', scraped)[1]
    assert replica in line


@pytest.mark.ray
def test_errors_keep_their_shape_behind_the_proxy(client, url):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.body["type"] == "NotFoundError"
    for response, status in (
        (httpx.get(f"{url}/nowhere"), 404),
        (httpx.get(f"{url}/v1/completions"), 405),
        (httpx.post(f"{url}/v1/completions", content=b"{"), 400),
        (httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 5000}), 400),
        (httpx.post(f"{url}/v1/completions", content=b"x" * 200_000), 413),
        (httpx.post(f"{url}/v1/completions", content=iter([b"x" * 50_000] * 4)), 413),
    ):
        assert response.status_code == status, response.text
        assert response.json()["error"]["code"] == status


@pytest.mark.ray
def test_one_request_id_comes_back(url):
    response = httpx.get(f"{url}/v1/models", headers={"X-Request-ID": "abc"})
    assert response.headers.get_list("x-request-id") == ["abc"]
    body = {"prompt": "x", "max_tokens": 1}
    response = httpx.post(f"{url}/v1/completions", json=body)
    assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"


@pytest.mark.ray
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_sequences(url, stream):
    body = {"prompt": "x", "n": 4, "max_tokens": 500, "ignore_eos": True, "stream": stream}
    before = engine_stats(url)["decode_tokens"]
    if stream:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)
    wait_until(lambda: (stats := engine_stats(url))["running"] == stats["waiting"] == stats["pages_used"] == 0)
    assert engine_stats(url)["decode_tokens"] - before < 4 * 490  # it did not run to its end


@pytest.mark.ray
def test_overload_is_refused_with_a_time_to_come_back_and_the_rest_served(url):
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
    with ThreadPoolExecutor(24) as pool:
        responses = list(pool.map(lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=60), range(24)))
    refused = [response for response in responses if response.status_code != 200]
    assert 0 < len(refused) <= 24 - 8  # four are decoded at once, four more wait
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "RateLimitError"


@pytest.mark.ray
def test_a_killed_replica_breaks_its_streams_and_is_replaced(url):
    body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True, "temperature": 0}
    lines = []
    with pytest.raises(httpx.HTTPError):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            for line in response.iter_lines():
                if not lines:
                    (pid,) = replica_pids()
                    os.kill(pid, signal.SIGKILL)
                lines.append(line)
            raise httpx.ReadError("the proxy ended the stream without an error")
    assert "data: [DONE]" not in lines
    wait_until(lambda: answers(url), 90)


@pytest.mark.slow
def test_a_service_of_two_processes_is_sick_when_one_dies(tiny_llama):
    """And ends both when it is closed."""
    arguments = {"device": "cpu", "speculation": "off"}
    services = [
        load_service(ServerConfig(model=str(tiny_llama), tensor_parallel=count, **arguments)) for count in (1, 2)
    ]
    body = {"model": tiny_llama.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "seed": 4}
    with TestClient(services[0].api) as alone, TestClient(services[1].api) as client:
        replies = [c.post("/v1/chat/completions", json=body).json()["choices"] for c in (alone, client)]
        assert replies[0] == replies[1]
        (pid,) = services[1].engine._engine.backbone.followers.pids
        os.kill(pid, signal.SIGKILL)
        assert client.post("/v1/chat/completions", json=body).status_code == 503
        assert client.get("/health").status_code == 503
        assert alone.get("/health").status_code == 200
    for service in services:
        service.close()


def test_a_serving_process_collects_no_garbage_of_what_it_loaded():
    script = (
        "import gc, sys\nfrom deployments.loading import SWITCH_INTERVAL_S, settle_process\n"
        "settle_process()\nassert gc.get_freeze_count() > 10_000, gc.get_freeze_count()\n"
        "assert abs(sys.getswitchinterval() - SWITCH_INTERVAL_S) < 1e-6\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
