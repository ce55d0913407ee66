"""Distillation side by side: both sides say the same tokens, and the figures are those of the runs."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from medusa.config import ConfigError
from pipelines.distill_bench import bench_distill, markdown, write_result
from pipelines.distill_config import DistillConfig
from pipelines.prompt_files import Prompt
from pipelines.run import ModelConfig, RunContext
from pipelines.tracking import Tracker, TrackingConfig

CONFIG = DistillConfig(max_tokens=12, rows_per_block=4, max_batch_size=4, max_model_len=96, temperature=0.8)
PROMPTS = [Prompt(f"p{i}", (f"What is {i} plus {i}?", "And twice that?")) for i in range(10)]


@pytest.mark.ray
@pytest.mark.slow
def test_both_sides_say_the_same_tokens(ray_cluster: None, tiny_llama: Path, tmp_path: Path) -> None:
    with Tracker.open(TrackingConfig(uri=None), tmp_path, "bench", {}) as tracker:
        model = ModelConfig(backbone=str(tiny_llama), dtype="float32", device="cpu")
        context = RunContext(tmp_path, model, tracker, Console(file=StringIO()))
        result = bench_distill(context, CONFIG, PROMPTS, repeats=1)
    assert result.differing == 0
    assert result.prompts == 10 and 10 <= result.reply_tokens <= 120
    (alone,), (behind,) = result.alone_tokens_per_second, result.ray_tokens_per_second
    assert result.ratio == pytest.approx(behind / alone) and result.ratio_interval == (result.ratio, result.ratio)
    assert 1 <= result.alone_mean_batch <= 4 and 1 <= result.ray_mean_batch <= 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("bench-distill-")]
    write_result(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "distill.json").read_text())["reply_tokens"] == result.reply_tokens
    assert (tmp_path / "out" / "distill.md").read_text() == markdown(result)
    assert f"{result.ratio:.3f}" in markdown(result) and "behind Ray Data" in markdown(result)


def test_a_comparison_needs_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs prompts and at least one repeat, got 0 and 3"):
        bench_distill(None, CONFIG, [], repeats=3)  # type: ignore[arg-type]
