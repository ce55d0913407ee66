"""The training benchmarks on a tiny model: every recipe is a valid configuration, the scripts run to their tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_recipes, train_speed
from medusa.heads import HeadsConfig
from medusa.training.schedule import TrainerConfig


def call(monkeypatch: pytest.MonkeyPatch, main, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    main()


@pytest.mark.parametrize("name", train_recipes.RECIPES)
def test_every_recipe_is_a_valid_configuration(name: str) -> None:
    recipe = train_recipes.RECIPES[name]
    TrainerConfig(**recipe.trainer, loss=recipe.loss, joint=recipe.joint)
    HeadsConfig(hidden_size=8, vocab_size=8, num_heads=recipe.num_heads, vocabulary=recipe.vocabulary)
    assert recipe.kind in ("medusa", "hydra")


@pytest.mark.slow
def test_recipes_are_distilled_for_trained_and_tabulated(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [[{"role": "user", "content": f"foxes {n}"}, {"role": "assistant", "content": "Two."}] for n in range(14)]
    for name, rows in (("train", turns[:12]), ("heldout", turns[11:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    work, common = tmp_path / "work", ["--device", "cpu", "--max-tokens", "12", "--max-model-len", "96"]
    common += ["--batch-size", "8"]
    sets = ["--train", tmp_path / "train.jsonl", "--heldout", tmp_path / "heldout.jsonl", "--temperatures", "0,1"]
    call(monkeypatch, train_recipes.main, "distil", tiny_llama, work, *sets, *common)
    recipes = ["--recipes", "m1-soft,hydra,m2-lora", "--budget-s", "0.2", "--set", "batch_size=4"]
    call(monkeypatch, train_recipes.main, "train", tiny_llama, work, *recipes, *common)
    results = {result["recipe"]: result for result in json.loads((work / "results.json").read_text())}
    assert set(results) == {"m1-soft", "hydra", "m2-lora"}
    for result in results.values():
        assert set(result["tokens_per_step"]) == {
            "heldout_chat@0.0",
            "heldout_chat@1.0",
        }  # the shared prompt is dropped
        assert all(found["tokens_per_step"] >= 1 for found in result["tokens_per_step"].values())
    assert results["m2-lora"]["quality"]["heldout_chat_reference@None"]["kl"] >= 0
    assert "quality" not in results["hydra"]
    assert (work / "results.md").read_text().count("\n| ") == 1 + 3


@pytest.mark.slow
def test_speed_is_measured_beside_whole_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--shape", "tiny", "--length", "48", "--rows", "2", "--steps", "1", "--out", tmp_path / "speed.json"]
    call(monkeypatch, train_speed.main, *arguments, "--cases", "m1,m1-plain,m2,m2-plain")
    results = json.loads((tmp_path / "speed.json").read_text())
    assert [result["case"] for result in results] == ["m1", "m1-plain", "m2", "m2-plain"]
    assert all(result["tokens_per_second"] > 0 for result in results)


@pytest.mark.parametrize("case", ["m1", "m2"])
def test_whole_logits_and_chunks_have_one_loss(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Else their speeds would not compare."""
    assert first_loss(monkeypatch, case) == pytest.approx(first_loss(monkeypatch, f"{case}-plain"), rel=2e-2)


def first_loss(monkeypatch: pytest.MonkeyPatch, case: str) -> float:
    losses: list[float] = []

    def once(step, trainer, steps):
        done = step()
        losses.append(float(getattr(done, "loss", done)))
        return 1.0, 1, 1

    torch.manual_seed(0)
    monkeypatch.setattr(train_speed, "timed", once)
    shape = dict(shape="tiny", heads=2, length=48, rows=2, steps=1, chunk=16)
    train_speed.measure(case, argparse.Namespace(**shape, cross_entropy="chunked", peak_tflops=None))
    return losses[0]
