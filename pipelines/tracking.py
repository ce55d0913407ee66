"""Runs in MLflow that lose nothing when MLflow does: one run for a pipeline, and one below it for each step.

A step writes to its journal (pipelines/journal.py), which never waits for the network; a thread of the
Tracker sends. While MLflow is away the lines wait on disk, until it is back or the same command runs again.
Without a URI all of this stays the same, with nowhere to send to: a later run with a URI sends everything.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from medusa.config import canonical_json, strict, to_dict
from pipelines.artifact import StepDir
from pipelines.journal import JOURNAL, Backend, Entry, Replay, RunLog
from pipelines.mlflow_backend import MlflowBackend
from registry.connection import MlflowUnavailable
from registry.lease import TryAgain

logger = logging.getLogger(__name__)

PIPELINE_FOLDER = "pipeline"
_POLL_S, _MAX_BACKOFF_S = 1.0, 30.0


class TrackingUnavailable(TryAgain):
    """MLflow cannot be reached; everything written so far is kept on disk for the next try."""


@strict
@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """`uri`: sqlite:///file.db, a server's http://host:port, or null to track nothing."""

    uri: str | None = "sqlite:///mlflow.db"
    experiment: str = "medusa"


class NullBackend:
    def open_run(self, journal: str, name: str, tags: Mapping[str, str]) -> str:
        return ""

    def send(self, run_id: str, entries: Sequence[Entry]) -> None:
        pass


class Tracker:
    """A pipeline's run and those of its steps; as a context manager it sends all that is left at its end."""

    def __init__(self, uri: str | None, backend: Backend, folder: Path, name: str, *, patience_s: float = 10.0) -> None:
        self.uri = uri
        self.pipeline = RunLog(folder)
        self._backend, self._patience_s = backend, patience_s
        self._replays = {folder: Replay(folder, backend, name, {"medusa.pipeline": name})}
        self._sending = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_sending, name="tracking", daemon=True)

    @classmethod
    def open(cls, config: TrackingConfig, root: Path, name: str, pipeline: Any, *, patience_s: float = 10.0) -> Tracker:
        """Opens the run of the pipeline with this configuration (again, when it ran before).

        TrackingUnavailable when MLflow does not answer: better now than after hours of work.
        """
        digest = hashlib.sha256(canonical_json({"name": name, "config": pipeline}).encode()).hexdigest()
        folder = Path(root) / PIPELINE_FOLDER / digest[:16]
        try:
            backend = NullBackend() if config.uri is None else MlflowBackend(config.uri, config.experiment)
            tracker = cls(config.uri, backend, folder, name, patience_s=patience_s)
            folder.mkdir(parents=True, exist_ok=True)
            tracker.pipeline.set_status("RUNNING")
            tracker.pipeline.log_params(to_dict(pipeline))
            tracker._send_all()
        except MlflowUnavailable as error:
            raise TrackingUnavailable(
                f"{error}. Nothing was started; start MLflow, or set tracking.uri to another or to null"
            ) from error
        tracker._thread.start()
        return tracker

    @contextmanager
    def step(self, step_dir: StepDir) -> Iterator[RunLog]:
        """The run of an open step, below the pipeline's; its end tells MLflow how the step ended.

        For a complete step nothing new is said: what an earlier process could not send is sent.
        """
        log = RunLog(step_dir.path)
        self.pipeline.set_tags({f"medusa.step_key.{step_dir.step}": step_dir.key})
        if step_dir.complete:
            if log.last_status() == "RUNNING":  # killed between its manifest and the end of its run
                log.set_status("FINISHED")
            if log.last_status() is not None:
                self._follow(step_dir)
            yield log
            return
        log.set_status("RUNNING")
        self._follow(step_dir)
        with _telling_status(log):
            yield log

    def run_id(self, log: RunLog) -> str:
        """The MLflow run that `log` writes to; "" where nothing is tracked.

        TrackingUnavailable only while MLflow is away and has not been told of the run yet.
        """
        replay = self._replays[log.folder]
        if not replay.is_open:
            self.flush()
        return replay.run_id

    def flush(self) -> None:
        """Returns when MLflow has everything; TrackingUnavailable when it does not answer in time."""
        deadline, pause_s = time.monotonic() + self._patience_s, 0.5
        while True:
            try:
                return self._send_all()
            except MlflowUnavailable as error:
                if time.monotonic() + pause_s > deadline:
                    raise TrackingUnavailable(
                        f"{error}. Everything is kept in the {JOURNAL} files and sent when the same command "
                        "runs again; what is complete is not done twice"
                    ) from error
                time.sleep(pause_s)
                pause_s *= 2

    def close(self) -> None:
        """Stops the sender; whatever is unsent stays on disk."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _tell_end(self.pipeline, error)
        self.close()
        try:
            self.flush()
        except TrackingUnavailable as lost:
            if error is None:
                raise
            logger.warning("%s", lost)  # the error that ends the pipeline goes first

    def _follow(self, step_dir: StepDir) -> None:
        if step_dir.path in self._replays:
            return
        tags = {"medusa.step": step_dir.step, "medusa.step_key": step_dir.key}
        parent = self._replays[self.pipeline.folder].run_id
        if parent:
            tags["mlflow.parentRunId"] = parent
        with self._sending:
            self._replays[step_dir.path] = Replay(step_dir.path, self._backend, step_dir.step, tags)

    def _send_all(self) -> None:
        with self._sending:
            for replay in self._replays.values():
                replay.send_pending()

    def _keep_sending(self) -> None:
        pause_s = _POLL_S
        while not self._stop.wait(pause_s):
            try:
                self._send_all()
            except MlflowUnavailable as error:
                if pause_s == _POLL_S:
                    logger.warning("%s. The run goes on, and what it logs waits on disk", error)
                pause_s = min(2 * pause_s, _MAX_BACKOFF_S)
            else:
                if pause_s > _POLL_S:
                    logger.warning("MLflow answers again; everything that waited was sent")
                pause_s = _POLL_S


@contextmanager
def _telling_status(log: RunLog) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _tell_end(log, error)
        raise
    _tell_end(log, None)


def _tell_end(log: RunLog, error: BaseException | None) -> None:
    """A run that ends by TryAgain is not over: another process has it, or the next try goes on with it."""
    if isinstance(error, TryAgain):
        return
    if error is None:
        log.set_status("FINISHED")
    else:
        log.set_status("FAILED" if isinstance(error, Exception) else "KILLED")
