"""The services, each started by whoever asks first; MLflow and its database end with the file that asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import services

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An S3 over HTTP, and how boto3 and MLflow find it."""
    for name in ("moto", "boto3"):
        try:
            __import__(name)
        except ImportError:
            services.missing(name)
    with services.s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield CREDENTIALS | {"AWS_ENDPOINT_URL": url, "MLFLOW_S3_ENDPOINT_URL": url}


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """s3:// address of an empty bucket; the environment of this test names the store."""
    import boto3

    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    name = f"test-{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**10}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("postgres")
    with services.postgres_server(folder) as address:
        yield address


@pytest.fixture(scope="module")
def mlflow_url(
    postgres: str, s3_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """MLflow's server, with its database in PostgreSQL and its artifacts in S3; clients need to know neither."""
    import boto3

    url = s3_environment["AWS_ENDPOINT_URL"]
    keys = dict(zip(("aws_access_key_id", "aws_secret_access_key"), ("testing", "testing"), strict=True))
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(Bucket="mlflow")
    folder = tmp_path_factory.mktemp("mlflow-server")
    # Without the driver's name SQLAlchemy 2.1 would take psycopg 3.
    database = postgres.replace("postgresql://", "postgresql+psycopg2://")
    with services.mlflow_server(folder, database, "s3://mlflow/artifacts", s3_environment) as address:
        yield address
