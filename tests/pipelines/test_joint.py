"""Medusa-2 and each kind of heads through the train step: what it writes, that it belongs together, its quality."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from medusa import Engine, SamplingParams
from medusa.adapter import AdapterError, load_with_adapter, write_merged
from medusa.checkpoint import CheckpointError, CheckpointMismatchError, load_checkpoint, read_meta
from medusa.config import ConfigError, validate
from medusa.heads import MedusaHeads
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.quality import last_number
from medusa.tokenizer import ChatTokenizer
from medusa.training.schedule import JointConfig
from medusa.weights import weights_digest
from pipelines.artifact import StepOutput
from pipelines.quality import (
    QualityConfig,
    QualityError,
    Question,
    gate_fields,
    measure_quality,
    read_questions,
    task_accuracy,
)
from pipelines.records import read_records
from pipelines.run import ModelConfig, RunContext
from pipelines.tracking import Tracker, TrackingConfig
from pipelines.train import trained_backbone
from pipelines.train_config import HeadsChoice, TrainConfig
from tests.pipelines.test_train import CONFIG, losses, reopen, run, stop_once, vanish

LORA = replace(CONFIG.trainer, joint=JointConfig(rank=4, dropout=0.1, heads_only_ratio=0.3), lr=2e-2)
JOINT = replace(CONFIG, trainer=LORA, validate_every=5)


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> StepOutput:
    return run(tmp_path_factory.mktemp("joint"), tiny_llama, JOINT)


def logits(backbone: Backbone) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    return backbone.logits(backbone.hidden_states(ids))


def test_the_step_writes_heads_adapter_and_merged_model_that_belong_together(
    trained: StepOutput, tiny_llama: Path
) -> None:
    meta = read_meta(trained.path / "checkpoint")
    assert meta.adapter is not None and meta.adapter.base.weights_digest == weights_digest(tiny_llama)
    assert meta.backbone.weights_digest == weights_digest(trained.path / "backbone")
    assert meta.backbone.weights_digest != meta.adapter.base.weights_digest
    assert trained_backbone(trained, "base") == str(trained.path / "backbone")
    assert (trained.path / "backbone" / "tokenizer.json").exists()
    assert {"checkpoint/adapter/adapter_model.safetensors", "backbone/model.safetensors"} <= set(
        trained.manifest["outputs"]
    )
    load_checkpoint(trained.path / "checkpoint", Backbone.from_pretrained(trained.path / "backbone", device="cpu"))


def test_base_with_adapter_is_the_merged_model_and_not_the_base(trained: StepOutput, tiny_llama: Path) -> None:
    merged = Backbone.from_pretrained(trained.path / "backbone", device="cpu")
    adapted = load_with_adapter(tiny_llama, trained.path / "checkpoint", device="cpu")
    again = load_with_adapter(trained.path / "backbone", trained.path / "checkpoint", device="cpu")
    assert adapted.digest == again.digest == merged.digest
    assert torch.equal(logits(adapted), logits(merged)) and torch.equal(logits(again), logits(merged))
    base = Backbone.from_pretrained(tiny_llama, device="cpu")
    assert (logits(base) - logits(merged)).abs().max() > 1e-4
    with pytest.raises(CheckpointMismatchError, match="these heads belong to"):
        load_checkpoint(trained.path / "checkpoint", base)


def test_the_engine_serves_the_base_with_its_adapter_as_the_merged_model(trained: StepOutput, tiny_llama: Path) -> None:
    heads, params = trained.path / "checkpoint", SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    replies = [
        Engine.from_pretrained(folder, heads, device="cpu", max_model_len=64, speculation="off").generate(
            [[1, 5]], params
        )
        for folder in (tiny_llama, trained.path / "backbone")
    ]
    assert replies[0][0].token_ids == replies[1][0].token_ids


def test_another_base_is_refused_with_all_three_digests(trained: StepOutput, make_backbone_dir) -> None:
    other = make_backbone_dir("llama", seed=9)
    with pytest.raises(CheckpointMismatchError) as error:
        load_with_adapter(other, trained.path / "checkpoint", device="cpu")
    meta = read_meta(trained.path / "checkpoint")
    for digest in (meta.adapter.base.weights_digest, meta.backbone.weights_digest, weights_digest(other)):
        assert digest in str(error.value)


def test_an_adapter_that_was_changed_or_lost_is_refused(trained: StepOutput, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(trained.path / "checkpoint", tmp_path / "heads")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was changed: its digest is"):
        read_meta(folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(CheckpointError, match="is missing, without which"):
        read_meta(folder)


def test_merging_into_a_model_of_other_layers_is_refused(
    trained: StepOutput, make_backbone_dir, tmp_path: Path
) -> None:
    other = make_backbone_dir("gpt_neox")
    with pytest.raises(AdapterError, match="holds no weights of"):
        write_merged(other, trained.path / "checkpoint" / "adapter", tmp_path / "merged")


def test_the_heads_of_a_joint_training_learn_from_tokens(trained: StepOutput) -> None:
    recipe = read_meta(trained.path / "checkpoint").training["recipe"]
    assert recipe["trainer"]["loss"]["kind"] == "tokens" and recipe["trainer"]["joint"]["rank"] == 4


def test_records_tell_both_terms_and_validation(trained: StepOutput) -> None:
    records = read_records(trained.path / "metrics.jsonl")
    assert ["lm/loss" in record for record in records] == [False] * 3 + [True] * 7
    assert ["validation/loss" in record for record in records] == [step in (5, 10) for step in range(1, 11)]
    assert 0 < records[-1]["system/process_memory_gib"] < 64 and 0 <= records[-1]["system/cpu_percent"] <= 100
    assert 0 < records[-1]["validation/lm/overlap"] <= 1 and records[-1]["validation/head_0/loss"] > 0


def test_checkpoint_and_curves_are_artifacts_of_the_run(trained: StepOutput) -> None:
    journal = map(json.loads, (trained.path / "tracking.jsonl").read_text().splitlines())
    sent = [(Path(line["path"]).name, line["folder"]) for line in journal if line["kind"] == "artifact"]
    assert sent == [("checkpoint", "checkpoint"), ("curves.png", None)]
    assert (trained.path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("at", [2, 6])
def test_interrupted_joint_training_goes_on_with_the_same_numbers(
    trained: StepOutput, tiny_llama: Path, tmp_path: Path, at: int
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    on_step = stop_once(tmp_path / "marker", at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "runs", tiny_llama, JOINT, on_step=on_step)
    again = run(tmp_path / "runs", tiny_llama, JOINT, on_step=on_step)
    assert losses(again) == losses(trained)
    assert weights_digest(again.path / "backbone") == weights_digest(trained.path / "backbone")


def test_full_fine_tuning_writes_a_model_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, trainer=replace(CONFIG.trainer, joint=JointConfig(method="full"), max_steps=2))
    output = run(tmp_path, tiny_llama, config)
    meta = read_meta(output.path / "checkpoint")
    assert meta.adapter is None
    backbone = Backbone.from_pretrained(output.path / "backbone", device="cpu")
    assert meta.backbone.weights_digest == backbone.digest != weights_digest(tiny_llama)
    load_checkpoint(output.path / "checkpoint", backbone)


@pytest.mark.parametrize(("kind", "made", "schema"), [("hydra", HydraHeads, 2), ("medusa", MedusaHeads, 1)])
def test_heads_are_trained_by_their_kind(tiny_llama: Path, tmp_path: Path, kind: str, made: type, schema: int) -> None:
    config = replace(CONFIG, heads=HeadsChoice(kind=kind, num_heads=2), trainer=replace(CONFIG.trainer, max_steps=2))
    output = run(tmp_path, tiny_llama, config)
    loaded = load_checkpoint(output.path / "checkpoint", Backbone.from_pretrained(tiny_llama, device="cpu"))
    assert isinstance(loaded.heads, made) and loaded.meta.schema_version == schema
    assert not (output.path / "backbone").exists()


def contexts(root: Path, base: Path, served: Path, tracker: Tracker) -> list[RunContext]:
    console = Console(file=StringIO())
    return [
        RunContext(root, ModelConfig(backbone=str(folder), dtype="float32", device="cpu"), tracker, console)
        for folder in (base, served)
    ]


class Pipeline:
    """As much of a PipelineConfig as quality reads."""

    def __init__(self, quality: QualityConfig, train: TrainConfig) -> None:
        self.quality, self.train = quality, train


def test_quality_is_measured_on_replies_kept_back_and_on_a_task(
    trained: StepOutput, tiny_llama: Path, tmp_path: Path
) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(3)))
    root = trained.path.parent.parent
    settings = QualityConfig(task=str(task), task_limit=2, task_max_tokens=4)
    with Tracker.open(TrackingConfig(uri=None), root, "test", {}) as tracker:
        base, served = contexts(root, tiny_llama, trained.path / "backbone", tracker)
        output = measure_quality(base, served, Pipeline(settings, JOINT), reopen(root))
    result = json.loads((output.path / "quality.json").read_text())
    assert result["kl"] > 0 and result["positions"] > 0 and 0 < result["agreement"] <= 1
    fields = gate_fields(output)
    assert fields["backbone_changed"] and fields["kl"] == result["kl"]
    assert fields["task_accuracy"] == fields["base_task_accuracy"] == 0.0  # random weights do no sums


def test_a_right_answer_counts(tiny_llama: Path) -> None:
    """The number in the base's own greedy reply is right by definition, the one after it wrong."""
    settings = QualityConfig(task_max_tokens=48)
    backbone, tokenizer = Backbone.from_pretrained(tiny_llama, device="cpu"), ChatTokenizer.from_pretrained(tiny_llama)
    prompts = [f"How much is {n} + {n}?" for n in range(24)]
    encoded = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    engine = Engine(backbone, tokenizer, max_batch_size=8, max_model_len=max(map(len, encoded)) + 48, speculation="off")
    replies = engine.generate(encoded, SamplingParams(max_tokens=48, temperature=0.0))
    said = [(prompt, last_number(reply.text)) for prompt, reply in zip(prompts, replies, strict=True)]
    asked = [(prompt, number) for prompt, number in said if number is not None]
    assert len(asked) >= 4  # digits are among the tokens that random weights say
    questions = [Question(prompt, number + wrong) for wrong, (prompt, number) in enumerate(asked[:4], start=-3)]
    assert task_accuracy(backbone, str(tiny_llama), questions, settings) == 0.25


@pytest.mark.parametrize(
    ("line", "named"), [('{"prompt": "2 + 2?"}', r"task.jsonl:1 needs a `prompt` and an `answer`"), ("", "no question")]
)
def test_a_task_without_answers_is_refused(tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "task.jsonl").write_text(f"{line}\n" if line else "")
    with pytest.raises(QualityError, match=named):
        read_questions(tmp_path / "task.jsonl")


def test_a_quantised_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization is 4bit in joint training"):
        validate(TrainConfig, {"quantization": "4bit", "trainer": {"joint": {}}}, source="test")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_killed_twice_end_at_the_same_loss(tiny_llama: Path, tmp_path: Path, sharding: str) -> None:
    """Without dropout, whose draws depend on the worker; data position, optimiser and schedule are the same."""
    joint = JointConfig(rank=4, dropout=0.0, heads_only_ratio=0.3)
    config = replace(JOINT, trainer=replace(LORA, joint=joint), validate_every=0)
    undisturbed = run(tmp_path / "alone", tiny_llama, config)
    kills = [stop_once(tmp_path / f"marker-{at}", at, vanish) for at in (3, 7)]

    def on_step(step: int) -> None:
        for kill in kills:
            kill(step)

    distributed = replace(config, num_workers=2, max_failures=3, sharding=sharding)
    output = run(tmp_path / "runs", tiny_llama, distributed, on_step=on_step)
    assert (tmp_path / "marker-3").exists() and (tmp_path / "marker-7").exists()
    assert losses(output) == pytest.approx(losses(undisturbed), rel=1e-4)
    load_checkpoint(output.path / "checkpoint", Backbone.from_pretrained(output.path / "backbone", device="cpu"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_every_workers_dropout_is_the_same_after_a_kill(tiny_llama: Path, tmp_path: Path) -> None:
    joint = JointConfig(rank=4, dropout=0.3)
    trainer = replace(LORA, joint=joint, max_steps=6)
    config = replace(JOINT, trainer=trainer, validate_every=0, num_workers=2, max_failures=2)
    undisturbed = run(tmp_path / "undisturbed", tiny_llama, config)
    killed = run(tmp_path / "killed", tiny_llama, config, on_step=stop_once(tmp_path / "marker", 4, vanish))
    assert (tmp_path / "marker").exists()
    assert losses(killed) == pytest.approx(losses(undisturbed), rel=1e-5)
