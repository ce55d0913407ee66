"""The evaluate step: Medusa beside plain decoding, in one process, on prompts that nothing was trained on.

<step dir>/evaluation.json   what the gate judges (registry.gate.EvaluationSummary)
<step dir>/replies.jsonl     each prompt with its category and reply: text, text of each token, accepted tokens by step

Both sides are the same engine in the same dtype; plain decoding is its tree of one node. Plain decoding comes first;
each reply is cut where it starts to loop (medusa/loops.py), and every timed run then decodes exactly those lengths, so
that neither loops nor differing lengths flatter a side. Runs alternate, and the speedup is the median of their ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medusa import Completion, Engine, SamplingParams, StepTimes, TokenTree
from medusa.calibration import guess_replies, tokens_per_step
from medusa.checkpoint import Checkpoint, directory_digest, load_checkpoint
from medusa.config import strict, to_dict
from medusa.loops import cut_at_loop
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from pipelines.artifact import StepOutput, open_step
from pipelines.calibrate import CHECKPOINT, choose_tree, load_calibration
from pipelines.prompts import PromptsConfig, load_prompts, prepare_prompts
from registry.gate import ConcurrencyResult, Divergence, EvaluationSet, EvaluationSummary, Measurement

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 1
EVALUATION = "evaluation.json"
REPLIES = "replies.jsonl"


class EvaluateError(RuntimeError):
    """The evaluation cannot be made; the message says why and what to do."""


@strict
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Greedy replies of at most `max_tokens` to `prompts`, timed `repeats` times at each of `concurrency`.

    The first of `concurrency` is the one that the gate judges: the load that the service will carry. `min_gain` is
    the least gain for which speculation is on, as in calibration.
    """

    prompts: PromptsConfig
    max_tokens: int = 128
    concurrency: list[int] = field(default_factory=lambda: [1])
    repeats: int = 3
    min_gain: float = 0.02

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1 or self.repeats < 1:
            raise ValueError("concurrency lists numbers of at least 1, and repeats is at least 1")


@dataclass(frozen=True)
class EvaluationPrompt:
    id: str
    category: str | None
    prompt_ids: list[int]


def evaluate(
    context: RunContext, config: EvaluateConfig, calibrated: StepOutput, champion: Path | None = None
) -> StepOutput:
    """Runs the step on the calibrated checkpoint, and on the current champion's folder where there is one."""
    prompts_output = prepare_prompts(context, config.prompts)
    inputs = {"calibrate": calibrated.digest, "prompts": prompts_output.digest}
    if champion is not None:
        inputs["champion"] = directory_digest(champion)
    with (
        open_step(context.root, "evaluate", STEP_VERSION, config, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        bench = Bench(context, config, prompts_output)
        times = StepTimes.from_dict(load_calibration(calibrated))
        candidate, replies = bench.measure(calibrated.path / CHECKPOINT, times)
        rival = None
        if champion is not None and inputs["champion"] != candidate.checkpoint_digest:
            rival, _ = bench.measure(champion, times)
        summary = EvaluationSummary(**{**vars(candidate), "champion": rival})
        (step.path / EVALUATION).write_text(json.dumps(to_dict(summary), indent=2) + "\n")
        _write_replies(step.path / REPLIES, bench.prompts, replies, bench.tokenizer)
        log.log_metrics(_metrics(candidate))
        return step.commit({"counts": {"prompts": len(bench.prompts)}})


class Bench:
    """The prompts, the plain replies, and how a checkpoint is measured against them."""

    def __init__(self, context: RunContext, config: EvaluateConfig, prompts: StepOutput) -> None:
        self._context = context
        self._config = config
        self._backbone: Backbone = context.backbone
        self.tokenizer = ChatTokenizer.from_pretrained(context.model.backbone)
        longest = self._backbone.max_positions - config.max_tokens
        self.prompts = _encode(prompts, self.tokenizer, longest)
        if not self.prompts:
            raise EvaluateError(f"no prompt of {prompts.path} fits a context of {longest} tokens beside the reply")
        self._set = EvaluationSet(digest=prompts.digest, num_prompts=len(self.prompts))
        plain = self._engine(None, 1 + 15 * (len(self.prompts) > 15))
        done = self._generate(plain, [config.max_tokens] * len(self.prompts), "plain replies")
        self._lengths = [max(1, cut_at_loop(completion.token_ids)) for completion in done]
        self._plain = [c.token_ids[:length] for c, length in zip(done, self._lengths, strict=True)]

    def measure(self, folder: Path, times: StepTimes) -> tuple[Measurement, list[Completion]]:
        """A checkpoint's exactness, acceptance and speed at every concurrency; and its replies at the first."""
        checkpoint = load_checkpoint(folder, self._backbone)
        rows = [(prompt.prompt_ids, reply) for prompt, reply in zip(self.prompts, self._plain, strict=True)]
        width = max([10, *(max(map(max, tree)) + 1 for tree in checkpoint.meta.trees if tree)])
        walked = list(guess_replies(self._backbone, checkpoint.heads, rows, width))
        trees = [TokenTree.from_paths(paths) for paths in checkpoint.meta.trees]
        by_size = {tree.num_nodes: tokens_per_step(walked, tree) for tree in trees}
        speeds, replies, served = {}, [], {}
        for concurrency in self._config.concurrency:
            engine = self._engine(checkpoint, concurrency)
            chosen = self._choose(checkpoint, trees, times, concurrency)
            served[concurrency] = chosen or max(
                trees,
                key=lambda tree: (
                    by_size[tree.num_nodes] / times.lookup(concurrency, tree.num_nodes) if tree.num_nodes > 1 else 0.0
                ),
            )
            speeds[concurrency], last = self._race(engine, served[concurrency], promised=chosen is not None)
            replies = replies or last
        first = speeds[self._config.concurrency[0]]
        divergences = self._divergences(replies)
        return Measurement(
            checkpoint_digest=directory_digest(folder),
            lossless=all(gap_ok for _, gap_ok in divergences),
            divergences=tuple(divergence for divergence, _ in divergences),
            evaluation_set=self._set,
            dtype=str(self._backbone.dtype).removeprefix("torch."),
            tree_size=first.tree_size or 1,
            speculation_chosen=bool(first.speculation_chosen),
            acceptance_length=first.acceptance_length if first.speculation_chosen else 1.0,
            plain_tokens_per_second=first.plain_tokens_per_second,
            medusa_tokens_per_second=first.medusa_tokens_per_second,
            speedup=first.speedup if first.speculation_chosen else 1.0,
            by_concurrency={str(concurrency): result for concurrency, result in speeds.items()},
            concurrency=self._config.concurrency[0],
            details={
                "tokens_per_step_by_size": {str(size): value for size, value in by_size.items()},
                "tokens_per_step_measured": _acceptance(replies),
                "tree_measured": served[self._config.concurrency[0]].num_nodes,
                "speedup_measured": first.speedup,
                "tokens_per_step_by_category": self._by_category(replies),
                "replies_cut_at_loops": sum(
                    length < self._config.max_tokens and not self._ended(reply)
                    for length, reply in zip(self._lengths, self._plain, strict=True)
                ),
            },
        ), replies

    def _race(self, engine: Engine, tree: TokenTree, *, promised: bool) -> tuple[ConcurrencyResult, list[Completion]]:
        """Plain and Medusa in turn; speeds are of the fastest run, the speedup is the median of paired ratios.

        Speculation counts as chosen where calibration promised a gain and this race did not disprove it.
        """
        seconds: dict[str, list[float]] = {"plain": [], "medusa": []}
        replies: list[Completion] = []
        engine.set_tree(tree)
        self._generate(engine, self._lengths, "warm-up")
        for _ in range(self._config.repeats):
            for side, side_tree in (("plain", None), ("medusa", tree)):
                engine.set_tree(side_tree)
                start = time.perf_counter()
                done = self._generate(engine, self._lengths, f"{side}, {engine.max_batch_size} at once")
                seconds[side].append(time.perf_counter() - start)
                replies = done if side == "medusa" else replies
        tokens = sum(self._lengths)
        ratios = [plain / medusa for plain, medusa in zip(seconds["plain"], seconds["medusa"], strict=True)]
        chosen = promised and statistics.median(ratios) >= 1
        return ConcurrencyResult(
            plain_tokens_per_second=tokens / min(seconds["plain"]),
            medusa_tokens_per_second=tokens / min(seconds["medusa"]),
            speedup=statistics.median(ratios),
            speedup_interval=(min(ratios), max(ratios)),
            acceptance_length=_acceptance(replies),
            tree_size=tree.num_nodes if chosen else 1,
            speculation_chosen=chosen,
        ), replies

    def _choose(
        self, checkpoint: Checkpoint, trees: Sequence[TokenTree], times: StepTimes, concurrency: int
    ) -> TokenTree | None:
        """The tree that calibration's figures promise for this load; None where speculation does not pay."""
        calibration = checkpoint.meta.calibration
        if calibration is None:
            raise EvaluateError("the checkpoint has no calibration; run `medusa calibrate` first")
        tree = choose_tree(trees, calibration.tokens_per_step, times, concurrency, self._config.min_gain)
        return tree if tree.num_nodes > 1 else None

    def _engine(self, checkpoint: Checkpoint | None, concurrency: int) -> Engine:
        longest = max(len(prompt.prompt_ids) for prompt in self.prompts) + self._config.max_tokens
        return Engine(
            self._backbone,
            self.tokenizer,
            checkpoint,
            max_batch_size=concurrency,
            max_model_len=min(longest, self._backbone.max_positions),
            speculation="off",
        )

    def _generate(self, engine: Engine, lengths: Sequence[int], label: str) -> list[Completion]:
        """Greedy replies. With the plain replies known, exactly their lengths: EOS is the last token or none."""
        known = hasattr(self, "_plain")
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=known) for n in lengths]
        with self._context.bar(label, total=len(lengths)) as advance:
            return engine.generate(
                [prompt.prompt_ids for prompt in self.prompts], params, on_finish=lambda *_: advance(1)
            )

    def _divergences(self, replies: Sequence[Completion]) -> list[tuple[Divergence, bool]]:
        """The first difference of each reply from plain decoding, and whether rounding can explain it."""
        found = []
        for prompt, plain, reply in zip(self.prompts, self._plain, replies, strict=True):
            position = next((i for i, (a, b) in enumerate(zip(plain, reply.token_ids, strict=True)) if a != b), None)
            if position is not None:
                gap = self._logit_gap([*prompt.prompt_ids, *plain[:position]])
                divergence = Divergence(
                    id=prompt.id,
                    position=position,
                    logit_gap=gap,
                    plain_token=plain[position],
                    medusa_token=reply.token_ids[position],
                )
                found.append((divergence, self._backbone.dtype != torch.float32))
        return found

    def _logit_gap(self, token_ids: list[int]) -> float:
        hidden = self._backbone.hidden_states(torch.tensor([token_ids], device=self._backbone.device))[:, -1]
        best, second = self._backbone.logits(hidden)[0].float().topk(2).values.tolist()
        return best - second

    def _by_category(self, replies: Sequence[Completion]) -> dict[str, float]:
        groups: dict[str, list[Completion]] = defaultdict(list)
        for prompt, reply in zip(self.prompts, replies, strict=True):
            groups[prompt.category or "none"].append(reply)
        return {category: _acceptance(group) for category, group in sorted(groups.items())}

    def _ended(self, reply: Sequence[int]) -> bool:
        return bool(reply) and reply[-1] in self.tokenizer.eos_token_ids


def _encode(prompts: StepOutput, tokenizer: ChatTokenizer, longest: int) -> list[EvaluationPrompt]:
    """First turns only: a later turn depends on the reply before it. Prompts too long for the context are left out."""
    encoded = []
    for prompt in load_prompts(prompts):
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": prompt.turns[0]}])
        if len(ids) <= longest:
            encoded.append(EvaluationPrompt(prompt.id, prompt.category, ids))
    return encoded


def _acceptance(replies: Sequence[Completion]) -> float:
    """Tokens of decode steps over decode steps, summed over the set."""
    steps = [kept for reply in replies for kept in reply.accepted_per_step]
    return sum(steps) / len(steps) if steps else 1.0


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
