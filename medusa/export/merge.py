"""The result of joint training as one Transformers model: the adapter merged into the backbone's weights.

<output>/            the merged model with its tokenizer, as save_pretrained writes it
<output>/medusa/     the heads, pinned to the digest of the merged weights
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from medusa.checkpoint import BackboneRef, Checkpoint, CheckpointMismatchError, save_checkpoint
from medusa.export.folders import whole_folder
from medusa.export.layouts import ExportError
from medusa.model import model_directory, weights_digest

ADAPTER = "adapter"
HEADS = "medusa"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


def export_merged(directory: Path, checkpoint: Checkpoint, backbone: str | None, output: Path) -> str:
    """Writes the merged model and its heads; returns the digest of the merged weights.

    `backbone` is the model that the adapter was trained on. The heads' weights and calibration stay as they are.
    """
    adapter = directory / ADAPTER
    if not (adapter / "adapter_config.json").is_file():
        raise ExportError(
            f"{directory} has no {ADAPTER}/, so its backbone is unchanged and there is nothing to merge; use the "
            "backbone as it is, or export the heads with --format vllm, tgi or medusa"
        )
    base = model_directory(backbone or checkpoint.meta.backbone.name)
    model = merge_adapter(base, adapter)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        for pattern in TOKENIZER_FILES:
            for file in base.glob(pattern):
                shutil.copy2(file, folder / file.name)
        digest = weights_digest(folder)
        _check_known(checkpoint, digest, weights_digest(base), base)
        pinned = BackboneRef(
            name=output.name, weights_digest=digest, tokenizer_digest=checkpoint.meta.backbone.tokenizer_digest
        )
        save_checkpoint(folder / HEADS, checkpoint.heads, dataclasses.replace(checkpoint.meta, backbone=pinned))
    return digest


@torch.no_grad()
def merge_adapter(base: Path, adapter: Path) -> PreTrainedModel:
    """The base model with the adapter added into its weights, in the dtype of the base's files."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ExportError(f"merging an adapter needs peft ({error}); install it: pip install peft") from error
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    return merged


def _check_known(checkpoint: Checkpoint, merged: str, base: str, folder: Path) -> None:
    """The heads name the base or the merged weights, as their trainer wrote them; anything else is another model."""
    named = checkpoint.meta.backbone.weights_digest
    if named not in (merged, base):
        raise CheckpointMismatchError(
            f"these heads belong to {checkpoint.meta.backbone.name} ({named}), but {folder} is {base} and merged with "
            f"the adapter {merged}; give the backbone that the adapter was trained on (--backbone)"
        )
