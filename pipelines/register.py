"""The register step: a checkpoint and its evaluation become a version, and through the gate the champion.

<step dir>/version.json    {"name", "version", "uri", "digest", "promoted", "gate": {"passed", "reasons"}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.checkpoint import CheckpointMeta, read_meta
from medusa.config import ConfigError, strict
from medusa.digests import directory_digest
from medusa.weights import model_directory, weights_digest
from pipelines.artifact import StepOutput, open_step
from pipelines.tracking import TrackingUnavailable
from registry.connection import MlflowUnavailable, shown
from registry.gate import EvaluationSummary, GateConfig, GateResult, check_champion, evaluate_gate
from registry.versions import GATE_AGAINST_TAG, Registry, VersionRef

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 1
EVALUATION, VERSION = "evaluation.json", "version.json"
CHAMPIONS_FOLDER = "champions"


@strict
@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """`name` null: medusa-<backbone-name>. `promote` false: the version stays challenger, gated but not moved."""

    name: str | None = None
    promote: bool = True
    gate: GateConfig = field(default_factory=GateConfig)


def register(context: RunContext, config: RegisterConfig, checkpoint_path: Path, evaluation: StepOutput) -> StepOutput:
    """Registers the checkpoint, once for each content, and promotes it when asked and when the gate lets it.

    GateRefused leaves the version registered as challenger, with the reasons as tags. TrackingUnavailable
    while MLflow is down: all earlier steps are kept, and the same command goes on here.
    """
    summary = _read_evaluation(evaluation, checkpoint_path)
    name = model_name(config, checkpoint_path)
    inputs = {
        "checkpoint": summary.checkpoint_digest,
        "evaluation": evaluation.digest,
        "registry": f"{name} in {shown(_registry_uri(context))}",
    }
    with (
        open_step(context.root, "register", STEP_VERSION, config, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        with _or_try_again():
            registry = Registry(_registry_uri(context))
            tags = _tags(read_meta(checkpoint_path), summary, evaluation)
            version = registry.register(name, checkpoint_path, tags, context.tracker.run_id(log))
            gate = _gate(registry, version, summary, config.gate)
            log.set_tags({"medusa.version": version.uri, "medusa.gate": _word(gate), **tags})
            if config.promote:
                gate.require(version.uri)
                registry.promote(name, version.version)
        _write_version(step.path / VERSION, version, gate, promoted=config.promote)
        return step.commit({"counts": {"versions": 1}}, outputs=[VERSION])


def champion_folder(context: RunContext, config: RegisterConfig, checkpoint_path: Path) -> Path | None:
    """The checkpoint that this candidate is to be measured against, downloaded; None for a first version.

    For a candidate that has become champion it is the one that it replaced, so that running a finished pipeline
    again finds its evaluation as it was.
    """
    if context.tracker.uri is None:
        return None
    with _or_try_again():
        registry = Registry(context.tracker.uri)
        rival = _rival(registry, model_name(config, checkpoint_path), directory_digest(checkpoint_path))
        if rival is None:
            return None
        folder = rival.digest.removeprefix("sha256:")[:16]
        return registry.download(rival, context.root / CHAMPIONS_FOLDER / folder)


def champion_for(context: RunContext, config: RegisterConfig, backbone: str) -> Path | None:
    """The current champion's heads, downloaded, where they belong to exactly this backbone; None without such."""
    if context.tracker.uri is None:
        return None
    with _or_try_again():
        registry = Registry(context.tracker.uri)
        champion = registry.champion(config.name or _name_for(backbone))
        if champion is None:
            return None
        folder = context.root / CHAMPIONS_FOLDER / champion.digest.removeprefix("sha256:")[:16]
        folder = registry.download(champion, folder)
    return folder if read_meta(folder).backbone.weights_digest == weights_digest(model_directory(backbone)) else None


def model_name(config: RegisterConfig, checkpoint_path: Path) -> str:
    """The registered model that a checkpoint belongs to."""
    return config.name or _name_for(read_meta(checkpoint_path).backbone.name)


def _name_for(backbone: str) -> str:
    return f"medusa-{re.sub(r'[^A-Za-z0-9._-]', '-', backbone.rstrip('/').rpartition('/')[2])}"


def _rival(registry: Registry, name: str, candidate_digest: str) -> VersionRef | None:
    champion = registry.champion(name)
    if champion is None or champion.digest != candidate_digest:
        return champion
    return registry.find(name, champion.tags.get(GATE_AGAINST_TAG, "none"))


def _gate(registry: Registry, version: VersionRef, summary: EvaluationSummary, config: GateConfig) -> GateResult:
    """Judges the version and records the result; one that is champion already (a resumed run) stays so."""
    champion = registry.champion(version.name)
    if champion == version:
        return GateResult(True)
    registry.set_challenger(version)
    result = check_champion(summary, champion.digest if champion else None)
    if result.passed:
        result = evaluate_gate(summary, summary.champion if champion else None, config)
    registry.record_gate(version, result, champion.digest if champion else None)
    return result


def _read_evaluation(evaluation: StepOutput, checkpoint_path: Path) -> EvaluationSummary:
    source = evaluation.path / EVALUATION
    summary = EvaluationSummary.from_dict(json.loads(source.read_text()), source=str(source))
    digest = directory_digest(checkpoint_path)
    if summary.checkpoint_digest != digest:
        raise ValueError(
            f"{source} is about the checkpoint {summary.checkpoint_digest}, but {checkpoint_path} is {digest}; "
            "evaluate this checkpoint, then register it"
        )
    return summary


def _tags(meta: CheckpointMeta, summary: EvaluationSummary, evaluation: StepOutput) -> dict[str, Any]:
    training = {
        f"medusa.training.{name}": value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in meta.training.items()
    }
    speedups = {
        f"medusa.speedup.{concurrency}": f"{result.speedup:.3f}"
        for concurrency, result in summary.by_concurrency.items()
    }
    return {
        "medusa.backbone.name": meta.backbone.name,
        "medusa.backbone.digest": meta.backbone.weights_digest,
        "medusa.backbone.base_digest": (meta.adapter.base if meta.adapter else meta.backbone).weights_digest,
        "medusa.backbone.tokenizer_digest": meta.backbone.tokenizer_digest,
        "medusa.head_kind": meta.head_kind,
        "medusa.tree_size": summary.tree_size,
        "medusa.speculation_chosen": summary.speculation_chosen,
        "medusa.acceptance_length": f"{summary.acceptance_length:.3f}",
        "medusa.speedup": f"{summary.speedup:.3f}",
        "medusa.dtype": summary.dtype,
        "medusa.evaluation.key": evaluation.key,
        "medusa.evaluation.set": summary.evaluation_set.digest,
        **speedups,
        **training,
    }


def _write_version(path: Path, version: VersionRef, gate: GateResult, *, promoted: bool) -> None:
    content = {
        "name": version.name,
        "version": version.version,
        "uri": version.uri,
        "digest": version.digest,
        "promoted": promoted,
        "gate": {"passed": gate.passed, "reasons": list(gate.reasons)},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _word(gate: GateResult) -> str:
    return "passed" if gate.passed else f"refused: {'; '.join(gate.reasons)}"


def _registry_uri(context: RunContext) -> str:
    if context.tracker.uri is None:
        raise ConfigError(
            "tracking.uri is null, and there is no registry without MLflow; set tracking.uri=sqlite:///mlflow.db, "
            "or end the run at the evaluate step"
        )
    return context.tracker.uri


@contextmanager
def _or_try_again() -> Iterator[None]:
    try:
        yield
    except MlflowUnavailable as error:
        raise TrackingUnavailable(f"{error}. Everything is kept; run the same command when it is back") from error
