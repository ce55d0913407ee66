"""The evaluate step: Medusa beside plain decoding, in one process, on prompts that nothing was trained on.

<step dir>/evaluation.json   what the gate judges (registry.gate.EvaluationSummary)
<step dir>/replies.jsonl     each prompt's reply, its accepted tokens by step, and its category

pipelines/bench.py does the measuring.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa import Completion, StepTimes
from medusa.config import strict, to_dict
from medusa.digests import directory_digest
from medusa.tokenizer import ChatTokenizer
from pipelines.artifact import StepOutput, open_step
from pipelines.bench import Bench, BenchConfig, EvaluationPrompt
from pipelines.calibrate import CHECKPOINT, load_calibration
from pipelines.prompts import PromptsConfig, prepare_prompts
from registry.gate import EvaluationSummary, Measurement

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 2
EVALUATION = "evaluation.json"
REPLIES = "replies.jsonl"


@strict
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(BenchConfig):
    """What is measured (BenchConfig), and on which prompts: conversations of which the first turn is answered."""

    prompts: PromptsConfig


def evaluate(
    context: RunContext, config: EvaluateConfig, calibrated: StepOutput, champion: Path | None = None
) -> StepOutput:
    """Runs the step on the calibrated checkpoint, and on the current champion's folder where there is one."""
    prompts = prepare_prompts(context, config.prompts)
    inputs = {"calibrate": calibrated.digest, "prompts": prompts.digest}
    if champion is not None:
        inputs["champion"] = directory_digest(champion)
    with (
        open_step(context.root, "evaluate", STEP_VERSION, config, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        bench = Bench(context, config, prompts)
        times = StepTimes.from_dict(load_calibration(calibrated))
        candidate, replies = bench.measure(calibrated.path / CHECKPOINT, times)
        rival = None
        if champion is not None and inputs["champion"] != candidate.checkpoint_digest:
            rival, _ = bench.measure(champion, times)
        summary = EvaluationSummary(**{**vars(candidate), "champion": rival})
        (step.path / EVALUATION).write_text(json.dumps(to_dict(summary), indent=2) + "\n")
        _write_replies(step.path / REPLIES, bench.prompts, replies, bench.tokenizer)
        log.log_metrics(_metrics(candidate))
        return step.commit({"counts": {"prompts": len(bench.prompts), "too_long": bench.too_long}})


def _write_replies(
    path: Path, prompts: Sequence[EvaluationPrompt], replies: Sequence[Completion], tokenizer: ChatTokenizer
) -> None:
    rows = [
        {
            "id": prompt.id,
            "category": prompt.category,
            "prompt": tokenizer.decode(prompt.prompt_ids).strip(),
            "text": reply.text,
            "token_texts": _token_texts(reply.token_ids, tokenizer),
            "accepted_per_step": reply.accepted_per_step,
        }
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _token_texts(token_ids: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
    """What each token adds to the text: nothing for a special token or one that only begins a character."""
    detokenizer = tokenizer.detokenizer()
    texts = [detokenizer.push([token_id]) for token_id in token_ids]
    return [*texts[:-1], texts[-1] + detokenizer.finish()] if texts else []


def _metrics(measured: Measurement) -> dict[str, float]:
    metrics = {
        "tokens_per_step": measured.details["tokens_per_step_measured"],
        "speedup": measured.speedup,
        "lossless": float(measured.lossless),
    }
    for concurrency, result in measured.by_concurrency.items():
        metrics[f"plain_tokens_per_second_{concurrency}"] = result.plain_tokens_per_second
        metrics[f"medusa_tokens_per_second_{concurrency}"] = result.medusa_tokens_per_second
    return metrics


def load_evaluation(output: StepOutput) -> dict[str, Any]:
    """evaluation.json of a finished step."""
    return json.loads((output.path / EVALUATION).read_text())
