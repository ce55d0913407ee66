"""Exit codes and messages of the `medusa` command: 0 done, 1 failed, 2 usage, 3 a gate refused, 4 try again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from cli import main as command
from medusa.config import ConfigError
from pipelines.calibrate import CalibrateError
from pipelines.tracking import TrackingUnavailable
from registry.connection import MlflowUnavailable
from registry.gate import GateRefused
from registry.lease import LeaseHeldError

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "pipelines" / "configs" / "demo.yaml"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["medusa", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_an_unknown_configuration_key_is_named_by_its_path(monkeypatch, capsys):
    assert run(monkeypatch, "run", str(DEMO), "train.trainer.learning_rate=1") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "train.trainer.learning_rate" in message and "lr" in message


def test_a_missing_configuration_file_is_a_usage_error(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "run", str(tmp_path / "none.yaml")) == 2
    assert "none.yaml" in capsys.readouterr().err.replace("\n", "")


def test_an_unknown_step_is_a_usage_error(monkeypatch, capsys):
    assert run(monkeypatch, "run", str(DEMO), "--to", "trian") == 2
    assert "trian" in capsys.readouterr().err


def test_no_registry_without_tracking_is_said_before_any_work(monkeypatch, capsys, ray_cluster, tmp_path):
    assert run(monkeypatch, "run", str(DEMO), "tracking.uri=null", f"root={tmp_path / 'runs'}") == 2
    assert "--to evaluate" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_mlflow_away_at_the_start_asks_to_try_again_before_any_work(monkeypatch, capsys, ray_cluster, tmp_path):
    away = "tracking.uri=http://127.0.0.1:9"
    assert run(monkeypatch, "run", str(DEMO), away, f"root={tmp_path / 'runs'}") == 4
    assert "Nothing was started" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "runs").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CalibrateError("no rows"), 1),
        (ConfigError("bad key"), 2),
        (GateRefused("models:/m/1", ("slower",)), 3),
        (LeaseHeldError("held"), 4),
        (TrackingUnavailable("away"), 4),
        (MlflowUnavailable("away"), 4),
    ],
)
def test_known_errors_become_a_message_and_their_code(monkeypatch, capsys, error, code):
    def fail() -> None:
        raise error

    monkeypatch.setattr(command, "app", fail)
    assert run(monkeypatch) == code
    assert str(error) in " ".join(capsys.readouterr().err.split())


def test_a_rollback_of_an_unknown_model_says_so(monkeypatch, capsys, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert run(monkeypatch, "rollback", "medusa-none", "--tracking-uri", uri) == 1
    assert "medusa-none" in capsys.readouterr().err


def test_the_demo_configuration_is_plain_yaml_with_every_step():
    steps = {"prompts", "distill", "train", "calibrate", "evaluate", "register"}
    assert steps <= set(yaml.safe_load(DEMO.read_text()))
