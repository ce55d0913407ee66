"""The train step for heads that exist already, imported or of an earlier run: they are taken as they are.

    <step dir>/checkpoint/     a copy of the folder
    <step dir>/backbone/       where it has an adapter: the base merged with it, which the heads run on

Calibration, evaluation and registration then go on as after training.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from medusa.adapter import write_merged
from medusa.checkpoint import ADAPTER, CheckpointMismatchError, load_checkpoint
from medusa.digests import directory_digest
from medusa.weights import model_directory, weights_digest
from pipelines.artifact import StepOutput, open_step
from pipelines.train_worker import BACKBONE, CHECKPOINT

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 1


def adopt(context: RunContext, heads: Path) -> StepOutput:
    """Runs the step. CheckpointError for a folder that is no checkpoint, or one of another backbone's."""
    meta, base = load_checkpoint(heads).meta, model_directory(context.model.backbone)
    digest = weights_digest(base)
    expected = meta.backbone if meta.adapter is None else meta.adapter.base
    if digest != expected.weights_digest:
        raise CheckpointMismatchError(
            f"the heads in {heads} belong to {expected.name} ({expected.weights_digest}), but model.backbone is {base} "
            f"({digest}); give the backbone that they were trained on"
        )
    inputs = {"checkpoint": directory_digest(heads), "backbone": digest}
    with (
        open_step(context.root, "train", STEP_VERSION, {"adopted": True}, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        log.log_dataset("heads", inputs["checkpoint"], str(heads))
        for folder in (CHECKPOINT, BACKBONE):
            shutil.rmtree(step.path / folder, ignore_errors=True)  # an interrupted run's
        shutil.copytree(heads, step.path / CHECKPOINT)
        if meta.adapter is not None:
            write_merged(base, heads / ADAPTER, step.path / BACKBONE)
        made = [CHECKPOINT] if meta.adapter is None else [CHECKPOINT, BACKBONE]
        return step.commit({"counts": {"adopted": 1}}, outputs=made)
