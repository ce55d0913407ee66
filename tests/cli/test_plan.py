"""`medusa plan` from the command line: what it prints names its basis, and JSON holds all of it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from cli.plan import serve
from cli.plan_scale import scale
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta, save_checkpoint
from medusa.config import ConfigError
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.hydra import HydraHeads
from pipelines.train_config import HeadsChoice

DEMO = Path(__file__).resolve().parents[2] / "pipelines" / "configs" / "demo.yaml"
VICUNA = "lmsys/vicuna-7b-v1.5"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_a_training_plan_says_what_it_rests_on(monkeypatch):
    monkeypatch.chdir(DEMO.parents[2])
    told = run("train", str(DEMO), "--gpu", "a100-80gb")
    assert "for 2,400 conversations of 200 + 800 tokens" in told and "estimate by formula" in told
    plan = json.loads(run("train", str(DEMO), "--json", "--conversations", "10", "--num-gpus", "2"))
    assert plan["num_gpus"] == 2 and plan["asked"]["conversations"] == 10
    assert plan["hours"]["value"] > 0 and plan["hours"]["basis"] == "estimate"


def test_conversations_must_be_known(monkeypatch):
    monkeypatch.chdir(DEMO.parents[2])
    with pytest.raises(ConfigError, match="say how many there are with --conversations"):
        run("train", str(DEMO), "prompts.limit=null")


def test_a_serving_plan_compares_with_plain_decoding():
    told = run("serve", VICUNA, "--requests-per-second", "400")
    assert "plain decoding would take" in told and "tokens a step: estimate (as chat-28m's Hydra heads" in told
    plan = json.loads(run("serve", VICUNA, "--requests-per-second", "400", "--heads", "none", "--json"))
    assert plan["replicas"] == plan["plain_replicas"] and plan["point"]["nodes"] == 1


def test_hydra_heads_are_planned_unless_others_are_named():
    asked = ["serve", VICUNA, "--requests-per-second", "40", "--gpu", "h200-141gb", "--json"]
    hydra = json.loads(run(*asked))
    assert hydra == json.loads(run(*asked, "--heads", "hydra")) and hydra["tokens_per_step"]["value"] == 2.767
    assert "with hydra heads" in hydra["points"][0]["step"]["how"]
    medusa = json.loads(run(*asked, "--heads", "medusa"))
    assert medusa["tokens_per_step"]["value"] == 2.57 and medusa["tokens_per_step"]["basis"] == "published"
    assert "with medusa heads" in medusa["points"][0]["step"]["how"]
    assert medusa["memory"]["heads"] < hydra["memory"]["heads"]
    assert json.loads(run(*asked, "--heads", "joint"))["tokens_per_step"]["value"] == 3.47


def test_defaults_are_the_heads_that_training_trains():
    trained = HeadsChoice()
    for command in (serve, scale):
        options = {name: option.default for name, option in inspect.signature(command).parameters.items()}
        assert (options["heads"], options["num_heads"]) == (trained.kind, trained.num_heads)
        assert options["vocabulary"] == trained.vocabulary
        assert options.get("num_layers", 1) == trained.num_layers


def test_heads_that_are_neither_a_kind_nor_a_folder_are_refused():
    result = CliRunner().invoke(app, ["plan", "serve", VICUNA, "--requests-per-second", "5", "--heads", "heads"])
    assert result.exit_code == 2 and "neither hydra, medusa, joint, none" in " ".join(result.output.split())


@pytest.mark.parametrize("kind", [MedusaHeads, HydraHeads])
def test_a_calibrated_checkpoint_brings_its_own_kind_and_ladder(tmp_path, kind):
    heads = kind(HeadsConfig(hidden_size=4096, vocab_size=32000, num_heads=1, vocabulary="shared"))
    calibration = Calibration(accuracy=[[0.5, 0.2]], num_positions=9, tokens_per_step=[1.0, 1.5, 1.6])
    reference = BackboneRef(name=VICUNA, weights_digest="sha256:0")
    meta = CheckpointMeta.of(heads, reference, calibration=calibration, trees=[[], [[0]], [[0], [1]]])
    save_checkpoint(tmp_path / "heads", heads.to(torch.bfloat16), meta)
    asked = [
        "serve",
        VICUNA,
        "--requests-per-second",
        "5",
        "--heads",
        str(tmp_path / "heads"),
        "--gpu",
        "h200-141gb",
        "--json",
    ]
    plan = json.loads(run(*asked))
    assert plan["tokens_per_step"]["basis"] == "measured" and plan["tokens_per_step"]["value"] == 1.6
    assert {point["nodes"] for point in plan["points"]} <= {1, 2, 3}
    assert f"with {kind.kind} heads" in plan["points"][0]["step"]["how"]


def test_growth_is_called_simulated_and_names_its_inputs():
    small = ["scale", VICUNA, "--gpus", "1,2", "--rows", "32", "--rows-per-block", "8", "--batch", "4"]
    told = run(*small)
    assert "Simulated: " in told and "hydra ddp: " in told and "medusa-1 ddp: " in run(*small, "--heads", "medusa")
    assert "What limits 2 GPUs" in told and "estimate by formula, not measured" in told
    plan = json.loads(run(*small, "--json"))
    assert plan["simulated"] is True and [row["gpus"] for row in plan["rows"]] == [1, 2]
    assert plan["rows"][0]["distil"] == 1.0 and plan["inputs"]["nvlink-4, GB/s"]["how"]
