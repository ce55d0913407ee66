"""Who decodes in the benchmark: this engine, plainly or with a tree, and Hugging Face, with or without a draft model.

All run the same waves: groups of requests that start together. Prefill and decoding are timed apart, and a contender's
speed is that of decoding; the time from start to end is kept beside it. This engine also runs the waves' requests as a
steady load (benchmarks/steady.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.hardware import idle_share, synchronize
from benchmarks.steady import Steady, run_steady
from benchmarks.workload import Request
from medusa import Engine, SamplingParams
from medusa.grammar import Grammar


@dataclass
class Run:
    """What one contender did in the waves of one run. `full_steps` are the seconds of each step in which every request
    of its wave was still decoding, `full_tokens` what they gave; `nodes` the largest tree of every step; `replies` the
    tokens of each, by its seed; `steady` the same requests as a steady load, None where there was no such run."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    tokens: int = 0
    replies_steps: int = 0  # steps of each reply, summed over replies
    replies_tokens: int = 0  # tokens that those steps gave
    full_steps: list[float] = field(default_factory=list)
    full_tokens: int = 0
    nodes: list[int] = field(default_factory=list)
    replies: dict[int, list[int]] = field(default_factory=dict)
    steady: Steady | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds

    @property
    def full_tokens_per_second(self) -> float | None:
        """While every request of its wave was decoding; None where one had always ended."""
        return self.full_tokens / sum(self.full_steps) if self.full_steps else None

    @property
    def steady_tokens_per_second(self) -> float | None:
        """Under a steady load; None where there was none."""
        return self.steady.tokens_per_second if self.steady else None

    @property
    def end_to_end_tokens_per_second(self) -> float:
        return self.tokens / (self.prefill_seconds + self.decode_seconds)

    @property
    def tokens_per_step(self) -> float:
        return self.replies_tokens / self.replies_steps


class Contender(Protocol):
    """`plain` names the contender that this one is compared with (its own name for plain decoding itself)."""

    name: str
    plain: str
    temperature: float

    def run(self, waves: Sequence[Sequence[Request]], max_tokens: int | None = None) -> Run:
        """Decodes the waves one after the other, replies cut at `max_tokens`."""
        ...

    def run_steady(self, queue: Sequence[Request], concurrency: int) -> Steady | None:
        """Decodes the queue, `concurrency` at once for as long as it lasts; None from one that decodes only batches
        that start together."""
        ...


@dataclass
class EngineContender:
    """This engine; `select` sets its tree or policy before a run. With a `grammar` one of the requests that run
    together has it; `without` then names the same contender without one."""

    name: str
    plain: str
    temperature: float
    engine: Engine
    select: Callable[[Engine], None]
    grammar: Grammar | None = None
    without: str | None = None

    def run(self, waves: Sequence[Sequence[Request]], max_tokens: int | None = None) -> Run:
        self.select(self.engine)
        run = Run()
        for wave in waves:
            self._run_wave(wave, max_tokens, run)
        return run

    def run_steady(self, queue: Sequence[Request], concurrency: int) -> Steady:
        self.select(self.engine)
        return run_steady(self.engine, queue, concurrency, self.temperature, self.grammar)

    def idle_share(self, wave: Sequence[Request], max_tokens: int) -> float | None:
        """The GPU's idle share while the wave decodes; None on a CPU."""
        if self.engine.backbone.device.type != "cuda":
            return None
        self.select(self.engine)
        run = Run()
        ended = self._fill(wave, max_tokens, run)
        return idle_share(lambda: self._drain(run, ended), self.engine.backbone.device)

    def _run_wave(self, wave: Sequence[Request], max_tokens: int | None, run: Run) -> None:
        ended = self._drain(run, self._fill(wave, max_tokens, run))
        if ended != len(wave):
            raise RuntimeError(f"{len(wave)} requests were started and {ended} ended")

    def _fill(self, wave: Sequence[Request], max_tokens: int | None, run: Run) -> int:
        """Steps until every request has its first token; returns how many have ended by then."""
        synchronize(self.engine.backbone.device)
        start = time.perf_counter()
        params = self._params(wave, max_tokens)
        waiting = {self.engine.add(r.prompt_ids, asked) for r, asked in zip(wave, params, strict=True)}
        ended = 0
        while waiting:
            for output in self.engine.step():
                waiting.discard(output.request_id)
                ended += self._note(output, run)
        synchronize(self.engine.backbone.device)
        run.prefill_seconds += time.perf_counter() - start
        return ended

    def _params(self, wave: Sequence[Request], max_tokens: int | None) -> list[SamplingParams]:
        """A grammar is for the longest reply, so that hardly a step of the wave is without it."""
        longest = max(wave, key=lambda request: request.lengths[self.temperature])
        return [r.params(self.temperature, max_tokens, self.grammar if r is longest else None) for r in wave]

    def _drain(self, run: Run, ended: int) -> int:
        """Steps until all have ended; returns how many."""
        before = time.perf_counter()
        while self.engine.has_unfinished():
            outputs = self.engine.step()
            now = time.perf_counter()
            tokens = sum(len(output.token_ids) for output in outputs)
            if not ended:
                run.full_steps.append(now - before)
                run.full_tokens += tokens
            run.nodes.append(self.engine.stats().tree_size)
            run.decode_seconds += now - before
            before = now
            run.decode_tokens += tokens
            ended += sum(self._note(output, run) for output in outputs)
        return ended

    @staticmethod
    def _note(output: Any, run: Run) -> bool:
        if output.finished is None:
            return False
        run.replies[output.finished.seed] = output.finished.token_ids
        run.tokens += len(output.finished.token_ids)
        run.replies_steps += output.finished.num_steps
        run.replies_tokens += sum(output.finished.accepted_per_step)
        return True


def plain(engine: Engine, temperature: float) -> EngineContender:
    name = f"plain, T={temperature:g}"
    return EngineContender(name, name, temperature, engine, lambda e: e.set_speculation("off"))


def medusa(engine: Engine, temperature: float) -> EngineContender:
    """Trees of the policy's choice."""
    name, base = f"medusa, T={temperature:g}", f"plain, T={temperature:g}"
    return EngineContender(name, base, temperature, engine, lambda e: e.set_speculation("auto"))


def fixed_tree(engine: Engine, size: int, temperature: float) -> EngineContender:
    name, base = f"medusa, {size} nodes, T={temperature:g}", f"plain, T={temperature:g}"
    return EngineContender(name, base, temperature, engine, lambda e: e.set_speculation(size))


class HuggingFaceContender:
    """transformers' `generate`, greedy, on left-padded batches, with an assistant model where one is given. A batch
    runs to the end of its longest reply; tokens beyond a reply's own length are not counted."""

    temperature = 0.0

    def __init__(self, name: str, plain: str, model: PreTrainedModel, assistant: PreTrainedModel | None = None) -> None:
        self.name = name
        self.plain = plain
        self._model = model
        self._assistant = assistant
        self._forwards: list[float] = []

    def run(self, waves: Sequence[Sequence[Request]], max_tokens: int | None = None) -> Run:
        run = Run()
        hook = self._model.register_forward_hook(self._note_forward)
        try:
            for wave in waves:
                self._run_wave(wave, max_tokens, run)
        finally:
            hook.remove()
        return run

    def run_steady(self, queue: Sequence[Request], concurrency: int) -> None:
        """None: `generate` takes no request before its whole batch has ended."""
        return None

    @torch.inference_mode()
    def _run_wave(self, wave: Sequence[Request], max_tokens: int | None, run: Run) -> None:
        device = self._model.device
        ids, mask = _left_padded([request.prompt_ids for request in wave], device)
        lengths = [request.params(0.0, max_tokens).max_tokens for request in wave]
        self._forwards = []
        synchronize(device)
        start = time.perf_counter()
        output = self._model.generate(
            ids, attention_mask=mask, generation_config=self._exactly(max(lengths)), assistant_model=self._assistant
        )
        synchronize(device)
        end = time.perf_counter()
        if output.shape[1] - ids.shape[1] != max(lengths):
            raise RuntimeError(f"generate gave {output.shape[1] - ids.shape[1]} tokens, {max(lengths)} were asked for")
        first = self._forwards[0]
        steps = len(self._forwards) - 1
        run.prefill_seconds += first - start
        run.decode_seconds += end - first
        run.decode_tokens += sum(length - 1 for length in lengths)
        run.tokens += sum(lengths)
        run.replies_steps += steps * len(wave)
        run.replies_tokens += (max(lengths) - 1) * len(wave)
        full = min(steps, min(lengths))
        run.full_steps += [(end - first) / steps] * full
        run.full_tokens += round(full * len(wave) * (max(lengths) - 1) / steps) if steps else 0
        run.nodes += [1] * steps

    def _exactly(self, tokens: int) -> GenerationConfig:
        """Greedy, so many tokens: a reply ends at an id beyond the vocabulary, that is, never."""
        never = int(self._model.config.vocab_size)
        return GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=never, pad_token_id=0, use_cache=True
        )

    def _note_forward(self, *_: object) -> None:
        """The first forward is the prefill: it is waited for, later ones are only counted."""
        if not self._forwards:
            synchronize(self._model.device)
        self._forwards.append(time.perf_counter())


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return ids, mask
