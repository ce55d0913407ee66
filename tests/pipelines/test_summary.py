"""The summary of a run: posted however the run ends, in the words of the exit codes."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifact import StepOutput
from pipelines.journal import RunLog
from pipelines.summary import RunSummary
from registry.gate import GateRefused
from registry.lease import LeaseHeldError


def output(folder: Path, step: str, created: str, **files: Any) -> StepOutput:
    path = folder / step
    path.mkdir()
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return StepOutput(step, "k" * 64, path, {"created": created, "counts": {"written": 3}, "outputs": {}})


def posted(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    events = [json.loads(line) for line in (folder / "tracking.jsonl").read_text().splitlines()]
    (text,) = [event for event in events if event["kind"] == "text"]
    assert text["name"] == "summary.json"
    return json.loads(text["text"]), {
        k: v for event in events if event["kind"] == "tags" for k, v in event["values"].items()
    }


def test_a_finished_run_tells_what_it_did_and_what_came_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "pipelines.summary")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with RunSummary("nightly").told_to(RunLog(tmp_path)) as summary:
        summary.outputs["distill"] = output(tmp_path, "distill", "2026-01-01T00:00:00+00:00")
        evaluation = {"acceptance_length": 2.5, "speedup": 1.4, "lossless": True}
        summary.outputs["evaluate"] = output(tmp_path, "evaluate", now, evaluation=evaluation)
        version = {"uri": "models:/m/3", "promoted": True, "gate": {"passed": True, "reasons": []}}
        summary.outputs["register"] = output(tmp_path, "register", now, version=version)
    found, tags = posted(tmp_path)
    assert found["outcome"] == "done" and found["error"] is None
    assert {step: told["did"] for step, told in found["steps"].items()} == {
        "distill": "was complete",
        "evaluate": "ran",
        "register": "ran",
    }
    assert (found["tokens_per_step"], found["speedup"], found["version"]) == (2.5, 1.4, "models:/m/3")
    assert tags["medusa.summary.outcome"] == "done" and tags["medusa.summary.version"] == "models:/m/3"
    (record,) = caplog.records
    assert json.loads(record.message.removeprefix("summary ")) == found


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (GateRefused("models:/m/3", ("slower",)), "gate refused"),
        (LeaseHeldError("busy"), "try again"),
        (RuntimeError("x" * 900), "failed"),
        (KeyboardInterrupt(), "killed"),
    ],
)
def test_a_run_that_ends_otherwise_says_how(tmp_path: Path, error: BaseException, outcome: str):
    with pytest.raises(type(error)), RunSummary("nightly").told_to(RunLog(tmp_path)) as summary:
        summary.outputs["prompts"] = output(tmp_path, "prompts", "2026-01-01T00:00:00+00:00")
        raise error
    found, tags = posted(tmp_path)
    assert found["outcome"] == tags["medusa.summary.outcome"] == outcome
    assert str(error) in found["error"] and len(tags["medusa.summary.error"]) <= 500
    assert set(found["steps"]) == {"prompts"}
