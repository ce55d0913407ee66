"""Recipes one after another: trained, measured, kept; a run that was cut short goes on with the next one."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_recipes.machine import device_name, free_memory, load, make_engine, say
from benchmarks.train_recipes.measuring import calibrate, measure, own_replies, quality
from benchmarks.train_recipes.recipes import RECIPES, Recipe
from benchmarks.train_recipes.replies import Reply, read_replies, to_row
from benchmarks.train_recipes.table import write_table
from benchmarks.train_recipes.training import train_recipe
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta, save_checkpoint
from medusa.heads import DraftHeads
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.training.totals import NonFiniteLossError
from medusa.tree import TokenTree

HELD_BACK = 1000  # training prompts whose replies are kept for growing trees
# Loading and measuring of recipes that train the heads alone, or the backbone too (whose answers and distance from the
# base are then measured): assumed, until a recipe of the kind has told.
ASSUMED_BESIDE_S, ASSUMED_BESIDE_JOINT_S = 30.0, 60.0


@dataclass(frozen=True)
class Data:
    """Every reply by what it is for."""

    trained: list[Reply]
    references: list[Reply]
    kept_back: list[Reply]
    evaluation: list[Reply]
    everything: list[Reply]

    @classmethod
    def of(cls, replies: list[Reply]) -> Data:
        train = [reply for reply in replies if reply["set"] == "train"]
        if not train:
            raise SystemExit("there are no replies to training prompts; run distil first, with more time")
        numbers = sorted({reply["number"] for reply in train})
        kept = set(numbers[: min(HELD_BACK, len(numbers) // 10)])
        first_pass = train[0]["temperature"]
        return cls(
            trained=[reply for reply in train if reply["number"] not in kept],
            references=[r for r in replies if r["set"] == "train_reference" and r["number"] not in kept],
            kept_back=[r for r in train if r["number"] in kept and (r["temperature"], r["round"]) == (first_pass, 0)],
            evaluation=[reply for reply in replies if reply["set"] in ("heldout_chat", "mt_bench")],
            everything=replies,
        )


def run_recipes(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    data = Data.of(read_replies(arguments.work))
    trained, kept_back, evaluation = len(data.trained), len(data.kept_back), len(data.evaluation)
    say(f"{trained} replies to train on, {kept_back} to grow trees on, {evaluation} to measure on")
    results = arguments.work / "results"
    results.mkdir(exist_ok=True)
    for name, budget_s in budgets(arguments.recipes, arguments.budget_s):
        if why := left_out(name, budget_s, time.perf_counter() - started, arguments):
            say(f"--- {name} {why}")
            continue
        say(f"--- {name}: {RECIPES[name].about}")
        try:
            result = train_and_measure(name, RECIPES[name], data, budget_s, arguments)
        except (NonFiniteLossError, torch.OutOfMemoryError) as error:  # of this recipe; the others can do without
            told = f"{type(error).__name__}: {str(error)[:300]}"
            (results / f"{name}.failed").write_text(told + "\n")
            say(f"{name} failed: {told}")
        else:
            (results / f"{name}.json.partial").write_text(json.dumps(result, indent=2) + "\n")
            (results / f"{name}.json.partial").rename(results / f"{name}.json")
            (results / f"{name}.failed").unlink(missing_ok=True)
            say_result(result)
        write_table(arguments.work)
        free_memory()
    print(write_table(arguments.work))


def left_out(name: str, budget_s: float, elapsed: float, arguments: argparse.Namespace) -> str | None:
    """Why a recipe is not trained in this call; None if it is."""
    result, start = arguments.work / "results" / f"{name}.json", RECIPES[name].start
    if result.exists():
        return f"has a result already; delete {result} to train it again"
    if start is not None and not (heads := arguments.work / "heads" / start).exists():
        return f"is left out: {heads} is missing, with whose heads it goes on; train {start} first"
    wanted = budget_s + beside_s(name, arguments.work)
    if arguments.total_s is not None and elapsed + wanted > arguments.total_s:
        return f"is left out: {elapsed:.0f} s are gone, and with loading and measuring it may take {wanted:.0f} s more"
    return None


def beside_s(name: str, work: Path) -> float:
    """What a recipe takes beside its budget: the most that one of its kind did."""
    joint = RECIPES[name].joint is not None
    results = [json.loads(path.read_text()) for path in (work / "results").glob("*.json")]
    of_kind = [result for result in results if ("quality" in result) == joint]
    told = [result["seconds"]["all"] - result["training"]["seconds"] for result in of_kind]
    return max(told, default=ASSUMED_BESIDE_JOINT_S if joint else ASSUMED_BESIDE_S)


def budgets(asked: str, default_s: float) -> list[tuple[str, float]]:
    """("m1-soft:70,hydra", 60) -> [("m1-soft", 70.0), ("hydra", 60.0)]"""
    pairs = [item.partition(":") for item in asked.split(",")]
    if unknown := sorted({name for name, _, _ in pairs} - set(RECIPES)):
        raise SystemExit(f"no recipes {unknown}; there are {sorted(RECIPES)}")
    return [(name, float(seconds) if seconds else default_s) for name, _, seconds in pairs]


def train_and_measure(
    name: str, recipe: Recipe, data: Data, budget_s: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    started = time.perf_counter()
    backbone, tokenizer = load(arguments)
    learnt_from = [*data.trained, *(data.references if recipe.references else [])]
    heads, training = train_recipe(recipe, [to_row(reply) for reply in learnt_from], backbone, budget_s, arguments)
    heads = heads.eval().requires_grad_(False).to(backbone.dtype)
    free_memory()
    trained_s = time.perf_counter() - started
    evaluation, kept_back = data.evaluation, data.kept_back
    result: dict[str, Any] = {"recipe": name, "about": recipe.about, "start": recipe.start, "device": device_name()}
    result["training"] = training
    if recipe.joint is not None:
        base, _ = load(arguments)
        result["quality"] = quality(base, backbone, data.everything)
        say_quality(result)  # before what may still fail
        del base
        engine = make_engine(backbone, tokenizer, arguments)
        answered = own_replies(engine, [*evaluation, *kept_back], arguments.max_tokens)
        evaluation, kept_back = answered[: len(evaluation)], answered[len(evaluation) :]
    calibration, trees = calibrate(backbone, heads, kept_back)
    result["kept_back"] = {"tokens_per_step": round(calibration.tokens_per_step[-1], 4), "replies": len(kept_back)}
    result["tokens_per_step"] = measure(backbone, heads, evaluation, trees)
    result["tree"] = trees[-1].to_list()
    keep(arguments.work, name, recipe, backbone, tokenizer, heads, calibration, trees)
    return result | {"seconds": {"training": trained_s, "all": time.perf_counter() - started}}


def keep(
    work: Path,
    name: str,
    recipe: Recipe,
    backbone: Backbone,
    tokenizer: ChatTokenizer,
    heads: DraftHeads,
    calibration: Calibration,
    trees: Sequence[TokenTree],
) -> None:
    """WORK/heads/NAME, for an engine to use, and WORK/models/NAME where the backbone learned."""
    if recipe.joint is not None:
        folder = work / "models" / name
        backbone.model.save_pretrained(folder)
        tokenizer.hf.save_pretrained(folder)
        backbone = Backbone.from_pretrained(folder, device="cpu")
    belongs_to = BackboneRef(name=backbone.name, weights_digest=backbone.digest, tokenizer_digest=tokenizer.digest)
    meta = CheckpointMeta.of(heads, belongs_to, calibration=calibration, trees=[tree.to_list() for tree in trees])
    shutil.rmtree(work / "heads" / name, ignore_errors=True)  # of a run whose result was deleted
    save_checkpoint(work / "heads" / name, heads, meta)


def say_quality(result: dict[str, Any]) -> None:
    for name, found in result["quality"].items():
        say(f"{name}: KL {found['kl']:.4f}, perplexity {found['perplexity_ratio']:.4f} of the base's")


def say_result(result: dict[str, Any]) -> None:
    curve = result["training"]["curve"]
    say(f"loss {curve[0]['loss']:.3f} -> {curve[-1]['loss']:.3f}")
    for name, found in result["tokens_per_step"].items():
        say(f"{name}: {found['tokens_per_step']:.3f} tokens a step, top-1 {found['top1']}")
    seconds = result["seconds"]
    say(f"{seconds['training']:.0f} s to train, {seconds['all']:.0f} s with measuring")
