"""The engine: continuous batching over token trees. Plain decoding is the tree of one node; there is no other loop."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from medusa.checkpoint import Checkpoint, check_pair, load_checkpoint
from medusa.decoding import Typical
from medusa.engine.kv_cache import PAGE_SIZE, KVCache, pages_for
from medusa.engine.runner import Runner
from medusa.engine.scheduler import Scheduler
from medusa.engine.sequence import Completion, Output, Sequence
from medusa.engine.speculation import Policy, StepTimes, ladder_of
from medusa.model import Backbone
from medusa.sampling import MAX_SEED, SamplingParams
from medusa.tokenizer import ChatTokenizer
from medusa.tree import TokenTree

Prompt = str | Items[int]
Speculation = Literal["auto", "off"] | int
MAX_NODES = 64  # the largest tree a step is sized for
GUESS_WIDTH = 10  # guesses a head, unless a tree needs more (Medusa's TOPK)
PROFILE_CONTEXT = 128


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now and has done since it started. `tree_size` is the last step's."""

    running: int
    waiting: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    pages_used: int
    pages_total: int
    tree_size: int


class Engine:
    """Decodes prompts with a backbone and, where given, Medusa heads. Synchronous, for one thread.

    `speculation`: "auto" (the measured policy over the checkpoint's trees), "off", or a tree size of the ladder.
    `acceptance`: "exact" (lossless at any temperature) or a `Typical` rule (lossy above temperature 0).
    `kv_cache_gb` bounds the cache; by default every row of the batch can reach `max_model_len`.
    `step_times`: a stored profile of this machine; without one, "auto" measures at the start.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: ChatTokenizer,
        checkpoint: Checkpoint | None = None,
        *,
        max_batch_size: int = 16,
        max_model_len: int | None = None,
        kv_cache_gb: float | None = None,
        speculation: Speculation = "auto",
        acceptance: Literal["exact"] | Typical = "exact",
        step_times: StepTimes | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if checkpoint is not None:
            check_pair(checkpoint.meta, backbone)
        if acceptance != "exact" and not isinstance(acceptance, Typical):
            raise ValueError(f"acceptance is 'exact' or a Typical rule, got {acceptance!r}")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.max_batch_size = max_batch_size
        self.max_model_len = _model_len(backbone, max_model_len)
        self.trees, self._tokens_per_step = ladder_of(checkpoint.meta) if checkpoint else ((), ())
        self._max_nodes = max([MAX_NODES, *(tree.num_nodes for tree in self.trees)])
        self._cache = self._make_cache(kv_cache_gb)
        self._scheduler = Scheduler(self._cache, max_batch_size, self._max_nodes)
        self._runner = Runner(
            backbone,
            checkpoint,
            self._cache,
            max_batch_size=max_batch_size,
            guess_width=self._guess_width(),
            acceptance=None if acceptance == "exact" else acceptance,
        )
        self._ids = itertools.count()
        self._steps = self._prefill_tokens = self._decode_tokens = 0
        self._choose = self._chooser(speculation, step_times)
        self._last_tree = TokenTree.root()

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path,
        heads: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = 16,
        max_model_len: int | None = None,
        kv_cache_gb: float | None = None,
        speculation: Speculation = "auto",
        acceptance: Literal["exact"] | Typical = "exact",
        step_times: StepTimes | None = None,
    ) -> Engine:
        """`backbone` is a model folder or hub id; `heads` a Medusa checkpoint folder, or None for plain decoding.

        Raises UnsupportedModelError, CheckpointError, CheckpointMismatchError, or ValueError for a bad argument.
        """
        model = Backbone.from_pretrained(backbone, device=device, dtype=dtype)
        checkpoint = load_checkpoint(Path(heads), model) if heads is not None else None
        return cls(
            model,
            ChatTokenizer.from_pretrained(backbone),
            checkpoint,
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
            kv_cache_gb=kv_cache_gb,
            speculation=speculation,
            acceptance=acceptance,
            step_times=step_times,
        )

    def generate(
        self,
        prompts: Items[Prompt],
        params: SamplingParams | Items[SamplingParams],
        *,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Decodes all prompts: their completions in prompt order, the n of a prompt side by side.

        `params` is one for all, or one a prompt. `on_finish(i, completion)` is called as replies to prompt i end.
        """
        if isinstance(prompts, str):
            raise ValueError("generate takes a list of prompts; put a single prompt into a list")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(each)} sampling parameters; give one, or one each")
        if self.has_unfinished():
            raise RuntimeError("generate needs an idle engine; use add and step while requests are running")
        numbers = {self.add(prompt, p): i for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))}
        done: dict[tuple[int, int], Completion] = {}
        while self.has_unfinished():
            for output in self.step():
                if output.finished:
                    i = numbers[output.request_id]
                    done[i, output.index] = output.finished
                    if on_finish:
                        on_finish(i, output.finished)
        return [done[key] for key in sorted(done)]

    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> str:
        """Queues a request and returns its id. Raises ValueError for an empty or too long prompt, or unknown ids."""
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check(prompt_ids, params)
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        for index in range(params.n):
            self._scheduler.waiting.append(
                Sequence(
                    request_id,
                    index,
                    prompt_ids,
                    params,
                    seed=seed,
                    tokenizer=self.tokenizer,
                    max_new_tokens=min(params.max_tokens, self.max_model_len - len(prompt_ids)),
                )
            )
        return request_id

    def step(self) -> list[Output]:
        """Prefills what can join, decodes one step of all that run, and returns what each reply gained."""
        admitted = self._scheduler.admit()
        outputs = self._prefill(admitted) if admitted else []
        outputs += self._decode()
        self._scheduler.retire()
        return outputs

    def abort(self, request_id: str) -> list[Output]:
        """Ends a request wherever it is and frees its row and pages; unknown ids are ignored (it may have ended)."""
        return [sequence.abort() for sequence in self._scheduler.remove(request_id)]

    def has_unfinished(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            steps=self._steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            pages_used=self._cache.pages_used,
            pages_total=self._cache.num_pages,
            tree_size=self._last_tree.num_nodes,
        )

    def set_tree(self, tree: TokenTree | None) -> None:
        """Decodes with this tree from the next step on, whatever the load; None is plain decoding."""
        tree = tree or TokenTree.root()
        if tree.num_nodes > 1:
            self._check_tree(tree)
        self._choose = lambda batch_size: tree

    def set_policy(self, step_times: StepTimes) -> None:
        """Chooses among the checkpoint's trees by these step times from the next step on."""
        if not self.trees:
            raise ValueError("the policy needs heads with a calibrated ladder of trees; run `medusa calibrate` first")
        self._choose = Policy(self.trees, self._tokens_per_step, step_times).choose

    def measure_step_times(
        self, batch_sizes: Items[int], trees: Items[TokenTree], *, repeats: int = 5, context: int = PROFILE_CONTEXT
    ) -> StepTimes:
        """Times decode steps of this engine, idle, at each batch size and tree: the fastest of `repeats` rounds, the
        combinations taken in turn so that a passing disturbance does not fall on one of them."""
        if self.has_unfinished():
            raise RuntimeError("step times are measured on an idle engine; wait for its requests to end")
        context = min(context, self.max_model_len - 1)
        best: dict[tuple[int, int], float] = {}
        for batch_size in batch_sizes:
            sequences = self._dummies(batch_size, context)
            for _ in range(repeats + 1):
                for tree in trees:
                    key, seconds = (batch_size, tree.num_nodes), self._time_step(sequences, tree, context)
                    best[key] = min(best.get(key, seconds), seconds)
            for sequence in sequences:
                self._scheduler.remove(sequence.request_id)
        return StepTimes(best)

    def _prefill(self, sequences: list[Sequence]) -> list[Output]:
        guess = self._choose(len(self._scheduler.running)).num_nodes > 1
        steps = self._runner.prefill(sequences, guess=guess)
        self._prefill_tokens += sum(len(s.prompt_ids) for s in sequences)
        return [s.append(t.token_ids, t.logprobs, decoded=False) for s, t in zip(sequences, steps, strict=True)]

    def _decode(self) -> list[Output]:
        sequences = [s for s in self._scheduler.running if s.finish_reason is None]
        if not sequences:
            return []
        tree = self._choose(len(sequences))
        steps = self._runner.decode(sequences, [tree] * len(sequences), guess=tree.num_nodes > 1)
        outputs = [s.append(t.token_ids, t.logprobs) for s, t in zip(sequences, steps, strict=True)]
        self._steps += 1
        self._decode_tokens += sum(len(output.token_ids) for output in outputs)
        self._last_tree = tree
        return outputs

    def _chooser(self, speculation: Speculation, step_times: StepTimes | None) -> Callable[[int], TokenTree]:
        if speculation == "off" or (speculation == "auto" and self.checkpoint is None):
            return lambda batch_size: TokenTree.root()
        if speculation == "auto":
            if not self.trees:
                raise ValueError(
                    "speculation 'auto' needs heads with a calibrated ladder of trees; run `medusa calibrate`, "
                    "or give speculation='off'"
                )
            times = step_times or self.measure_step_times(_profile_batches(self.max_batch_size), self.trees)
            return Policy(self.trees, self._tokens_per_step, times).choose
        sizes = {tree.num_nodes: tree for tree in self.trees}
        if isinstance(speculation, bool) or speculation not in sizes:
            raise ValueError(
                f"speculation is 'auto', 'off' or a tree size of the ladder {sorted(sizes)}, got {speculation!r}"
            )
        tree = sizes[int(speculation)]
        return lambda batch_size: tree

    def _check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(prompt_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, but the context holds {self.max_model_len} with the reply; "
                f"give at most {self.max_model_len - 1}"
            )
        vocab_size = self.backbone.vocab_size
        unknown = [t for t in (*prompt_ids, *params.logit_bias, *params.stop_token_ids) if not 0 <= t < vocab_size]
        if unknown:
            raise ValueError(f"token ids {unknown[:5]} are outside the vocabulary of {vocab_size} tokens")
        needed = pages_for(len(prompt_ids) + min(params.max_tokens, self.max_model_len) + self._max_nodes)
        if needed > self._cache.num_pages:
            raise ValueError(
                f"the request can need {needed} pages of {PAGE_SIZE} tokens, but the cache holds "
                f"{self._cache.num_pages}; lower max_tokens or raise kv_cache_gb"
            )

    def _check_tree(self, tree: TokenTree) -> None:
        if self.checkpoint is None:
            raise ValueError(f"a tree of {tree.num_nodes} nodes needs Medusa heads; this engine has none")
        heads = self.checkpoint.config.num_heads
        if tree.max_depth > heads:
            raise ValueError(f"the tree is {tree.max_depth} deep, but there are {heads} heads")
        if tree.max_rank >= self._guess_width():
            raise ValueError(f"the tree uses rank {tree.max_rank}, but heads give {self._guess_width()} guesses")
        if tree.num_nodes > self._max_nodes:
            raise ValueError(f"the tree has {tree.num_nodes} nodes, the engine is sized for {self._max_nodes}")

    def _guess_width(self) -> int:
        if self.checkpoint is None:
            return 1
        widest = max([GUESS_WIDTH - 1, *(tree.max_rank for tree in self.trees)]) + 1
        return min(widest, self.checkpoint.config.head_vocab_size)

    def _make_cache(self, kv_cache_gb: float | None) -> KVCache:
        max_pages = pages_for(self.max_model_len + self._max_nodes)
        num_pages = self.max_batch_size * max_pages
        if kv_cache_gb is not None:
            heads, head_size = self.backbone.kv_shape
            page_bytes = (
                2 * self.backbone.num_layers * PAGE_SIZE * heads * head_size * self.backbone.lm_head_weight.itemsize
            )
            num_pages = min(num_pages, int(kv_cache_gb * 2**30 / page_bytes) - 1)
            if num_pages < 1 + pages_for(self._max_nodes):
                raise ValueError(f"kv_cache_gb={kv_cache_gb} holds {num_pages} pages, too few for one sequence")
        return KVCache(
            num_layers=self.backbone.num_layers,
            kv_shape=self.backbone.kv_shape,
            num_pages=num_pages,
            max_batch_size=self.max_batch_size,
            max_pages=max_pages,
            dtype=self.backbone.dtype,
            device=self.backbone.device,
        )

    def _dummies(self, batch_size: int, context: int) -> list[Sequence]:
        """Prefilled sequences to time steps on; they never finish and are not counted."""
        params = SamplingParams(max_tokens=1, temperature=0.0)
        prompt = [token % self.backbone.vocab_size for token in range(context)]
        for index in range(batch_size):
            self._scheduler.waiting.append(
                Sequence(f"profile-{index}", 0, prompt, params, seed=0, tokenizer=self.tokenizer, max_new_tokens=1)
            )
        sequences = self._scheduler.admit()
        if len(sequences) < batch_size:
            raise ValueError(f"step times at batch {batch_size} do not fit this engine's {self.max_batch_size} rows")
        self._runner.prefill(sequences, guess=self.checkpoint is not None)
        return sequences

    def _time_step(self, sequences: list[Sequence], tree: TokenTree, context: int) -> float:
        self._runner.rewind(sequences, context)
        start = time.perf_counter()
        self._runner.decode(sequences, [tree] * len(sequences), guess=tree.num_nodes > 1)
        return time.perf_counter() - start


def _model_len(backbone: Backbone, asked: int | None) -> int:
    if asked is not None and not 2 <= asked <= backbone.max_positions:
        raise ValueError(f"max_model_len must be 2 to the model's {backbone.max_positions} positions, got {asked}")
    return asked or backbone.max_positions


def _profile_batches(max_batch_size: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 <= max_batch_size:
        sizes.append(sizes[-1] * 2)
    return sizes
