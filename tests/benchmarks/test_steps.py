"""The table of step times: its shapes, what it counts, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import hardware
from benchmarks.stepping import StepsConfig, time_steps
from cli.main import app
from medusa.config import ConfigError
from tests.medusa.engine.support import load


def test_every_shape_is_timed_and_compared_with_plain(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    shapes = ((1, 1), (1, 8), (2, 4), (2, 1))
    config = StepsConfig(
        out=tmp_path, shapes=shapes, model=str(tiny_llama), heads=("shared", "own"), context=30, repeats=5, device="cpu"
    )
    page = time_steps(config)
    content = json.loads((tmp_path / "steps.json").read_text())
    rows = content["rows"]
    assert [(r["heads"], r["batch"], r["nodes"]) for r in rows] == [(h, *s) for h in ("shared", "own") for s in shapes]
    for row in rows:
        assert 0 < row["low_ms"] <= row["step_ms"] <= row["high_ms"]
    by = {(r["heads"], r["batch"], r["nodes"]): r for r in rows}
    tree, plain = by["own", 1, 8], by["own", 1, 1]
    assert tree["over_plain"] == pytest.approx(tree["step_ms"] / plain["step_ms"])
    assert by["own", 2, 4]["over_plain"] is None  # its plain step came after it
    backbone, _ = load(tiny_llama)
    read = hardware.weight_bytes(backbone) + (30 + 6 + 2.5) * hardware.kv_bytes_per_token(backbone)
    rate = content["settings"]["copy rate, GB/s"] * 1e9
    assert plain["of_copy"] == pytest.approx(read / (plain["step_ms"] / 1e3) / rate)
    assert page == (tmp_path / "steps.md").read_text() and "| 1 x 8 | own |" in page


def test_a_larger_shape_is_timed_by_the_command(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    arguments = ["bench", "steps", "--model", tiny_llama, "--inflate", "tiny-test", "--shapes", "1x1,2x16"]
    arguments += ["--context", "20", "--repeats", "3", "--device", "cpu", "--out", tmp_path]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "steps.json").read_text())["settings"]["model"].endswith("@tiny-test")
    assert "| 2 x 16 | shared |" in done.output


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"heads": ("mine",)}, "--heads lists shared and own, got 'mine'"),
        ({"shapes": ((1, 65),)}, "1 to 64 nodes"),
        ({"shapes": ((0, 1),)}, "at least one sequence"),
        ({"repeats": 2}, "--repeats is at least 3"),
        ({"dtype": "int4"}, "--dtype is one of"),
    ],
)
def test_bad_options_are_named(options, problem, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        StepsConfig(**{"out": tmp_path, "shapes": ((1, 1),), **options})


def test_shapes_that_are_none_are_named() -> None:
    done = CliRunner().invoke(app, ["bench", "steps", "--shapes", "1,2"])
    assert isinstance(done.exception, ConfigError) and "got '1,2'" in str(done.exception)
