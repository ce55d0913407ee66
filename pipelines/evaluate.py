"""The evaluate step: Medusa beside plain decoding, in one process, on prompts that nothing was trained on.

<step dir>/evaluation.json   what the gate judges (registry.gate.EvaluationSummary)
<step dir>/replies.jsonl     each prompt's reply, its accepted tokens by step, and its category

pipelines/bench.py does the measuring.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa import Completion, StepTimes
from medusa.adapter import write_merged
from medusa.checkpoint import ADAPTER, read_meta
from medusa.config import strict, to_dict
from medusa.digests import directory_digest
from medusa.tokenizer import ChatTokenizer
from medusa.weights import model_directory
from pipelines.artifact import StepOutput, open_step
from pipelines.bench import Bench, BenchConfig, EvaluateError, EvaluationPrompt
from pipelines.calibrate import CHECKPOINT, load_calibration
from pipelines.prompts import PromptsConfig, prepare_prompts
from pipelines.quality import gate_fields
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
    context: RunContext,
    config: EvaluateConfig,
    calibrated: StepOutput,
    champion: Path | None = None,
    quality: StepOutput | None = None,
    base: RunContext | None = None,
) -> StepOutput:
    """Runs the step on the calibrated checkpoint, and on the current champion's folder where there is one.

    Where training changed the backbone, `context` names the changed one, `base` the one before, and `quality` is the
    quality step's output. A champion is measured on the backbone that it belongs to.
    """
    prompts = prepare_prompts(context, config.prompts)
    inputs = {"calibrate": calibrated.digest, "prompts": prompts.digest}
    if champion is not None:
        inputs["champion"] = directory_digest(champion)
    if quality is not None:
        inputs["quality"] = quality.digest
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
            its_context = context_of(champion, context, base or context)
            its_bench = bench if its_context is context else Bench(its_context, config, prompts)
            rival, _ = its_bench.measure(champion, times)
        of_model = {} if quality is None else gate_fields(quality)
        summary = EvaluationSummary(**{**vars(candidate), **of_model, "champion": rival})
        (step.path / EVALUATION).write_text(json.dumps(to_dict(summary), indent=2) + "\n")
        _write_replies(step.path / REPLIES, bench.prompts, replies, bench.tokenizer)
        log.log_metrics(_metrics(candidate))
        return step.commit({"counts": {"prompts": len(bench.prompts), "too_long": bench.too_long}})


def context_of(checkpoint: Path, *contexts: RunContext) -> RunContext:
    """The context, of these, whose backbone a checkpoint's heads run on; a base with the adapter merged, if need be.

    EvaluateError where it is none of them.
    """
    meta = read_meta(checkpoint)
    for context in contexts:
        if context.backbone.digest == meta.backbone.weights_digest:
            return context
    for context in contexts:
        if meta.adapter is not None and context.backbone.digest == meta.adapter.base.weights_digest:
            return replace(context, model=replace(context.model, backbone=str(_merged(checkpoint, context))))
    raise EvaluateError(
        f"the champion {checkpoint} runs on {meta.backbone.name} ({meta.backbone.weights_digest}), which is neither "
        "the base of this pipeline nor the model it trained; measure the two by hand, or give this one another "
        "register.name"
    )


def _merged(checkpoint: Path, context: RunContext) -> Path:
    merged = checkpoint.with_name(f"{checkpoint.name}-backbone")
    shutil.rmtree(merged, ignore_errors=True)  # what an interrupted run left may be half a model
    write_merged(model_directory(context.model.backbone), checkpoint / ADAPTER, merged)
    return merged


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
