"""An engine whose device only passes time, to measure what the host costs: no figure of it is a speed of decoding.

Everything but the device is the real thing: scheduling, pages, the loop with its launches ahead, detokenising, and all
that stands above the engine. A launch takes the time that a step of its shape takes on a GPU; whoever collects it
sleeps until then without the interpreter lock, as it would wait for a CUDA event. Its tokens come from a fixed stream
by position alone, so that a reply is the same whatever runs beside it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path

import torch

from medusa import Engine, HeadsConfig, MedusaHeads
from medusa.checkpoint import BackboneRef, Calibration, Checkpoint, CheckpointMeta
from medusa.config import ConfigError
from medusa.decoding import Typical
from medusa.engine.sequence import Sequence
from medusa.engine.shapes import Buckets
from medusa.engine.step import PrefillChunk, StepRunner, StepTokens
from medusa.engine.step_times import StepTimes
from medusa.heads import DraftHeads
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.tree import Path as TreePath
from medusa.tree import TokenTree

TREE = [[0], [1], [0, 0]]  # of every sequence; two heads guess for it
# Plain steps of a 7B shape on one H200 (docs/results.md). A step with this tree takes a little longer there; to charge
# the plain step's time for it asks more of the host.
PLAIN_STEPS = {1: 4.03e-3, 4: 4.42e-3, 16: 6.31e-3, 32: 8.15e-3, 64: 12.28e-3}
STREAM = 4096  # tokens after which the stream begins again


def plain_step_times() -> StepTimes:
    nodes = (1, len(TREE) + 1)
    return StepTimes.of_uniform_trees({(b, n): seconds for b, seconds in PLAIN_STEPS.items() for n in nodes})


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """How long launches take, and how often a guess is right. A prefill takes the time of one plain step and then so
    much for each token beyond `free_prefill_tokens`: what a GPU computes while it reads the weights."""

    step_times: StepTimes = field(default_factory=plain_step_times)
    prefill_token_s: float = 30e-6
    free_prefill_tokens: int = 128
    acceptance: float = 0.37  # with two heads 1.5 tokens a step
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1:
            raise ConfigError(f"acceptance is a probability, 0 to 1, got {self.acceptance}")

    def prefill_seconds(self, num_tokens: int) -> float:
        beyond = max(0, num_tokens - self.free_prefill_tokens)
        return self.step_times.at(1, 1) + beyond * self.prefill_token_s


def pacing_of(step_times: Path | None) -> Pacing:
    """With the step times of a file, or the built-in ones. Raises ConfigError for a file that is none."""
    if step_times is None:
        return Pacing()
    try:
        return Pacing(step_times=StepTimes.from_dict(json.loads(step_times.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{step_times} holds no step times as StepTimes.to_dict gives them: {error!r}") from error


class Device:
    """Takes launches in order, each of which takes its time."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def launch(self, seconds: float, steps: list[StepTokens]) -> Timed:
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        return Timed(self._free_at, steps)


@dataclass(frozen=True)
class Timed:
    """A Launched that ends at a time."""

    ends_at: float
    steps: list[StepTokens]

    def collect(self) -> list[StepTokens]:
        if (left := self.ends_at - time.perf_counter()) > 0:
            time.sleep(left)
        return self.steps


class TokenStream:
    """Tokens by place, whole characters each, and how many of a tree's guesses are right there."""

    def __init__(self, tokenizer: ChatTokenizer, pacing: Pacing) -> None:
        drawn = random.Random(pacing.seed)
        words = [token for token in range(tokenizer.vocab_size) if _is_text(tokenizer, token)]
        self._tokens = [drawn.choice(words) for _ in range(STREAM)]
        self._right = [_run_of_hits(drawn, pacing.acceptance) for _ in range(STREAM)]

    def step(self, place: int, depth: int) -> list[int]:
        """What a step with a tree of this depth gives."""
        count = 1 + min(self._right[place % STREAM], depth)
        return [self._tokens[(place + i) % STREAM] for i in range(count)]


def _is_text(tokenizer: ChatTokenizer, token: int) -> bool:
    text = tokenizer.decode([token])
    return token not in tokenizer.special_token_ids and text.isprintable() and "\ufffd" not in text


def _run_of_hits(drawn: random.Random, acceptance: float) -> int:
    hits = 0
    while hits < STREAM and drawn.random() < acceptance:
        hits += 1
    return hits


class PacedRunner:
    """A StepRunner of lag 1 without a model. Like a device it keeps each row's length by itself."""

    def __init__(self, pacing: Pacing, stream: TokenStream, max_batch_size: int) -> None:
        self._pacing = pacing
        self._stream = stream
        self._device = Device()
        self._length = [0] * max_batch_size
        self._seconds: dict[tuple[int, int], float] = {}

    @property
    def lag(self) -> int:
        return 1

    @property
    def buckets(self) -> Buckets | None:
        return None

    def prefill(self, chunks: Items[PrefillChunk], *, num_heads: int) -> Timed:
        seconds = self._pacing.prefill_seconds(sum(len(chunk.token_ids) for chunk in chunks))
        return self._device.launch(seconds, [self._filled(chunk) for chunk in chunks])

    def decode(self, sequences: Items[Sequence], trees: Items[TokenTree], *, num_heads: int) -> Timed:
        steps = [self._advanced(sequence, tree) for sequence, tree in zip(sequences, trees, strict=True)]
        return self._device.launch(self._step_seconds(len(trees), sum(tree.num_nodes for tree in trees)), steps)

    def take_heads(self, heads: DraftHeads, growth: Items[TreePath]) -> DraftHeads:
        return heads

    def rewind(self, sequences: Items[Sequence], length: int) -> None:
        for sequence in sequences:
            self._length[sequence.row] = length

    def _filled(self, chunk: PrefillChunk) -> StepTokens:
        self._length[chunk.sequence.row] = chunk.end
        return StepTokens(self._stream.step(_place(chunk.sequence, chunk.end), 0) if chunk.gives_token else [], [])

    def _advanced(self, sequence: Sequence, tree: TokenTree) -> StepTokens:
        length = self._length[sequence.row]
        tokens = self._stream.step(_place(sequence, length + 1), tree.max_depth)
        self._length[sequence.row] = length + len(tokens)
        return StepTokens(tokens, [])

    def _step_seconds(self, batch: int, nodes: int) -> float:
        if (batch, nodes) not in self._seconds:
            self._seconds[batch, nodes] = self._pacing.step_times.at(batch, nodes)
        return self._seconds[batch, nodes]


def _place(sequence: Sequence, position: int) -> int:
    """Prompts differ, and so do their replies."""
    return position + 31 * sequence.prompt_ids[-1]


class PacedEngine(Engine):
    """An Engine with heads that nobody asks, for its tree; greedy and sampled replies are the same."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: ChatTokenizer,
        *,
        pacing: Pacing,
        max_batch_size: int = 16,
        max_model_len: int | None = None,
        max_prefill_tokens: int = 512,
    ) -> None:
        self._pacing = pacing
        self._stream = TokenStream(tokenizer, pacing)
        super().__init__(
            backbone,
            tokenizer,
            _unread_heads(backbone, tokenizer),
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
            max_prefill_tokens=max_prefill_tokens,
            speculation=len(TREE) + 1,
        )

    @classmethod
    def load(cls, model: str, *, pacing: Pacing, max_batch_size: int, max_model_len: int | None = None) -> PacedEngine:
        """The model's tokenizer and sizes; its weights are loaded and not used."""
        backbone = Backbone.from_pretrained(model, device="cpu", dtype=torch.bfloat16)
        tokenizer = ChatTokenizer.from_pretrained(model)
        return cls(backbone, tokenizer, pacing=pacing, max_batch_size=max_batch_size, max_model_len=max_model_len)

    def _runner_of(self, acceptance: Typical | None) -> StepRunner:
        return PacedRunner(self._pacing, self._stream, self.max_batch_size)


def _unread_heads(backbone: Backbone, tokenizer: ChatTokenizer) -> Checkpoint:
    config = HeadsConfig(
        num_heads=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, vocabulary="shared"
    )
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    reference = BackboneRef(name=backbone.name, weights_digest=backbone.digest, tokenizer_digest=tokenizer.digest)
    calibration = Calibration(accuracy=[[0.37, 0.1], [0.37, 0.1]], num_positions=1)
    return Checkpoint(heads, CheckpointMeta.of(heads, reference, trees=[TREE], calibration=calibration))
