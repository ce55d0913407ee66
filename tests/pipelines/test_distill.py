"""Distillation on Ray with a tiny random backbone. Run as a script, this file is the driver that a test kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from rich.console import Console

from medusa import Engine
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta, CheckpointMismatchError, save_checkpoint
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.loops import cut_at_loop
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from pipelines.answering import Conversation, ReplyConfig
from pipelines.artifact import StepOutput
from pipelines.block_actor import BlockActor
from pipelines.distill import DistillError, distill
from pipelines.distill_config import DistillConfig
from pipelines.distilled import SCHEMA, DistilledTableError, account_for, block_path, read_endings, write_block
from pipelines.prompt_files import Prompt
from pipelines.prompts import write_prompts

LONG = Prompt("too long", ("word " * 200,))
PROMPTS = [
    *(Prompt(f"single-{i}", (f"What is {i} plus {i}?",)) for i in range(16)),
    *(Prompt(f"double-{i}", (f"Name {i} foxes.", "Why these?"), system="Be brief.") for i in range(5)),
    Prompt("triple", ("Hello", "And then?", "The end?"), category="talk"),
    Prompt("later too long", ("Hello", "word " * 200)),
    LONG,
]
CONFIG = DistillConfig(cut_loops=True, max_tokens=10, rows_per_block=4, max_batch_size=3, max_model_len=96, seed=3)


class UnrulyEngine(Engine):
    """An engine that is slow, dies, or fails, at the step that `build` says."""

    unruly: dict[str, Any]
    steps_done = 0

    def step(self) -> list[Any]:
        self.steps_done += 1
        time.sleep(self.unruly.get("step_s", 0))
        if self.steps_done == self.unruly.get("die_at") and claimed(self.unruly.get("once")):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps_done == self.unruly.get("fail_at"):
            raise ZeroDivisionError("a kernel failed")
        return super().step()


def claimed(once: str | None) -> bool:
    """True for the first of all processes that asks; always, where there is no file to ask by."""
    if once is None:
        return True
    try:
        os.close(os.open(once, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def build(backbone: str, config: DistillConfig, **unruly: Any) -> Engine:
    engine = UnrulyEngine.from_pretrained(
        backbone, max_batch_size=config.max_batch_size, max_model_len=config.max_model_len
    )
    engine.unruly = unruly
    return engine


def run(root: Path, backbone: Path, config: DistillConfig = CONFIG, **unruly: Any) -> StepOutput:
    model = SimpleNamespace(backbone=str(backbone), dtype=None, device=None)
    tracker = SimpleNamespace(step=lambda _: nullcontext(SimpleNamespace(log_metrics=lambda _: None)))
    context = SimpleNamespace(root=root, model=model, tracker=tracker, console=Console(file=StringIO()))
    root.mkdir(exist_ok=True)
    if not (root / "prompts.parquet").exists():
        write_prompts(root / "prompts.parquet", PROMPTS)
    build_engine = partial(build, str(backbone), config, **unruly) if unruly else None
    return distill(context, config, root / "prompts.parquet", build_engine=build_engine)


def rows_of(output: StepOutput) -> list[dict[str, Any]]:
    table = pq.read_table(output.path / "data")
    return sorted(table.to_pylist(), key=lambda row: (row["id"], row["turn"]))


@pytest.fixture(scope="module", autouse=True)
def this_file_travels_by_value() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> StepOutput:
    """One actor, the whole set in one batch."""
    config = DistillConfig(**{**CONFIG.__dict__, "num_actors": 1, "max_batch_size": 24})
    return run(tmp_path_factory.mktemp("undisturbed"), tiny_llama, config)


@pytest.mark.ray
def test_every_conversation_is_accounted_for(undisturbed: StepOutput) -> None:
    manifest = undisturbed.manifest
    assert manifest["counts"] == {"input": 24, "written": 23, "skipped": 0, "failed": 1}
    assert manifest["reasons"] == {"ended_early": {"prompt refused": 1}, "failed": {"prompt refused": 1}}
    (failure,) = map(json.loads, (undisturbed.path / "failed.jsonl").read_text().splitlines())
    assert failure["id"] == "too long" and "96" in failure["detail"]
    (cut,) = map(json.loads, (undisturbed.path / "incomplete.jsonl").read_text().splitlines())
    assert (cut["id"], cut["outcome"], cut["reason"]) == ("later too long", "ended_early", "prompt refused")
    rows = rows_of(undisturbed)
    assert manifest["table"]["rows"] == len(rows) == 16 + 5 * 2 + 3 + 1
    assert manifest["table"]["completion_tokens"] == sum(len(row["completion_ids"]) for row in rows)
    assert manifest["table"]["prompt_tokens"] == sum(len(row["prompt_ids"]) for row in rows)
    assert sum(manifest["table"]["finish_reasons"].values()) == len(rows)
    assert len({(row["id"], row["turn"]) for row in rows}) == len(rows)


@pytest.mark.ray
def test_the_table_is_what_training_reads(undisturbed: StepOutput, tiny_llama: Path) -> None:
    assert pq.read_table(undisturbed.path / "data").schema.equals(SCHEMA)
    assert set(ray.data.read_parquet(str(undisturbed.path / "data")).take(1)[0]) == set(SCHEMA.names)
    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    rows = {(row["id"], row["turn"]): row for row in rows_of(undisturbed)}
    for prompt in PROMPTS:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        expected = tokenizer.encode_chat([*system, {"role": "user", "content": prompt.turns[0]}])
        for turn in range(len([key for key in rows if key[0] == prompt.id])):
            row = rows[prompt.id, turn]
            assert row["prompt_ids"] == expected
            assert 1 <= len(row["completion_ids"]) <= CONFIG.max_tokens
            assert cut_at_loop(row["completion_ids"]) == len(row["completion_ids"])
            assert (row["completion_ids"][-1] in tokenizer.eos_token_ids) == (row["finish_reason"] == "stop")
            if turn + 1 < len(prompt.turns):
                ids = [*row["prompt_ids"], *row["completion_ids"]]
                expected = tokenizer.next_turn(ids, prompt.turns[turn + 1])


@pytest.mark.slow  # the run of two actors below, one of which is killed, gives the same rows
@pytest.mark.ray
def test_tokens_depend_on_no_worker_and_no_batch(
    ray_cluster: None, undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path
) -> None:
    other = run(tmp_path / "r", tiny_llama, DistillConfig(**{**CONFIG.__dict__, "num_actors": 2}))
    assert rows_of(other) == rows_of(undisturbed)
    assert other.key == undisturbed.key  # workers and batch size may change at a restart
    assert run(tmp_path / "r", tiny_llama).manifest == other.manifest  # done: nothing is answered again


@pytest.mark.ray
@pytest.mark.slow
def test_batches_stay_full_across_blocks(ray_cluster: None, tiny_llama: Path, tmp_path: Path) -> None:
    """Blocks of 4 conversations in a batch of 3, all replies of 10 tokens: block by block the last reply of each
    would step alone (4/6 of the places taken).
    """
    config = DistillConfig(**{**CONFIG.__dict__, "num_actors": 1, "max_tokens": 10, "cut_loops": False})
    stepping = run(tmp_path / "r", tiny_llama, config, step_s=0.02).manifest["stepping"]
    assert stepping["replies_stepped"] / stepping["steps"] / config.max_batch_size > 0.8


@pytest.mark.ray
def test_a_killed_actor_costs_and_doubles_nothing(
    ray_cluster: None, undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path
) -> None:
    config = DistillConfig(**{**CONFIG.__dict__, "num_actors": 2})
    marker = tmp_path / "died"
    output = run(tmp_path / "r", tiny_llama, config, step_s=0.01, die_at=25, once=str(marker))
    assert marker.exists()
    assert rows_of(output) == rows_of(undisturbed)
    assert output.key == undisturbed.key
    assert output.manifest["counts"] == undisturbed.manifest["counts"]
    assert run(tmp_path / "r", tiny_llama).manifest == output.manifest  # done: nothing is answered again


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_is_resumed(
    ray_cluster: None, undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path
) -> None:
    """One of two actors is killed, then the driver; the next run answers only what is missing."""
    root = tmp_path / "r"
    with (tmp_path / "log").open("wb") as log:
        arguments = [sys.executable, __file__, str(root), str(tiny_llama), str(tmp_path / "died")]
        driver = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
    try:
        early = wait_for_blocks(root, 2, driver)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(20)
        end_session(driver.pid)
    assert (tmp_path / "died").exists()
    assert not list(root.glob("distill/*/manifest.json"))
    resumed = run(root, tiny_llama, DistillConfig(**{**CONFIG.__dict__, "num_actors": 2}))
    assert rows_of(resumed) == rows_of(undisturbed)
    assert resumed.manifest["counts"] == undisturbed.manifest["counts"]
    assert {file: file.stat().st_ino for file in early} == early  # what was there was not answered again
    names = sorted(file.name for file in (resumed.path / "data").iterdir())
    assert names == [f"block-{i:05d}.parquet" for i in range(6)]


@pytest.mark.ray
def test_an_engine_failure_stops_the_run(ray_cluster: None, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="a kernel failed"):
        run(tmp_path / "r", tiny_llama, fail_at=3)
    assert not list((tmp_path / "r").glob("distill/*/manifest.json"))


def test_nothing_but_failures_stops_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    config = DistillConfig(**{**CONFIG.__dict__, "num_actors": 0, "max_model_len": 12})
    with pytest.raises(DistillError, match=r"of 24 conversations failed, more than distill\.max_failed=0\.5; the l"):
        run(tmp_path / "r", tiny_llama, config)


@pytest.mark.slow
@pytest.mark.ray
def test_a_block_that_always_kills_its_worker_stops_the_run(
    ray_cluster: None, tiny_llama: Path, tmp_path: Path
) -> None:
    config = DistillConfig(**{**CONFIG.__dict__, "num_actors": 1, "max_attempts": 2})
    with pytest.raises(Exception, match="has ended its worker 2 times without an exception"):
        run(tmp_path / "r", tiny_llama, config, die_at=2)


@pytest.fixture(scope="module")
def earlier_heads(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads that start as the LM head, which a random model's next tokens agree with now and then."""
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    sizes = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, num_heads=2)
    heads = MedusaHeads.initialised(sizes, backbone.lm_head_weight)
    reference = BackboneRef(name=backbone.name, weights_digest=backbone.digest)
    trees = [[], [[k] for k in range(8)] + [[0, k] for k in range(7)]]
    calibration = Calibration(accuracy=[[0.1] * 8] * 2, num_positions=1)
    meta = CheckpointMeta(heads=sizes, backbone=reference, trees=trees, calibration=calibration)
    folder = tmp_path_factory.mktemp("heads") / "earlier"
    save_checkpoint(folder, heads, meta)
    return folder


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_heads_of_an_earlier_version_change_no_token(
    tiny_llama: Path, earlier_heads: Path, tmp_path: Path, temperature: float
) -> None:
    settings = {**CONFIG.__dict__, "num_actors": 0, "temperature": temperature, "cut_loops": False}
    plain = run(tmp_path / "plain", tiny_llama, DistillConfig(**settings))
    faster = DistillConfig(**settings | {"heads": str(earlier_heads), "speculation": 16})
    output = run(tmp_path / "faster", tiny_llama, faster)
    assert rows_of(output) == rows_of(plain)
    assert output.key == plain.key
    assert output.manifest["stepping"]["tokens"] == plain.manifest["stepping"]["tokens"]
    assert output.manifest["stepping"]["replies_stepped"] < plain.manifest["stepping"]["replies_stepped"]


def test_without_ray_the_tokens_are_the_same(undisturbed: StepOutput, tiny_llama: Path, tmp_path: Path) -> None:
    """With two processes to the engine as well, which end with the step."""
    here = run(tmp_path / "r", tiny_llama, DistillConfig(**{**CONFIG.__dict__, "num_actors": 0, "tensor_parallel": 2}))
    assert not torch.distributed.is_initialized()
    assert rows_of(here) == rows_of(undisturbed)
    assert here.manifest["counts"] == undisturbed.manifest["counts"]


def test_each_temperature_is_a_run_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    outputs = [
        run(tmp_path / "r", tiny_llama, DistillConfig(**{**CONFIG.__dict__, "num_actors": 0, "temperature": t}))
        for t in (0.0, 1.0)
    ]
    assert outputs[0].key != outputs[1].key and rows_of(outputs[0]) != rows_of(outputs[1])


def test_heads_of_another_backbone_are_refused_before_any_work(
    earlier_heads: Path, make_backbone_dir: Any, tmp_path: Path
) -> None:
    other = make_backbone_dir("llama", seed=4)
    with pytest.raises(CheckpointMismatchError, match=r"distill\.heads=.* belongs to"):
        run(tmp_path / "r", other, DistillConfig(**{**CONFIG.__dict__, "heads": str(earlier_heads)}))
    assert not (tmp_path / "r" / "distill").exists()


def wait_for_blocks(root: Path, number: int, driver: subprocess.Popen[bytes]) -> dict[Path, int]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        files = list(root.glob("distill/*/data/*.parquet"))
        if len(files) >= number:
            return {file: file.stat().st_ino for file in files}
        assert driver.poll() is None, (root.parent / "log").read_text()[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"no {number} blocks in time: {(root.parent / 'log').read_text()[-3000:]}")


def end_session(leader: int) -> None:
    """Ends what the dead driver's session has left of its own Ray."""
    left = subprocess.run(["pgrep", "-s", str(leader)], capture_output=True, text=True).stdout.split()
    for pid in map(int, left):
        os.kill(pid, signal.SIGKILL)


def conversation(identity: str, *turns: str, reason: str | None = None) -> Conversation:
    from pipelines.answering import Turn

    made = Conversation(Prompt(identity, ("q",) * max(1, len(turns))))
    made.turns = [Turn([1, 2], [3, 4], turn) for turn in turns]
    made.end(reason, "detail" if reason else "")
    return made


def test_a_block_file_holds_rows_and_account(tmp_path: Path) -> None:
    block = [
        conversation("a", "stop", "length"),
        conversation("b", reason="length"),
        conversation("c", reason="prompt refused"),
        conversation("d", "stop", reason="length"),
    ]
    write_block(block_path(tmp_path, 0), tmp_path, block)
    assert [e["outcome"] for e in read_endings(block_path(tmp_path, 0))] == ["skipped", "failed", "written"]
    account = account_for(tmp_path, [[c.prompt for c in block]])
    assert account.manifest() == {
        "counts": {"input": 4, "written": 2, "skipped": 1, "failed": 1},
        "reasons": {"ended_early": {"length": 1}, "failed": {"prompt refused": 1}, "skipped": {"length": 1}},
        "table": {
            "rows": 3,
            "prompt_tokens": 6,
            "completion_tokens": 6,
            "finish_reasons": {"stop": 2, "length": 1},
        },
    }
    assert account.failures == [{"id": "c", "reason": "prompt refused", "detail": "detail"}]
    assert [file.name for file in tmp_path.iterdir()] == ["block-00000.parquet"]


def test_a_block_without_rows_is_a_block(tmp_path: Path) -> None:
    block = [conversation("a", reason="length")]
    write_block(block_path(tmp_path, 0), tmp_path, block)
    assert account_for(tmp_path, [[c.prompt for c in block]]).manifest()["counts"]["skipped"] == 1


def test_a_block_in_place_is_not_replaced(tmp_path: Path) -> None:
    path = block_path(tmp_path, 0)
    write_block(path, tmp_path, [conversation("a", "stop")])
    before = path.read_bytes()
    write_block(path, tmp_path, [conversation("a", "length")])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("written", "asked", "message"),
    [
        ([conversation("a", "stop")], ["a", "b"], "not the 2 prompts"),
        ([conversation("a", "stop"), conversation("b", "stop")], ["a"], "not the 1 prompts"),
        ([conversation("a", "stop"), conversation("a", "stop")], ["a"], "holds a turn twice"),
        ([conversation("a", "stop"), conversation("a", reason="length")], ["a"], "not the 1 prompts"),
    ],
)
def test_a_wrong_table_is_noticed(tmp_path: Path, written: list[Conversation], asked: list[str], message: str) -> None:
    write_block(block_path(tmp_path, 0), tmp_path, written)
    with pytest.raises(DistilledTableError, match=message):
        account_for(tmp_path, [[Prompt(identity, ("q",)) for identity in asked]])


def test_a_foreign_file_is_noticed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), block_path(tmp_path, 0))
    with pytest.raises(DistilledTableError, match="was not written by the distil step"):
        account_for(tmp_path, [[Prompt("a", ("q",))]])


def test_an_attempt_too_many_is_refused(tmp_path: Path) -> None:
    actor = BlockActor(SimpleNamespace, ReplyConfig(), tmp_path, max_attempts=2)
    for _ in range(2):
        actor._count_attempt(5)
    with pytest.raises(RuntimeError, match="block 5 has ended its worker 2 times"):
        actor._count_attempt(5)


def main(root: str, backbone: str, marker: str) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=256 * 2**20)
    config = DistillConfig(**{**CONFIG.__dict__, "num_actors": 2})
    run(Path(root), Path(backbone), config, step_s=0.1, die_at=8, once=marker)


if __name__ == "__main__":
    main(*sys.argv[1:])
