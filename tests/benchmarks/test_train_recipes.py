"""The comparison of training recipes on a tiny model: every recipe is valid, budgets hold, what is there is kept."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.train_recipes import __main__ as command
from benchmarks.train_recipes import distil, run
from benchmarks.train_recipes.recipes import RECIPES
from benchmarks.train_recipes.replies import add_replies, key_of, read_replies
from benchmarks.train_recipes.run import Data, budgets
from benchmarks.train_recipes.table import table, targets
from benchmarks.train_recipes.training import Pace, run_steps
from medusa.checkpoint import HEADS, load_checkpoint
from medusa.heads import HeadsConfig
from medusa.model import Backbone
from medusa.training.schedule import TrainerConfig
from medusa.training.totals import NonFiniteLossError


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_configuration(name: str) -> None:
    recipe = RECIPES[name]
    TrainerConfig(**recipe.trainer, loss=recipe.loss, joint=recipe.joint)
    HeadsConfig(hidden_size=8, vocab_size=8, num_heads=recipe.num_heads, vocabulary=recipe.vocabulary)
    assert recipe.kind in HEADS
    if recipe.start is not None:  # it goes on with heads of its own shape
        first = RECIPES[recipe.start]
        shape = (recipe.kind, recipe.num_heads, recipe.num_layers, recipe.vocabulary)
        assert (first.kind, first.num_heads, first.num_layers, first.vocabulary) == shape


def test_budgets_are_read_and_unknown_recipes_named() -> None:
    assert budgets("m1-soft:70,hydra", 60.0) == [("m1-soft", 70.0), ("hydra", 60.0)]
    with pytest.raises(SystemExit, match=r"no recipes \['m9'\]"):
        budgets("m1-soft,m9:3", 60.0)


def test_the_pace_is_told_once_enough_was_timed() -> None:
    told = [Pace(0.0).after(step) for step in (1, 4)]
    assert told == [None, None]  # warm-up
    pace = Pace(0.0)
    answers = [pace.after(step) for step in range(1, 20)]
    assert [step for step, answer in enumerate(answers, 1) if answer is not None] == [8]
    slow = Pace(1e9)
    assert all(slow.after(step) is None for step in range(1, 20)) and not slow.known


def test_few_steps_wait_for_a_record_while_the_pace_is_measured() -> None:
    class Steps:
        step, total_steps = 0, 10
        finished = property(lambda self: self.step == self.total_steps)

        def next_batches(self) -> None: ...

        def train_step(self, batches: None) -> SimpleNamespace:
            self.step += 1
            return SimpleNamespace(step=self.step)

        def take_record(self, metrics: SimpleNamespace) -> dict[str, float]:
            return {"step": metrics.step}

    curve = run_steps(Steps(), time.perf_counter(), budget_s=1e9)
    assert [record["step"] for record in curve] == [1, 4, 8, 10]


def reply(set: str, number: int, temperature: float | None = 0.7, round: int = 0) -> dict:
    place = {"set": set, "temperature": temperature, "number": number, "round": round}
    return place | {"prompt_ids": [1, 2], "reply_ids": [3, 4, 5]}


def test_replies_are_only_added_to_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    add_replies(tmp_path, [reply("train", 0), reply("train", 1)])
    file = tmp_path / "replies.jsonl"
    file.write_text(file.read_text()[:-5])
    assert [key_of(r) for r in read_replies(tmp_path)] == [("train", 0.7, 0, 0)]
    add_replies(tmp_path, [reply("train", 1)])
    assert [r["number"] for r in read_replies(tmp_path)] == [0, 1]


def test_prompts_kept_back_are_in_no_form_trained_on() -> None:
    replies = [reply("train", n, temperature) for temperature in (0.7, 1.0) for n in range(40)]
    replies += [reply("train_reference", n, None) for n in range(40)] + [reply("mt_bench", 0, 0.0)]
    data = Data.of(replies)
    kept = {r["number"] for r in data.kept_back}
    assert len(data.kept_back) == len(kept) == 4 and {r["temperature"] for r in data.kept_back} == {0.7}
    assert not kept & {r["number"] for r in data.trained + data.references}
    assert len(data.trained) == 72 and len(data.references) == 36 and len(data.evaluation) == 1
    with pytest.raises(SystemExit, match="no replies to training prompts"):
        Data.of([reply("mt_bench", 0, 0.0)])


def result(name: str, cold: float, warm: float, perplexities: tuple[float, ...] = (), kept: float = 2.0) -> dict:
    tokens = {"heldout_chat@0.0": {"tokens_per_step": cold}, "heldout_chat@1.0": {"tokens_per_step": warm}}
    quality = {str(place): {"perplexity_ratio": ratio} for place, ratio in enumerate(perplexities)}
    return {"recipe": name, "kept_back": {"tokens_per_step": kept}, "tokens_per_step": tokens} | (
        {"quality": quality} if perplexities else {}
    )


def test_targets_are_decided_by_the_best_recipe_of_each_kind() -> None:
    results = [result("m1-soft", 2.3, 1.71), result("m1-soft-cold", 2.25, 1.6, kept=2.1), result("hydra", 2.6, 2.0)]
    results += [result("m2-full", 3.1, 2.0, (1.001, 1.03)), result("m2-lora", 2.5, 1.9, (0.99, 1.004))]
    told = "\n".join(targets(results))
    assert "Medusa-1, heldout_chat@0.0: 2.250 (m1-soft-cold), target 2.2: reached" in told
    assert "Medusa-1, heldout_chat@1.0: 1.600 (m1-soft-cold), target 1.7: missed" in told  # the best on other rows
    assert "2.500 (m2-lora, perplexity +0.40% at most), target 2.7: missed" in told  # m2-full is not the base any more
    assert "Hydra over Medusa-1: 1.156 (hydra over m1-soft-cold), target 1.2: missed" in told
    assert "closest m2-full, +3.00%: missed" in targets(results[3:4])[0]
    old = {key: value for key, value in results[0].items() if key != "kept_back"}
    assert targets([old]) == ["- m1-soft: not judged, its result has no figure on rows kept back; train it again"]
    assert targets([result("m2-full", 3.1, 2.0) | {"quality": {}}]) == []  # no set to measure its distance on


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_recipes", *map(str, arguments)])
    command.main()


@pytest.fixture
def sets(tmp_path: Path) -> list[object]:
    turns = [[{"role": "user", "content": f"foxes {n}"}, {"role": "assistant", "content": "Two."}] for n in range(14)]
    for name, rows in (("train", turns[:12]), ("heldout", turns[11:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (tmp_path / "mt.jsonl").write_text(json.dumps({"turns": ["Write of foxes.", "Again."]}) + "\n")
    files = ["--train", tmp_path / "train.jsonl", "--heldout", tmp_path / "heldout.jsonl"]
    return [*files, "--mt-bench", tmp_path / "mt.jsonl", "--temperatures", "0,1"]


COMMON = ["--device", "cpu", "--max-tokens", "12", "--max-model-len", "96", "--batch-size", "8"]


def test_distillation_stops_at_its_budget_and_goes_on_where_it_stopped(
    tiny_llama: Path, tmp_path: Path, sets: list[object], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    work = tmp_path / "work"
    call(monkeypatch, "distil", tiny_llama, work, *sets, *COMMON, "--budget-s", "1e-9", "--wave", "4")
    assert "the budget of 1e-09 s is spent; 18 replies are left" in capsys.readouterr().err
    assert {r["set"] for r in read_replies(work)} == {"heldout_chat_reference", "train_reference"}
    call(monkeypatch, "distil", tiny_llama, work, *sets, *COMMON, "--limit", "6")
    counted = len(read_replies(work))
    call(monkeypatch, "distil", tiny_llama, work, *sets, *COMMON, "--train-temperatures", "0.7,0.7,1.0")
    replies = read_replies(work)
    assert f"{counted} replies are there, 30 are wanted" in capsys.readouterr().err
    keys = [key_of(r) for r in replies]
    assert len(set(keys)) == len(keys)  # nothing was asked twice
    of_train = {key[1:] for key in keys if key[0] == "train"}
    assert of_train == {(t, n, again) for t, again in ((0.7, 0), (0.7, 1), (1.0, 0)) for n in range(12)}
    by_key = {key_of(r): r["reply_ids"] for r in replies}
    assert any(by_key["train", 0.7, n, 0] != by_key["train", 0.7, n, 1] for n in range(12))
    # the prompt that also stands in the training set is dropped
    assert {key[1:3] for key in keys if key[0] == "heldout_chat"} == {(t, n) for t in (0.0, 1.0) for n in range(2)}


def trained(name: str, beside_s: float) -> dict:
    record = {"loss": 1.0, "seconds": 1.0, "head_0/top1_accuracy": 0.5}
    training = {"rows": 1, "epochs": 1.0, "seconds": 10.0, "curve": [record, record]}
    found = {"tokens_per_step": 2.0, "top1": [0.5]}
    seconds = {"training": 10.0, "all": 10.0 + beside_s}
    return {"recipe": name, "about": "", "device": "CPU", "training": training, "seconds": seconds} | {
        "tokens_per_step": {"heldout_chat@0.0": found, "heldout_chat@1.0": found}
    }


def test_a_recipe_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def train_and_measure(name: str, *_: object) -> dict:
        if name == "m1-soft-fast":
            raise NonFiniteLossError(7, [1])
        if name == "hydra-soft-4layers":
            raise torch.OutOfMemoryError("2 GiB wanted")
        return trained(name, beside_s=80.0)

    add_replies(tmp_path, [reply("train", n) for n in range(20)])
    monkeypatch.setattr(run, "train_and_measure", train_and_measure)
    failing = "m1-soft-fast,m2-full,hydra-soft-4layers"
    call(monkeypatch, "train", "backbone", tmp_path, "--recipes", f"{failing},hydra")
    told = capsys.readouterr()
    assert "m2-full is left out" in told.err and "train m1-soft-4layers first" in told.err
    assert [path.name for path in (tmp_path / "results").glob("*.json")] == ["hydra.json"]
    written = (tmp_path / "results.md").read_text()
    assert told.out == written + "\n" and "- hydra-soft-4layers failed: OutOfMemoryError: 2 GiB wanted" in written
    assert "- m1-soft-fast failed: NonFiniteLossError: " in written
    monkeypatch.setattr(run, "train_and_measure", lambda name, *_: trained(name, beside_s=80.0))
    call(monkeypatch, "train", "backbone", tmp_path, "--recipes", failing)
    assert "failed" not in (tmp_path / "results.md").read_text()


def test_the_seconds_of_both_stages_stand_in_the_table() -> None:
    second = trained("m2-full", beside_s=1.0) | {"start": "m1-soft-4layers"}
    rows = table([trained("m1-soft-4layers", beside_s=1.0), second])[2:]
    assert "| 1 | 10 |" in rows[0] and "| 1 | 10 + 10 |" in rows[1]
    assert "| 1 | ? + 10 |" in table([second])[2]  # the first stage's result was deleted


def test_what_a_recipe_takes_beside_its_budget_is_counted(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert run.beside_s("m1-long", tmp_path) == 30.0 and run.beside_s("m2-full", tmp_path) == 60.0
    for name, beside_s in (("m1-soft", 80.0), ("hydra", 20.0)):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(trained(name, beside_s)))
    assert run.beside_s("m1-long", tmp_path) == 80.0 and run.beside_s("m2-full", tmp_path) == 60.0
    asked = argparse.Namespace(work=tmp_path, total_s=200.0)
    assert run.left_out("m1-long", 60.0, 59.0, asked) is None
    assert "may take 140 s more" in (run.left_out("m1-long", 60.0, 61.0, asked) or "")


def test_a_budget_is_held_by_the_last_wave_not_by_the_one_that_compiles(
    tiny_llama: Path, tmp_path: Path, sets: list[object], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    clock = [0.0]

    def answer(engine: object, asked: list, max_tokens: int) -> list[dict]:
        clock[0] += 60.0 if clock[0] == 0.0 else 5.0
        return [reply(ask.set, ask.number, ask.temperature, ask.round) for ask in asked]

    monkeypatch.setattr(distil, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(distil, "answer", answer)
    call(monkeypatch, "distil", tiny_llama, tmp_path, *sets, *COMMON, "--budget-s", "122", "--wave", "4")
    told = capsys.readouterr().err  # a third wave like the first would not have fitted
    assert "18 of 18 replies" in told and "is spent" not in told


@pytest.mark.slow
def test_recipes_are_trained_tabulated_and_not_trained_again(
    tiny_llama: Path, tmp_path: Path, sets: list[object], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    work = tmp_path / "work"
    call(monkeypatch, "distil", tiny_llama, work, *sets, *COMMON)
    call(monkeypatch, "train", tiny_llama, work, "--recipes", "m2-full:0.3", *COMMON)
    assert "train m1-soft-4layers first" in capsys.readouterr().err
    recipes = ["--recipes", "m1-soft-4layers,hydra,m2-full,m2-lora", "--budget-s", "0.5", "--set", "batch_size=4"]
    call(monkeypatch, "train", tiny_llama, work, *recipes, *COMMON)
    results = {result["recipe"]: result for result in json.loads((work / "results.json").read_text())}
    assert set(results) == {"m1-soft-4layers", "hydra", "m2-full", "m2-lora"}
    for name, found in results.items():
        assert set(found["tokens_per_step"]) == {"heldout_chat@0.0", "heldout_chat@1.0", "mt_bench@0.0", "mt_bench@1.0"}
        assert all(of_set["tokens_per_step"] >= 1 for of_set in found["tokens_per_step"].values())
        joint = name.startswith("m2")
        backbone = Backbone.from_pretrained(work / "models" / name if joint else tiny_llama, device="cpu")
        assert load_checkpoint(work / "heads" / name, backbone).meta.calibration.num_positions > 0
        assert ("quality" in found) == joint
    assert results["m2-lora"]["quality"]["heldout_chat_reference@None"]["kl"] >= 0
    assert results["m2-full"]["training"]["rows"] > results["hydra"]["training"]["rows"]  # with references
    assert (work / "curves.png").stat().st_size > 1000
    assert (work / "results.md").read_text().count("\n| ") == 1 + 4
    before = (work / "results" / "hydra.json").read_bytes()
    capsys.readouterr()
    call(monkeypatch, "train", tiny_llama, work, "--recipes", "hydra,m1-long", "--total-s", "0", *COMMON)
    told = capsys.readouterr().err
    assert "hydra has a result already" in told and "m1-long is left out" in told
    assert (work / "results" / "hydra.json").read_bytes() == before
