"""The whole pipeline: prompts, distil, train, calibrate, evaluate, register; each step skipped when it is done.

A step reads the finished steps before it, so running one of them runs (or skips) what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from rich.console import Console

from medusa.config import ConfigError, load_config, strict
from medusa.model import Backbone
from medusa.quantization import Quantization
from pipelines import progress
from pipelines.adopt import adopt
from pipelines.artifact import StepOutput, mirrored_to, only_complete_steps
from pipelines.calibrate import CHECKPOINT, CalibrateConfig, calibrate
from pipelines.distill import CHAMPION, distill
from pipelines.distill_config import DistillConfig
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.prompts import PromptsConfig, prepare_prompts
from pipelines.quality import QualityConfig, measure_quality
from pipelines.register import RegisterConfig, champion_folder, champion_for, register
from pipelines.summary import RunSummary
from pipelines.tracking import Tracker, TrackingConfig
from pipelines.train import train, trained_backbone
from pipelines.train_config import TrainConfig
from registry.object_store import ObjectFolder

T = TypeVar("T")
Step = Literal["prompts", "distill", "train", "calibrate", "evaluate", "register"]
STEPS: tuple[Step, ...] = get_args(Step)
Dtype = Literal["float32", "bfloat16", "float16"]


@strict
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone: a folder or hub id. `dtype` null: float32 on a CPU, the checkpoint's own on a GPU."""

    backbone: str
    dtype: Dtype | None = None
    device: str | None = None

    @property
    def located(self) -> ModelConfig:
        """With the folder's absolute path: Ray's workers have another working directory. Hub ids stay."""
        return replace(self, backbone=str(Path(self.backbone).resolve())) if Path(self.backbone).is_dir() else self

    def load(self, quantization: Quantization | None = None) -> Backbone:
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return Backbone.from_pretrained(self.backbone, dtype=dtype, device=self.device, quantization=quantization)


@strict
@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """One pipeline: `root` holds its steps' folders, everything else is the config of a step.

    `heads` is a checkpoint folder that the train step takes as it is instead of training (pipelines/adopt.py).
    `store` is a folder of an object store (s3://bucket/prefix) that keeps the steps: `root` is then the scratch folder
    beside it, which all of the run's processes must see.
    """

    name: str
    root: str = "runs"
    store: str | None = None
    model: ModelConfig
    heads: str | None = None
    prompts: PromptsConfig
    distill: DistillConfig
    train: TrainConfig
    calibrate: CalibrateConfig
    evaluate: EvaluateConfig
    quality: QualityConfig = field(default_factory=QualityConfig)
    register: RegisterConfig = field(default_factory=RegisterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True)
class RunContext:
    """What every step needs beside its config and inputs."""

    root: Path
    model: ModelConfig
    tracker: Tracker
    console: Console = field(default_factory=Console)

    @cached_property
    def backbone(self) -> Backbone:
        """Loaded once a process, by the first step that needs it here."""
        return self.model.load()

    def bar(self, label: str, total: int) -> AbstractContextManager[progress.Advance]:
        return progress.bar(label, total, self.console)

    def track(self, iterable: Iterable[T], label: str, total: int) -> Iterator[T]:
        return progress.track(iterable, label, total, self.console)


def load_pipeline(path: Path, overrides: Iterable[str] = ()) -> PipelineConfig:
    """The config file with its overrides; relative paths in it are taken from the working directory."""
    return load_config(PipelineConfig, path, list(overrides))


def run_pipeline(
    config: PipelineConfig, *, first: Step = "prompts", last: Step = "register", console: Console | None = None
) -> dict[Step, StepOutput]:
    """Runs the steps up to `last`, posts a summary however that ends, and returns their outputs. Ray must be
    initialised.

    Steps before `first` must be complete already: StepMissingError names the one that is not.
    """
    if last == "register" and config.tracking.uri is None:
        raise ConfigError(
            "tracking.uri is null, and there is no registry without MLflow; set it, or end the run with `--to evaluate`"
        )
    root = Path(config.root).resolve()
    store = ObjectFolder(config.store) if config.store else None
    with mirrored_to(store), Tracker.open(config.tracking, root, config.name, config) as tracker:
        context = RunContext(root, config.model.located, tracker, console or Console())
        summary = RunSummary(config.name)
        with summary.told_to(tracker.pipeline):
            outputs: dict[Step, StepOutput] = summary.outputs  # type: ignore[assignment]
            for step in STEPS[: STEPS.index(last) + 1]:
                required = STEPS.index(step) < STEPS.index(first)
                with only_complete_steps() if required else nullcontext():
                    outputs[step] = _run_step(context, config, step, outputs)
        return outputs


def _with_champion(context: RunContext, config: PipelineConfig) -> DistillConfig:
    """distill.heads "champion" as the folder of today's champion, or none while there is no champion to use."""
    if config.distill.heads != CHAMPION:
        return config.distill
    folder = champion_for(context, config.register, config.model.backbone)
    return replace(config.distill, heads=None if folder is None else str(folder))


def _serving(context: RunContext, trained: StepOutput) -> RunContext:
    """With the backbone that the trained heads run on: the same, or the merged one of a joint training."""
    backbone = trained_backbone(trained, context.model.backbone)
    if backbone == context.model.backbone:
        return context
    return replace(context, model=replace(context.model, backbone=backbone))


def _run_step(context: RunContext, config: PipelineConfig, step: Step, outputs: dict[Step, StepOutput]) -> StepOutput:
    match step:
        case "prompts":
            return prepare_prompts(context, config.prompts)
        case "distill":
            return distill(context, _with_champion(context, config), outputs["prompts"])
        case "train" if config.heads is not None:
            return adopt(context, Path(config.heads))
        case "train":
            return train(context, config.train, outputs["distill"])
        case "calibrate":
            held_back = config.train.validation_fraction
            served = _serving(context, outputs["train"])
            return calibrate(served, config.calibrate, outputs["train"], outputs["distill"], held_back)
        case "evaluate":
            champion = champion_folder(context, config.register, outputs["calibrate"].path / CHECKPOINT)
            served = _serving(context, outputs["train"])
            changed = None if served is context else measure_quality(context, served, config, outputs["distill"])
            return evaluate(served, config.evaluate, outputs["calibrate"], champion, changed, base=context)
        case "register":
            return register(context, config.register, outputs["calibrate"].path / CHECKPOINT, outputs["evaluate"])
