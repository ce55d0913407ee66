"""Calibration and evaluation on a tiny model: the walk is what is served, and a lossy engine is found out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import medusa.engine.runner as runner
from medusa import HeadsConfig, MedusaHeads, StepTimes, TokenTree
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta, save_checkpoint
from medusa.config import ConfigError
from medusa.tree import ladder
from pipelines.bench import Bench, BenchConfig, EvaluateError
from pipelines.calibrate import CalibrateConfig, choose_tree
from pipelines.prompts import PromptsConfig, prepare_prompts
from pipelines.run import ModelConfig, RunContext
from pipelines.tracking import Tracker, TrackingConfig

ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.2, 0.1]]
TREES = ladder(ACCURACY, [1, 2, 4, 8])
FAST_TREES = StepTimes.of_uniform_trees({(1, tree.num_nodes): 1.0 for tree in TREES})
SLOW_TREES = StepTimes.of_uniform_trees({(1, tree.num_nodes): float(tree.num_nodes) for tree in TREES})


@pytest.fixture(scope="module")
def context(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("evaluate")
    with Tracker.open(TrackingConfig(uri=None), root, "evaluate", {}) as tracker:
        yield RunContext(root, ModelConfig(backbone=str(tiny_llama)), tracker)


@pytest.fixture(scope="module")
def prompts(context: RunContext):
    path = context.root / "prompts.jsonl"
    rows = [{"prompt": f"How many foxes make pack {n}?", "category": "ab"[n % 2]} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + json.dumps({"prompt": "fox " * 600}) + "\n")
    return prepare_prompts(context, PromptsConfig(path=str(path)))


@pytest.fixture(scope="module")
def bench(context: RunContext, prompts: Any) -> Bench:
    return Bench(context, BenchConfig(max_tokens=24, concurrency=[1, 3], repeats=1, min_gain=0.0), prompts)


@pytest.fixture(scope="module")
def checkpoint(context: RunContext) -> Path:
    """Heads with random blocks: their guesses vary, and some are right."""
    backbone = context.backbone
    config = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, num_heads=2)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    torch.manual_seed(0)
    for head in heads:
        torch.nn.init.normal_(head[0].linear.weight, std=0.05)
    meta = CheckpointMeta(
        heads=config,
        backbone=BackboneRef(name="tiny", weights_digest=backbone.digest),
        calibration=Calibration(accuracy=ACCURACY, num_positions=9, tokens_per_step=[1.0, 1.4, 1.6, 1.8]),
        trees=[tree.to_list() for tree in TREES],
    )
    save_checkpoint(context.root / "checkpoint", heads, meta)
    return context.root / "checkpoint"


def test_what_is_served_is_what_the_walk_says_and_nothing_differs_from_plain(bench, checkpoint):
    measured, replies = bench.measure(checkpoint, FAST_TREES)
    assert measured.lossless and measured.divergences == ()
    assert len(replies) == measured.evaluation_set.num_prompts == 6 and bench.too_long == 1
    tree = measured.details["tree_measured"]
    assert tree == 8
    assert measured.details["tokens_per_step_measured"] == measured.details["tokens_per_step_by_size"][str(tree)] > 1
    assert set(measured.by_concurrency) == {"1", "3"}
    assert set(measured.details["tokens_per_step_by_category"]) == {"a", "b"}


def test_a_lossy_engine_is_found_out_with_the_place_of_the_first_difference(bench, checkpoint, monkeypatch):
    monkeypatch.setattr(runner, "match", lambda tree, tokens, samples: torch.ones_like(tokens, dtype=torch.bool))
    measured, _ = bench.measure(checkpoint, FAST_TREES)
    assert not measured.lossless
    first = measured.divergences[0]
    assert first.plain_token != first.medusa_token and first.position >= 1 and first.logit_gap > 0
    assert len({d.id for d in measured.divergences}) > 1


def test_where_no_tree_pays_speculation_is_off_and_its_acceptance_is_told_all_the_same(bench, checkpoint):
    measured, _ = bench.measure(checkpoint, SLOW_TREES)
    assert not measured.speculation_chosen
    assert (measured.tree_size, measured.speedup, measured.acceptance_length) == (1, 1.0, 1.0)
    assert measured.details["tree_measured"] > 1 and measured.details["tokens_per_step_measured"] >= 1


def test_a_quantised_backbone_is_measured_as_itself(context, prompts, checkpoint):
    config = BenchConfig(max_tokens=12, concurrency=[1], repeats=1, min_gain=0.0, quantization="int8")
    quantized = Bench(context, config, prompts)
    measured, replies = quantized.measure(checkpoint, SLOW_TREES)
    assert measured.lossless and measured.details["quantization"] == "int8"
    assert sum(len(reply.token_ids) for reply in replies) > 6
    assert quantized._backbone.quantization == "int8" and context.backbone.quantization is None


def test_a_checkpoint_without_calibration_is_refused(bench, context):
    backbone = context.backbone
    config = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, num_heads=1)
    meta = CheckpointMeta(heads=config, backbone=BackboneRef(name="tiny", weights_digest=backbone.digest))
    save_checkpoint(context.root / "raw", MedusaHeads.initialised(config, backbone.lm_head_weight), meta)
    with pytest.raises(EvaluateError, match="medusa calibrate"):
        bench.measure(context.root / "raw", FAST_TREES)


def test_no_prompt_that_fits_is_an_error(context, prompts):
    with pytest.raises(EvaluateError, match="fits a context of 2 tokens"):
        Bench(context, BenchConfig(max_tokens=510), prompts)


def test_the_choice_is_the_fastest_tree_that_gains_enough():
    measured = [1.0, 1.4, 1.6, 1.8]
    times = StepTimes.of_uniform_trees({(1, 1): 1.0, (1, 2): 1.1, (1, 4): 1.2, (1, 8): 1.5})
    assert choose_tree(TREES, measured, times, 1, 0.02).num_nodes == 4
    assert choose_tree(TREES, measured, times, 1, 0.4) == TokenTree.root()
    assert choose_tree(TREES, measured, SLOW_TREES, 1, 0.0) == TokenTree.root()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sizes": [0]}, "at least 1 node"), ({"concurrency": 3}, "must be one of"), ({"repeats": 0}, "at least 1")],
)
def test_calibration_settings_out_of_range_are_refused(change, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        replace(CalibrateConfig(sizes=[2], batch_sizes=[1, 2]), **change)
