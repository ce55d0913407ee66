"""The result of joint training as one Transformers model: the adapter merged into the backbone's weights.

<output>/            the merged model with its tokenizer, file by file like the base's folder
<output>/medusa/     the heads, pinned to the digest of the merged weights
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from medusa.adapter import write_merged
from medusa.checkpoint import ADAPTER, Checkpoint, CheckpointMismatchError, save_checkpoint
from medusa.export.layouts import ExportError
from medusa.folders import whole_folder
from medusa.weights import model_directory, weights_digest

HEADS = "medusa"


def export_merged(directory: Path, checkpoint: Checkpoint, backbone: str | None, output: Path) -> str:
    """Writes the merged model and its heads; returns the digest of the merged weights.

    `backbone` is the model that the adapter was trained on. Heads, calibration and trees stay as they are.
    """
    meta = checkpoint.meta
    if meta.adapter is None:
        raise ExportError(
            f"{directory} has no {ADAPTER}/, so its backbone is a model of its own and there is nothing to merge; use "
            "the backbone as it is, or export the heads with --format vllm, tgi or medusa"
        )
    base = model_directory(backbone or meta.adapter.base.name)
    digest = weights_digest(base)
    if digest != meta.adapter.base.weights_digest:
        raise CheckpointMismatchError(
            f"the adapter of {directory} was trained on {meta.adapter.base.name} ({meta.adapter.base.weights_digest}), "
            f"but {base} is {digest}; give the backbone that it was trained on (--backbone)"
        )
    with whole_folder(output) as folder:
        folder.rmdir()  # it is written in one piece
        merged = write_merged(base, directory / ADAPTER, folder)
        if merged != meta.backbone.weights_digest:
            raise CheckpointMismatchError(
                f"{base} with {directory / ADAPTER} gives {merged}, but the heads were trained for "
                f"{meta.backbone.weights_digest}; the folder or the base has changed since"
            )
        pinned = dataclasses.replace(meta.backbone, name=output.name)
        save_checkpoint(folder / HEADS, checkpoint.heads, dataclasses.replace(meta, backbone=pinned, adapter=None))
    return merged
