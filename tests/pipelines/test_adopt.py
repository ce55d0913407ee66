"""Ready heads in a pipeline: taken as they are, calibrated like trained ones, refused for another backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from medusa.adapter import write_merged
from medusa.checkpoint import (
    AdapterRef,
    BackboneRef,
    CheckpointMeta,
    CheckpointMismatchError,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from medusa.config import validate
from medusa.digests import directory_digest
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.weights import weights_digest
from pipelines.run import PipelineConfig, run_pipeline


def ready_heads(folder: Path, backbone_folder: Path) -> Path:
    backbone = Backbone.from_pretrained(backbone_folder, device="cpu")
    config = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, num_heads=2)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    reference = BackboneRef(name=backbone.name, weights_digest=backbone.digest)
    save_checkpoint(folder, heads, CheckpointMeta(heads=config, backbone=reference))
    return folder


def pipeline(folder: Path, backbone: Path, heads: Path) -> PipelineConfig:
    rows = [{"prompt": f"Question {number}: how many foxes make a pack?"} for number in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "name": "ready",
        "root": str(folder / "runs"),
        "model": {"backbone": str(backbone), "device": "cpu"},
        "heads": str(heads),
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "distill": {"max_tokens": 24, "max_batch_size": 8, "rows_per_block": 8, "num_actors": 0},
        "train": {"num_workers": 0, "validation_fraction": 0.5},
        "calibrate": {"sizes": [2, 4], "width": 4, "batch_sizes": [1], "repeats": 1},
        "evaluate": {"prompts": {"path": "none.jsonl"}},
    }
    return validate(PipelineConfig, content, source="test")


def test_ready_heads_are_calibrated_like_trained_ones(tmp_path: Path, tiny_llama: Path) -> None:
    heads = ready_heads(tmp_path / "heads", tiny_llama)
    config = pipeline(tmp_path, tiny_llama, heads)
    console = Console(file=StringIO())
    outputs = run_pipeline(config, last="calibrate", console=console)
    assert directory_digest(outputs["train"].path / "checkpoint") == directory_digest(heads)
    meta = read_meta(outputs["calibrate"].path / "checkpoint")
    assert [len(tree) + 1 for tree in meta.trees] == [1, 2, 4]
    assert meta.calibration is not None and len(meta.calibration.accuracy) == 2
    again = run_pipeline(config, last="calibrate", console=console)
    assert {step: output.key for step, output in again.items()} == {s: output.key for s, output in outputs.items()}


def test_heads_with_an_adapter_run_on_the_merged_model(tmp_path: Path, tiny_llama: Path) -> None:
    sides = {f"lora_{side}": torch.randn(shape) for side, shape in (("A", (2, 64)), ("B", (64, 2)))}
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    (tmp_path / "adapter").mkdir()
    tensors = {f"{name}.{side}.weight": tensor for side, tensor in sides.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(told))
    merged = write_merged(tiny_llama, tmp_path / "adapter", tmp_path / "merged")
    ready = load_checkpoint(ready_heads(tmp_path / "ready", tiny_llama))
    adapter = AdapterRef(base=ready.meta.backbone, digest=directory_digest(tmp_path / "adapter"))
    backbone = replace(ready.meta.backbone, weights_digest=merged)
    meta = replace(ready.meta, backbone=backbone, adapter=adapter)
    save_checkpoint(tmp_path / "heads", ready.heads, meta, adapter=tmp_path / "adapter")

    config = pipeline(tmp_path, tiny_llama, tmp_path / "heads")
    outputs = run_pipeline(config, last="calibrate", console=Console(file=StringIO()))
    assert weights_digest(outputs["train"].path / "backbone") == merged
    assert read_meta(outputs["calibrate"].path / "checkpoint").backbone.weights_digest == merged


def test_other_heads_make_another_step(tmp_path: Path, tiny_llama: Path) -> None:
    keys = set()
    for name in ("one", "two"):
        heads = ready_heads(tmp_path / name, tiny_llama)
        if name == "two":
            (heads / "README.md").write_text("other")
        outputs = run_pipeline(pipeline(tmp_path, tiny_llama, heads), last="train", console=Console(file=StringIO()))
        keys.add(outputs["train"].key)
    assert len(keys) == 2


def test_heads_of_another_backbone_are_refused(
    tmp_path: Path, tiny_llama: Path, make_backbone_dir: Callable[..., Path]
) -> None:
    heads = ready_heads(tmp_path / "heads", make_backbone_dir("llama", seed=1))
    with pytest.raises(CheckpointMismatchError):
        run_pipeline(pipeline(tmp_path, tiny_llama, heads), last="train", console=Console(file=StringIO()))
    assert not list((tmp_path / "runs").glob("train/*/manifest.json"))
