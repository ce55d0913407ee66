"""An MLflow database of its own for each test, and small folders that stand for checkpoints."""

from __future__ import annotations

import shutil
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
