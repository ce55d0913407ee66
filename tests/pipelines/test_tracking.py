from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines.artifact import StepDir, open_step
from pipelines.journal import CURSOR, JOURNAL, Replay, RunLog
from pipelines.tracking import Tracker, TrackingConfig, TrackingUnavailable
from registry.connection import MlflowUnavailable
from registry.lease import LeaseLostError

PIPELINE = {"name": "demo", "train": {"lr": 0.001, "heads": [1, 2]}}


@contextmanager
def tracking(uri: str | None, root: Path, **options) -> Iterator[Tracker]:
    with Tracker.open(TrackingConfig(uri=uri), root, "demo", PIPELINE, **options) as tracker:
        yield tracker


@contextmanager
def training(tracker: Tracker, root: Path) -> Iterator[tuple[StepDir, RunLog]]:
    with open_step(root, "train", 1, {"lr": 0.001}, {}) as step_dir, tracker.step(step_dir) as log:
        yield step_dir, log


def runs(uri: str) -> dict[str, Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("medusa")
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "no run stands there twice"
    return {run.info.run_name: run for run in found}


def history(uri: str, metric: str) -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(runs(uri)["train"].info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_a_pipeline_is_a_run_with_a_child_for_each_step(mlflow_uri: str, tmp_path: Path):
    root = tmp_path / "runs"
    with tracking(mlflow_uri, root) as tracker, training(tracker, root) as (step_dir, log):
        (step_dir.path / "curve.txt").write_text("curve")
        log.log_params({"lr": 0.001, "optim": {"name": "adamw"}, "server": "http://me:secret@host/x"})
        log.log_metrics({"loss": 2.0, "lr": 0.1}, step=1)
        log.log_metrics({"loss": 1.0, "lr": float("nan")}, step=2)
        log.log_dataset("distilled", "sha256:" + "d" * 64, "runs/distill/x", context="training")
        log.log_artifact(step_dir.path / "curve.txt", "plots")
        log.log_text("# Report", "report.md")
        log.set_tags({"medusa.gate": "passed"})
        run_id = tracker.run_id(log)
        step_dir.commit({})

    found = runs(mlflow_uri)
    parent, child = found["demo"], found["train"]
    assert child.info.run_id == run_id
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params == {"name": "demo", "train.lr": "0.001", "train.heads": "[1, 2]"}
    assert parent.data.tags["medusa.step_key.train"] == step_dir.key == child.data.tags["medusa.step_key"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["medusa.gate"] == "passed"
    assert child.data.params == {"lr": "0.001", "optim.name": "adamw", "server": "http://host/x"}
    assert history(mlflow_uri, "loss") == [(1, 2.0), (2, 1.0)]
    [dataset] = child.inputs.dataset_inputs
    assert dataset.dataset.name == "distilled" and dataset.dataset.digest == "d" * 36
    assert "d" * 64 in dataset.dataset.source
    client = MlflowClient(mlflow_uri)
    assert [f.path for f in client.list_artifacts(run_id)] == ["plots", "report.md"]
    assert Path(child.info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path), "beside the database"


def test_a_resumed_step_goes_on_in_its_run_without_gap_or_repeat(mlflow_uri: str, tmp_path: Path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"), tracking(mlflow_uri, tmp_path) as tracker:
            with training(tracker, tmp_path) as (_, log):
                log.log_params({"lr": 0.001})
                for step in range(6):
                    log.log_metrics({"loss": 6.0 - step}, step=step)
                raise RuntimeError("killed")
    assert runs(mlflow_uri)["train"].info.status == "FAILED"

    with tracking(mlflow_uri, tmp_path) as tracker, training(tracker, tmp_path) as (step_dir, log):
        assert runs(mlflow_uri)["demo"].info.status == "RUNNING"
        log.log_params({"lr": 0.001})
        for step in range(4, 9):  # from the last checkpoint on; rounding differs
            log.log_metrics({"loss": 6.0 - step + 1e-6}, step=step)
        step_dir.commit({})
    assert history(mlflow_uri, "loss") == [(s, 6.0 - s + 1e-6 * (s > 5)) for s in range(9)]
    assert runs(mlflow_uri)["train"].info.status == "FINISHED"


def test_a_complete_step_is_tracked_once_and_its_new_parent_names_it(mlflow_uri: str, tmp_path: Path):
    with tracking(mlflow_uri, tmp_path) as tracker, training(tracker, tmp_path) as (step_dir, log):
        log.log_metrics({"loss": 1.0}, step=1)
        step_dir.commit({})
    ended = runs(mlflow_uri)["train"].info.end_time
    with Tracker.open(TrackingConfig(uri=mlflow_uri), tmp_path, "second", {"other": 1}) as tracker:
        with training(tracker, tmp_path) as (step_dir, _):
            assert step_dir.complete
    found = runs(mlflow_uri)
    assert set(found) == {"demo", "train", "second"}
    assert found["second"].data.tags["medusa.step_key.train"] == step_dir.key
    assert found["train"].info.end_time == ended


def test_a_kill_after_the_manifest_still_ends_the_run(mlflow_uri: str, tmp_path: Path, monkeypatch):
    with tracking(mlflow_uri, tmp_path) as tracker, monkeypatch.context() as patch:
        with training(tracker, tmp_path) as (step_dir, log):
            log.log_metrics({"loss": 1.0}, step=1)
            step_dir.commit({})
            patch.setattr(RunLog, "set_status", lambda self, status: None)
    assert runs(mlflow_uri)["train"].info.status == "RUNNING"
    with tracking(mlflow_uri, tmp_path) as tracker, training(tracker, tmp_path) as (step_dir, _):
        assert step_dir.complete
    assert runs(mlflow_uri)["train"].info.status == "FINISHED"


def test_a_step_that_another_process_took_over_does_not_end_its_run(mlflow_uri: str, tmp_path: Path):
    with pytest.raises(LeaseLostError), tracking(mlflow_uri, tmp_path) as tracker:
        with training(tracker, tmp_path):
            raise LeaseLostError("taken over")
    found = runs(mlflow_uri)
    assert (found["demo"].info.status, found["train"].info.status) == ("RUNNING", "RUNNING")


def test_a_folder_made_anew_is_another_run(mlflow_uri: str, tmp_path: Path):
    ids = set()
    for root in (tmp_path / "a", tmp_path / "b"):
        with tracking(mlflow_uri, root) as tracker, training(tracker, root) as (_, log):
            log.log_metrics({"loss": 1.0}, step=1)
            ids.add(tracker.run_id(log))
    assert len(ids) == 2


def test_a_worker_process_writes_to_the_same_run(mlflow_uri: str, tmp_path: Path):
    with tracking(mlflow_uri, tmp_path) as tracker, training(tracker, tmp_path) as (_, log):
        worker = pickle.loads(pickle.dumps(log))
        worker.log_metrics({"loss": 1.0}, step=1)
        log.log_metrics({"loss": 1.0}, step=1)
        worker.log_metrics({"loss": 0.5}, step=2)
    assert history(mlflow_uri, "loss") == [(1, 1.0), (2, 0.5)]


def test_what_mlflow_refuses_is_left_out_alone(mlflow_uri: str, tmp_path: Path, caplog):
    with tracking(mlflow_uri, tmp_path) as tracker, training(tracker, tmp_path) as (_, log):
        log.log_metrics({"loss": 1.0, "not*allowed": 2.0, "gain": 3.0}, step=1)
        log.log_artifact(tmp_path / "gone.txt")
        log.set_tags({"after": "it"})
    child = runs(mlflow_uri)["train"]
    assert child.data.metrics == {"loss": 1.0, "gain": 3.0}
    assert child.data.tags["after"] == "it"
    assert "not*allowed" in caplog.text and "gone.txt is gone" in caplog.text


def test_without_a_uri_everything_waits_for_a_run_that_has_one(mlflow_uri: str, tmp_path: Path):
    with tracking(None, tmp_path) as tracker, training(tracker, tmp_path) as (step_dir, log):
        log.log_metrics({"loss": 1.0}, step=1)
        assert tracker.run_id(log) == ""
        step_dir.commit({})
    with tracking(mlflow_uri, tmp_path) as tracker, training(tracker, tmp_path):
        pass
    assert history(mlflow_uri, "loss") == [(1, 1.0)]
    assert runs(mlflow_uri)["train"].info.status == "FINISHED"


def test_unreachable_at_the_start_is_told_before_any_work(tmp_path: Path):
    with pytest.raises(TrackingUnavailable, match=r"http://127\.0\.0\.1:9 cannot be reached.*Nothing was started"):
        Tracker.open(TrackingConfig(uri="http://127.0.0.1:9"), tmp_path / "runs", "demo", PIPELINE)
    assert not (tmp_path / "runs").exists()


class Recorder:
    """A backend in memory, whose connection can be cut: before a request, or after it took effect."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, object]] = []
        self.down = False
        self.fail_after_next = False

    def open_run(self, journal, name, tags) -> str:
        if self.down:
            raise MlflowUnavailable("down")
        return "run"

    def send(self, run_id, entries) -> None:
        if self.down:
            raise MlflowUnavailable("down")
        self.sent += [(entry.kind, entry.value.get("step", entry.value.get("status"))) for entry in entries]
        if self.fail_after_next:
            self.fail_after_next = False
            raise MlflowUnavailable("the answer was lost")


def test_order_is_kept_over_a_loss_and_an_unanswered_request_is_sent_again(tmp_path: Path):
    log, backend = RunLog(tmp_path), Recorder()
    replay = Replay(tmp_path, backend, "train", {})
    log.log_metrics({"loss": 1.0}, step=0)
    replay.send_pending()
    backend.down = True
    log.log_metrics({"loss": 1.0}, step=1)
    with pytest.raises(MlflowUnavailable):
        replay.send_pending()
    log.set_status("FINISHED")
    backend.down, backend.fail_after_next = False, True
    with pytest.raises(MlflowUnavailable):
        replay.send_pending()
    replay.send_pending()
    assert backend.sent == [("metric", 0), ("metric", 1), ("status", "FINISHED"), ("metric", 1), ("status", "FINISHED")]


def test_a_line_cut_off_by_a_kill_harms_no_other(tmp_path: Path):
    log, backend = RunLog(tmp_path), Recorder()
    log.log_metrics({"loss": 1.0}, step=0)
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"kind": "metrics", "time": 1, "values": {"lo')
    Replay(tmp_path, backend, "train", {}).send_pending()
    log.log_metrics({"loss": 0.5}, step=1)
    Replay(tmp_path, backend, "train", {}).send_pending()
    assert backend.sent == [("metric", 0), ("metric", 1)]


def test_a_lost_cursor_sends_everything_again(tmp_path: Path):
    log, backend = RunLog(tmp_path), Recorder()
    for step in range(1200):
        log.log_metrics({"loss": 1.0}, step=step)
    Replay(tmp_path, backend, "train", {}).send_pending()
    Replay(tmp_path, backend, "train", {}).send_pending()
    assert backend.sent == [("metric", step) for step in range(1200)]
    (tmp_path / CURSOR).write_text("")
    Replay(tmp_path, backend, "train", {}).send_pending()
    assert len(backend.sent) == 2400


class Server:
    """A real MLflow server on a free port, which can be killed and started again."""

    def __init__(self, database: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._arguments = ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
        self._process: subprocess.Popen[bytes] | None = None
        self._log = (folder / "server.log").open("ab")

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", *self._arguments, "--host", "127.0.0.1"]
        self._process = subprocess.Popen(
            [*command, "--port", str(self._port), "--workers", "1"],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # the process group that `start` made
            self._process.wait()

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False


def test_a_server_killed_while_logging_and_started_again_has_everything_once(mlflow_uri: str, tmp_path: Path):
    server = Server(mlflow_uri, tmp_path)
    server.start()
    try:
        with tracking(server.uri, tmp_path, patience_s=1.0) as tracker:
            with training(tracker, tmp_path) as (step_dir, log):
                for step in range(300):
                    log.log_metrics({"loss": float(step)}, step=step)
                    if step == 100:
                        tracker.flush()
                    if step == 150:
                        server.kill()
                with pytest.raises(TrackingUnavailable, match="Everything is kept"):
                    tracker.flush()
                assert tracker.run_id(log), "known from before"
                log.log_text("written while it was away", "report.md")
                step_dir.commit({})
            server.start()
            tracker.flush()
    finally:
        server.kill()
    assert history(mlflow_uri, "loss") == [(step, float(step)) for step in range(300)]
    found = runs(mlflow_uri)
    assert (found["demo"].info.status, found["train"].info.status) == ("FINISHED", "FINISHED")
    assert len(list((tmp_path / "artifacts").rglob("report.md"))) == 1
