"""The data flywheel's first half: with the users' consent, a share of what they ask is kept, so that the next heads are
trained on it.

    <path>/day=2026-11-24/<replica>-<n>.parquet       id, turns, system, category: what pipelines/prompt_files.py reads

Prompts only: never a reply, a client's address, a key or a header. Off unless the configuration says `consent: true`,
and a request with OpenAI's `"store": false` is never kept. Texts pass the redaction hook before they are held, in the
writer's thread; what it raises on is dropped. A request never waits for any of this: where the writer cannot follow,
samples are dropped and counted.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import queue
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa.config import ConfigError, strict

logger = logging.getLogger(__name__)

CHAT_PATH = "/v1/chat/completions"  # a plain completion's prompt is no turn of a conversation
CATEGORY = "sampled"
DAY = "day="
SCHEMA = pa.schema(
    [("id", pa.string()), ("turns", pa.list_(pa.string())), ("system", pa.string()), ("category", pa.string())]
)
QUEUE = 1000

Redact = Callable[[str], str | None]


@strict
@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What is kept of requests. `redact` names a function `module:name` that takes a text and returns it without what
    must not be kept, or None to drop the whole conversation; null keeps texts as they are."""

    consent: bool = False  # that users have agreed that prompts are kept to improve the service
    path: str
    fraction: float = 0.01
    redact: str | None = "deployments.redaction:mask"
    max_prompt_chars: int = 20_000  # of a conversation; longer ones are not kept
    max_mb_a_day: float = 256.0  # of all replicas together; then no more is kept until the next day
    max_age_days: int = 30  # older days are removed
    rows_per_file: int = 500
    flush_s: float = 300.0

    def __post_init__(self) -> None:
        if not self.consent:
            raise ConfigError(
                "sampling keeps what users write: it needs `consent: true`, once they have agreed to that; "
                "leave sampling out to keep nothing"
            )
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction must be above 0 and at most 1, got {self.fraction}")
        for name in ("max_prompt_chars", "max_mb_a_day", "max_age_days", "rows_per_file", "flush_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.redact is not None:
            load_hook(self.redact)


def load_hook(name: str) -> Redact:
    """The function that `module:name` names. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"redact {name!r} is no function of an importable module (module:name): {error}") from error
    if not callable(found):
        raise ConfigError(f"redact {name!r} is no function")
    return found


class SamplingLog:
    """Takes bodies from any thread, and writes files from its own, which begins here and ends with `close`."""

    def __init__(
        self,
        config: SamplingConfig,
        replica: str,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        seed: int | None = None,
    ) -> None:
        self._config, self._now = config, now
        self._replica = "".join(char if char.isalnum() else "-" for char in replica)
        self._redact = load_hook(config.redact) if config.redact else None
        self._chance = random.Random(seed)
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUE)
        self._rows: dict[str, dict[str, Any]] = {}
        self._files = 0
        self.counts: Counter[str] = Counter()  # kept, and why others were not
        self._thread = threading.Thread(target=self._run, name="sampling-log", daemon=True)
        self._thread.start()

    def wants_one(self) -> bool:
        """Whether the next request is among those that are kept."""
        return self._chance.random() < self._config.fraction

    def offer(self, body: bytes) -> None:
        try:
            self._queue.put_nowait(body)
        except queue.Full:
            self.counts["dropped: writer behind"] += 1

    def close(self) -> None:
        """Writes what is held."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic() + self._config.flush_s
        while True:
            try:
                body = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                body = b""
            if body:
                self._take(body)
            if body is None or len(self._rows) >= self._config.rows_per_file or time.monotonic() >= due:
                self._flush_or_warn()
                due = time.monotonic() + self._config.flush_s
            if body is None:
                return

    def _take(self, body: bytes) -> None:
        row, why_not = to_row(body, self._config.max_prompt_chars, self._redact)
        if row is None:
            self.counts[f"dropped: {why_not}"] += 1
        elif row["id"] in self._rows:
            self.counts["dropped: the same again"] += 1
        else:
            self._rows[row["id"]] = row

    def _flush_or_warn(self) -> None:
        try:
            self._flush()
        except OSError as error:  # a full or lost volume must not stop the service
            logger.error("%d sampled prompts are lost: %s", len(self._rows), error)
            self.counts["dropped: storage"] += len(self._rows)
        self._rows.clear()

    def _flush(self) -> None:
        root, today = Path(self._config.path), self._now().date()
        _remove_old(root, today - timedelta(days=self._config.max_age_days))
        if not self._rows:
            return
        folder = root / f"{DAY}{today.isoformat()}"
        folder.mkdir(parents=True, exist_ok=True)
        if sum(file.stat().st_size for file in folder.glob("*.parquet")) >= self._config.max_mb_a_day * 2**20:
            self.counts["dropped: the day's limit"] += len(self._rows)
            return
        self._files += 1
        path = folder / f"{self._replica}-{os.getpid()}-{self._files:06d}.parquet"
        partial = path.with_name(f".{path.name}.partial")
        pq.write_table(pa.Table.from_pylist(list(self._rows.values()), schema=SCHEMA), partial)
        partial.replace(path)
        self.counts["kept"] += len(self._rows)


class SampleRequests:
    """ASGI middleware: offers the body of a chat request that was answered with 200."""

    def __init__(self, app: ASGIApp, *, log: SamplingLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_chat = scope["type"] == "http" and scope["path"] == CHAT_PATH and scope["method"] == "POST"
        if not is_chat or not self._log.wants_one():
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []

        async def receive_and_keep() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                parts.append(message.get("body", b""))
            return message

        async def send_and_offer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self._log.offer(b"".join(parts))
            await send(message)

        await self._app(scope, receive_and_keep, send_and_offer)


def to_row(body: bytes, max_chars: int, redact: Redact | None) -> tuple[dict[str, Any] | None, str]:
    """What is kept of a request, or why nothing is. Replies in it (role assistant) and tools are left out."""
    try:
        request = json.loads(body)
        messages = [(message["role"], _text(message.get("content"))) for message in request["messages"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "not readable"
    if request.get("store") is False:
        return None, "store is false"
    turns = [text for role, text in messages if role == "user"]
    system = next((text for role, text in messages if role in ("system", "developer")), None)
    if not turns or not all(turns):
        return None, "no text"
    if sum(map(len, turns)) + len(system or "") > max_chars:
        return None, "too long"
    try:
        shown = [redact(text) if redact else text for text in turns]
        shown_system = redact(system) if redact and system else system
    except Exception as error:  # noqa: BLE001 - the hook is somebody else's code; what it fails on must not be kept
        logger.error("the redaction hook failed with %s; the prompt is not kept", type(error).__name__)
        return None, "redaction failed"
    if not all(shown) or (system and not shown_system):
        return None, "redacted"
    identity = hashlib.sha256(json.dumps([shown_system, shown], ensure_ascii=False).encode()).hexdigest()[:20]
    return {"id": identity, "turns": shown, "system": shown_system, "category": CATEGORY}, ""


def _text(content: Any) -> str:
    """A message's text; images and other parts are left out."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, Mapping) and part.get("type") == "text")


def _remove_old(root: Path, before: date) -> None:
    for folder in root.glob(f"{DAY}*"):
        try:
            day = date.fromisoformat(folder.name.removeprefix(DAY))
        except ValueError:
            continue  # not ours
        if day < before:
            shutil.rmtree(folder, ignore_errors=True)  # another replica may be at it
