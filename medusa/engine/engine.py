"""The engine: continuous batching over token trees. Plain decoding is the tree of one node; there is no other loop."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Literal

import torch

from medusa.checkpoint import Checkpoint, check_pair, load_checkpoint
from medusa.decoding import Typical
from medusa.engine.drafting import Drafting, ladder_of
from medusa.engine.limits import Limits
from medusa.engine.loop import StepLoop
from medusa.engine.pairing import pair_checked
from medusa.engine.profile import CONTEXT, REPEATS, Profiler
from medusa.engine.runners import runner_of
from medusa.engine.scheduler import Scheduler
from medusa.engine.sequence import Completion, Output, Sequence
from medusa.engine.sharded import ShardedBackbone, load_backbone, make_cache
from medusa.engine.speculation import Adaptive, Speculation, SpeculationSetting, speculation_of
from medusa.engine.start_times import Laps, StartTimes
from medusa.engine.stats import Counters, EngineStats
from medusa.engine.step import StepRunner
from medusa.engine.step_times import StepTimes
from medusa.engine.watched import WatchedRunner
from medusa.grammar import Grammars
from medusa.growth import grown_tree
from medusa.model import Backbone
from medusa.quantization import Quantization
from medusa.sampling import MAX_SEED, SamplingParams
from medusa.tokenizer import ChatTokenizer
from medusa.tree import TokenTree
from medusa.weights import Hashing

Prompt = str | Items[int]


class Engine:
    """Decodes prompts with a backbone and, where given, Medusa heads. Synchronous, for one thread.

    `speculation`: "auto" (the measured policy over the checkpoint's trees), "off", or a tree size of the ladder.
    `acceptance`: "exact" (lossless at any temperature) or a `Typical` rule (lossy above temperature 0).
    `kv_cache_gb` sizes the cache, that of each process where several share the model; by default every row of the
    batch can reach `max_model_len`, on a GPU as far as its free memory goes. `max_prefill_tokens` bounds the prompt
    tokens that other replies wait for at each of their tokens: a step computes so many for each token that it gives a
    reply, on average of late.
    `step_times`: a stored profile of this machine; without one, "auto" measures at the start.
    """

    start_times: StartTimes | None = None  # of an engine from `from_pretrained`

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: ChatTokenizer,
        checkpoint: Checkpoint | None = None,
        *,
        max_batch_size: int = 16,
        max_model_len: int | None = None,
        max_prefill_tokens: int | None = None,
        kv_cache_gb: float | None = None,
        speculation: SpeculationSetting = "auto",
        acceptance: Literal["exact"] | Typical = "exact",
        step_times: StepTimes | None = None,
    ) -> None:
        if checkpoint is None:
            pairing: AbstractContextManager[None] = nullcontext()
        else:
            pairing = pair_checked(checkpoint.meta, backbone, tokenizer.digest)
        with pairing:  # to its end: a large model's weights may still be hashed while graphs are captured
            if acceptance != "exact" and not isinstance(acceptance, Typical):
                raise ValueError(f"acceptance is 'exact' or a Typical rule, got {acceptance!r}")
            self.backbone = backbone
            self.tokenizer = tokenizer
            trees = ladder_of(checkpoint.meta) if checkpoint else ()
            grown = grown_tree(checkpoint.meta) if checkpoint else None
            limits = Limits.of(
                backbone,
                checkpoint,
                trees,
                max_batch_size=max_batch_size,
                max_model_len=max_model_len,
                max_prefill_tokens=max_prefill_tokens,
                kv_cache_gb=kv_cache_gb,
            )
            for tree in trees:
                limits.check_tree(tree)
            self._drafting = Drafting(checkpoint, trees, grown, limits)
            self.max_batch_size = limits.max_batch_size
            self.max_model_len = limits.max_model_len
            self._cache = make_cache(
                backbone,
                num_pages=limits.num_pages,
                max_batch_size=max_batch_size,
                max_pages=limits.table_width,
            )
            self._scheduler = Scheduler(
                self._cache,
                max_batch_size=max_batch_size,
                max_nodes=limits.max_nodes,
                max_prefill_tokens=limits.max_prefill_tokens,
            )
            self._acceptance = acceptance
            self.grammars = Grammars(tokenizer, backbone.vocab_size)
            self._counters = Counters()
            self._build_runner()
            self._ids = itertools.count()
            self._step_times = step_times
            self._speculate(speculation)

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
        max_prefill_tokens: int | None = None,
        kv_cache_gb: float | None = None,
        speculation: SpeculationSetting = "auto",
        acceptance: Literal["exact"] | Typical = "exact",
        step_times: StepTimes | None = None,
        quantization: Quantization | None = None,
        tensor_parallel: int = 1,
        hashing: Hashing | None = None,
    ) -> Engine:
        """`backbone` is a model folder or hub id; `heads` a Medusa checkpoint folder, or None for plain decoding. Where
        the checkpoint has an adapter, `backbone` is its base or the two merged.

        `quantization`: the decoder's weights in one byte each, "int8" or "fp8" (medusa/quantization.py). Replies are
        then another model's, close to the backbone's; speculation is lossless against that model.

        `tensor_parallel`: so many processes share the decoder's layers and cache, each with a GPU of its own where
        there are GPUs. The engine starts the others, and `close` ends them; when one fails, calls raise
        TensorParallelError from then on.

        `hashing`: the digest of the backbone's weights, already under way; with heads it is begun here. It goes on
        while weights are loaded and the engine is built; heads of another backbone are refused before this returns.

        Raises UnsupportedModelError, ShardingError, QuantizationError, CheckpointError, CheckpointMismatchError, or
        ValueError for a bad argument.
        """
        times = Laps()
        model = load_backbone(
            backbone,
            Path(heads) if heads is not None else None,
            device=device,
            dtype=dtype,
            quantization=quantization,
            tensor_parallel=tensor_parallel,
            hashing=hashing,
        )
        weights_s = times.lap()
        try:
            tokenizer = ChatTokenizer.from_pretrained(backbone)
            checkpoint = None if heads is None else load_checkpoint(Path(heads)).on(model)
            heads_s = times.lap()
            engine = cls(
                model,
                tokenizer,
                checkpoint,
                max_batch_size=max_batch_size,
                max_model_len=max_model_len,
                max_prefill_tokens=max_prefill_tokens,
                kv_cache_gb=kv_cache_gb,
                speculation=speculation,
                acceptance=acceptance,
                step_times=step_times,
            )
            engine.start_times = StartTimes(weights_s, heads_s, times.lap())
            return engine
        except BaseException:
            if isinstance(model, ShardedBackbone):
                model.close()
            raise

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The heads in use."""
        return self._drafting.checkpoint

    @property
    def trees(self) -> tuple[TokenTree, ...]:
        """Their ladder, the smallest first; empty without calibration."""
        return self._drafting.trees

    def close(self) -> None:
        """Ends the other processes of a tensor-parallel engine, which decodes no more; does nothing to another one."""
        if isinstance(self.backbone, ShardedBackbone):
            if isinstance(self._runner, WatchedRunner):
                self._runner.release()
            self.backbone.close()

    def generate(
        self,
        prompts: Items[Prompt],
        params: SamplingParams | Items[SamplingParams],
        *,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Decodes all prompts: their completions in prompt order, the n of a prompt side by side.

        `params` is one for all, or one a prompt. `on_finish(i, completion)` is called as replies to prompt i end.
        An error leaves the engine idle, as it was found.
        """
        if isinstance(prompts, str):
            raise ValueError("generate takes a list of prompts; put a single prompt into a list")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(each)} sampling parameters; give one, or one each")
        if self.has_unfinished():
            raise RuntimeError("generate needs an idle engine; use add and step while requests are running")
        numbers: dict[str, int] = {}
        done: dict[tuple[int, int], Completion] = {}
        try:
            for i, (prompt, its_params) in enumerate(zip(prompts, each, strict=True)):
                numbers[self.add(prompt, its_params)] = i
            while self.has_unfinished():
                for completion in filter(None, (output.finished for output in self.step())):
                    i = numbers[completion.request_id]
                    done[i, completion.index] = completion
                    if on_finish:
                        on_finish(i, completion)
        finally:
            self._loop.clear()
        return [done[key] for key in sorted(done)]

    def add(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> str:
        """Queues a request and returns its id. Raises ValueError for an empty or too long prompt, unknown ids, or a
        grammar that cannot be used (`grammars` compiles one beforehand)."""
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [index(token) for token in prompt]
        self._drafting.limits.check_request(prompt_ids, params)
        if request_id is None:
            request_id = f"request-{next(self._ids)}"
        elif self._scheduler.holds(request_id):
            raise ValueError(f"request id {request_id!r} is in use; give another, or none")
        seed = secrets.randbelow(MAX_SEED) if params.seed is None else params.seed
        matchers = [self.grammars.start(params.grammar) if params.grammar else None for _ in range(params.n)]
        for i in range(params.n):
            self._scheduler.add(
                Sequence(
                    request_id,
                    i,
                    prompt_ids,
                    params,
                    seed=seed,
                    tokenizer=self.tokenizer,
                    max_new_tokens=self._drafting.limits.max_new_tokens(prompt_ids, params),
                    matcher=matchers[i],
                )
            )
        return request_id

    def step(self) -> list[Output]:
        """Prefills chunks of what can join, decodes one step of all that run, and returns what each reply gained."""
        return self._loop.step()

    def abort(self, request_id: str) -> list[Output]:
        """Ends a request wherever it is and frees its row and pages; unknown ids are ignored (it may have ended)."""
        return [sequence.abort() for sequence in self._scheduler.remove(request_id)]

    def has_unfinished(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def stats(self) -> EngineStats:
        return self._counters.stats(self._scheduler, self._cache)

    def set_tree(self, tree: TokenTree | None) -> None:
        """Decodes with this tree from the next step on, whatever the load; None is plain decoding."""
        self._speculate(tree or TokenTree.root())

    def set_speculation(self, speculation: SpeculationSetting) -> None:
        """From the next step on, as the constructor's argument of that name; "auto" measures once an engine."""
        if speculation == "auto" and self._step_times is None and self.has_unfinished():
            raise RuntimeError("step times are measured on an idle engine; wait for its requests to end")
        self._speculate(speculation)

    @property
    def step_times(self) -> StepTimes | None:
        """What "auto" chooses by, once it was measured or given."""
        return self._step_times

    def set_policy(self, step_times: StepTimes) -> None:
        """Chooses among the checkpoint's trees by these step times from the next step on."""
        self._speculate(step_times)

    def must_be_idle_for(self, checkpoint: Checkpoint) -> bool:
        """Whether running requests have to end before these heads can be taken: where their shape is another, or
        replies depend on heads, as they do under typical acceptance and never under exact."""
        if self.checkpoint is None:
            return False
        return self._acceptance != "exact" or not self._drafting.has_shape_of(checkpoint)

    def swap_heads(self, checkpoint: Checkpoint) -> None:
        """Guesses with other heads of the same backbone from the next step on, for running requests too, and chooses
        among their trees. Raises CheckpointMismatchError, or ValueError for heads that this engine has no room for; it
        then goes on as before. `must_be_idle_for` tells whether requests may be running."""
        if self.checkpoint is None:
            raise ValueError("this engine was started without heads; start it with some to change them later")
        if self.must_be_idle_for(checkpoint) and self.has_unfinished():
            raise RuntimeError("these heads can be taken only while no request runs; wait for those that do to end")
        check_pair(checkpoint.meta, self.backbone, self.tokenizer.digest)
        before, after = self._drafting, self._drafting.with_heads(checkpoint)
        has_same_shape = before.has_shape_of(checkpoint)
        self._drafting = after
        try:
            speculation = self._speculation_of(self._asked)
            if not has_same_shape:
                self._build_runner()
        except ValueError:
            self._drafting = before
            raise
        if has_same_shape:
            heads = self._runner.take_heads(checkpoint.heads, after.grown.paths if after.grown else ())
            self._drafting = replace(after, checkpoint=replace(checkpoint, heads=heads))
        self._loop.speculation = speculation

    def measure_step_times(
        self,
        batch_sizes: Items[int],
        trees: Items[TokenTree],
        *,
        repeats: int = REPEATS,
        context: int | Items[int] = CONTEXT,
    ) -> StepTimes:
        """Times decode steps of this engine, idle, at each batch size and tree: the fastest of `repeats` rounds, with
        `context` tokens a sequence, or each of several (fewer where the engine's own context is shorter)."""
        if self.has_unfinished():
            raise RuntimeError("step times are measured on an idle engine; wait for its requests to end")
        for tree in trees:
            self._drafting.limits.check_tree(tree)
        contexts = [context] if isinstance(context, int) else context
        steps = {batch: [[tree] * batch for tree in trees] for batch in batch_sizes}
        return self._profiler.measure(steps, repeats=repeats, contexts=contexts)

    def _build_runner(self) -> None:
        self._runner = self._runner_of(None if self._acceptance == "exact" else self._acceptance)
        self._loop = StepLoop(self._runner, self._scheduler, self._counters)
        self._profiler = Profiler(self._runner, self._scheduler, self._cache, self._drafting.limits, self.tokenizer)

    def _runner_of(self, acceptance: Typical | None) -> StepRunner:
        return runner_of(self.backbone, self._cache, self._drafting, acceptance)

    def _speculate(self, asked: SpeculationSetting | TokenTree | StepTimes) -> None:
        """How steps get their trees; made again when the heads change."""
        self._loop.speculation = self._speculation_of(asked)
        self._asked = asked

    def _speculation_of(self, asked: SpeculationSetting | TokenTree | StepTimes) -> Speculation:
        speculation = speculation_of(asked, self._drafting, self._profiler, self._step_times)
        if isinstance(speculation, Adaptive):
            self._step_times = speculation.policy.step_times
        return speculation
