"""How long a replica takes from the start of its process to its first answer, and what the time goes into.

Each start is a process of its own (started.py) that serves as `medusa serve --without-ray` does. Its compile cache is a
folder of its own: empty the first time, as that start has left it the second. The parts are the replica's own word, the
line of its log that tells a start, between two moments that are seen from outside.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.serving import Load
from deployments.config import ServerConfig
from deployments.one_process import free_port, wait_until_healthy
from medusa.config import to_dict
from medusa.tokenizer import ChatTokenizer
from medusa.weights import model_directory

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 1200.0  # for one start
BLOCK_BYTES = 1 << 24

CompileCache = Literal["empty", "warm"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """`repeats` times a start with an empty compile cache and one with the cache that it left. With `read_first` the
    files of model and heads are read just before each start; otherwise they are where the machine has them."""

    repeats: int = 3
    read_first: bool = True
    prompt_tokens: int = 128
    reply_tokens: int = 16


@dataclass(frozen=True)
class Start:
    """Seconds from the process's start to its first answer: `total_s`, and its parts one after another. The digest was
    computed beside them; `waited_for_digest_s`, of the parts that it falls into, is what they waited for it."""

    repeat: int
    compile_cache: CompileCache
    total_s: float
    imports_s: float
    weights_s: float
    heads_s: float  # with the tokenizer
    engine_s: float  # the cache of keys and values, graphs, and the policy's measurements
    other_loading_s: float  # the digest of the heads' folder, the API, and the wait for the digest without heads
    listening_s: float  # until /health answers, which is asked every tenth of a second
    request_s: float
    digest_s: float
    waited_for_digest_s: float
    compiled_files: int  # in the compile cache afterwards
    read_s: float | None  # that reading all files just before took


def measure_starts(
    config: ServerConfig, plan: Plan, out: Path, *, keep: Callable[[Sequence[Start]], object], say: Say
) -> list[Start]:
    """Starts one replica after another; `keep` gets all starts so far after each. Raises RuntimeError for a replica
    that does not start or answer."""
    out.mkdir(parents=True, exist_ok=True)
    body = _question(config, plan)
    starts: list[Start] = []
    for repeat in range(1, plan.repeats + 1):
        with tempfile.TemporaryDirectory(dir=out, prefix="compile-cache-") as cache:
            for state in ("empty", "warm"):
                say(f"start {len(starts) + 1} of {2 * plan.repeats}: compile cache {state} ...")
                read_s = _read_files(config) if plan.read_first else None
                log = out / f"start-{repeat}-{state}.log"
                start = _start(config, body, Path(cache), log, repeat, state, read_s)
                starts.append(start)
                keep(starts)
                say(f"  answered after {start.total_s:.1f} s ({_parts(start)})")
    return starts


def _start(
    config: ServerConfig,
    body: dict[str, Any],
    cache: Path,
    log: Path,
    repeat: int,
    state: CompileCache,
    read_s: float | None,
) -> Start:
    config = replace(config, port=free_port())
    url = f"http://{config.host}:{config.port}"
    began = time.monotonic()
    with _replica(config, cache, log) as process:
        try:
            wait_until_healthy(url, LIMIT_S, is_alive=lambda: process.poll() is None)
            healthy = time.monotonic()
            _ask(url, body)
        except (OSError, RuntimeError) as error:
            end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"the replica did not start: {error}\nthe end of {log}:\n{end}") from error
        answered = time.monotonic()
    imported, parts = _told(log)
    in_turn = [parts[name] for name in ("weights_s", "heads_s", "engine_s")]
    return Start(
        repeat,
        state,
        answered - began,
        imported - began,
        *in_turn,
        other_loading_s=parts["loaded_s"] - sum(in_turn),
        listening_s=healthy - imported - parts["loaded_s"],
        request_s=answered - healthy,
        digest_s=parts["digest_s"],
        waited_for_digest_s=parts["waited_for_digest_s"],
        compiled_files=sum(path.is_file() for path in cache.rglob("*")),
        read_s=read_s,
    )


@contextmanager
def _replica(config: ServerConfig, cache: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves `config`, and writes to `log`, until the block ends."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    settings = log.with_suffix(".json")
    settings.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    with log.open("wb") as output:
        command = [sys.executable, "-m", "benchmarks.started", str(settings)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            settings.unlink()


def _ask(url: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
        usage = json.load(response)["usage"]
    if usage["completion_tokens"] != body["max_tokens"]:
        raise RuntimeError(f"a reply of {body['max_tokens']} tokens was asked for, its usage is {usage}")


def _question(config: ServerConfig, plan: Plan) -> dict[str, Any]:
    load = Load((1,), requests=1, prompt_tokens=plan.prompt_tokens, reply_tokens=plan.reply_tokens)
    (prompt,) = load.prompts(ChatTokenizer.from_pretrained(config.model).vocab_size)
    return {"prompt": prompt, "max_tokens": plan.reply_tokens, "temperature": 0, "ignore_eos": True}


def _told(log: Path) -> tuple[float, dict[str, float]]:
    """When the imports were done, and the parts of loading, in seconds."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = {}
    for name in ("imported_at", "start"):
        line = next(line for line in lines if f'"{name}": ' in line)
        told[name] = json.loads(line[line.index("{") :])[name]
    return told["imported_at"], told["start"]


def _read_files(config: ServerConfig) -> float:
    """Reads the files of model and heads, so that they are in memory as far as there is room; returns the seconds."""
    started, block = time.perf_counter(), bytearray(BLOCK_BYTES)
    folders = [model_directory(config.model), *([Path(config.heads)] if config.heads else [])]
    for file in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
    return time.perf_counter() - started


def _parts(start: Start) -> str:
    return (
        f"imports {start.imports_s:.1f}, weights {start.weights_s:.1f}, engine {start.engine_s:.1f}, "
        f"first request {start.request_s:.1f}; digest beside {start.digest_s:.1f}"
    )
