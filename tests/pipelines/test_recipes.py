"""Every recipe runs: its own file, on a tiny random model of its family and a handful of prompts, from prompts to
calibrated heads. Only sizes, device and places are changed; what is trained and how stays the recipe's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medusa.checkpoint import read_meta
from medusa.export.write import export_checkpoint
from medusa.tokenizer import ChatTokenizer
from medusa.weights import weights_digest
from pipelines.plan.figures import load_figures
from pipelines.plan.recipe import recipe_of
from pipelines.plan.training import Data, plan_training
from pipelines.run import PipelineConfig, load_pipeline, run_pipeline
from pipelines.train_config import HeadsChoice

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "pipelines" / "configs"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # the family's config beside the usual tiny sizes
    "vicuna-7b": ("llama", {"num_key_value_heads": 4}),
    "vicuna-13b": ("llama", {"num_key_value_heads": 4}),
    "vicuna-33b": ("llama", {"num_key_value_heads": 4}),
    "zephyr-7b": ("mistral", {"sliding_window": 4096}),
    "llama-3-8b": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "qwen3-8b": ("qwen3", {}),
}
SMALLER = [
    "model.dtype=float32",
    "model.device=cpu",
    "prompts.limit=12",
    "distill.num_actors=0",
    "distill.max_tokens=16",
    "distill.truncated=keep",
    "distill.max_model_len=128",
    "distill.max_batch_size=6",
    "train.num_workers=0",
    "train.use_gpu=false",
    "train.validation_fraction=0.4",
    "train.trainer.max_steps=2",
    "train.trainer.warmup_steps=1",
    "train.trainer.batch_size=4",
    "train.trainer.max_length=64",
    "calibrate.sizes=[2, 8]",
    "calibrate.width=4",
    "calibrate.batch_sizes=[1]",
    "calibrate.repeats=1",
    "tracking.uri=null",
]


def small(name: str, folder: Path, backbone: Path) -> PipelineConfig:
    rows = [{"prompt": f"Question {number}: how many foxes make a pack?"} for number in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = [f"model.backbone={backbone}", f"prompts.path={folder / 'prompts.jsonl'}", f"root={folder / 'runs'}"]
    recipe = load_pipeline(CONFIGS / f"{name}.yaml")
    truncated = ["train.heads.truncated_vocab_size=64"] if recipe.train.heads.vocabulary == "truncated" else []
    return load_pipeline(CONFIGS / f"{name}.yaml", [*SMALLER, *truncated, *places])


def test_every_recipe_for_a_model_of_others_is_run_here() -> None:
    recipes = {path.stem for path in CONFIGS.glob("*.yaml")} - {"demo", "chat-8m"}
    assert recipes == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_gives_calibrated_heads(name: str, tmp_path: Path, make_backbone_dir: Callable[..., Path]) -> None:
    family, changes = FAMILIES[name]
    config = small(name, tmp_path, make_backbone_dir(family, **changes))
    outputs = run_pipeline(config, last="calibrate", console=Console(file=StringIO()))
    meta = read_meta(outputs["calibrate"].path / "checkpoint")
    recipe = load_pipeline(CONFIGS / f"{name}.yaml")
    assert meta.heads.num_heads == recipe.train.heads.num_heads
    assert meta.heads.vocabulary == recipe.train.heads.vocabulary
    assert meta.calibration is not None and len(meta.calibration.accuracy) == meta.heads.num_heads
    sizes = [len(tree) + 1 for tree in meta.trees]
    assert (meta.adapter is not None) == (recipe.train.trainer.joint is not None)
    assert sizes[:2] == [1, 2] and 2 < sizes[2] <= 8  # a rank that is never right gets no node
    assert outputs["distill"].manifest["counts"]["written"] == 12
    if meta.adapter is not None:  # what was trained can be handed on
        folder = outputs["calibrate"].path / "checkpoint"
        merged = export_checkpoint(folder, "transformers", tmp_path / "merged", config.model.backbone)
        assert weights_digest(merged.path) == meta.backbone.weights_digest
        assert read_meta(merged.path / "medusa").calibration == meta.calibration


@pytest.mark.parametrize("name", ["vicuna-7b", "vicuna-13b", "vicuna-33b", "zephyr-7b"])
def test_a_recipe_with_the_papers_numbers_trains_the_papers_heads(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    for train in (load_pipeline(path).train, load_pipeline(path, ["train.trainer.joint=null"]).train):
        assert (train.heads.kind, train.trainer.heads_loss.kind) == ("medusa", "tokens")


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-8b"])
def test_a_recipe_of_today_trains_what_the_defaults_are(name: str) -> None:
    config = load_pipeline(CONFIGS / f"{name}.yaml").train
    unnamed = replace(
        config, heads=replace(config.heads, kind=HeadsChoice().kind), trainer=replace(config.trainer, loss=None)
    )
    assert unnamed.recipe == config.recipe


@pytest.mark.parametrize(
    ("name", "rate", "warmup", "weight", "ramp", "batch", "length", "first_stage"),
    [
        ("vicuna-7b", 5e-4, 40, 0.2, "constant", 64, 4096, 0.5),
        ("vicuna-13b", 5e-4, 40, 0.2, "constant", 64, 4096, 0.5),
        ("vicuna-33b", 1e-4, 20, 0.01, "sine", 128, 2048, 0.0),
        ("zephyr-7b", 1e-4, 20, 0.01, "sine", 128, 2048, 0.0),
    ],
)
def test_the_papers_numbers(
    name: str, rate: float, warmup: int, weight: float, ramp: str, batch: int, length: int, first_stage: float
) -> None:
    """arXiv 2401.10774, appendices B.2 to B.4; the rate is the backbone's, of which the heads' is four times."""
    train = load_pipeline(CONFIGS / f"{name}.yaml").train
    trainer, joint = train.trainer, train.trainer.joint
    assert joint is not None
    assert (train.heads.num_heads, train.heads.num_layers, train.heads.vocabulary) == (5, 1, "own")
    assert (joint.method, joint.rank, joint.alpha, joint.dropout) == ("lora", 32, 16.0, 0.05)
    assert (trainer.lr / joint.heads_lr_scale, joint.heads_lr_scale) == (pytest.approx(rate), 4)
    assert (trainer.schedule, trainer.warmup_steps, trainer.head_decay) == ("cosine", warmup, 0.8)
    assert (joint.heads_weight, joint.heads_weight_schedule, joint.ramp_ratio) == (weight, ramp, 1.0)
    assert (trainer.batch_size, trainer.max_length, joint.heads_only_ratio) == (batch, length, first_stage)
    assert trainer.epochs == (4 if first_stage else 2)  # of two stages two each


def test_large_vocabularies_get_no_matrix_a_head() -> None:
    models = load_figures().models
    for name in FAMILIES:
        recipe = load_pipeline(CONFIGS / f"{name}.yaml")
        large = models[recipe.model.backbone].vocab_size > 64_000
        assert (recipe.train.heads.vocabulary != "own") == large, name


@pytest.mark.parametrize("name", FAMILIES)
def test_the_document_shows_what_plan_computes(name: str) -> None:
    """docs/recipes.md, a row a recipe: memory, then hours of both on one kind of GPU."""
    recipe, figures = load_pipeline(CONFIGS / f"{name}.yaml"), load_figures()
    shape = figures.models[recipe.model.backbone]
    data = Data(conversations=recipe.prompts.limit or 0, prompt_tokens=200, reply_tokens=800)
    plan = plan_training(
        recipe.model.backbone,
        shape,
        recipe_of(recipe, shape),
        data,
        "h100-80gb",
        figures,
        num_gpus=recipe.train.num_workers,
    )
    line = re.search(rf"^\| `pipelines/configs/{name}.yaml` .*$", (ROOT / "docs" / "recipes.md").read_text(), re.M)
    assert line is not None
    cells = [cell.strip() for cell in line[0].strip("|").split("|")]
    told = [f"{plan.num_gpus}", f"{plan.memory_each:.0f}", f"{plan.distill_hours.value:.1f}"]
    assert cells[2:6] == [*told, f"{plan.train_hours.value:.1f}"]
    assert plan.hours.basis in cells[6]


def test_the_template_for_vicuna_continues_conversations(make_tokenizer: Callable[..., Any]) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    (template,) = re.findall(r"^\{\{ bos_token \}\}A chat between.*$", text, re.M)
    tokenizer = ChatTokenizer(make_tokenizer(chat_template=template))
    first = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    assert tokenizer.decode(first, skip_special_tokens=False).endswith("questions. USER: Hello ASSISTANT:")
    reply = [*tokenizer.hf.encode(" Hi", add_special_tokens=False), tokenizer.hf.eos_token_id]
    second = tokenizer.next_turn([*first, *reply], "And?")
    assert tokenizer.decode(second, skip_special_tokens=False).endswith("ASSISTANT: Hi</s> USER: And? ASSISTANT:")
