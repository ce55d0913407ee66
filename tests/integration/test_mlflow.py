"""The registry on MLflow's server with PostgreSQL and S3 behind it, as prod has them."""

from __future__ import annotations

from pathlib import Path

import boto3
import psycopg2
import pytest
from mlflow import MlflowClient

from medusa.digests import directory_digest
from registry.connection import MlflowUnavailable
from registry.gate import GateResult
from registry.versions import DigestMismatchError, Registry

NAME = "medusa-on-services"


@pytest.fixture
def run_id(mlflow_url: str) -> str:
    client = MlflowClient(mlflow_url)
    found = client.get_experiment_by_name("services")
    experiment = found.experiment_id if found else client.create_experiment("services")
    return client.create_run(experiment).info.run_id


def checkpoint(folder: Path, content: str) -> Path:
    path = folder / content
    (path / "adapter").mkdir(parents=True)
    (path / "medusa.json").write_text(f'{{"content": "{content}"}}')
    (path / "adapter" / "weights.safetensors").write_bytes(content.encode() * 10_000)
    return path


@pytest.mark.timeout(300)
def test_versions_live_in_postgres_and_their_files_in_s3(
    mlflow_url: str, postgres: str, s3_environment: dict[str, str], run_id: str, tmp_path: Path, monkeypatch
):
    registry = Registry(mlflow_url)
    first = registry.register(NAME, checkpoint(tmp_path, "one"), {"medusa.tree_size": 8}, run_id)
    registry.record_gate(first, GateResult(True), None)
    registry.promote(NAME, first.version)
    second = registry.register(NAME, checkpoint(tmp_path, "two"), {}, run_id)
    registry.record_gate(second, GateResult(True), first.digest)
    registry.promote(NAME, second.version)
    assert registry.aliases(NAME) == {"champion": second.version, "previous": first.version}

    folder = registry.download(registry.resolve(f"models:/{NAME}@champion"), tmp_path / "fetched")
    assert directory_digest(folder) == second.digest
    assert registry.rollback(NAME) == first

    with psycopg2.connect(postgres) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT alias, version FROM registered_model_aliases WHERE name = %s ORDER BY alias", (NAME,))
        assert cursor.fetchall() == [("champion", first.version), ("previous", second.version)]

    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    store = boto3.client("s3")
    keys = [item["Key"] for item in store.list_objects_v2(Bucket="mlflow")["Contents"]]
    (stored,) = [
        key for key in keys if key.endswith("medusa.json") and first.digest.removeprefix("sha256:")[:16] in key
    ]

    store.put_object(Bucket="mlflow", Key=stored, Body=b'{"content": "changed"}')
    with pytest.raises(DigestMismatchError, match=first.digest):
        registry.download(first, tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_a_server_that_is_away_is_told_from_one_that_says_no(mlflow_url: str):
    with pytest.raises(MlflowUnavailable):
        Registry("http://127.0.0.1:9")
    assert Registry(mlflow_url).champion("medusa-nobody") is None
