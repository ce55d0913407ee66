"""An MLflow database of its own for each test, and small folders that stand for checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="session")
def mlflow_schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh database, made once: MLflow takes a second to make its tables."""
    path = tmp_path_factory.mktemp("mlflow") / "schema.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_uri(mlflow_schema: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(mlflow_schema, tmp_path / 'mlflow.db')}"


@pytest.fixture
def run_id(mlflow_uri: str, tmp_path: Path) -> str:
    client = MlflowClient(mlflow_uri)
    experiment = client.create_experiment("medusa", artifact_location=(tmp_path / "mlruns").as_uri())
    return client.create_run(experiment).info.run_id


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    def make(content: str) -> Path:
        folder = tmp_path / "checkpoints" / content
        (folder / "adapter").mkdir(parents=True)
        (folder / "medusa.json").write_text(f'{{"content": "{content}"}}')
        (folder / "adapter" / "weights.safetensors").write_bytes(content.encode() * 100)
        return folder

    return make
