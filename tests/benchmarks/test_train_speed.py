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
