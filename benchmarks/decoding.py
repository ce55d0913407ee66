"""The decode benchmark: its settings, its contenders, and the order in which they run.

1. The model answers every prompt plainly, which fixes the replies' lengths (benchmarks/workload.py).
2. At each concurrency, one engine decodes plainly and with Medusa at each temperature, in turn.
3. A second engine does so with typical acceptance, in turn with its own plain decoding.
4. Hugging Face decodes the same waves on an untouched copy of the model.

Results are written after every concurrency, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import hardware
from benchmarks.backbones import check_dtype, load_timed
from benchmarks.contenders import Contender, EngineContender, HuggingFaceContender
from benchmarks.inflate import inflate_checkpoint
from benchmarks.measure import MIN_REPEATS, Interval, Row, plan, probe, rotated_runs, summarise
from benchmarks.results import markdown, write_results
from benchmarks.typical import distance_from_exact
from benchmarks.workload import MIN_REPLY, Request, encode, pick_prompts, reply_lengths, waves_of, with_context
from medusa import Engine, Typical
from medusa.checkpoint import Checkpoint, load_checkpoint
from medusa.config import ConfigError
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer

TYPICAL_TEMPERATURE = 0.7
DISTANCE_PROMPTS = 32
IDLE_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """The options of `medusa bench decode`; see there."""

    prompts: Path
    out: Path
    model: str = "models/chat-8m"
    heads: Path | None = None
    draft: str | None = None
    exclude: Path | None = None
    num_prompts: int = 256
    context: int = 0
    max_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    repeats: int = 5
    trees: tuple[int, ...] = ()
    typical: bool = True
    peers: bool = True
    peers_at: tuple[int, ...] = ()
    inflate: str | None = None
    dtype: str | None = None
    device: str | None = None
    kv_cache_gb: float | None = None
    time_budget: float | None = None

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError(f"--concurrency lists numbers of at least 1, got {self.concurrency}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigError(f"--temperatures lists numbers of at least 0, got {self.temperatures}")
        if self.repeats < MIN_REPEATS:
            raise ConfigError(f"--repeats is at least {MIN_REPEATS}, for a median with quartiles; got {self.repeats}")
        if self.num_prompts < 1 or self.max_tokens < MIN_REPLY or self.context < 0:
            raise ConfigError(f"--num-prompts is at least 1, --max-tokens at least {MIN_REPLY}, --context at least 0")
        check_dtype(self.dtype)
        if not set(self.peers_at) <= set(self.concurrency):
            raise ConfigError(f"--peers-at {self.peers_at} must be among --concurrency {self.concurrency}")


class DecodeBenchmark:
    """One run of it. Contenders share the weights; their engines exist one at a time."""

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self._start = time.monotonic()
        self._rows: list[Row] = []
        self._notes: list[str] = []
        self._settings: dict[str, Any] = {}

    def run(self) -> str:
        """Runs everything, writes the results and returns the Markdown page."""
        config = self._config
        self._say("loading the model")
        self._backbone, self._checkpoint, self._tokenizer = _load(config)
        assistant = _draft(config.draft, self._backbone) if config.draft else None
        reference = copy.deepcopy(self._backbone.model) if config.peers else None
        self._copy_rate = hardware.copy_rate(self._backbone.device)
        self._settings = _settings(config, self._backbone, self._copy_rate)
        engine = self._engine("exact")
        self._requests = self._make_requests(engine)
        budgets = self._budgets()
        self._race_engine(engine, budgets)
        del engine
        if config.typical and self._checkpoint is not None:
            self._race_typical(self._engine(Typical()), budgets)
        if reference is not None:
            hardware.release_memory()  # of the engine's cache, without which Hugging Face has more room
            self._race_peers(reference, assistant, budgets)
        self._write()
        return markdown(self._settings, self._rows, self._notes)

    def _make_requests(self, engine: Engine) -> list[Request]:
        config = self._config
        prompts = pick_prompts(config.prompts, config.exclude, config.num_prompts)
        longest = engine.max_model_len - config.max_tokens
        questions = encode(prompts, self._tokenizer, longest)
        if len(questions) < len(prompts):
            self._notes.append(f"{len(prompts) - len(questions)} prompts above {longest} tokens were left out")
        ids = [question.prompt_ids for question in questions]
        if config.context:
            ids = with_context(engine, questions, config.context, config.max_tokens, self._count("context", len(ids)))
        temperatures = self._temperatures()
        count = self._count("plain replies", len(ids) * len(temperatures))
        requests = reply_lengths(engine, ids, temperatures, config.max_tokens, count)
        self._settings["prompts"] = f"{len(requests)} of {config.prompts.name}"
        self._settings["prompt tokens, mean"] = round(sum(len(r.prompt_ids) for r in requests) / len(requests), 1)
        for temperature in temperatures:
            mean = sum(request.lengths[temperature] for request in requests) / len(requests)
            self._settings[f"reply tokens at T = {temperature:g}, mean"] = round(mean, 1)
        return requests

    def _race_engine(self, engine: Engine, budgets: Iterator[float | None]) -> None:
        contenders = [self._plain(engine, temperature) for temperature in self._config.temperatures]
        if self._checkpoint is not None:
            self._say("measuring step times")
            engine.set_speculation("auto")
            contenders += [self._medusa(engine, temperature) for temperature in self._config.temperatures]
            contenders += [self._fixed_tree(engine, size) for size in self._config.trees]
        for concurrency in self._config.concurrency:
            self._rows += self._race(contenders, concurrency, next(budgets))
            self._write()
        if engine.step_times is not None:
            self._settings["step times"] = engine.step_times.to_dict()["step_times"]

    def _race_typical(self, engine: Engine, budgets: Iterator[float | None]) -> None:
        plain = self._plain(engine, TYPICAL_TEMPERATURE)
        typical = replace(self._medusa(engine, TYPICAL_TEMPERATURE), name="medusa, typical, T=0.7")
        self._say("measuring step times and typical acceptance's distance")
        engine.set_speculation("auto")
        self._note_distance(engine)
        for concurrency in self._config.concurrency:
            self._rows += self._race([plain, typical], concurrency, next(budgets))[1:]
            self._write()

    def _race_peers(
        self, model: PreTrainedModel, assistant: PreTrainedModel | None, budgets: Iterator[float | None]
    ) -> None:
        plain = {row.concurrency: row for row in self._rows if row.contender == "plain, T=0"}
        for concurrency in self._config.peers_at or self._config.concurrency:
            peers: list[Contender] = [HuggingFaceContender("HF generate, T=0", "", model)]
            if assistant is not None and concurrency == 1:
                peers.append(HuggingFaceContender("HF assisted, T=0", "", model, assistant))
            try:
                rows = self._race(peers, concurrency, next(budgets))
            except torch.cuda.OutOfMemoryError:
                self._notes.append(f"concurrency {concurrency}: Hugging Face ran out of the GPU's memory")
                continue
            self._rows += [replace(_over(row, plain.get(concurrency)), end_to_end=None) for row in rows]
            self._write()

    def _race(self, contenders: Sequence[Contender], concurrency: int, budget: float | None) -> list[Row]:
        start = time.monotonic()
        self._say(f"concurrency {concurrency}: warming up")
        seconds = sum(probe(contender, self._requests, concurrency) for contender in contenders)
        left = None if budget is None else max(budget - (time.monotonic() - start), 0.0)
        planned = plan(seconds, concurrency, len(self._requests), self._config.repeats, left)
        if planned.note:
            self._notes.append(planned.note)
        if concurrency > len(self._requests):
            self._notes.append(f"concurrency {concurrency}: the {len(self._requests)} prompts repeat in a wave")
        runs = rotated_runs(contenders, self._requests, concurrency, planned, self._say)
        rows = summarise(contenders, runs, concurrency, planned)
        return [self._with_hardware(row, each) for row, each in zip(rows, contenders, strict=True)]

    def _with_hardware(self, row: Row, contender: Contender) -> Row:
        lengths = [len(r.prompt_ids) + r.lengths[row.temperature] / 2 for r in self._requests]
        kv_bytes = row.concurrency * sum(lengths) / len(lengths) * hardware.kv_bytes_per_token(self._backbone)
        bytes_read = hardware.weight_bytes(self._backbone) + kv_bytes
        if self._checkpoint is not None:
            bytes_read += row.speculating * hardware.heads_bytes(self._checkpoint.heads, self._backbone)
        idle = None
        if isinstance(contender, EngineContender):
            wave = waves_of(self._requests, row.temperature, row.concurrency, 1)[0]
            idle = contender.idle_share(wave, IDLE_TOKENS)
        share = bytes_read / (row.step_ms / 1e3) / self._copy_rate
        return replace(row, bandwidth_share=share, gpu_idle_share=idle)

    def _note_distance(self, engine: Engine) -> None:
        prompts = [request.prompt_ids for request in self._requests[:DISTANCE_PROMPTS]]
        distance = distance_from_exact(engine, prompts, TYPICAL_TEMPERATURE)
        self._settings["typical acceptance, distance"] = asdict(distance)
        self._notes.append(
            f"typical acceptance at T = 0.7: KL(typical || exact) is {distance.first:.2f} nats for the first token and "
            f"{distance.second:.2f} for the second, over {distance.prompts} prompts"
        )

    def _plain(self, engine: Engine, temperature: float) -> EngineContender:
        name = f"plain, T={temperature:g}"
        return EngineContender(name, name, temperature, engine, lambda e: e.set_speculation("off"))

    def _medusa(self, engine: Engine, temperature: float) -> EngineContender:
        plain = f"plain, T={temperature:g}"
        select: Callable[[Engine], None] = lambda e: e.set_speculation("auto")  # noqa: E731
        return EngineContender(f"medusa, T={temperature:g}", plain, temperature, engine, select)

    def _fixed_tree(self, engine: Engine, size: int) -> EngineContender:
        temperature = self._config.temperatures[0]
        name, plain = f"medusa, {size} nodes, T={temperature:g}", f"plain, T={temperature:g}"
        return EngineContender(name, plain, temperature, engine, lambda e: e.set_speculation(size))

    def _engine(self, acceptance: Any) -> Engine:
        hardware.release_memory()
        config = self._config
        room = max(config.context, self._backbone.max_positions // 2) + config.max_tokens
        return Engine(
            self._backbone,
            self._tokenizer,
            self._checkpoint,
            max_batch_size=max(config.concurrency),
            max_model_len=min(room, self._backbone.max_positions),
            kv_cache_gb=config.kv_cache_gb,
            speculation="off",
            acceptance=acceptance,
        )

    def _temperatures(self) -> list[float]:
        wanted = list(self._config.temperatures)
        if self._config.typical and self._checkpoint is not None:
            wanted.append(TYPICAL_TEMPERATURE)
        if self._config.peers:
            wanted.append(0.0)
        return list(dict.fromkeys(wanted))

    def _budgets(self) -> Iterator[float | None]:
        """Seconds for each race to come: a fair share of what is left of the time budget when it begins."""
        config, medusa = self._config, self._checkpoint is not None
        engine = len(config.temperatures) * (2 if medusa else 1) + (len(config.trees) if medusa else 0)
        weights = [engine] * len(config.concurrency)
        weights += [2] * len(config.concurrency) if config.typical and medusa else []
        weights += [4] * len(config.peers_at or config.concurrency) if config.peers else []
        for i, weight in enumerate(weights):
            if config.time_budget is None:
                yield None
            else:
                left = max(config.time_budget - (time.monotonic() - self._start), 0.0)
                yield left * weight / sum(weights[i:])

    def _write(self) -> None:
        write_results(self._config.out, self._settings, self._rows, self._notes)

    def _count(self, label: str, total: int) -> Callable[[int], None]:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self._say(f"{label}: {done}/{total}", passing=done < total)

        return advance

    def _say(self, text: str, passing: bool = False) -> None:
        """The progress line. On a terminal it is rewritten; in a log passing counts are left out."""
        line = f"[{time.monotonic() - self._start:6.1f} s] {text}"
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{line}", end="" if passing else "\n", file=sys.stderr, flush=True)
        elif not passing:
            print(line, file=sys.stderr, flush=True)


def _load(config: DecodeConfig) -> tuple[Backbone, Checkpoint | None, ChatTokenizer]:
    tokenizer = ChatTokenizer.from_pretrained(config.model)
    small, backbone = load_timed(config.model, config.inflate, config.dtype, config.device)
    checkpoint = load_checkpoint(config.heads, small) if config.heads else None
    if checkpoint is not None and backbone is not small:
        checkpoint = inflate_checkpoint(checkpoint, backbone)
    return backbone, checkpoint, tokenizer


def _draft(name: str, backbone: Backbone) -> PreTrainedModel:
    draft = AutoModelForCausalLM.from_pretrained(name, dtype=backbone.dtype).to(backbone.device).eval()
    if draft.config.vocab_size != backbone.vocab_size:
        raise ConfigError(
            f"--draft {name} has a vocabulary of {draft.config.vocab_size} tokens, the model {backbone.vocab_size}; "
            "assisted generation is compared with a draft of the same vocabulary"
        )
    return draft


def _settings(config: DecodeConfig, backbone: Backbone, copy_rate: float) -> dict[str, Any]:
    return {
        "model": backbone.name,
        "heads": str(config.heads) if config.heads else "none",
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": hardware.device_name(backbone.device),
        "threads": torch.get_num_threads() if backbone.device.type == "cpu" else os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy rate, GB/s": round(copy_rate / 1e9, 1),
        "weights, GB": round(hardware.weight_bytes(backbone) / 1e9, 3),
        "context": config.context or "the prompts' own",
        "max tokens": config.max_tokens,
        "time budget, s": config.time_budget or "none",
    }


def _over(row: Row, plain: Row | None) -> Row:
    """With its ratio to this engine's plain decoding, which ran at another time of the same process."""
    if plain is None:
        return row
    return replace(
        row,
        ratio=_scaled(row.tokens_per_second, plain.tokens_per_second.median),
        full_ratio=_scaled(row.full, plain.full.median) if row.full and plain.full else None,
    )


def _scaled(speed: Interval, base: float) -> Interval:
    return Interval(speed.median / base, speed.low / base, speed.high / base)


__all__ = ["DecodeBenchmark", "DecodeConfig"]
