"""One recipe trained for as many steps as its budget allows."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.train_recipes.machine import say, synchronise
from benchmarks.train_recipes.recipes import Recipe
from medusa.checkpoint import HEADS
from medusa.heads import DraftHeads, HeadsConfig
from medusa.model import Backbone
from medusa.training.batch import Row
from medusa.training.schedule import TrainerConfig
from medusa.training.trainer import Trainer

CHUNK = 16384  # rows of logits at once: all of most batches, which then ask the teacher once for all heads
RECORDS = 40  # of a run, for its curves
TIMED_BLOCK, TIMED_SHARE = 4, 0.04  # steps between two looks at the clock, and the budget's share that is timed
FILL_TOKENS = 32768  # of a forward that only remembers hidden states
TOO_LATE = 1.3  # times the budget: stop whatever the schedule says


def train_recipe(
    recipe: Recipe, rows: list[Row], backbone: Backbone, budget_s: float, arguments: argparse.Namespace
) -> tuple[DraftHeads, dict[str, Any]]:
    """Trains in place; a joint recipe's backbone ends merged. The budget includes remembering hidden states and the
    first steps, which tell how many more fit."""
    started = time.perf_counter()
    trainer = make_trainer(recipe, rows, backbone, arguments)
    if trainer.memory is not None:
        trainer.memory.fill(FILL_TOKENS)
    synchronise()
    filled_s = time.perf_counter() - started
    planned = trainer.total_steps
    curve = run_steps(trainer, started, budget_s)
    seconds = time.perf_counter() - started
    if trainer.adaptation is not None:
        merge(trainer, backbone)
    told = {
        "rows": len(trainer.rows),
        "planned_steps": planned,
        "steps": trainer.step,
        "epochs": round(trainer.step / trainer.sampler.steps_per_epoch, 2),
        "seconds": round(seconds, 1),
        "seconds_of_hidden_states": round(filled_s, 1),
        "tokens": trainer.tokens_seen,
        "curve": curve,
    }
    return trainer.heads, told


def make_trainer(recipe: Recipe, rows: list[Row], backbone: Backbone, arguments: argparse.Namespace) -> Trainer:
    changes = {key: json.loads(value) for key, value in (item.split("=") for item in arguments.set)}
    numbers = {"max_length": arguments.max_model_len, "chunk_size": CHUNK, "bucket_batches": 32}
    config = TrainerConfig(**(numbers | recipe.trainer | changes), loss=recipe.loss, joint=recipe.joint)
    shape = HeadsConfig(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=recipe.num_heads,
        num_layers=recipe.num_layers,
        vocabulary=recipe.vocabulary,  # type: ignore[arg-type]
    )
    heads = HEADS[recipe.kind].initialised(shape, backbone.lm_head_weight)
    if recipe.start is not None:
        begin_with(heads, arguments.work / "heads" / recipe.start)
    return Trainer(backbone, heads, rows, config)


def begin_with(heads: DraftHeads, folder: Path) -> None:
    weights = load_file(folder / "medusa_lm_head.safetensors")
    heads.load_state_dict({name.removeprefix(f"{heads.kind}."): tensor for name, tensor in weights.items()})


def run_steps(trainer: Trainer, started: float, budget_s: float) -> list[dict[str, float]]:
    """To the end of the schedule, which is set once the first steps told how long one takes."""
    pace = Pace(budget_s * TIMED_SHARE)
    every = TIMED_BLOCK  # until the pace is known: a record waits for the device, which is no part of a step
    curve: list[dict[str, float]] = []
    while not trainer.finished:
        metrics = trainer.train_step(trainer.next_batches())
        if step_s := pace.after(metrics.step):
            fitting = metrics.step + int((budget_s - (time.perf_counter() - started)) / step_s)
            trainer.total_steps = max(min(trainer.total_steps, fitting), metrics.step)  # the rates follow it
            every = max(trainer.total_steps // RECORDS, 1)
            say(f"{step_s * 1e3:.1f} ms a step; {trainer.total_steps} steps fit the budget")
        if metrics.step == 1 or metrics.step % every == 0 or trainer.finished:
            curve.append(trainer.take_record(metrics) | {"seconds": round(time.perf_counter() - started, 2)})
            if pace.known and not trainer.finished and curve[-1]["seconds"] > TOO_LATE * budget_s:
                say(f"stopped at step {metrics.step} of {trainer.total_steps}: steps became slower than the first")
                break
    synchronise()
    return curve


class Pace:
    """Seconds a step, from the first ones: as many blocks of steps as fill `seconds`, the warm-up not counted."""

    def __init__(self, seconds: float) -> None:
        self.known = False
        self._seconds = seconds
        self._began = 0.0

    def after(self, step: int) -> float | None:
        """The answer, once: None before and after."""
        if self.known or step % TIMED_BLOCK:
            return None
        synchronise()
        if step == TIMED_BLOCK:
            self._began = time.perf_counter()
            return None
        elapsed = time.perf_counter() - self._began
        self.known = elapsed >= self._seconds
        return elapsed / (step - TIMED_BLOCK) if self.known else None


def merge(trainer: Trainer, backbone: Backbone) -> None:
    """The adapters into the weights, in place; full fine-tuning back to the type it is served in."""
    from peft.tuners.lora import LoraLayer

    model = backbone.model.eval()
    with torch.no_grad():
        for parent in list(model.modules()):
            for child_name, layer in list(parent.named_children()):
                if isinstance(layer, LoraLayer):
                    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
                    weight = layer.base_layer.weight
                    weight.copy_((weight.float() + layer.scaling["default"] * (b @ a)).to(weight.dtype))
                    setattr(parent, child_name, layer.base_layer)
    model.gradient_checkpointing_disable()
    model.to(trainer.served_dtype).requires_grad_(False)
