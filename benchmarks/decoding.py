"""The decode benchmark: its settings, its contenders, and the order in which they run.

1. The model answers every prompt plainly, which fixes the replies' lengths (benchmarks/workload.py).
2. At each concurrency, as many requests as the KV cache holds together (benchmarks/prompt_cache.py) are run: one engine
   decodes plainly and with Medusa at each temperature, in turn: first in waves, then the same requests as a steady
   load, where there are enough (benchmarks/steady.py).
3. A second engine does so with typical acceptance, in turn with its own plain decoding.
4. Hugging Face decodes the same waves on an untouched copy of the model.

Results are written after every concurrency, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import hardware
from benchmarks.contenders import Contender, EngineContender, HuggingFaceContender, fixed_tree, medusa, plain
from benchmarks.decode_setup import DecodeConfig, load, load_draft, settings_of
from benchmarks.host_steps import for_grammar, over_own, why_other_replies, with_grammar
from benchmarks.measure import Row, rotated_runs, summarise, why_not_steady
from benchmarks.planning import Estimate, plan, probe
from benchmarks.progress import Progress
from benchmarks.prompt_cache import cache_gb, fill, requests_that_fit
from benchmarks.results import markdown, write_results
from benchmarks.time_budget import TimeBudget
from benchmarks.typical import distance_from_exact
from benchmarks.workload import Question, Request, encode, pick_prompts, reply_lengths, waves_of, with_context
from medusa import Engine, Typical

TYPICAL_TEMPERATURE = 0.7
DISTANCE_PROMPTS = 32
IDLE_TOKENS = 32
OVERRUN = 1.2  # times its share of the time budget that a race took, from which the report says so


class DecodeBenchmark:
    """One run of it. Contenders share the weights; their engines exist one at a time."""

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self._start = time.monotonic()
        self._progress = Progress()
        self._rows: list[Row] = []
        self._notes: list[str] = []
        self._settings: dict[str, Any] = {}
        self._taken: dict[int, list[Request]] = {}  # by concurrency
        self._engine_s = 0.0  # to start an engine and to measure its step times

    def run(self) -> str:
        """Runs everything, writes the results and returns the Markdown page."""
        config = self._config
        self._progress.say("loading the model")
        self._backbone, self._checkpoint, self._tokenizer = load(config)
        assistant = load_draft(config.draft, self._backbone) if config.draft else None
        reference = copy.deepcopy(self._backbone.model) if config.peers else None
        self._copy_rate = hardware.copy_rate(self._backbone.device)
        self._settings = settings_of(config, self._backbone, self._copy_rate)
        self._questions = self._make_questions()
        engine = self._engine("exact")
        self._requests = self._make_requests(engine)
        budget = self._budget()
        self._race_engine(engine, budget)
        del engine
        if self._runs_typical:
            self._race_typical(self._engine(Typical()), budget)
        if reference is not None:
            hardware.release_memory()  # of the engine's cache, without which Hugging Face has more room
            self._race_peers(reference, assistant, budget)
        self._write()
        return markdown(self._settings, self._rows, self._notes)

    @property
    def _runs_typical(self) -> bool:
        return self._config.typical and self._checkpoint is not None

    @property
    def _max_model_len(self) -> int:
        room = max(self._config.context, self._backbone.max_positions // 2) + self._config.max_tokens
        return min(room, self._backbone.max_positions)

    def _make_questions(self) -> list[Question]:
        config = self._config
        prompts = pick_prompts(config.prompts, config.exclude, config.num_prompts)
        longest = self._max_model_len - config.max_tokens
        questions = encode(prompts, self._tokenizer, longest)
        if len(questions) < len(prompts):
            self._notes.append(f"{len(prompts) - len(questions)} prompts above {longest} tokens were left out")
        return questions

    def _make_requests(self, engine: Engine) -> list[Request]:
        config, questions = self._config, self._questions
        ids = [question.prompt_ids for question in questions]
        if config.context:
            ids = with_context(
                engine, questions, config.context, config.max_tokens, self._progress.counter("context", len(ids))
            )
        temperatures = self._temperatures()
        count = self._progress.counter("plain replies", len(ids) * len(temperatures))
        requests = reply_lengths(engine, ids, temperatures, config.max_tokens, count)
        if config.grammar:
            requests, notes = for_grammar(engine, requests)
            self._notes += notes
        self._settings["prompts"] = f"{len(requests)} of {config.prompts.name}"
        self._settings["prompt tokens, mean"] = round(sum(len(r.prompt_ids) for r in requests) / len(requests), 1)
        for temperature in temperatures:
            mean = sum(request.lengths[temperature] for request in requests) / len(requests)
            self._settings[f"reply tokens at T = {temperature:g}, mean"] = round(mean, 1)
        random.Random(0).shuffle(requests)  # a concurrency that takes the first of them takes some of the whole file
        return requests

    def _race_engine(self, engine: Engine, budget: TimeBudget) -> None:
        temperatures = self._config.temperatures
        contenders = [plain(engine, temperature) for temperature in temperatures]
        if self._checkpoint is not None:
            self._measure_step_times(engine)
            contenders += [medusa(engine, temperature) for temperature in temperatures]
        if self._config.grammar:
            contenders += [with_grammar(contender) for contender in contenders if contender.temperature == 0.0]
        if self._checkpoint is not None:
            contenders += [fixed_tree(engine, size, temperatures[0]) for size in self._config.trees]
        for concurrency in self._config.concurrency:
            self._taken[concurrency] = requests = self._found_again(engine, concurrency)
            share = budget.share(reserved_s=self._engine_s if self._runs_typical else 0.0)
            self._rows += self._race(contenders, requests, concurrency, share)
            self._write()
        if engine.step_times is not None:
            self._settings["step times"] = engine.step_times.to_dict()["step_times"]

    def _race_typical(self, engine: Engine, budget: TimeBudget) -> None:
        typical = replace(medusa(engine, TYPICAL_TEMPERATURE), name="medusa, typical, T=0.7")
        contenders = [plain(engine, TYPICAL_TEMPERATURE), typical]
        self._measure_step_times(engine)
        self._progress.say("measuring typical acceptance's distance")
        self._note_distance(engine)
        for concurrency in self._config.concurrency:
            requests = self._found_again(engine, concurrency)
            self._rows += self._race(contenders, requests, concurrency, budget.share(), ", typical acceptance")[1:]
            self._write()

    def _race_peers(self, model: PreTrainedModel, assistant: PreTrainedModel | None, budget: TimeBudget) -> None:
        of_plain = {row.concurrency: row for row in self._rows if row.contender == "plain, T=0"}
        for concurrency in self._config.peers_at or self._config.concurrency:
            peers: list[Contender] = [HuggingFaceContender("HF generate, T=0", "", model)]
            if assistant is not None and concurrency == 1:
                peers.append(HuggingFaceContender("HF assisted, T=0", "", model, assistant))
            try:
                rows = self._race(peers, self._taken[concurrency], concurrency, budget.share(), ", Hugging Face")
            except torch.cuda.OutOfMemoryError:
                self._notes.append(f"concurrency {concurrency}: Hugging Face ran out of the GPU's memory")
                continue
            if concurrency in of_plain:
                rows = [row.over(of_plain[concurrency]) for row in rows]
            self._rows += [replace(row, end_to_end=None) for row in rows]
            self._write()

    def _found_again(self, engine: Engine, concurrency: int) -> list[Request]:
        """The requests of a concurrency: those whose prompts, computed here, its waves will find in the engine's cache;
        all of them where it does not hold a wave."""
        total = len(self._requests)
        count = requests_that_fit(self._requests, concurrency, engine.stats().pages_total)
        if count == 0:
            self._note(
                f"concurrency {concurrency}: the KV cache does not hold {concurrency} requests, so that prompts are "
                "computed anew each time, replies of a wave end before all its requests decode, and a steady load does "
                "not decode all at once"
            )
            return self._requests
        if count < total:
            self._note(f"concurrency {concurrency}: {count} of {total} prompts, as many as the KV cache holds")
        self._progress.say(f"concurrency {concurrency}: computing {count} prompts")
        fill(engine, self._requests[:count])
        return self._requests[:count]

    def _race(
        self,
        contenders: Sequence[Contender],
        requests: Sequence[Request],
        concurrency: int,
        budget: float | None,
        who: str = "",
    ) -> list[Row]:
        """`who` tells in notes whose race it is, where it is not the first at this concurrency."""
        start, label = time.monotonic(), f"concurrency {concurrency}{who}"
        self._progress.say(f"{label}: warming up")
        estimate = Estimate.total([probe(contender, requests, concurrency) for contender in contenders])
        idle = [self._idle_share(contender, requests, concurrency) for contender in contenders]
        left = None if budget is None else max(budget - (time.monotonic() - start), 0.0)
        planned = plan(estimate, concurrency, len(requests), self._config.repeats, left)
        if planned.note:
            self._note(f"{label}: {planned.note}")
        if concurrency > len(requests):
            self._note(f"concurrency {concurrency}: the {len(requests)} prompts repeat in a wave")
        runs = rotated_runs(contenders, requests, concurrency, planned, self._progress.say, left)
        rows = over_own(contenders, runs, summarise(contenders, runs, concurrency, planned))
        for other in why_other_replies(rows):
            self._note(f"{label}: {other}")
        if any(isinstance(c, EngineContender) for c in contenders) and (why := why_not_steady(rows, planned)):
            self._note(f"{label}: {why}")
        if rows[0].repeats < planned.repeats:
            self._note(f"{label}: {rows[0].repeats} of {planned.repeats} runs, its share of the time budget was spent")
        if budget is not None and (took := time.monotonic() - start) > OVERRUN * budget:
            self._note(f"{label}: took {took:.0f} s, its share of the time budget was {budget:.0f} s")
        return [
            replace(row, bandwidth_share=self._bandwidth_share(row, requests), gpu_idle_share=share)
            for row, share in zip(rows, idle, strict=True)
        ]

    def _idle_share(self, contender: Contender, requests: Sequence[Request], concurrency: int) -> float | None:
        if not isinstance(contender, EngineContender):
            return None
        return contender.idle_share(waves_of(requests, contender.temperature, concurrency, 1)[0], IDLE_TOKENS)

    def _bandwidth_share(self, row: Row, requests: Sequence[Request]) -> float | None:
        if row.step_ms is None:
            return None
        lengths = [len(r.prompt_ids) + r.lengths[row.temperature] / 2 for r in requests]
        kv_bytes = row.concurrency * sum(lengths) / len(lengths) * hardware.kv_bytes_per_token(self._backbone)
        bytes_read = hardware.weight_bytes(self._backbone) + kv_bytes
        if self._checkpoint is not None:
            bytes_read += row.speculating * hardware.heads_bytes(self._checkpoint.heads, self._backbone)
        return bytes_read / (row.step_ms / 1e3) / self._copy_rate

    def _note_distance(self, engine: Engine) -> None:
        prompts = [request.prompt_ids for request in self._requests[:DISTANCE_PROMPTS]]
        distance = distance_from_exact(engine, prompts, TYPICAL_TEMPERATURE)
        self._settings["typical acceptance, distance"] = asdict(distance)
        self._notes.append(
            f"typical acceptance at T = 0.7: KL(typical || exact) is {distance.first:.2f} nats for the first token and "
            f"{distance.second:.2f} for the second, over {distance.prompts} prompts"
        )

    def _engine(self, acceptance: Any) -> Engine:
        hardware.release_memory()
        self._progress.say("starting an engine")
        start, config = time.monotonic(), self._config
        prompts = [max(config.context, len(question.prompt_ids)) for question in self._questions]
        batch, room = max(config.concurrency), self._max_model_len
        cache = config.kv_cache_gb
        if cache is None:
            cache = cache_gb(self._backbone, prompts, config.max_tokens, batch, room)
        engine = Engine(
            self._backbone,
            self._tokenizer,
            self._checkpoint,
            max_batch_size=batch,
            max_model_len=room,
            kv_cache_gb=cache,
            speculation="off",
            acceptance=acceptance,
        )
        self._engine_s = time.monotonic() - start
        return engine

    def _measure_step_times(self, engine: Engine) -> None:
        self._progress.say("measuring step times")
        start = time.monotonic()
        engine.set_speculation("auto")
        self._engine_s += time.monotonic() - start

    def _temperatures(self) -> list[float]:
        wanted = list(self._config.temperatures)
        if self._runs_typical:
            wanted.append(TYPICAL_TEMPERATURE)
        if self._config.peers:
            wanted.append(0.0)
        return list(dict.fromkeys(wanted))

    def _budget(self) -> TimeBudget:
        """Weights are about a race's passes over its requests: in waves, and as a steady load; Hugging Face, which has
        waves alone, also computes every prompt again."""
        config, medusa = self._config, self._checkpoint is not None
        engine = len(config.temperatures) * (2 if medusa else 1) + (len(config.trees) if medusa else 0)
        engine += (2 if medusa else 1) if config.grammar else 0
        weights = [2 * engine] * len(config.concurrency)
        weights += [4] * len(config.concurrency) if self._runs_typical else []
        weights += [4] * len(config.peers_at or config.concurrency) if config.peers else []
        return TimeBudget(None if config.time_budget is None else self._start + config.time_budget, weights)

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _write(self) -> None:
        write_results(self._config.out, self._settings, self._rows, self._notes)


__all__ = ["DecodeBenchmark", "DecodeConfig"]
