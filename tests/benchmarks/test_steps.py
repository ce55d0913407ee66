"""The table of step times: its shapes, what it counts, and bad input."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import hardware, stepping
from benchmarks.stepping import StepRow, StepsConfig, time_steps
from cli.main import app
from medusa import Engine, MedusaHeads
from medusa.config import ConfigError
from medusa.heads import DraftHeads
from medusa.hydra import HydraHeads
from tests.medusa.engine.support import load

HEADS = ("shared", "own", "hydra", "hydra-own")


def test_every_shape_is_timed_and_compared_with_plain(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    shapes = ((1, 1), (1, 8), (2, 4), (2, 1))
    config = StepsConfig(
        out=tmp_path, shapes=shapes, model=str(tiny_llama), heads=HEADS, context=30, repeats=5, device="cpu"
    )
    page = time_steps(config)
    content = json.loads((tmp_path / "steps.json").read_text())
    rows = content["rows"]
    assert [(r["heads"], r["batch"], r["nodes"]) for r in rows] == [(h, *s) for h in HEADS for s in shapes]
    for row in rows:
        assert 0 < row["low_ms"] <= row["step_ms"] <= row["high_ms"]
        assert row["clock_mhz"] is None  # of a CPU
    by = {(r["heads"], r["batch"], r["nodes"]): r for r in rows}
    tree, plain = by["own", 1, 8], by["own", 1, 1]
    assert tree["over_plain"] == pytest.approx(tree["step_ms"] / plain["step_ms"])
    assert by["own", 2, 4]["over_plain"] is None  # its plain step came after it
    backbone, _ = load(tiny_llama)
    read = hardware.weight_bytes(backbone) + (30 + 6 + 2.5) * hardware.kv_bytes_per_token(backbone)
    rate = content["settings"]["copy rate, GB/s"] * 1e9
    assert plain["of_copy"] == pytest.approx(read / (plain["step_ms"] / 1e3) / rate)
    for heads, matrices in (("shared", 1), ("own", 4), ("hydra", 4), ("hydra-own", 4)):  # of a vocabulary, read
        row = by[heads, 1, 8]
        blocks = ((2 + 3 + 4 + 5) * 64 * 64 + 4 * 64) * 4 if "hydra" in heads else 4 * (64 * 64 + 64) * 4
        its = matrices * backbone.lm_head_weight.nbytes
        assert row["of_copy"] == pytest.approx((read + blocks + its) / (row["step_ms"] / 1e3) / rate)
    assert page == (tmp_path / "steps.md").read_text()
    assert all(f"| 1 x 8 | {heads} |" in page for heads in HEADS)


def test_the_clock_is_shown_where_it_was_read() -> None:
    rows = [StepRow("own", 4, 32, 4.8, 4.7, 4.9, 1.19, 0.78, clock) for clock in (1695.0, None)]
    first, second = stepping._markdown({}, rows, []).splitlines()[-2:]
    assert first == "| 4 x 32 | own | 4.800 (4.700 to 4.900) | 1.190 | 78% | 1,695 |"
    assert second == "| 4 x 32 | own | 4.800 (4.700 to 4.900) | 1.190 | 78% |  |"


def test_layers_of_a_head_are_counted(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    bytes_read = []
    for layers in (1, 3):
        config = StepsConfig(
            out=tmp_path, shapes=((1, 4),), model=str(tiny_llama), heads=("hydra-own",), head_layers=layers, context=8,
            repeats=3, device="cpu",
        )  # fmt: skip
        time_steps(config)
        content = json.loads((tmp_path / "steps.json").read_text())
        assert content["settings"]["layers of a head"] == layers
        row, rate = content["rows"][0], content["settings"]["copy rate, GB/s"] * 1e9
        bytes_read.append(row["of_copy"] * row["step_ms"] / 1e3 * rate)
    assert bytes_read[1] - bytes_read[0] == pytest.approx(4 * 2 * (64 * 64 + 64) * 4)


def test_weights_of_one_byte_are_timed_and_counted_as_such(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    config = StepsConfig(
        out=tmp_path, shapes=((1, 1),), model=str(tiny_llama), context=8, repeats=3, device="cpu", quantization="int8"
    )
    time_steps(config)
    content = json.loads((tmp_path / "steps.json").read_text())
    assert content["settings"]["quantization"] == "int8"
    whole, _ = load(tiny_llama)
    linears = [m for m in whole.model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    saved = sum(linear.weight.nbytes - linear.weight.numel() - 4 * linear.out_features for linear in linears)
    read = hardware.weight_bytes(whole) - saved + (8 + 6 + 1.5) * hardware.kv_bytes_per_token(whole)
    row = content["rows"][0]
    assert row["of_copy"] == pytest.approx(
        read / (row["step_ms"] / 1e3) / (content["settings"]["copy rate, GB/s"] * 1e9)
    )


def test_each_engine_is_gone_before_the_next_is_made(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    """A GPU's cache is sized by what is free: what the first left in the allocator would make the second's smaller."""
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    made: list[weakref.ref[Engine]] = []
    held: list[tuple[type[DraftHeads], int]] = []
    cleared: list[int] = []

    class Recorded(Engine):
        def __init__(self, backbone, tokenizer, checkpoint, **options) -> None:
            held.append((type(checkpoint.heads), sum(engine() is not None for engine in made)))
            assert len(cleared) == len(held)  # emptied once for each engine, before it is made
            super().__init__(backbone, tokenizer, checkpoint, **options)
            made.append(weakref.ref(self))

    release = hardware.release_memory

    def released() -> None:
        release()
        cleared.append(sum(engine() is not None for engine in made))

    monkeypatch.setattr(stepping, "Engine", Recorded)
    monkeypatch.setattr(hardware, "release_memory", released)
    time_steps(
        StepsConfig(
            out=tmp_path, shapes=((1, 2),), model=str(tiny_llama), heads=HEADS, context=8, repeats=3, device="cpu"
        )
    )
    assert held == [(MedusaHeads, 0), (MedusaHeads, 0), (HydraHeads, 0), (HydraHeads, 0)]
    assert cleared == [0, 0, 0, 0]


def test_heads_are_of_the_kind_asked_for_and_hold_no_zeros(tiny_llama: Path) -> None:
    backbone, tokenizer = load(tiny_llama)
    for name, kind, vocabulary in (
        ("shared", MedusaHeads, "shared"),
        ("own", MedusaHeads, "own"),
        ("hydra", HydraHeads, "shared"),
        ("hydra-own", HydraHeads, "own"),
    ):
        heads = stepping._fresh_heads(backbone, name, 2, tokenizer).heads
        assert type(heads) is kind and heads.config.vocabulary == vocabulary
        assert all((head[i].linear.weight != 0).float().mean() > 0.99 for head in heads for i in range(2))


def test_a_larger_shape_is_timed_by_the_command(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    arguments = ["bench", "steps", "--model", tiny_llama, "--inflate", "tiny-test", "--shapes", "1x1,2x16"]
    arguments += ["--heads", "shared,hydra", "--context", "20", "--repeats", "3", "--device", "cpu", "--out", tmp_path]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "steps.json").read_text())["settings"]["model"].endswith("@tiny-test")
    assert "| 2 x 16 | shared |" in done.output and "| 2 x 16 | hydra |" in done.output


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"heads": ("mine",)}, "--heads lists any of shared, own, hydra, hydra-own, got 'mine'"),
        ({"shapes": ((1, 65),)}, "1 to 64 nodes"),
        ({"shapes": ((0, 1),)}, "at least one sequence"),
        ({"head_layers": 0}, "--head-layers is at least 1, got 0"),
        ({"repeats": 2}, "--repeats is at least 3"),
        ({"dtype": "int4"}, "--dtype is one of"),
        ({"quantization": "int4"}, "--quantization is one of int8, fp8, got 'int4'"),
    ],
)
def test_bad_options_are_named(options, problem, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        StepsConfig(**{"out": tmp_path, "shapes": ((1, 1),), **options})


def test_shapes_that_are_none_are_named() -> None:
    done = CliRunner().invoke(app, ["bench", "steps", "--shapes", "1,2"])
    assert isinstance(done.exception, ConfigError) and "got '1,2'" in str(done.exception)
