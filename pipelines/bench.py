"""How a checkpoint is measured against plain decoding: exactness, acceptance and speed on one set of prompts.

Both sides are the same engine in the same dtype; plain decoding is its tree of one node. Plain decoding comes first;
each reply is cut where it starts to loop (medusa/loops.py), and every timed run then decodes exactly those lengths, so
that neither loops nor differing lengths flatter a side. Runs alternate, and the speedup is the median of their ratios.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medusa import Completion, Engine, SamplingParams, StepTimes, TokenTree
from medusa.calibration import guess_replies, tokens_per_step
from medusa.checkpoint import Checkpoint, load_checkpoint
from medusa.config import strict
from medusa.digests import directory_digest
from medusa.loops import cut_at_loop
from medusa.model import Backbone
from medusa.quantization import Quantization
from medusa.tokenizer import ChatTokenizer
from pipelines.artifact import StepOutput
from pipelines.calibrate import choose_tree
from pipelines.prompts import load_prompts
from registry.gate import ConcurrencyResult, Divergence, EvaluationSet, Measurement

if TYPE_CHECKING:
    from pipelines.run import RunContext

PLAIN_BATCH = 16  # replies at once when nothing is timed
MIN_WIDTH = 10  # guesses a head that are looked at, unless the trees use more


class EvaluateError(RuntimeError):
    """The evaluation cannot be made; the message says why and what to do."""


@strict
@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Greedy replies of at most `max_tokens`, timed `repeats` times at each of `concurrency`.

    The first of `concurrency` is the one that the gate judges: the load that the service will carry. `min_gain` is
    the least gain for which speculation is on, as in calibration.

    With `quantization` both sides are the backbone with weights of one byte, as a service of that setting runs it; step
    times are then measured here, since calibration's are of the backbone as it is.
    """

    max_tokens: int = 128
    concurrency: list[int] = field(default_factory=lambda: [1])
    repeats: int = 3
    min_gain: float = 0.02
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1 or self.repeats < 1:
            raise ValueError("concurrency lists numbers of at least 1, and repeats is at least 1")


@dataclass(frozen=True)
class EvaluationPrompt:
    id: str
    category: str | None
    prompt_ids: list[int]


@dataclass(frozen=True)
class Race:
    """Plain and Medusa at one concurrency: the figures, the tree that raced, and Medusa's last replies."""

    result: ConcurrencyResult
    tree: TokenTree
    replies: list[Completion]


class Bench:
    """The prompts, their plain replies, and how a checkpoint is measured against them.

    `prompts` are those that fit the context beside a reply; `too_long` counts the others.
    """

    def __init__(self, context: RunContext, config: BenchConfig, prompts: StepOutput) -> None:
        self._context = context
        self._config = config
        quantization = config.quantization
        self._backbone: Backbone = context.model.load(quantization) if quantization else context.backbone
        self.tokenizer = ChatTokenizer.from_pretrained(context.model.backbone)
        longest = self._backbone.max_positions - config.max_tokens
        encoded = _encode(prompts, self.tokenizer)
        self.prompts = [prompt for prompt in encoded if len(prompt.prompt_ids) <= longest]
        self.too_long = len(encoded) - len(self.prompts)
        if not self.prompts:
            raise EvaluateError(f"no prompt of {prompts.path} fits a context of {longest} tokens beside the reply")
        self._set = EvaluationSet(digest=prompts.digest, num_prompts=len(self.prompts))
        self._plain = self._plain_replies()

    def measure(self, folder: Path, times: StepTimes) -> tuple[Measurement, list[Completion]]:
        """A checkpoint's exactness, acceptance and speed at every concurrency; and its replies at the first.

        Exactness is asked of the replies at every concurrency.
        """
        checkpoint = load_checkpoint(folder, self._backbone)
        trees = [TokenTree.from_paths(paths) for paths in checkpoint.meta.trees]
        if self._config.quantization:
            largest = max(self._config.concurrency)
            times = self._engine(checkpoint, largest).measure_step_times(self._config.concurrency, trees)
        by_size = self._walk(checkpoint, trees)
        races = {c: self._race(checkpoint, trees, times, c) for c in self._config.concurrency}
        concurrency = self._config.concurrency[0]
        first, replies = races[concurrency].result, races[concurrency].replies
        divergences = [divergence for race in races.values() for divergence in self._divergences(race.replies)]
        measured = Measurement(
            checkpoint_digest=directory_digest(folder),
            lossless=not divergences or self._backbone.dtype != torch.float32,  # below float32 the gate judges the gaps
            divergences=tuple(divergences),
            evaluation_set=self._set,
            dtype=str(self._backbone.dtype).removeprefix("torch."),
            tree_size=first.tree_size or 1,
            speculation_chosen=bool(first.speculation_chosen),
            acceptance_length=_acceptance(replies) if first.speculation_chosen else 1.0,
            plain_tokens_per_second=first.plain_tokens_per_second,
            medusa_tokens_per_second=first.medusa_tokens_per_second,
            speedup=first.speedup if first.speculation_chosen else 1.0,
            by_concurrency={str(c): race.result for c, race in races.items()},
            concurrency=concurrency,
            details={
                "quantization": self._config.quantization,
                "tokens_per_step_by_size": {str(size): value for size, value in by_size.items()},
                "tokens_per_step_measured": _acceptance(replies),
                "tree_measured": races[concurrency].tree.num_nodes,
                "speedup_measured": first.speedup,
                "tokens_per_step_by_category": self._by_category(replies),
            },
        )
        return measured, replies

    def _plain_replies(self) -> list[list[int]]:
        """What every side is to say: plain decoding's replies, cut where they start to loop."""
        params = [SamplingParams(max_tokens=self._config.max_tokens, temperature=0.0)] * len(self.prompts)
        done = self._generate(self._engine(None, min(PLAIN_BATCH, len(self.prompts))), params, "plain replies")
        return [reply.token_ids[: max(1, cut_at_loop(reply.token_ids))] for reply in done]

    def _walk(self, checkpoint: Checkpoint, trees: Sequence[TokenTree]) -> dict[int, float]:
        """Tokens a step of each tree on the plain replies, without decoding again."""
        rows = [(prompt.prompt_ids, reply) for prompt, reply in zip(self.prompts, self._plain, strict=True)]
        width = max([MIN_WIDTH, *(tree.max_rank + 1 for tree in trees)])
        guessed = list(guess_replies(self._backbone, checkpoint.heads, rows, width))
        return {tree.num_nodes: tokens_per_step(guessed, tree) for tree in trees}

    def _race(self, checkpoint: Checkpoint, trees: Sequence[TokenTree], times: StepTimes, concurrency: int) -> Race:
        """Plain and Medusa in turn; speeds are of the fastest run, the speedup is the median of paired ratios.

        Speculation counts as chosen where calibration promised a gain and this race did not disprove it. Where none
        was promised, the best tree of several nodes races all the same, to tell what it would have given.
        """
        tree, promised = self._tree_for(checkpoint, trees, times, concurrency)
        engine = self._engine(checkpoint, concurrency)
        params = [SamplingParams(max_tokens=len(reply), temperature=0.0, ignore_eos=True) for reply in self._plain]
        engine.set_tree(tree)
        replies = self._generate(engine, params, "warm-up")
        seconds: dict[str, list[float]] = {"plain": [], "medusa": []}
        for _ in range(self._config.repeats):
            for side, side_tree in (("plain", None), ("medusa", tree)):
                engine.set_tree(side_tree)
                start = time.perf_counter()
                self._generate(engine, params, f"{side}, {concurrency} at once")
                seconds[side].append(time.perf_counter() - start)
        tokens = sum(len(reply) for reply in self._plain)
        ratios = [plain / medusa for plain, medusa in zip(seconds["plain"], seconds["medusa"], strict=True)]
        chosen = promised and statistics.median(ratios) >= 1
        result = ConcurrencyResult(
            plain_tokens_per_second=tokens / min(seconds["plain"]),
            medusa_tokens_per_second=tokens / min(seconds["medusa"]),
            speedup=statistics.median(ratios),
            speedup_interval=(min(ratios), max(ratios)),
            acceptance_length=_acceptance(replies),
            tree_size=tree.num_nodes if chosen else 1,
            speculation_chosen=chosen,
        )
        return Race(result, tree, replies)

    def _tree_for(
        self, checkpoint: Checkpoint, trees: Sequence[TokenTree], times: StepTimes, concurrency: int
    ) -> tuple[TokenTree, bool]:
        """The tree that calibration's figures promise most for at this load, and whether they promise a gain."""
        calibration = checkpoint.meta.calibration
        if calibration is None:
            raise EvaluateError("the checkpoint has no calibration; run `medusa calibrate` first")
        chosen = choose_tree(trees, calibration.tokens_per_step, times, concurrency, self._config.min_gain)
        if chosen.num_nodes > 1:
            return chosen, True
        speeds = {
            tree: tokens / times.lookup(concurrency, tree.num_nodes)
            for tree, tokens in zip(trees, calibration.tokens_per_step, strict=True)
            if tree.num_nodes > 1
        }
        return (max(speeds, key=speeds.__getitem__) if speeds else chosen), False

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

    def _generate(self, engine: Engine, params: Sequence[SamplingParams], label: str) -> list[Completion]:
        with self._context.bar(label, total=len(params)) as advance:
            return engine.generate(
                [prompt.prompt_ids for prompt in self.prompts], params, on_finish=lambda *_: advance(1)
            )

    def _divergences(self, replies: Sequence[Completion]) -> list[Divergence]:
        """The first difference of each reply from plain decoding, with the gap of plain decoding's two best logits."""
        found = []
        for prompt, plain, reply in zip(self.prompts, self._plain, replies, strict=True):
            position = next((i for i, (a, b) in enumerate(zip(plain, reply.token_ids, strict=True)) if a != b), None)
            if position is not None:
                found.append(
                    Divergence(
                        id=prompt.id,
                        position=position,
                        logit_gap=self._logit_gap([*prompt.prompt_ids, *plain[:position]]),
                        plain_token=plain[position],
                        medusa_token=reply.token_ids[position],
                    )
                )
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


def _encode(prompts: StepOutput, tokenizer: ChatTokenizer) -> list[EvaluationPrompt]:
    """First turns only: a later turn depends on the reply before it."""
    encoded = []
    for prompt in load_prompts(prompts):
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": prompt.turns[0]}])
        encoded.append(EvaluationPrompt(prompt.id, prompt.category, ids))
    return encoded


def _acceptance(replies: Sequence[Completion]) -> float:
    """Tokens of decode steps over decode steps, summed over the set."""
    steps = [kept for reply in replies for kept in reply.accepted_per_step]
    return sum(steps) / len(steps) if steps else 1.0
