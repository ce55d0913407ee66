"""An engine that follows a script, with the interface of medusa's, so that the shell can be tested on its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI

from deployments import logs
from deployments.async_engine import AsyncEngine
from deployments.handover import Pace
from medusa import Engine, EngineStats, HeadsConfig, MedusaHeads, SamplingParams, TokenLogprob
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta, save_checkpoint
from medusa.engine.sequence import Output, Sequence
from medusa.grammar import Grammars
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer

PAGES_EACH = 4  # of 64 tokens: the context of 256
REPLY = "Two words, und ein paar Umlaute: äöü, €, 🙂 and a Stop here. "


class ScriptedEngine:
    """Every reply is `reply`, over and over, `width` tokens a step (the first step gives one, as a prefill does).

    `gate` holds the next step back while it is clear, and clears itself after step number `pause_after`; `fault` is
    raised by the next step.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, reply: str = REPLY, width: int = 3, max_batch_size: int = 4):
        self.tokenizer = tokenizer
        self.backbone = SimpleNamespace(vocab_size=tokenizer.vocab_size)
        self.grammars = Grammars(tokenizer, tokenizer.vocab_size)
        self.max_model_len = 256
        self.max_batch_size = max_batch_size
        self.script = tokenizer.hf.encode(reply, add_special_tokens=False)
        self.width = width
        self.gate = threading.Event()
        self.gate.set()
        self.pause_after: int | None = None
        self.fault: Exception | None = None
        self.threads: set[int] = set()
        self.aborted: list[str] = []
        self.closed_in: int | None = None  # the thread
        self.must_be_idle = False
        self.swapped: list[object] = []
        self._sequences: list[Sequence] = []
        self._steps = self._prefilled = self._drafted = self._accepted = 0

    def close(self) -> None:
        self.closed_in = threading.get_ident()

    def add(self, prompt: str | list[int], params: SamplingParams, *, request_id: str) -> str:
        self.threads.add(threading.get_ident())
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not prompt_ids:
            raise ValueError("the prompt is empty; give at least one token")
        room = min(params.max_tokens, self.max_model_len - len(prompt_ids))
        for index in range(params.n):
            self._sequences.append(
                Sequence(
                    request_id,
                    index,
                    prompt_ids,
                    params,
                    seed=7 if params.seed is None else params.seed,
                    tokenizer=self.tokenizer,
                    max_new_tokens=room,
                )
            )
        return request_id

    def step(self) -> list[Output]:
        self.threads.add(threading.get_ident())
        assert self.gate.wait(30)
        if self.fault:
            raise self.fault
        self._steps += 1
        if self._steps == self.pause_after:
            self.gate.clear()
        outputs = [self._advance(sequence) for sequence in self._sequences[: self.max_batch_size]]
        self._sequences = [sequence for sequence in self._sequences if sequence.finish_reason is None]
        return outputs

    def _advance(self, sequence: Sequence) -> Output:
        done = len(sequence.output_ids)
        self._prefilled += 0 if done else len(sequence.prompt_ids)
        self._drafted += self.width - 1 if done else 0
        width = self.width if done else 1
        ids = [self.script[(done + i) % len(self.script)] for i in range(width)]
        top = sequence.params.logprobs or 0
        logprobs = [TokenLogprob(t, -0.25, [(t, -0.25), (0, float("-inf"))][:top]) for t in ids]
        output = sequence.append(ids, logprobs, decoded=done > 0, num_drafted=width - 1)
        self._accepted += output.num_draft_accepted
        return output

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._sequences = [sequence for sequence in self._sequences if sequence.request_id != request_id]

    def must_be_idle_for(self, checkpoint: object) -> bool:
        return self.must_be_idle

    def swap_heads(self, checkpoint: object) -> None:
        self.threads.add(threading.get_ident())
        assert not (self.must_be_idle and self._sequences)
        if isinstance(checkpoint, Exception):
            raise checkpoint
        self.swapped.append(checkpoint)

    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    def stats(self) -> EngineStats:
        running = min(len(self._sequences), self.max_batch_size)
        return EngineStats(
            running=running,
            waiting=len(self._sequences) - running,
            steps=self._steps,
            prefill_tokens=self._prefilled,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            decode_tokens=0,
            pages_used=running,
            pages_total=self.max_batch_size * PAGES_EACH,
            tree_size=self.width,
        )


class HeldSteps:
    """A real engine's steps, each held back until it is let go. `found` has what the engine held as each began: the
    steps before it, its running and waiting replies, and the cache's pages in use."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._step = engine, engine.step
        self._allowed = threading.Semaphore(0)
        self._is_open = False
        self.found: list[SimpleNamespace] = []
        engine.step = self._held

    def let_go(self, count: int) -> None:
        """So many steps more may run."""
        self._allowed.release(count)

    def open(self) -> None:
        """Nothing is held any more."""
        self._is_open = True
        self._allowed.release()

    def _held(self) -> list[Output]:
        stats, pool = self._engine.stats(), self._engine._cache.pool
        self.found.append(
            SimpleNamespace(steps=stats.steps, running=stats.running, waiting=stats.waiting, pages=pool.num_used)
        )
        assert self._is_open or self._allowed.acquire(timeout=60)
        return self._step()


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable) -> ChatTokenizer:
    return ChatTokenizer(make_tokenizer())


@pytest.fixture
def scripted(tokenizer: ChatTokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def async_engine(scripted: ScriptedEngine) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(scripted, max_queued=4, pace=Pace(seconds=0.0))  # no chunk waits for another
    yield engine
    scripted.gate.set()
    engine.close()


@pytest.fixture(scope="session")
def tiny_heads(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of untrained heads for `tiny_llama`, with a ladder of one tree: its guesses are the LM head's."""
    backbone = Backbone.from_pretrained(tiny_llama)
    config = HeadsConfig(num_heads=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    digests = BackboneRef(
        name=backbone.name,
        weights_digest=backbone.digest,
        tokenizer_digest=ChatTokenizer.from_pretrained(tiny_llama).digest,
    )
    tree = [[0], [1], [2], [0, 0], [0, 1]]
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-heads"
    calibration = Calibration(accuracy=[[0.3, 0.1, 0.05]] * 2, num_positions=1)
    meta = CheckpointMeta(heads=config, backbone=digests, trees=[tree], calibration=calibration)
    save_checkpoint(folder, heads, meta)
    return folder


class LiveServer:
    """An app under a real uvicorn on a free port, in a thread."""

    def __init__(self, api: FastAPI) -> None:
        config = uvicorn.Config(api, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def serve_live() -> Iterator[Callable[[FastAPI], str]]:
    """`serve_live(api)` gives the URL of the app, served until the test ends."""
    servers: list[LiveServer] = []

    def serve(api: FastAPI) -> str:
        servers.append(LiveServer(api))
        return servers[-1].url

    yield serve
    for server in servers:
        server.close()


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """What a service writes its logs by is the process's: this gives back to the next test what was there."""
    loggers = [logging.getLogger(name) for name in logs.LOGGERS]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
