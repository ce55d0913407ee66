"""The train step for heads that exist already, imported or of an earlier run: they are taken as they are.

    <step dir>/checkpoint/     a copy of the folder

Calibration, evaluation and registration then go on as after training.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from medusa.checkpoint import load_checkpoint
from medusa.digests import directory_digest
from pipelines.artifact import StepOutput, open_step
from pipelines.train_worker import CHECKPOINT

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 1


def adopt(context: RunContext, heads: Path) -> StepOutput:
    """Runs the step. CheckpointError for a folder that is no checkpoint, or one of another backbone's."""
    load_checkpoint(heads, context.backbone)
    inputs = {"checkpoint": directory_digest(heads), "backbone": context.backbone.digest}
    with (
        open_step(context.root, "train", STEP_VERSION, {"adopted": True}, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        log.log_dataset("heads", inputs["checkpoint"], str(heads))
        shutil.rmtree(step.path / CHECKPOINT, ignore_errors=True)  # an interrupted run's
        shutil.copytree(heads, step.path / CHECKPOINT)
        return step.commit({"counts": {"adopted": 1}}, outputs=[CHECKPOINT])
