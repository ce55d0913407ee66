"""The whole loop on real services: pipeline -> registry -> promote -> rollout -> a request answered by the new version
-> the next night's version -> rollback.

MLflow's server on PostgreSQL and S3, steps in S3, Ray and Serve in a process of their own, and the command as a
scheduled job runs it: in a process whose exit code counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from registry.object_store import ObjectFolder
from registry.versions import Registry
from tests.integration.local_ray import LocalRay, ask, deploy, local_ray, serve_config
from tests.integration.services import free_port

ROOT = Path(__file__).resolve().parents[2]
NAME = "medusa-loop"
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


def pipeline(folder: Path, backbone: Path, mlflow: str, store: str) -> dict[str, Any]:
    for name, count in (("train", 24), ("heldout", 4)):
        rows = [{"prompt": f"Question {name} {number}: how many foxes make a pack?"} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "loop",
        "root": str(folder / "scratch"),
        "store": store,
        "model": {"backbone": str(backbone)},
        "prompts": {"path": str(folder / "train.jsonl")},
        "distill": {"max_tokens": 24, "max_batch_size": 8, "rows_per_block": 8, "temperature": 0.5},
        "train": {
            "heads": {"num_heads": 2},
            "trainer": {"epochs": 8, "batch_size": 8, "lr": 1e-2, "log_every": 4},
            "num_workers": 0,
            "validation_fraction": 0.2,
        },
        "calibrate": {"sizes": [4], "width": 4, "batch_sizes": [1], "repeats": 1},
        "evaluate": {"prompts": {"path": str(folder / "heldout.jsonl")}, "max_tokens": 24, "repeats": 1},
        # A tiny model's speed on a busy machine is noise: here the way through the gate counts, not its tolerances.
        "register": {
            "name": NAME,
            "gate": {"min_speedup": 0.01, "speedup_tolerance": 0.99, "acceptance_tolerance": 0.9},
        },
        "tracking": {"uri": mlflow, "experiment": "loop"},
    }


@dataclass
class Loop:
    folder: Path
    ray: LocalRay
    url: str
    mlflow: str
    environment: dict[str, str]

    def medusa(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **self.environment, "RAY_ADDRESS": self.ray.address, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-m", "cli.main", *arguments]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=600)

    def run(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self.medusa("run", str(self.folder / "loop.yaml"), *overrides)

    def rollout(self) -> subprocess.CompletedProcess[str]:
        return self.medusa(
            "rollout",
            NAME,
            f"--tracking-uri={self.mlflow}",
            f"--service={self.ray.dashboard}",
            f"--url={self.url}",
            f"--versions={self.folder / 'versions'}",
            "--watch=3",
            "--baseline=1",
            "--poll=0.5",
            "--settle-timeout=120",
        )

    def served(self) -> tuple[str | None, str | None]:
        answer = httpx.get(f"{self.url}/version", timeout=10).json()
        return answer["heads_version"], answer["heads_digest"]


@pytest.fixture(scope="module")
def loop(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, mlflow_url: str, s3_environment: dict[str, str]
) -> Iterator[Loop]:
    import boto3

    folder = tmp_path_factory.mktemp("loop")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="steps")
        config = pipeline(folder, tiny_llama, mlflow_url, "s3://steps/runs")
        (folder / "loop.yaml").write_text(yaml.safe_dump(config))
        port = free_port()
        with local_ray(folder, environment=s3_environment) as ray:
            url = f"http://127.0.0.1:{port}"
            deploy(ray, serve_config(tiny_llama, port), url)
            yield Loop(folder, ray, url, mlflow_url, s3_environment)


def test_from_prompts_to_an_answer_by_the_new_version_and_back(loop: Loop):
    plain = ask(loop.url)["choices"][0]["text"]
    assert loop.served() == (None, None)

    first_run = loop.run()
    assert first_run.returncode == 0, first_run.stdout + first_run.stderr
    assert '"outcome": "done"' in first_run.stderr  # the summary, in the job's log
    registry = Registry(loop.mlflow)
    first = registry.champion(NAME)
    assert first is not None and first.version == 1
    rolled = loop.rollout()
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    assert loop.served() == ("1", first.digest)
    answer = ask(loop.url)
    assert answer["choices"][0]["text"] == plain  # other heads, the same words
    assert answer["usage"]["medusa"]["mean_acceptance_length"] >= 1

    # The same run again, from a machine that has nothing of it: every step is in the store.
    again = loop.run(f"root={loop.folder / 'another-machine'}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert registry.champion(NAME) == first
    steps = {name.split("/")[0] for name in ObjectFolder("s3://steps/runs").names()}
    assert steps == {"prompts", "distill", "train", "calibrate", "evaluate", "register"}

    # The next night: other replies, another version, taken by the replicas that run.
    second_run = loop.run("distill.seed=7")
    assert second_run.returncode == 0, second_run.stdout + second_run.stderr
    second = registry.champion(NAME)
    assert second is not None and second.version == 2
    before = replicas(loop)
    rolled = loop.rollout()
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    assert loop.served() == ("2", second.digest)
    assert replicas(loop) == before
    assert ask(loop.url)["choices"][0]["text"] == plain

    # Back by moving the alias again.
    back = loop.medusa("rollback", NAME, f"--tracking-uri={loop.mlflow}")
    assert back.returncode == 0, back.stderr
    rolled = loop.rollout()
    assert rolled.returncode == 0, rolled.stdout + rolled.stderr
    assert loop.served() == ("1", first.digest)
    assert ask(loop.url)["choices"][0]["text"] == plain


def replicas(loop: Loop) -> set[str]:
    details = httpx.get(f"{loop.ray.dashboard}/api/serve/applications/", timeout=30).json()
    found = details["applications"]["medusa"]["deployments"]["MedusaServer"]["replicas"]
    return {replica["replica_id"] for replica in found}


def test_a_run_whose_mlflow_is_away_ends_with_4_and_touches_nothing(loop: Loop):
    ended = loop.run("tracking.uri=http://127.0.0.1:9", f"root={loop.folder / 'untouched'}")
    assert ended.returncode == 4, ended.stderr
    assert not list((loop.folder / "untouched").glob("prompts/*/manifest.json"))


def test_a_rollout_whose_service_is_away_ends_with_4(loop: Loop):
    ended = loop.medusa(
        "rollout",
        NAME,
        f"--tracking-uri={loop.mlflow}",
        "--service=http://127.0.0.1:9",
        f"--versions={loop.folder / 'versions'}",
    )
    assert ended.returncode == 4, ended.stderr
