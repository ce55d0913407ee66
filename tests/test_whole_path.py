"""The whole path on a tiny model: `medusa demo` from prompts to two answered requests; then run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from cli.main import app
from registry.versions import Registry

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
SUMMARY_KEYS = {
    "mean_acceptance_length",
    "plain_tokens_per_second",
    "medusa_tokens_per_second",
    "speedup",
    "lossless",
    "head_accuracy",
    "tree_size",
    "model_version",
    "reply",
    "dtype",
    "speculation_chosen",
}


def tiny_pipeline(folder: Path, backbone: Path) -> dict[str, Any]:
    for name, count in (("train", 24), ("heldout", 4)):
        rows = [{"prompt": f"Question {name} {number}: how many foxes make a pack?"} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "tiny",
        "root": str(folder / "runs"),
        "model": {"backbone": str(backbone)},
        "prompts": {"path": str(folder / "train.jsonl")},
        "distill": {"max_tokens": 24, "max_batch_size": 8, "rows_per_block": 8, "temperature": 0.5},
        "train": {
            "heads": {"num_heads": 2},
            "trainer": {"epochs": 8, "batch_size": 8, "lr": 1e-2, "log_every": 4},
            "num_workers": 0,
            "validation_fraction": 0.2,
        },
        "calibrate": {"sizes": [2, 4, 8], "width": 4, "batch_sizes": [1], "repeats": 2},
        "evaluate": {"prompts": {"path": str(folder / "heldout.jsonl")}, "max_tokens": 24, "repeats": 1},
        "register": {"name": "medusa-tiny"},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}", "experiment": "tiny"},
    }


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_pipeline(folder, tiny_llama)))
    result = CliRunner().invoke(app, ["demo", "--config", str(config)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, json.loads((folder / "runs" / "summary.json").read_text()), result.output


def test_the_demo_ends_with_a_lossless_registered_model_that_answered(demo_run: tuple[Path, Any, str]) -> None:
    folder, summary, output = demo_run
    assert set(summary) >= SUMMARY_KEYS
    assert summary["lossless"] is True
    assert summary["divergences"] == 0
    assert summary["mean_acceptance_length"] >= 1
    assert summary["reply"].strip() and summary["completion"].strip()
    assert summary["tree_size"] > 1 if summary["speculation_chosen"] else summary["tree_size"] == 1
    assert "tokens a step" in output
    assert "<svg" in (folder / "runs" / "report.html").read_text()
    assert Registry(f"sqlite:///{folder / 'mlflow.db'}").champion("medusa-tiny").version == summary["model_version"]


def test_mlflow_has_a_summary_of_the_run(demo_run: tuple[Path, Any, str]) -> None:
    folder, summary, _ = demo_run
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`medusa.pipeline` = 'tiny'")
    assert run.data.tags["medusa.summary.outcome"] == "done"
    assert run.data.tags["medusa.summary.version"] == f"models:/medusa-tiny/{summary['model_version']}"
    posted = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/summary.json"))
    assert set(posted["steps"]) == {"prompts", "distill", "train", "calibrate", "evaluate", "register"}


def test_running_again_skips_every_step(demo_run: tuple[Path, Any, str]) -> None:
    folder, _, _ = demo_run
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("manifest.json")}
    result = CliRunner().invoke(app, ["run", str(folder / "tiny.yaml")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    after = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("manifest.json")}
    assert after == before
    assert len(before) == 7  # six steps, and the prompts of the evaluation


def test_from_refuses_to_start_before_what_it_needs_is_there(demo_run: tuple[Path, Any, str]) -> None:
    folder, _, _ = demo_run
    changed = ["distill.seed=7", "--from", "train", "--to", "train"]
    result = CliRunner().invoke(app, ["run", str(folder / "tiny.yaml"), *changed])
    assert result.exit_code != 0
    assert "step distill is not complete" in str(result.exception)


@pytest.mark.slow
def test_a_jointly_trained_model_is_judged_by_its_quality_and_against_a_champion_on_the_base(
    demo_run: tuple[Path, Any, str],
) -> None:
    folder, _, _ = demo_run
    joint = ["train.trainer.joint={rank: 4, heads_weight: 1.0}", "train.trainer.epochs=2"]
    result = CliRunner().invoke(app, ["run", str(folder / "tiny.yaml"), *joint])
    assert result.exit_code in (0, 3), result.output  # the gate may well refuse what so few rows taught
    (evaluated,) = [
        summary
        for summary in (json.loads(path.read_text()) for path in (folder / "runs").rglob("evaluation.json"))
        if summary["backbone_changed"]
    ]
    assert evaluated["lossless"] and evaluated["kl"] > 0 and evaluated["perplexity"] > 0
    champion = Registry(f"sqlite:///{folder / 'mlflow.db'}").champion("medusa-tiny")
    assert champion is not None
    assert champion.digest in (evaluated["champion"]["checkpoint_digest"], evaluated["checkpoint_digest"])
