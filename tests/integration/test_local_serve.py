"""`medusa rollout` on a real Serve: versions come in, a broken one goes back, requests are answered all the time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from mlflow import MlflowClient
from typer.testing import CliRunner

from cli.main import app
from medusa import HeadsConfig, MedusaHeads
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta, save_checkpoint
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from registry.gate import GateResult
from registry.versions import Registry, VersionRef
from tests.integration.local_ray import LocalRay, ask, deploy, local_ray, serve_config
from tests.integration.services import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
NAME = "medusa-tiny"


def make_heads(folder: Path, backbone_path: Path, seed: int) -> Path:
    """Heads of one shape whose weights follow from the seed."""
    backbone = Backbone.from_pretrained(backbone_path)
    config = HeadsConfig(num_heads=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    reference = BackboneRef(
        name=backbone.name,
        weights_digest=backbone.digest,
        tokenizer_digest=ChatTokenizer.from_pretrained(backbone_path).digest,
    )
    calibration = Calibration(accuracy=[[0.3, 0.1, 0.05]] * 2, num_positions=1)
    tree = [[0], [1], [2], [0, 0], [0, 1]]
    save_checkpoint(
        folder, heads, CheckpointMeta(heads=config, backbone=reference, trees=[tree], calibration=calibration)
    )
    return folder


@dataclass
class Traffic:
    """One client that asks all the time, and what became of it."""

    url: str
    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(ask(self.url)["choices"][0]["text"])
            except (AssertionError, httpx.HTTPError) as error:
                self.failures.append(repr(error))
            time.sleep(0.02)


@dataclass
class Place:
    folder: Path
    ray: LocalRay
    url: str
    uri: str
    backbone: Path
    run_id: str

    def promote(self, checkpoint: Path) -> VersionRef:
        registry = Registry(self.uri)
        digest = Backbone.from_pretrained(self.backbone).digest
        ref = registry.register(NAME, checkpoint, {"medusa.backbone.digest": digest}, self.run_id)
        champion = registry.champion(NAME)
        registry.record_gate(ref, GateResult(True), champion.digest if champion else None)
        return registry.promote(NAME, ref.version)

    def rollout(self, *more: str) -> int:
        options = [
            f"--tracking-uri={self.uri}",
            f"--service={self.ray.dashboard}",
            f"--url={self.url}",
            f"--versions={self.folder / 'versions'}",
            "--watch=2",
            "--baseline=1",
            "--poll=0.5",
            "--settle-timeout=90",
            "--min-requests=5",
        ]
        return CliRunner().invoke(app, ["rollout", NAME, *options, *more]).exit_code

    def version(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/version", timeout=10).json()

    def replicas(self) -> set[str]:
        details = httpx.get(f"{self.ray.dashboard}/api/serve/applications/", timeout=30).json()
        found = details["applications"]["medusa"]["deployments"]["MedusaServer"]["replicas"]
        return {replica["replica_id"] for replica in found}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("medusa", artifact_location=(folder / "mlruns").as_uri())
    port = free_port()
    with local_ray(folder) as ray:
        url = f"http://127.0.0.1:{port}"
        deploy(ray, serve_config(tiny_llama, port), url)
        yield Place(folder, ray, url, uri, tiny_llama, client.create_run(experiment).info.run_id)


@pytest.mark.slow
def test_versions_come_in_and_a_broken_one_goes_back_while_requests_are_answered(place: Place):
    plain = ask(place.url)["choices"][0]["text"]
    first = place.promote(make_heads(place.folder / "one", place.backbone, 1))
    with Traffic(place.url) as traffic:
        assert place.rollout() == 0
        assert place.version()["heads_digest"] == first.digest
        assert place.rollout() == 0  # nothing to do

        second = place.promote(make_heads(place.folder / "two", place.backbone, 2))
        before = place.replicas()
        assert place.rollout() == 0
        assert place.version()["heads_version"] == str(second.version)
        assert place.replicas() == before  # taken in place

        # A checkpoint for another backbone, registered as if it were for this one: replicas refuse it.
        foreign = make_heads(place.folder / "foreign", place.backbone, 3)
        meta = json.loads((foreign / "medusa.json").read_text())
        meta["backbone"]["weights_digest"] = "sha256:" + "0" * 64
        (foreign / "medusa.json").write_text(json.dumps(meta))
        third = place.promote(foreign)
        assert place.rollout("--settle-timeout=15") == 1
        assert place.version()["heads_digest"] == second.digest
        registry = Registry(place.uri)
        assert registry.champion(NAME) == second
        assert "failed" in str(registry.resolve(third.uri).tags)

        registry.rollback(NAME)  # previous is the version that failed here: no refuge
        assert place.rollout() == 1
        assert place.version()["heads_digest"] == second.digest
    assert traffic.failures == []
    assert len(traffic.answers) > 20
    assert set(traffic.answers) == {plain}  # the heads change speed, never what is said


@pytest.mark.slow
def test_a_service_that_does_not_answer_is_named(place: Place):
    place.promote(make_heads(place.folder / "four", place.backbone, 4))
    result = CliRunner().invoke(
        app,
        [
            "rollout",
            NAME,
            f"--tracking-uri={place.uri}",
            "--service=http://127.0.0.1:9",
            f"--versions={place.folder / 'versions'}",
        ],
    )
    assert "no answer" in str(result.exception)
