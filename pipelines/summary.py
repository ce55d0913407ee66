"""What a run tells at its end, to MLflow and to the log: for the person who looks in the morning."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipelines.artifact import StepOutput
from pipelines.journal import RunLog
from registry.gate import GateRefused
from registry.lease import TryAgain

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
TAG = "medusa.summary."
TAG_LENGTH = 500  # an error's whole text is in the file


@dataclass
class RunSummary:
    """Filled while a run goes on. `outputs` are the finished steps."""

    name: str
    outputs: dict[str, StepOutput] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    @contextmanager
    def told_to(self, log: RunLog) -> Iterator[RunSummary]:
        """However the block ends, the summary is posted; the error goes on."""
        try:
            yield self
        except BaseException as error:
            self._tell(log, error)
            raise
        self._tell(log, None)

    def to_dict(self, error: BaseException | None = None) -> dict[str, Any]:
        steps = {step: self._step(output) for step, output in self.outputs.items()}
        return {
            "pipeline": self.name,
            "outcome": _outcome(error),
            "error": f"{type(error).__name__}: {error}" if error else None,
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 1),
            "steps": steps,
            **_results(self.outputs),
        }

    def _step(self, output: StepOutput) -> dict[str, Any]:
        made = datetime.fromisoformat(output.manifest["created"]).timestamp()
        did = "ran" if made >= int(self.started) else "was complete"
        return {"key": output.key[:16], "did": did, "counts": output.manifest.get("counts", {})}

    def _tell(self, log: RunLog, error: BaseException | None) -> None:
        summary = self.to_dict(error)
        log.log_text(json.dumps(summary, indent=2) + "\n", SUMMARY)
        told = {"outcome", "error", "seconds", "tokens_per_step", "speedup", "lossless", "version", "promoted"}
        log.set_tags({f"{TAG}{name}": str(value)[:TAG_LENGTH] for name, value in summary.items() if name in told})
        logger.log(logging.INFO if error is None else logging.ERROR, "summary %s", json.dumps(summary))


def _outcome(error: BaseException | None) -> str:
    """In the words of the exit codes."""
    if error is None:
        return "done"
    if isinstance(error, GateRefused):
        return "gate refused"
    if isinstance(error, TryAgain):
        return "try again"
    return "failed" if isinstance(error, Exception) else "killed"


def _results(outputs: Mapping[str, StepOutput]) -> dict[str, Any]:
    """The figures that decide, of the steps that got so far."""
    found: dict[str, Any] = {}
    if "evaluate" in outputs:
        evaluation = json.loads((outputs["evaluate"].path / "evaluation.json").read_text())
        found |= {
            "tokens_per_step": evaluation["acceptance_length"],
            "speedup": evaluation["speedup"],
            "lossless": evaluation["lossless"],
        }
    if "register" in outputs:
        version = json.loads((outputs["register"].path / "version.json").read_text())
        found |= {"version": version["uri"], "promoted": version["promoted"], "gate": version["gate"]}
    return found
