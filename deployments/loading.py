"""What a process that serves loads and starts, whoever runs it: a replica of Ray Serve, or uvicorn alone."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from fastapi import FastAPI

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from deployments.config import ServerConfig
from deployments.handover import Pace
from deployments.heads_slot import HeadsSlot, verified
from deployments.metrics import Metrics
from deployments.sampling_log import SampleRequests, SamplingLog
from deployments.tracing import Tracing
from medusa import Engine
from medusa.checkpoint import CheckpointMismatchError
from medusa.weights import Hashing, model_directory

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.001  # Python's own is five times that


@dataclass(frozen=True)
class LoadedService:
    """A running engine, the API over it, the slot that takes new heads, and, where asked for, what keeps prompts and
    what exports traces."""

    engine: AsyncEngine
    api: FastAPI
    heads: HeadsSlot
    samples: SamplingLog | None = None
    tracing: Tracing | None = None

    def close(self) -> None:
        self.engine.close()
        if self.samples is not None:
            self.samples.close()
        if self.tracing is not None:
            self.tracing.close()


def load_engine(config: ServerConfig) -> Engine:
    """Hashes the weights meanwhile, heads or none: a replica tells which weights it serves."""
    hashing = Hashing(model_directory(config.model))
    return Engine.from_pretrained(config.model, config.heads, hashing=hashing, **config.engine_arguments())


def load_service(
    config: ServerConfig,
    *,
    replica: str = "local",
    send_request_id: bool = True,
    load: Callable[[ServerConfig], Engine] = load_engine,
) -> LoadedService:
    """Loads and starts. Raises what a model that cannot be served raises (CheckpointError, ConfigError, ...); nothing
    that was started is left then."""
    started = time.perf_counter()
    endpoint = config.otlp_traces_endpoint
    with ExitStack() as undo:  # ends what has been started where a later part fails
        tracing = Tracing(endpoint, replica=replica) if endpoint else None  # first: it may be asked for in vain
        if tracing is not None:
            undo.callback(tracing.close)
        heads = verified(config.heads_config)
        engine = load(config)
        undo.callback(engine.close)
        _check_digest(config, engine.backbone.digest)
        running = AsyncEngine(
            engine,
            max_queued=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            stall_timeout_s=config.stall_timeout_s,
            metrics=Metrics(config.served_name, replica=replica),
            heads=heads,
            pace=Pace(seconds=config.merge_chunks_s),
        )
        undo.callback(running.close)
        api = build_api(
            running,
            engine.tokenizer,
            config.served_name,
            served={
                "backbone": engine.backbone.name,
                "backbone_digest": engine.backbone.digest,
                "quantization": config.quantization,
            },
            request_timeout_s=config.request_timeout_s,
            max_body_bytes=config.max_body_bytes,
            body_timeout_s=config.body_timeout_s,
            tool_notation=config.tool_notation,
            api_key_hashes=config.all_key_hashes(),
            send_request_id=send_request_id,
            tracing=tracing,
        )
        samples = SamplingLog(config.sampling, replica) if config.sampling else None
        if samples is not None:
            api.add_middleware(SampleRequests, log=samples)
        _tell_start(config, engine, time.perf_counter() - started)
        undo.pop_all()
        return LoadedService(running, api, HeadsSlot(running, engine.backbone), samples, tracing)


def _check_digest(config: ServerConfig, digest: str) -> None:
    if config.backbone_digest not in (None, digest):
        raise CheckpointMismatchError(
            f"{config.model} has weights of the digest {digest}, but {config.backbone_digest} was to be served; fetch "
            "the model again"
        )


def _tell_start(config: ServerConfig, engine: Engine, seconds: float) -> None:
    """One line of the log, whatever its level: what a new replica's time went into."""
    parts = {"loaded_s": seconds} | (asdict(engine.start_times) if engine.start_times else {})
    if (hashing := engine.backbone.hashing) is not None:
        parts |= {"digest_s": hashing.seconds, "waited_for_digest_s": hashing.waited_s}
    rounded = {name: round(value, 3) for name, value in parts.items()}
    logger.warning("%s was loaded in %.1f s", config.served_name, seconds, extra={"start": rounded})


def settle_process() -> None:
    """For a process that serves and does nothing else, once it has loaded.

    A full garbage collection would walk every object of torch and transformers, hold the interpreter for a third of a
    second meanwhile, and find nothing. And the engine's thread, which gives the interpreter up in every wait and many
    a torch call, is to have it back before the event loop has served all streams of a step.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
