"""The train step: what it writes, and that killing it anywhere changes no number."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from medusa.checkpoint import load_checkpoint
from medusa.config import validate
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.training.batch import Row
from medusa.training.schedule import HeadsLossConfig, TrainerConfig
from pipelines.artifact import StepOutput, open_step
from pipelines.distilled import SCHEMA
from pipelines.records import read_records
from pipelines.run import ModelConfig, RunContext
from pipelines.split import is_held_back
from pipelines.tracking import Tracker, TrackingConfig
from pipelines.train import TrainError, frequent_reply_tokens, train
from pipelines.train_config import HeadsChoice, TrainConfig
from pipelines.train_worker import read_rows

CONFIG = TrainConfig(
    heads=HeadsChoice(num_heads=2),
    trainer=TrainerConfig(
        max_steps=10, batch_size=6, max_length=40, lr=5e-3, log_every=1, checkpoint_every=2, bucket_batches=2
    ),
    num_workers=0,
    use_gpu=False,
    validation_fraction=0.2,
)
ON_RAY = replace(CONFIG, num_workers=2, max_failures=1)


def make_distilled(root: Path, conversations: int = 30, vocab: int = 512) -> StepOutput:
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(rng.randint(low, high))]

    rows = [
        {
            "id": f"c{number}",
            "turn": turn,
            "prompt_ids": ids(2, 8),
            "completion_ids": [*ids(3, 15), 2],
            "finish_reason": "stop",
        }
        for number in range(conversations)
        for turn in range(1 + number % 2)
    ]
    with open_step(root, "distill", 1, {"of": "test"}, {}) as step:
        (step.path / "data").mkdir()
        for block in range(2):
            table = pa.Table.from_pylist(rows[block::2], schema=SCHEMA)
            pq.write_table(table, step.path / "data" / f"block-{block:05d}.parquet")
        return step.commit({}, outputs=["data"])


def run(
    root: Path, backbone: Path, config: TrainConfig = CONFIG, on_step: Callable[[int], None] | None = None
) -> StepOutput:
    distilled = make_distilled(root) if not (root / "distill").exists() else reopen(root)
    with Tracker.open(TrackingConfig(uri=None), root, "test", {}) as tracker:
        model = ModelConfig(backbone=str(backbone), dtype="float32", device="cpu")
        context = RunContext(root, model, tracker, Console(file=StringIO()))
        return train(context, config, distilled, on_step=on_step)


def reopen(root: Path) -> StepOutput:
    with open_step(root, "distill", 1, {"of": "test"}, {}) as step:
        return step.output


def losses(output: StepOutput) -> list[float]:
    records = read_records(output.path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))  # no gap, no repeat
    return [record["loss"] for record in records]


def stop_once(marker: Path, at: int, how: Callable[[], None]) -> Callable[[int], None]:
    """Stops the first worker that reaches the step, once."""

    def on_step(step: int) -> None:
        if step == at:
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            how()

    return on_step


def vanish() -> None:
    os._exit(1)


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> StepOutput:
    return run(tmp_path_factory.mktemp("undisturbed"), tiny_llama)


def test_heads_learn_and_belong_to_their_backbone(undisturbed: StepOutput, tiny_llama: Path) -> None:
    assert losses(undisturbed)[-1] < losses(undisturbed)[0]
    checkpoint = load_checkpoint(undisturbed.path / "checkpoint", Backbone.from_pretrained(tiny_llama, device="cpu"))
    assert checkpoint.config.num_heads == 2
    assert checkpoint.heads[0][0].linear.weight.abs().sum() > 0
    training = checkpoint.meta.training
    assert training["steps"] == 10 and training["recipe"]["trainer"]["lr"] == 5e-3
    assert training["data_digest"].startswith("sha256:")


def test_records_tell_each_head_and_the_speed(undisturbed: StepOutput) -> None:
    record = read_records(undisturbed.path / "metrics.jsonl")[-1]
    for k in range(2):
        assert math.isfinite(record[f"head_{k}/loss"])
        assert 0 <= record[f"head_{k}/top1_accuracy"] <= record[f"head_{k}/top5_accuracy"] <= 1
        assert record[f"head_{k}/coverage"] == 1
    assert record["tokens_per_second"] > 0 and record["learning_rate"] > 0
    journal = (undisturbed.path / "tracking.jsonl").read_text().splitlines()
    metrics = [line for line in map(json.loads, journal) if line["kind"] == "metrics"]
    assert [line["step"] for line in metrics] == list(range(1, 11))
    assert metrics[-1]["values"]["head_1/loss"] == record["head_1/loss"]


def test_rows_are_accounted_for_and_held_back_by_id(undisturbed: StepOutput) -> None:
    counts = undisturbed.manifest["counts"]
    ids = [f"c{number}" for number in range(30) for _ in range(1 + number % 2)]
    held_back = sum(is_held_back(id_, 0.2) for id_ in ids)
    assert counts["held_back"] == held_back > 0
    assert counts["read"] == counts["kept"] + counts["without_labels"] == 45 - held_back


def test_a_complete_step_is_skipped_and_leaves_no_state(undisturbed: StepOutput, tiny_llama: Path) -> None:
    def refuse(step: int) -> None:
        raise AssertionError("trained again")

    again = run(undisturbed.path.parent.parent, tiny_llama, on_step=refuse)
    assert again.manifest == undisturbed.manifest
    names = {path.name for path in again.path.iterdir()}
    assert {"checkpoint", "metrics.jsonl", "manifest.json"} <= names and not names & {".ray", ".states"}


def test_what_no_configuration_names_is_hydra_with_soft_targets(undisturbed: StepOutput, tiny_llama: Path) -> None:
    loaded = load_checkpoint(undisturbed.path / "checkpoint", Backbone.from_pretrained(tiny_llama, device="cpu"))
    assert isinstance(loaded.heads, HydraHeads) and loaded.meta.head_kind == "hydra"
    recipe = loaded.meta.training["recipe"]
    assert recipe["heads"]["kind"] == "hydra" and recipe["trainer"]["loss"]["kind"] == "soft"
    again = validate(TrainConfig, recipe, source="test")
    assert again.meaning == CONFIG.meaning  # what is recorded says the same when defaults have changed


@pytest.mark.parametrize("at", [3, 4, 10])
def test_interrupted_training_goes_on_with_the_same_numbers(
    undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path, at: int
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    on_step = stop_once(tmp_path / "marker", at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "runs", tiny_llama, on_step=on_step)
    assert losses(run(tmp_path / "runs", tiny_llama, on_step=on_step)) == losses(undisturbed)


def test_process_killed_while_training_goes_on_with_the_same_numbers(
    undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path
) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from tests.pipelines.test_train import *\n"
        "root, backbone = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "run(root / 'runs', backbone, on_step=stop_once(root / 'marker', 5, vanish))\n"
    )
    root = Path(__file__).parent.parent.parent
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(tiny_llama)], cwd=root, check=False)
    assert process.returncode == 1 and (tmp_path / "marker").exists()
    assert losses(run(tmp_path / "runs", tiny_llama)) == losses(undisturbed)


def test_diverging_training_is_named_and_writes_no_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = replace(CONFIG.trainer, lr=1e38, warmup_steps=0, grad_clip=None)
    with pytest.raises(TrainError, match=r"loss of head 0, 1 is not finite at step \d+"):
        run(tmp_path, tiny_llama, replace(CONFIG, trainer=trainer))
    assert not list(tmp_path.rglob("medusa_lm_head.safetensors"))


def test_nothing_to_learn_is_an_error_that_counts(tiny_llama: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, validation_fraction=1 - 1e-9)
    with pytest.raises(TrainError, match="45 rows kept back"):
        run(tmp_path, tiny_llama, config)


def test_truncated_vocabulary_holds_frequent_reply_tokens_and_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    heads = HeadsChoice(num_heads=2, vocabulary="truncated", truncated_vocab_size=100)
    trainer = replace(CONFIG.trainer, loss=HeadsLossConfig(kind="tokens"))  # which other tokens carry no loss of
    output = run(tmp_path, tiny_llama, replace(CONFIG, heads=heads, trainer=trainer))
    token_map = load_checkpoint(output.path / "checkpoint").heads.token_map.tolist()
    assert token_map == sorted(set(token_map)) and len(token_map) == 100 and 2 in token_map
    record = read_records(output.path / "metrics.jsonl")[-1]
    assert 0 < record["head_0/coverage"] < 1 and record["head_0/top5_accuracy"] <= record["head_0/coverage"]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_heads_of_a_quantised_backbone_belong_to_the_weights_as_published(
    undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path, bits: Literal["8bit", "4bit"]
) -> None:
    pytest.importorskip("bitsandbytes", reason="the optional extra `quantized` is not installed")
    trainer = replace(CONFIG.trainer, optimizer="adamw_8bit")
    output = run(tmp_path, tiny_llama, replace(CONFIG, quantization=bits, trainer=trainer))
    found = losses(output)
    assert found[-1] < found[0] and found[0] != pytest.approx(losses(undisturbed)[0], rel=1e-4)
    checkpoint = load_checkpoint(output.path / "checkpoint", Backbone.from_pretrained(tiny_llama, device="cpu"))
    assert checkpoint.meta.training["recipe"]["quantization"] == bits


def test_most_frequent_reply_tokens_ties_to_lower_ids() -> None:
    rows = [Row.of([9, 9, 9], [7, 5, 5]), Row.of([1], [7, 3, 4])]
    assert frequent_reply_tokens(rows, 3) == (3, 5, 7)
    assert frequent_reply_tokens(rows, 3, always=[2]) == (2, 5, 7)
    assert frequent_reply_tokens(rows, 8) == (0, 1, 2, 3, 4, 5, 6, 7)


def test_split_is_stable_and_larger_fractions_only_add() -> None:
    ids = [f"id-{number}" for number in range(2000)]
    small, large = ({id_ for id_ in ids if is_held_back(id_, fraction)} for fraction in (0.05, 0.1))
    assert small < large and 60 < len(small) < 140
    assert not any(is_held_back(id_, 0.0) for id_ in ids) and all(is_held_back(id_, 1.0) for id_ in ids)
    assert {id_ for id_ in ids if is_held_back(id_, 0.05, salt="other")} != small


def test_rows_come_by_id_and_turn_whatever_the_files(tmp_path: Path) -> None:
    distilled = make_distilled(tmp_path)
    rows, held_back = read_rows(distilled.path / "data", 0.0)
    table = pq.read_table(distilled.path / "data").to_pylist()
    expected = sorted(table, key=lambda row: (row["id"], row["turn"]))
    assert held_back == []
    assert [row.token_ids.tolist() for row in rows] == [r["prompt_ids"] + r["completion_ids"] for r in expected]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_one_killed_give_the_losses_of_one_process(
    undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path
) -> None:
    output = run(tmp_path / "runs", tiny_llama, ON_RAY, on_step=stop_once(tmp_path / "marker", 5, vanish))
    assert (tmp_path / "marker").exists()
    assert losses(output) == pytest.approx(losses(undisturbed), rel=1e-5)
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    ours, theirs = (load_checkpoint(o.path / "checkpoint", backbone).heads for o in (output, undisturbed))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_failed_run_is_resumed_by_running_it_again(undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path) -> None:
    config = replace(ON_RAY, num_workers=1, max_failures=0)
    steps_done = tmp_path / "steps"

    def on_step(step: int) -> None:
        with steps_done.open("a") as file:
            file.write(f"{step}\n")
        stop_once(tmp_path / "marker", 5, vanish)(step)

    with pytest.raises(TrainError, match="run the same command again"):
        run(tmp_path / "runs", tiny_llama, config, on_step=on_step)
    output = run(tmp_path / "runs", tiny_llama, config, on_step=on_step)
    assert losses(output) == pytest.approx(losses(undisturbed), rel=1e-5)
    first, second = steps_done.read_text().split()[:5], steps_done.read_text().split()[5:]
    assert first == [*"12345"]
    # A checkpoint counts once Ray's controller has heard of it; that of step 4 may not have come so far.
    assert second in ([*"3456789", "10"], [*"56789", "10"])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_of_two_workers_goes_on_with_one(undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path) -> None:
    """The number of workers is no part of a state: fewer machines end what more began, with the same numbers."""
    on_step = stop_once(tmp_path / "marker", 7, vanish)
    with pytest.raises(TrainError, match="run the same command again"):
        run(tmp_path / "runs", tiny_llama, replace(ON_RAY, max_failures=0), on_step=on_step)
    steps_done = tmp_path / "steps"

    def count(step: int) -> None:
        with steps_done.open("a") as file:
            file.write(f"{step}\n")

    output = run(tmp_path / "runs", tiny_llama, replace(ON_RAY, num_workers=1), on_step=count)
    assert int(steps_done.read_text().split()[0]) > 1  # from a checkpoint, not from the start
    assert losses(output) == pytest.approx(losses(undisturbed), rel=1e-5)
