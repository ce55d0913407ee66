"""What the report reads from the folders of finished steps, checked: absent files are None, damaged ones an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from medusa.checkpoint import CheckpointError, read_meta
from medusa.config import ConfigError, validate
from medusa.tree import TokenTree
from pipelines.artifact import StepOutput
from registry.gate import EvaluationSummary, Measurement

T = TypeVar("T")
_HEAD_VALUE = re.compile(r"head_(\d+)/(\w+)")


class ReportError(RuntimeError):
    """A file that the report is made from is damaged; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class TreeRow:
    """One tree of the ladder at the calibrated concurrency. `product_error` is relative to `tokens_per_step`."""

    nodes: int
    tokens_per_step: float
    product_estimate: float
    product_error: float
    step_seconds: float
    tokens_per_second: float
    speedup: float


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """calibration.json as far as the report shows it; `chosen` maps sequences at once to a tree's nodes."""

    accuracy: list[list[float]]
    num_positions: int
    concurrency: int
    ladder: list[TreeRow]
    chosen: dict[str, int]

    def __post_init__(self) -> None:
        if not self.ladder or str(self.concurrency) not in self.chosen:
            raise ValueError("the ladder needs a tree, and `chosen` an entry for `concurrency`")

    @property
    def chosen_nodes(self) -> int:
        return self.chosen[str(self.concurrency)]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A line of replies.jsonl. The reply's first token comes from the prefill and belongs to no step."""

    id: str
    text: str
    accepted_per_step: list[int]
    category: str | None = None
    prompt: str | None = None
    token_texts: list[str] | None = None

    @property
    def has_token_texts(self) -> bool:
        return self.token_texts is not None and len(self.token_texts) == 1 + sum(self.accepted_per_step)

    @property
    def tokens_per_step(self) -> float:
        steps = self.accepted_per_step
        return sum(steps) / len(steps) if steps else 1.0


@dataclass(frozen=True, kw_only=True)
class Details:
    """A measurement's `details` as far as the report shows them: of the tree that ran, though the service may not."""

    tokens_per_step_measured: float | None = None
    tree_measured: int | None = None
    speedup_measured: float | None = None
    tokens_per_step_by_category: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was measured of a checkpoint at the load that the gate judges, also where the service decodes plainly.

    `interval` is the range of the speedup over several runs; None for a single one.
    """

    tokens_per_step: float
    nodes: int
    speedup: float
    interval: tuple[float, float] | None
    by_category: Mapping[str, float]

    @classmethod
    def of(cls, measurement: Measurement, source: str) -> Measured:
        details = _checked(Details, measurement.details, f"{source}: details")
        result = measurement.by_concurrency.get(str(measurement.concurrency))
        interval = result.speedup_interval if result else None
        return cls(
            tokens_per_step=_first(details.tokens_per_step_measured, measurement.acceptance_length),
            nodes=_first(details.tree_measured, measurement.tree_size),
            speedup=_first(details.speedup_measured, measurement.speedup),
            interval=interval if interval and interval[0] < interval[1] else None,
            by_category=details.tokens_per_step_by_category,
        )


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json: the gate's summary with what ran, and the same of the champion measured beside it."""

    summary: EvaluationSummary
    measured: Measured
    champion: Measured | None
    repeats: int | None


@dataclass(frozen=True, kw_only=True)
class Gate:
    passed: bool
    reasons: list[str]


@dataclass(frozen=True, kw_only=True)
class Version:
    """version.json of the register step."""

    name: str
    version: int
    promoted: bool
    gate: Gate


@dataclass(frozen=True)
class TrainingRecord:
    """Each head's mean loss and top-1 accuracy over the steps since the record before."""

    step: int
    loss_K: tuple[float, ...]
    top1_K: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """Everything a report can show; None or empty where the step did not run or wrote no such file."""

    training: tuple[TrainingRecord, ...]
    calibration: CalibrationResult | None
    trees: tuple[TokenTree, ...]
    evaluation: Evaluation | None
    replies: tuple[Reply, ...]
    version: Version | None

    def tree(self, nodes: int) -> TokenTree | None:
        return next((tree for tree in self.trees if tree.num_nodes == nodes), None)


def read_inputs(outputs: Mapping[str, StepOutput]) -> ReportInputs:
    """Reads the steps' files. ReportError for one that cannot be understood."""
    metrics = _read_lines(_file(outputs, "train", "metrics.jsonl"))
    calibration = _read_as(CalibrationResult, _file(outputs, "calibrate", "calibration.json"))
    replies = _file(outputs, "evaluate", "replies.jsonl")
    return ReportInputs(
        training=_training(metrics),
        calibration=calibration,
        trees=_trees(_file(outputs, "calibrate", "checkpoint/medusa.json")),
        evaluation=_evaluation(outputs),
        replies=tuple(_checked(Reply, row, f"{replies}:{number}") for number, row in _read_lines(replies)),
        version=_read_as(Version, _file(outputs, "register", "version.json")),
    )


def _evaluation(outputs: Mapping[str, StepOutput]) -> Evaluation | None:
    path = _file(outputs, "evaluate", "evaluation.json")
    summary = _read_as(EvaluationSummary, path)
    if summary is None:
        return None
    rival = summary.champion
    return Evaluation(
        summary=summary,
        measured=Measured.of(summary, str(path)),
        champion=None if rival is None else Measured.of(rival, f"{path}: champion"),
        repeats=outputs["evaluate"].manifest.get("config", {}).get("repeats"),
    )


def _file(outputs: Mapping[str, StepOutput], step: str, name: str) -> Path | None:
    path = outputs[step].path / name if step in outputs else None
    return path if path is not None and path.is_file() else None


def _first(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def _read_as(cls: type[T], path: Path | None) -> T | None:
    return None if path is None else _checked(cls, _json(path.read_bytes(), str(path)), str(path))


def _read_lines(path: Path | None) -> list[tuple[int, Any]]:
    lines = path.read_bytes().splitlines() if path is not None else []
    return [(number, _json(line, f"{path}:{number}")) for number, line in enumerate(lines, 1) if line.strip()]


def _json(content: bytes, source: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:  # also what is not UTF-8
        raise _damaged(source, str(error)) from error


def _checked(cls: type[T], data: Any, source: str) -> T:
    if not isinstance(data, Mapping):
        raise _damaged(source, f"a JSON object is needed, got {type(data).__name__}")
    try:
        return validate(cls, data, source=source)
    except ConfigError as error:
        raise _damaged(source, str(error)) from error


def _damaged(source: str, what: str) -> ReportError:
    return ReportError(f"{source} cannot be read for the report: {what}; remove the step's folder and run it again")


def _trees(path: Path | None) -> tuple[TokenTree, ...]:
    if path is None:
        return ()
    try:
        return tuple(TokenTree.from_paths(paths) for paths in read_meta(path.parent).trees)
    except (CheckpointError, ConfigError, ValueError) as error:
        raise _damaged(str(path), str(error)) from error


def _training(rows: list[tuple[int, Any]]) -> tuple[TrainingRecord, ...]:
    """Records of training steps in order; of a step written twice, by a run that was resumed, the later one."""
    records = {record.step: record for record in (_training_record(row) for _, row in rows) if record is not None}
    return tuple(records[step] for step in sorted(records))


def _training_record(row: Any) -> TrainingRecord | None:
    """None for a line about something else than the heads' training, such as a validation."""
    if not isinstance(row, Mapping) or not isinstance(row.get("step"), int):
        return None
    loss, top1 = _by_head(row, "loss"), _by_head(row, "top1_accuracy")
    return TrainingRecord(row["step"], loss, top1) if loss and len(loss) == len(top1) else None


def _by_head(row: Mapping[str, Any], measure: str) -> tuple[float, ...]:
    matches = ((_HEAD_VALUE.fullmatch(key), value) for key, value in row.items())
    found = {int(match[1]): value for match, value in matches if match and match[2] == measure}
    return tuple(_finite(found[k]) for k in sorted(found))


def _finite(value: Any) -> float:
    """NaN, which is drawn as a gap, for a value that is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
