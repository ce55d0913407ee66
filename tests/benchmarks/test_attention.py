"""The attention benchmark: who takes part, its page, bad input; its contenders are in interpreted/."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli import main
from medusa.config import ConfigError

attending = pytest.importorskip("benchmarks.attending", reason="Triton is not installed")


@pytest.mark.gpu
def test_shapes_are_timed_on_a_gpu(tmp_path: Path) -> None:
    shapes, heads = ((1, 1), (2, 16)), ((8, 8), (8, 2))
    config = attending.AttentionConfig(out=tmp_path, shapes=shapes, heads=heads, contexts=(300,), repeats=3)
    attending.time_attention(config)
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {(r["batch"], r["nodes"], r["heads"], r["groups"]) for r in rows} == {
        (*s, *h) for s in shapes for h in heads
    }
    assert all(0 < r["low_us"] <= r["us"] <= r["high_us"] and r["error"] < 0.05 for r in rows)


def row(contender: str, us: float, error: float, nodes: int = 16) -> attending.AttentionRow:
    return attending.AttentionRow(2, nodes, 32, 8, 1000, contender, us, us, us, 3.25, error, 7)


def test_the_page_has_a_line_for_each_shape() -> None:
    rows = [row("medusa", 11.26, 0.01), row("rope+xqa", 9.0, 0.02), row("medusa", 20.0, 0.03, nodes=64)]
    page = attending.markdown({"device": "a GPU"}, rows, ["a note."])
    assert "- device: a GPU" in page and "- a note." in page
    assert "| 2 x 16 | 32/8 | 1000 | 3.2 | 11.3 | 9.0 | 0.80 |" in page
    assert "| 2 x 64 | 32/8 | 1000 | 3.2 | 20.0 |  |  |" in page
    assert "| 2 x 16 | 32/8 | 1000 | 0.0100 | 0.0200 |" in page


def test_xqa_takes_part_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(attending.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attending.chosen(None, torch.device("cuda")) == (attending.CONTENDERS, [])
    capability = (8, 0)
    names, (note,) = attending.chosen(None, torch.device("cuda"))
    assert names == ("medusa", "medusa-written", "sdpa") and "this one has 8.0" in note
    with pytest.raises(ConfigError, match="cannot run here"):
        attending.chosen(("xqa",), torch.device("cuda"))
    monkeypatch.setattr(attending.importlib.util, "find_spec", lambda name: None)
    assert attending.chosen(("sdpa",), torch.device("cuda"))[0] == ("sdpa",)
    assert "not installed" in attending.chosen(None, torch.device("cuda"))[1][0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"contenders": ("mine",)}, "--contenders lists medusa, .*got 'mine'"),
        ({"dtype": "float32"}, "--dtype is one of"),
        ({"heads": ((32, 5),)}, "multiple of key-value heads"),
        ({"shapes": ((1, 65),)}, "1 to 64 nodes"),
        ({"repeats": 2}, "--repeats is at least 3"),
        ({"contexts": (0,)}, "--contexts at least 1"),
        ({"head_size": 20}, "--head-size is a multiple of 16"),
    ],
)
def test_bad_options_are_named(options, problem, tmp_path: Path) -> None:
    good = {"out": tmp_path, "shapes": ((1, 1),), "heads": ((32, 32),), "contexts": (1000,)}
    with pytest.raises(ConfigError, match=problem):
        attending.AttentionConfig(**{**good, **options})


def test_the_grid_has_every_shape(tmp_path: Path) -> None:
    shapes, heads = ((1, 1), (4, 32)), ((32, 32), (32, 8))
    config = attending.AttentionConfig(out=tmp_path, shapes=shapes, heads=heads, contexts=(1000, 4000))
    grid = list(config.grid())
    assert len(set(grid)) == 8 and {shape.pages for shape in grid} == {16, 17, 63}
    assert grid[0].kv_bytes(2) == 2 * 1001 * 32 * 128 * 2


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["medusa", "bench", "attention"])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert "torch sees no CUDA GPU here" in " ".join(capsys.readouterr().err.split())


def test_lists_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for option, value in (("--shapes", "1,2"), ("--heads", "32x8"), ("--contexts", "many")):
        done = CliRunner().invoke(main.app, ["bench", "attention", option, value])
        assert isinstance(done.exception, ConfigError) and option in str(done.exception)
