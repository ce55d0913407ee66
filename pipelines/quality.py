"""Is the model of a joint training still the base? Measured for the gate, before speed is.

<step dir>/quality.json   KL and perplexity on replies kept back from training, and task accuracy where a task is named

The base's own replies, kept back from training, are read by both models (medusa/quality.py). A task is a file of JSON
lines with `prompt` and `answer`, such as GSM8K: both models answer greedily, and the last number counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from medusa import Engine, SamplingParams
from medusa.config import strict
from medusa.digests import file_sha256
from medusa.model import Backbone
from medusa.quality import Row, compare, last_number
from medusa.tokenizer import ChatTokenizer
from pipelines.artifact import StepOutput, open_step
from pipelines.split import is_held_back

if TYPE_CHECKING:
    from pipelines.run import PipelineConfig, RunContext

STEP_VERSION = 1
QUALITY = "quality.json"


class QualityError(RuntimeError):
    """There is nothing to measure quality on; the message says why and what to do."""


@strict
@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """`max_rows` replies are compared. `task`: a file of questions with numbers for answers, of which the first
    `task_limit` are asked; null: no task."""

    max_rows: int = 500
    task: str | None = None
    task_limit: int = 200
    task_max_tokens: int = 256
    max_batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_rows", "task_limit", "task_max_tokens", "max_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: float


def measure_quality(base: RunContext, served: RunContext, config: PipelineConfig, distilled: StepOutput) -> StepOutput:
    """Runs the step: `base` names the model before joint training, `served` the one after it."""
    settings, held_back = config.quality, config.train.validation_fraction
    inputs = {
        "distill": distilled.digest,
        "base": base.backbone.digest,
        "backbone": served.backbone.digest,
        "held_back": str(held_back),
    }
    if settings.task is not None:
        inputs["task"] = file_sha256(Path(settings.task))
    with open_step(base.root, "quality", STEP_VERSION, settings, inputs) as step, base.tracker.step(step) as log:
        if step.complete:
            return step.output
        rows = replies_kept_back(distilled, held_back, settings.max_rows)
        closeness = compare(base.backbone, served.backbone, rows)
        result: dict[str, Any] = asdict(closeness) | {"perplexity_ratio": closeness.perplexity_ratio}
        if settings.task is not None:
            questions = read_questions(Path(settings.task))[: settings.task_limit]
            for name, context in (("base_task_accuracy", base), ("task_accuracy", served)):
                result[name] = task_accuracy(context.backbone, context.model.backbone, questions, settings)
        (step.path / QUALITY).write_text(json.dumps(result, indent=2) + "\n")
        log.log_metrics({name: float(value) for name, value in result.items()})
        return step.commit({"counts": {"rows": len(rows), "positions": closeness.positions}})


def gate_fields(quality: StepOutput) -> dict[str, Any]:
    """What the gate asks of a changed backbone (registry.gate.Measurement)."""
    result = json.loads((quality.path / QUALITY).read_text())
    names = ("kl", "perplexity", "base_perplexity", "task_accuracy", "base_task_accuracy")
    return {"backbone_changed": True} | {name: result.get(name) for name in names}


def replies_kept_back(distilled: StepOutput, held_back: float, max_rows: int) -> list[Row]:
    columns = ["id", "turn", "prompt_ids", "completion_ids"]
    table = pq.read_table(distilled.path / "data", columns=columns).sort_by(
        [("id", "ascending"), ("turn", "ascending")]
    )
    kept = [row for row in table.to_pylist() if is_held_back(row["id"], held_back)]
    if not kept:
        raise QualityError(
            f"no row of {distilled.path} was kept back from training; raise train.validation_fraction ({held_back})"
        )
    return [(row["prompt_ids"], row["completion_ids"]) for row in kept[:max_rows]]


def read_questions(path: Path) -> list[Question]:
    """QualityError names the line that lacks a prompt or a number in its answer."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        answer = last_number(str(row.get("answer", "")))
        if not row.get("prompt") or answer is None:
            raise QualityError(
                f"{path}:{number} needs a `prompt` and an `answer` with a number in it, got {line[:100]}"
            )
        questions.append(Question(row["prompt"], answer))
    if not questions:
        raise QualityError(f"{path} holds no question")
    return questions


def task_accuracy(backbone: Backbone, folder: str, questions: Sequence[Question], config: QualityConfig) -> float:
    """Share of questions whose greedy reply ends on the right number."""
    tokenizer = ChatTokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question.prompt}]) for question in questions]
    longest = max(map(len, prompts)) + config.task_max_tokens
    engine = Engine(
        backbone,
        tokenizer,
        max_batch_size=min(config.max_batch_size, len(prompts)),
        max_model_len=min(longest, backbone.max_positions),
        speculation="off",
    )
    replies = engine.generate(prompts, SamplingParams(max_tokens=config.task_max_tokens, temperature=0.0))
    right = [last_number(reply.text) == question.answer for reply, question in zip(replies, questions, strict=True)]
    return sum(right) / len(right)
