"""On a real Ray Serve: heads by user_config, draining, an engine that fails, and replicas that come and go."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections import Counter

import httpx
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from medusa import Engine, SamplingParams
from medusa.digests import directory_digest
from tests.deployments.held_server import hold_of
from tests.deployments.replicas import replica_pids

pytestmark = pytest.mark.ray
SERVER = "deployments.server:build_app"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.1)


class Service:
    """An application deployed from a configuration, as `serve deploy` does it."""

    def __init__(self, model):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.args = {
            "model": str(model),
            "model_name": "tiny",
            "device": "cpu",
            "speculation": "off",
            "max_batch_size": 4,
            "num_cpus": 0.5,
            "health_check_period_s": 0.5,
            "graceful_shutdown_timeout_s": 30,
        }
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})

    def deploy(self, import_path=SERVER, user_config=None, **args):
        """Returns once it runs."""
        self.args |= args
        self.order(import_path, {} if user_config is None else {"user_config": user_config})

    def order(self, import_path, options, *, waits=True):
        """`options` are the deployment's own, beside the arguments."""
        application = {"name": "medusa", "route_prefix": "/", "import_path": import_path, "args": self.args}
        if options:
            application["deployments"] = [{"name": "MedusaServer", **options}]
        schema = ServeDeploySchema(applications=[application], http_options={"host": "127.0.0.1", "port": self.port})
        _get_global_client().deploy_apps(schema, _blocking=waits)

    def get(self, path):
        return httpx.get(self.url + path, timeout=30).json()

    def complete(self, **fields):
        body = {"prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0} | fields
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def replicas(self):
        return replica_pids()


@pytest.fixture(scope="module")
def service(ray_cluster, tiny_llama):
    try:
        yield Service(tiny_llama)
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def plain(tiny_llama):
    return Engine.from_pretrained(tiny_llama, max_batch_size=4)


def stream_in_thread(url, **fields):
    """(thread, what it gets): the texts of a streamed reply, and how it ended."""
    got = {"text": "", "end": None, "started": threading.Event()}

    def read():
        body = {"prompt": "x", "stream": True, "temperature": 0, "ignore_eos": True} | fields
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        got["text"] += json.loads(line[6:])["choices"][0]["text"]
                        got["started"].set()
                    got["end"] = line or got["end"]
        except httpx.HTTPError as error:
            got["end"] = error

    thread = threading.Thread(target=read)
    thread.start()
    return thread, got


def test_user_config_changes_the_heads_in_the_replicas_that_run(service, tiny_heads, tmp_path, plain):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(tiny_heads, folder)
        (folder / "README.md").write_text(folder.name)
    heads = {"heads": str(first), "heads_version": "1", "heads_digest": directory_digest(first)}
    service.deploy(user_config=heads, speculation=6)
    pids = service.replicas()
    assert service.get("/health")["heads"] == {"version": "1", "digest": directory_digest(first)}
    (expected,) = plain.generate(["x"], SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    thread, got = stream_in_thread(service.url, max_tokens=400)
    assert got["started"].wait(30)
    heads = {"heads": str(second), "heads_version": "2", "heads_digest": directory_digest(second)}
    service.deploy(user_config=heads)
    wait_until(lambda: service.get("/health")["heads"]["version"] == "2")
    thread.join(60)
    assert (got["end"], got["text"]) == ("data: [DONE]", expected.text)
    assert service.complete().json()["usage"]["medusa"]["heads_version"] == "2"
    assert service.replicas() == pids  # no restart
    (second / "README.md").write_text("changed after it was registered")
    broken = heads | {"heads_version": "3"}
    service.deploy(user_config=broken)
    wait_until(lambda: service.get("/health")["failed_heads"])
    health = service.get("/health")
    assert (health["status"], health["heads"]["version"], health["failed_heads"]["version"]) == ("ok", "2", "3")
    assert service.complete().status_code == 200
    assert service.replicas() == pids


@pytest.mark.slow
def test_a_redeployed_replica_ends_its_streams_first(service, plain):
    service.deploy(user_config={}, speculation="off")
    pids = service.replicas()
    (expected,) = plain.generate(["x"], SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True))
    threads = [stream_in_thread(service.url, max_tokens=450) for _ in range(4)]
    assert all(got["started"].wait(30) for _, got in threads)
    service.deploy(user_config={}, max_queued_requests=100)
    for thread, got in threads:
        thread.join(60)
        assert (got["end"], got["text"]) == ("data: [DONE]", expected.text)
    wait_until(lambda: not set(service.replicas()) & set(pids))
    assert service.complete().status_code == 200


@pytest.mark.slow
def test_a_sick_engine_turns_health_red_and_its_replica_is_replaced(service):
    service.deploy(import_path="tests.deployments.sick_server:build_app", user_config={})
    (before,) = service.replicas()
    assert httpx.post(f"{service.url}/v1/completions", json={"prompt": "make sick"}, timeout=30).status_code == 503
    assert httpx.get(f"{service.url}/health", timeout=30).status_code in (503, 200)  # 200: replaced already
    wait_until(lambda: service.replicas() and before not in service.replicas())
    wait_until(lambda: service.complete().status_code == 200)
    assert service.get("/health")["status"] == "ok"


async def keep_asking(url, num_clients, stop, outcomes, **fields):
    """Clients that ask again and again; each obeys Retry-After."""

    async def client(http):
        while not stop.is_set():
            response = await http.post("/v1/completions", json={"prompt": "x", "ignore_eos": True} | fields)
            outcomes[response.status_code] += 1
            if response.status_code == 429:
                await asyncio.sleep(int(response.headers["retry-after"]))

    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=200)) as http:
        await asyncio.gather(*(client(http) for _ in range(num_clients)))


def in_state(name):
    """How many replicas are."""
    return serve.status().applications["medusa"].deployments["MedusaServer"].replica_states.get(name, 0)


def running():
    """Replicas that take requests."""
    return in_state("RUNNING")


@pytest.mark.slow
def test_a_replica_that_is_scaled_down_ends_its_streams_first(service, plain, tiny_llama):
    """Both replicas are held in the midst of their replies until Serve has told one of them to stop."""
    app, hold = "tests.deployments.held_server:build_app", hold_of(tiny_llama)
    service.order(app, {"user_config": {}, "num_replicas": 2})
    wait_until(lambda: running() == 2)
    both = service.replicas()
    (expected,) = plain.generate(["x"], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    hold.mkdir()
    try:
        streams = [stream_in_thread(service.url, max_tokens=60) for _ in range(8)]
        wait_until(lambda: sorted(int(file.name) for file in hold.iterdir()) == both)
        service.order(app, {"user_config": {}, "num_replicas": 1}, waits=False)
        wait_until(lambda: (running(), in_state("STOPPING")) == (1, 1))
        assert service.replicas() == both
    finally:
        shutil.rmtree(hold)
    for thread, got in streams:
        thread.join(60)
        assert (got["end"], got["text"]) == ("data: [DONE]", expected.text)
    wait_until(lambda: len(service.replicas()) == 1)
    assert set(service.replicas()) < set(both)
    assert service.complete().status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_replicas_come_and_go_with_the_load_and_no_request_fails(service):
    """1 -> 3 -> 1, while somebody always asks."""
    outcomes, stop_all, stop_crowd = Counter(), asyncio.Event(), asyncio.Event()
    service.deploy(
        user_config={},
        min_replicas=1,
        max_replicas=3,
        target_ongoing_requests=2,
        upscale_delay_s=1,
        downscale_delay_s=5,
        look_back_s=3,
    )
    assert running() == 1
    lone = keep_asking(service.url, 1, stop_all, outcomes, max_tokens=20)
    one = threading.Thread(target=asyncio.run, args=[lone])
    many = keep_asking(service.url, 8, stop_crowd, outcomes, max_tokens=200)
    crowd = threading.Thread(target=asyncio.run, args=[many])
    one.start()
    crowd.start()
    try:
        wait_until(lambda: running() == 3, 150)
        stop_crowd.set()
        crowd.join(60)
        wait_until(lambda: running() == 1, 150)
    finally:
        stop_crowd.set()
        stop_all.set()
        one.join(60)
    assert set(outcomes) == {200}
    assert outcomes[200] > 50


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_another_backbone_comes_in_replica_by_replica_and_no_request_fails(service, plain, make_backbone_dir):
    """Each reply is the one model's or the other's, and says which."""
    other = make_backbone_dir("llama", seed=1)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    service.deploy(user_config={}, min_replicas=2, max_replicas=2)
    before, pids = service.get("/version")["backbone_digest"], service.replicas()
    assert (before, len(pids)) == (plain.backbone.digest, 2)
    replies, stop = Counter(), threading.Event()

    def ask():
        while not stop.is_set():
            response = service.complete(prompt="x", max_tokens=20, ignore_eos=True)
            answer = response.json() if response.is_success else {"choices": [{"text": response.text}]}
            replies[answer.get("system_fingerprint"), answer["choices"][0]["text"]] += 1

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: replies)
        service.args["model"] = str(other)
        service.order(SERVER, {"user_config": {}}, waits=False)
        wait_until(lambda: not set(service.replicas()) & set(pids) and running() == 2, 150)
        wait_until(lambda: len(replies) > 1)
    finally:
        stop.set()
        for client in clients:
            client.join(60)
    new = Engine.from_pretrained(other, max_batch_size=4)
    assert service.get("/version")["backbone_digest"] == new.backbone.digest != before
    expected = {
        (f"medusa-{engine.backbone.digest.removeprefix('sha256:')[:12]}", engine.generate(["x"], params)[0].text)
        for engine in (plain, new)
    }
    assert set(replies) == expected
