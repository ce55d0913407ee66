"""The benchmark of training speed on a tiny model: it measures, and what it compares computes the same."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_speed


def call(monkeypatch: pytest.MonkeyPatch, main, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    main()


TINY = ["--shape", "tiny", "--length", "48", "--rows", "2", "--steps", "2"]


def test_every_case_is_measured_and_calls_add_up_to_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "speed.json"
    call(monkeypatch, train_speed.main, *TINY, "--out", out, "--cases", "m1,m1-plain,m1-shared,m2")
    call(
        monkeypatch, train_speed.main, *TINY, "--out", out, "--cases", "m2,m2-plain,m1-8bit,m1-4bit", "--budget-s", "0"
    )
    results = json.loads(out.read_text())
    assert sorted(result["case"] for result in results) == sorted(train_speed.CASES)
    assert all(result["tokens_per_second"] > 0 for result in results)
    steps = {result["case"]: result["steps"] for result in results}
    assert train_speed.body_weights("tiny") == 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert steps["m1"] == 2 and steps["m2"] == 1  # a step at least, whatever the budget
    assert out.with_suffix(".md").read_text().count("\n| ") == 1 + len(train_speed.CASES)


def test_results_of_other_settings_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    asked = argparse.Namespace(shape="tiny", heads=5, length=48, rows=2, chunk=16)
    alike = train_speed.settings_of(asked)
    others = [alike | {name: "another"} for name in alike]
    out.write_text(json.dumps([each | {"case": "m1"} for each in (alike, *others)]))
    assert train_speed.kept_results(out, alike, ["m2"]) == [alike | {"case": "m1"}]
    assert f"{len(others)} results of other settings are left out" in capsys.readouterr().err
    assert train_speed.kept_results(out, alike, ["m1"]) == []


def test_a_case_whose_package_is_missing_is_told_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    out = tmp_path / "speed.json"
    call(monkeypatch, train_speed.main, *TINY, "--out", out, "--cases", "m1-4bit,m1-shared")
    missing, measured = json.loads(out.read_text())
    assert "needs bitsandbytes" in missing["error"] and "tokens_per_second" not in missing
    assert measured["tokens_per_second"] > 0


@pytest.mark.parametrize("case", ["m1", "m2"])
def test_whole_logits_and_chunks_have_one_loss(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Else their speeds would not compare."""
    assert first_loss(monkeypatch, case) == pytest.approx(first_loss(monkeypatch, f"{case}-plain"), rel=2e-2)


def first_loss(monkeypatch: pytest.MonkeyPatch, case: str) -> float:
    losses: list[float] = []

    def once(step, trainer, steps, budget_s):
        done = step()
        losses.append(float(getattr(done, "loss", done)))
        return 1, 1.0, 1, 1

    torch.manual_seed(0)
    monkeypatch.setattr(train_speed, "timed", once)
    shape = dict(shape="tiny", heads=2, length=48, rows=2, steps=1, chunk=16)
    train_speed.measure(case, argparse.Namespace(**shape, cross_entropy="chunked", peak_tflops=None, budget_s=None))
    return losses[0]
