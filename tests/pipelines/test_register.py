from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from medusa.checkpoint import BackboneRef, CheckpointMeta
from medusa.config import ConfigError, to_dict
from medusa.digests import directory_digest
from medusa.heads import HeadsConfig
from medusa.weights import weights_digest
from pipelines.artifact import StepOutput, open_step
from pipelines.register import RegisterConfig, champion_folder, champion_for, model_name, register
from pipelines.tracking import Tracker, TrackingConfig, TrackingUnavailable
from registry.connection import MlflowUnavailable
from registry.gate import ConcurrencyResult, EvaluationSet, EvaluationSummary, GateConfig, GateRefused, Measurement
from registry.versions import Registry

NAME = "medusa-tiny-llama"


@dataclass(frozen=True)
class Context:
    root: Path
    tracker: Tracker


@dataclass(frozen=True)
class Project:
    """One root, tracked in one MLflow: checkpoints, their evaluations, and the register step on them."""

    uri: str
    folder: Path

    def checkpoint(self, content: str, backbone: str = "org/tiny-llama", weights_digest: str = "sha256:b") -> Path:
        path = self.folder / "checkpoints" / content
        path.mkdir(parents=True)
        meta = CheckpointMeta(
            heads=HeadsConfig(hidden_size=64, vocab_size=512),
            backbone=BackboneRef(name=backbone, weights_digest=weights_digest, tokenizer_digest="sha256:t"),
            training={"data_digest": "sha256:d", "steps": 100},
        )
        (path / "medusa.json").write_text(json.dumps(to_dict(meta)))
        (path / "medusa_lm_head.safetensors").write_bytes(content.encode() * 50)
        return path

    def evaluation(self, checkpoint: Path, champion: Measurement | None = None, **changes: Any) -> StepOutput:
        summary = replace(measured(checkpoint), champion=champion, **changes)
        inputs = {"checkpoint": summary.checkpoint_digest}
        if champion is not None:
            inputs["champion"] = champion.checkpoint_digest
        with open_step(self.folder / "runs", "evaluate", 1, changes, inputs) as step:
            if step.complete:
                return step.output
            (step.path / "evaluation.json").write_text(json.dumps(to_dict(summary)))
            return step.commit({})

    def register(self, checkpoint: Path, evaluation: StepOutput, **config: Any) -> StepOutput:
        return self.within(lambda c: register(c, RegisterConfig(**config), checkpoint, evaluation))

    def champion_folder(self, checkpoint: Path) -> Path | None:
        return self.within(lambda c: champion_folder(c, RegisterConfig(), checkpoint))

    def within(self, work: Callable[[Any], Any], uri: str | None = "") -> Any:
        root = self.folder / "runs"
        config = TrackingConfig(uri=self.uri if uri == "" else uri)
        with Tracker.open(config, root, "demo", {}, patience_s=0.1) as tracker:
            return work(Context(root, tracker))

    @property
    def registry(self) -> Registry:
        return Registry(self.uri)


def measured(checkpoint: Path) -> EvaluationSummary:
    speeds = {"plain_tokens_per_second": 100.0, "medusa_tokens_per_second": 170.0, "speedup": 1.7}
    return EvaluationSummary(
        checkpoint_digest=directory_digest(checkpoint),
        lossless=True,
        divergences=(),
        evaluation_set=EvaluationSet(digest="sha256:set", num_prompts=95),
        dtype="float32",
        tree_size=16,
        speculation_chosen=True,
        acceptance_length=2.4,
        by_concurrency={"1": ConcurrencyResult(**speeds), "4": ConcurrencyResult(**speeds)},
        **speeds,
    )


def as_champion(checkpoint: Path) -> Measurement:
    fields = {name: value for name, value in vars(measured(checkpoint)).items() if name != "champion"}
    return Measurement(**fields)


@pytest.fixture
def project(mlflow_uri: str, tmp_path: Path) -> Project:
    return Project(mlflow_uri, tmp_path)


def version_json(output: StepOutput) -> dict[str, Any]:
    return json.loads((output.path / "version.json").read_text())


def test_a_first_version_is_registered_and_promoted(project: Project, tmp_path: Path):
    checkpoint = project.checkpoint("a")
    output = project.register(checkpoint, project.evaluation(checkpoint))
    assert version_json(output) == {
        "name": NAME,
        "version": 1,
        "uri": f"models:/{NAME}/1",
        "digest": directory_digest(checkpoint),
        "promoted": True,
        "gate": {"passed": True, "reasons": []},
    }
    assert project.registry.aliases(NAME) == {"champion": 1}
    champion = project.registry.champion(NAME)
    assert champion.tags["medusa.gate"] == "passed"
    assert champion.tags["medusa.backbone.digest"] == "sha256:b"
    assert champion.tags["medusa.training.data_digest"] == "sha256:d"
    assert (champion.tags["medusa.speedup.4"], champion.tags["medusa.acceptance_length"]) == ("1.700", "2.400")
    downloaded = project.registry.download(champion, tmp_path / "served")
    assert directory_digest(downloaded) == directory_digest(checkpoint)
    client = MlflowClient(project.uri)
    source = client.get_model_version(NAME, "1")
    assert client.get_run(source.run_id).data.tags["medusa.version"] == f"models:/{NAME}/1"


def test_doing_it_again_changes_nothing(project: Project):
    checkpoint = project.checkpoint("a")
    evaluation = project.evaluation(checkpoint)
    first = project.register(checkpoint, evaluation)
    assert project.register(checkpoint, evaluation) == first
    again = project.register(checkpoint, evaluation, gate=GateConfig(min_speedup=0.9))
    assert again.key != first.key and version_json(again)["version"] == 1
    assert len(MlflowClient(project.uri).search_model_versions(f"name = '{NAME}'")) == 1
    assert project.registry.aliases(NAME) == {"champion": 1}


def test_a_better_version_replaces_the_champion_that_it_was_measured_against(project: Project):
    old, new = project.checkpoint("a"), project.checkpoint("b")
    assert project.champion_folder(old) is None
    project.register(old, project.evaluation(old))

    rival = project.champion_folder(new)
    assert directory_digest(rival) == directory_digest(old)
    evaluation = project.evaluation(new, champion=as_champion(rival), acceptance_length=2.6)
    output = project.register(new, evaluation)
    assert project.registry.aliases(NAME) == {"champion": 2, "previous": 1}

    # Running the finished pipeline again compares with the same rival, so every step is found complete.
    assert project.champion_folder(new) == rival
    assert project.champion_folder(old) != rival
    assert project.register(new, evaluation) == output


def test_the_champion_of_a_backbone_is_found_for_that_backbone_alone(
    project: Project, tiny_llama: Path, make_backbone_dir: Callable[..., Path]
):
    def found(backbone: Path, **config: Any) -> Path | None:
        return project.within(lambda c: champion_for(c, RegisterConfig(**config), str(backbone)))

    assert found(tiny_llama, name=NAME) is None  # no version yet
    checkpoint = project.checkpoint("a", weights_digest=weights_digest(tiny_llama))
    project.register(checkpoint, project.evaluation(checkpoint))
    heads = found(tiny_llama, name=NAME)
    assert heads is not None and directory_digest(heads) == directory_digest(checkpoint)
    assert found(make_backbone_dir("llama", seed=7), name=NAME) is None
    assert found(tiny_llama) is None  # another name: that of the folder
    assert project.within(lambda c: champion_for(c, RegisterConfig(name=NAME), str(tiny_llama)), uri=None) is None


def test_a_worse_version_is_refused_and_stays_challenger(project: Project):
    old, new = project.checkpoint("a"), project.checkpoint("b")
    project.register(old, project.evaluation(old))
    evaluation = project.evaluation(new, champion=as_champion(old), acceptance_length=1.5)
    for _ in range(2):
        with pytest.raises(GateRefused, match=r"models:/medusa-tiny-llama/2 is refused by the gate: acceptance"):
            project.register(new, evaluation)
    assert project.registry.aliases(NAME) == {"champion": 1, "challenger": 2}
    challenger = project.registry.resolve(f"models:/{NAME}@challenger")
    assert challenger.tags["medusa.gate"] == "refused"
    assert "acceptance length 1.500" in challenger.tags["medusa.gate.reasons"]
    with pytest.raises(GateRefused, match=r"acceptance length 1\.500"):
        project.registry.promote(NAME, 2)


def test_a_candidate_that_was_not_measured_beside_the_champion_is_refused(project: Project):
    old, new = project.checkpoint("a"), project.checkpoint("b")
    project.register(old, project.evaluation(old))
    with pytest.raises(GateRefused, match="the evaluation measured no champion; evaluate again"):
        project.register(new, project.evaluation(new))


def test_without_promotion_the_version_is_gated_but_waits(project: Project):
    checkpoint = project.checkpoint("a")
    output = project.register(checkpoint, project.evaluation(checkpoint), promote=False)
    assert not version_json(output)["promoted"] and version_json(output)["gate"]["passed"]
    assert project.registry.aliases(NAME) == {"challenger": 1}
    project.registry.promote(NAME, 1)
    assert project.registry.aliases(NAME) == {"champion": 1}


def test_a_refused_version_is_still_registered_without_promotion(project: Project):
    checkpoint = project.checkpoint("a")
    output = project.register(checkpoint, project.evaluation(checkpoint, speedup=0.8), promote=False)
    assert version_json(output)["gate"]["reasons"] == ["speedup 0.800 at concurrency 1 is below min_speedup 1"]


@pytest.mark.parametrize(
    "moment", ["create_model_version", "set_registered_model_alias", "delete_registered_model_alias"]
)
def test_a_kill_at_any_write_is_completed_by_the_next_run(project: Project, monkeypatch, moment: str):
    old, new = project.checkpoint("a"), project.checkpoint("b")
    project.register(old, project.evaluation(old))
    evaluation = project.evaluation(new, champion=as_champion(old))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, moment, killed_after(getattr(MlflowClient, moment)))
        project.register(new, evaluation)
    assert not list((project.folder / "runs" / "register").glob("*/lease.json"))
    output = project.register(new, evaluation)
    assert version_json(output)["version"] == 2 and version_json(output)["gate"]["passed"]
    assert project.registry.aliases(NAME) == {"champion": 2, "previous": 1}


def killed_after(write):
    """Takes effect in MLflow, and dies before it returns."""

    def wrapper(*args, **kwargs):
        write(*args, **kwargs)
        raise KeyboardInterrupt

    return wrapper


def test_mlflow_down_at_register_asks_to_try_again_and_keeps_everything(project: Project, monkeypatch):
    checkpoint = project.checkpoint("a")
    evaluation = project.evaluation(checkpoint)

    def down(*args, **kwargs):
        raise MlflowUnavailable("MLflow at x cannot be reached: down")

    with monkeypatch.context() as patch, pytest.raises(TrackingUnavailable, match="run the same command"):
        patch.setattr(Registry, "register", down)
        project.register(checkpoint, evaluation)
    assert version_json(project.register(checkpoint, evaluation))["version"] == 1


def test_an_evaluation_of_another_checkpoint_is_refused(project: Project):
    one, other = project.checkpoint("a"), project.checkpoint("b")
    with pytest.raises(ValueError, match="evaluate this checkpoint, then register it"):
        project.register(other, project.evaluation(one))


def test_without_mlflow_there_is_no_registry(project: Project):
    checkpoint = project.checkpoint("a")
    evaluation = project.evaluation(checkpoint)
    assert project.within(lambda c: champion_folder(c, RegisterConfig(), checkpoint), uri=None) is None
    with pytest.raises(ConfigError, match=r"tracking\.uri is null"):
        project.within(lambda c: register(c, RegisterConfig(), checkpoint, evaluation), uri=None)


@pytest.mark.parametrize(
    ("backbone", "name"),
    [("lmsys/vicuna-7b-v1.5", "medusa-vicuna-7b-v1.5"), ("/models/chat 8m/", "medusa-chat-8m"), ("m:1", "medusa-m-1")],
)
def test_the_model_is_named_after_its_backbone(project: Project, backbone: str, name: str):
    checkpoint = project.checkpoint("a", backbone)
    assert model_name(RegisterConfig(), checkpoint) == name
    assert model_name(RegisterConfig(name="own"), checkpoint) == "own"
