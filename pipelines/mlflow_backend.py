"""Journal entries as calls of MLflow's client. An entry that is sent twice stands in MLflow once."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pipelines.journal import Entry
from registry.connection import MlflowUnavailable, connect, reaching, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_ROWS = ("metric", "param", "tag")  # what MLflow takes many of in one request
_ROWS_A_REQUEST = 100  # MLflow's limit for parameters and tags
_DATASET_DIGEST_LENGTH = 36  # MLflow's limit; the whole digest stands in the dataset's source


class MlflowBackend:
    def __init__(self, uri: str, experiment: str) -> None:
        self._uri = uri
        self._client = connect(uri)
        with reaching(uri):
            self._experiment_id = self._open_experiment(experiment)

    def open_run(self, journal: str, name: str, tags: Mapping[str, str]) -> str:
        """The run of this journal: found by its tag, or created. So a run is never created twice."""
        with reaching(self._uri):
            found = self._client.search_runs([self._experiment_id], f"tags.`medusa.journal` = '{journal}'")
            if found:
                return found[0].info.run_id
            run = self._client.create_run(self._experiment_id, tags={**tags, "medusa.journal": journal}, run_name=name)
            return run.info.run_id

    def send(self, run_id: str, entries: Sequence[Entry]) -> None:
        with reaching(self._uri):
            for is_row, group in itertools.groupby(entries, lambda entry: entry.kind in _ROWS):
                members = list(group)
                size = _ROWS_A_REQUEST if is_row else 1
                for start in range(0, len(members), size):
                    self._send_or_refuse(run_id, members[start : start + size])

    def _send_or_refuse(self, run_id: str, entries: Sequence[Entry]) -> None:
        """What MLflow refuses for good (a name it does not allow) is named in a warning and left out."""
        from mlflow.exceptions import MlflowException

        try:
            if entries[0].kind in _ROWS:
                _send_rows(self._client, run_id, entries)
            else:
                _SENDERS[entries[0].kind](self._client, run_id, entries[0])
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise MlflowUnavailable(f"MLflow at {shown(self._uri)} has lost run {run_id}") from error
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(entries) == 1:
                logger.warning("MLflow refuses %s %s: %s", entries[0].kind, entries[0].value, error.message)
                return
            for entry in entries:
                self._send_or_refuse(run_id, [entry])

    def _open_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name, artifact_location=_artifacts_beside(self._uri, name))
        except MlflowException as error:  # another process was quicker
            found = self._client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            return found.experiment_id


def _send_rows(client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run_id,
        metrics=[Metric(timestamp=e.time_ms, **e.value) for e in entries if e.kind == "metric"],
        params=[Param(**e.value) for e in entries if e.kind == "param"],
        tags=[RunTag(**e.value) for e in entries if e.kind == "tag"],
    )


def _send_dataset(client: MlflowClient, run_id: str, entry: Entry) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=entry.value["name"],
        digest=entry.value["digest"].removeprefix("sha256:")[:_DATASET_DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": entry.value["source"], "digest": entry.value["digest"]}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", entry.value["context"])])])


def _send_artifact(client: MlflowClient, run_id: str, entry: Entry) -> None:
    path = Path(entry.value["path"])
    if not path.exists():
        logger.warning("the artifact %s is gone, and not sent to MLflow", path)
    elif path.is_dir():
        client.log_artifacts(run_id, str(path), entry.value["folder"])
    else:
        client.log_artifact(run_id, str(path), entry.value["folder"])


def _send_text(client: MlflowClient, run_id: str, entry: Entry) -> None:
    client.log_text(run_id, entry.value["text"], entry.value["name"])


def _send_status(client: MlflowClient, run_id: str, entry: Entry) -> None:
    status = entry.value["status"]
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status, end_time=entry.time_ms)


_SENDERS: dict[str, Callable[[MlflowClient, str, Entry], None]] = {
    "dataset": _send_dataset,
    "artifact": _send_artifact,
    "text": _send_text,
    "status": _send_status,
}


def _artifacts_beside(uri: str, experiment: str) -> str | None:
    """For a SQLite file, a folder next to it (MLflow would take the working directory); else MLflow's own."""
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()
    return f"{(database.parent / 'mlruns').as_uri()}/{quote(experiment, safe='')}"
