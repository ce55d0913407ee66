"""A run's journal: what a step wants tracked, on disk first and in order.

`RunLog` appends lines to `tracking.jsonl`; `Replay` reads them, hands them to a backend, and notes in
`tracking.cursor.json` how far it got. A line names its time, so that one which was sent but not noted before
a kill is the same row when it is sent again. What a resumed step writes again (a parameter, a metric of the
same step number) is sent once: the first wins.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from registry.connection import shown

JOURNAL, CURSOR, IDENTITY = "tracking.jsonl", "tracking.cursor.json", "tracking.id"
_LINES_A_TURN = 500


class RunLog:
    """The writing end of a run: appends to a journal, never touches the network.

    It is picklable: a training worker that shares the folder writes to the same run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted names; a name keeps its first value. URIs lose their credentials."""
        self._append("params", values=dict(_flatten(params)))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """A metric keeps the first value that it was given for a step number."""
        self._append("metrics", values={name: float(value) for name, value in metrics.items()}, step=step)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._append("tags", values={name: str(value) for name, value in tags.items()})

    def log_dataset(self, name: str, digest: str, source: str, *, context: str = "input") -> None:
        """What the run read: lineage by digest, without a copy of the data."""
        self._append("dataset", name=name, digest=digest, source=source, context=context)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or a directory's content, to be uploaded from where it lies: it must stay there."""
        self._append("artifact", path=str(Path(path).resolve()), folder=folder)

    def log_text(self, text: str, name: str) -> None:
        self._append("text", text=text, name=name)

    def set_status(self, status: str) -> None:
        self._append("status", status=status)

    def last_status(self) -> str | None:
        """What `set_status` was last told; None for a run that nothing was written to."""
        try:
            lines = (self.folder / JOURNAL).read_bytes().splitlines()
        except FileNotFoundError:
            return None
        statuses = (e.value["status"] for line in lines for e in _entries(line) if e.kind == "status")
        return next(reversed(list(statuses)), None)

    def _append(self, kind: str, **content: Any) -> None:
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **content}).encode() + b"\n"
        descriptor = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # its writer was killed
            os.write(descriptor, b"\n" + line if torn else line)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Entry:
    """One thing to send. Entries of equal `identity` say the same about a run; None may be said again."""

    kind: str
    time_ms: int
    value: dict[str, Any]
    identity: Hashable = None


class Backend(Protocol):
    """Where entries go; raises MlflowUnavailable when they cannot."""

    def open_run(self, journal: str, name: str, tags: Mapping[str, str]) -> str: ...

    def send(self, run_id: str, entries: Sequence[Entry]) -> None: ...


class Replay:
    """The sending end of a run: reads its journal from where the last sender stopped."""

    def __init__(self, folder: Path, backend: Backend, name: str, tags: Mapping[str, str]) -> None:
        self._folder, self._backend, self._name, self._tags = folder, backend, name, tags
        self._run_id: str | None = None
        self._offset = 0
        self._sent: set[Hashable] = set()

    @property
    def is_open(self) -> bool:
        return self._run_id is not None

    @property
    def run_id(self) -> str:
        """The run in MLflow, found or created on first use."""
        if self._run_id is None:
            run_id = self._backend.open_run(_journal_identity(self._folder), self._name, self._tags)
            self._skip_sent(run_id)
            self._run_id = run_id
        return self._run_id

    def send_pending(self) -> None:
        run_id = self.run_id
        while True:
            entries, end = self._read(self._offset)
            if end == self._offset:
                return
            self._backend.send(run_id, list(self._first_of_each(entries)))
            self._pass(entries, end)
            self._write_cursor(run_id)

    def _first_of_each(self, entries: Sequence[Entry]) -> Iterator[Entry]:
        told = set()
        for entry in entries:
            if entry.identity not in self._sent and entry.identity not in told:
                yield entry
            if entry.identity is not None:
                told.add(entry.identity)

    def _pass(self, entries: Sequence[Entry], end: int) -> None:
        self._offset = end
        self._sent.update(entry.identity for entry in entries if entry.identity is not None)

    def _write_cursor(self, run_id: str) -> None:
        partial = self._folder / f".{CURSOR}.{os.getpid()}.partial"
        partial.write_text(json.dumps({"run_id": run_id, "offset": self._offset}))
        partial.replace(self._folder / CURSOR)

    def _skip_sent(self, run_id: str) -> None:
        """Moves to the cursor, remembering what was sent; another MLflow than last time gets everything."""
        self._offset, self._sent = 0, set()
        try:
            cursor = json.loads((self._folder / CURSOR).read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # none, or lost at a power cut: sending again is safe
            return
        while cursor["run_id"] == run_id and self._offset < cursor["offset"]:
            entries, end = self._read(self._offset, limit=cursor["offset"])
            if end == self._offset:
                return
            self._pass(entries, end)

    def _read(self, offset: int, limit: int | None = None) -> tuple[list[Entry], int]:
        """What the next whole lines say, and where they end; `limit` is an end of a line too."""
        try:
            file = (self._folder / JOURNAL).open("rb")
        except FileNotFoundError:
            return [], offset
        entries: list[Entry] = []
        with file:
            end = os.fstat(file.fileno()).st_size if limit is None else limit
            if offset < end:
                os.fsync(file.fileno())  # a cursor must not be ahead of its journal, even at a power cut
            file.seek(offset)
            for _ in range(_LINES_A_TURN):
                line = file.readline()
                if offset >= end or not line.endswith(b"\n"):
                    break
                offset += len(line)
                entries += _entries(line)
        return entries, offset


def _journal_identity(folder: Path) -> str:
    """Names this journal for ever: the same folder made anew is another run."""
    path = folder / IDENTITY
    if not path.exists():
        partial = folder / f".{IDENTITY}.{uuid.uuid4().hex}"
        partial.write_text(uuid.uuid4().hex)
        try:
            os.link(partial, path)
        except FileExistsError:
            pass  # another process was quicker, and its name holds
        finally:
            partial.unlink()
    return path.read_text()


def _entries(line: bytes) -> Iterator[Entry]:
    """What a line says, in units that can be sent once; nothing for a line cut off by a kill."""
    try:
        event = json.loads(line)
    except ValueError:
        return
    kind, time_ms = event.pop("kind"), event.pop("time")
    if kind == "metrics":
        for name, value in event["values"].items():
            step = event["step"]
            yield Entry("metric", time_ms, {"key": name, "value": value, "step": step}, ("metric", name, step))
    elif kind == "params":
        for name, value in event["values"].items():
            yield Entry("param", time_ms, {"key": name, "value": value}, ("param", name))
    elif kind == "tags":
        for name, value in event["values"].items():
            yield Entry("tag", time_ms, {"key": name, "value": value})
    else:
        yield Entry(kind, time_ms, event)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    return shown(value) if "://" in value else value
