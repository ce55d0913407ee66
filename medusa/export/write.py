"""Exporting a checkpoint: to the layout of another program, or as one Transformers model with its heads beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file

from medusa.checkpoint import Checkpoint, CheckpointMismatchError, load_checkpoint, read_meta
from medusa.export.layouts import REFERENCE_WEIGHTS, ExportError, Layout, reference_layout, tgi_layout, vllm_layout
from medusa.export.merge import HEADS, export_merged
from medusa.folders import whole_folder
from medusa.model import Backbone
from medusa.weights import weights_digest

Format = Literal["vllm", "tgi", "medusa", "transformers"]
FORMATS: tuple[Format, ...] = get_args(Format)
READERS = {
    "vllm": "vLLM 0.31 and 0.32 (0.33 has no Medusa); it uses each head's best guess, as a chain",
    "tgi": "text-generation-inference; it uses each head's best guess, as a chain",
    "medusa": "the Medusa reference (FasterDecoding/Medusa)",
    "transformers": "Transformers, and any server of Transformers models",
}
HEAD_KIND = "medusa"


@dataclass(frozen=True)
class Exported:
    """What was written. `notes` are sentences that whoever uses the folder should read."""

    path: Path
    notes: tuple[str, ...]


def export_checkpoint(directory: Path, format: Format, output: Path, backbone: str | None = None) -> Exported:
    """Writes `output`, which must not exist, whole or not at all.

    `backbone` is the folder or hub id of the model that the heads belong to; a folder is checked by its digest. It is
    needed where the layout names or contains it and the checkpoint does not know where it is. ExportError names what
    the program cannot read; CheckpointMismatchError another backbone's.
    """
    directory = Path(directory)
    if format not in FORMATS:
        raise ExportError(f"{format!r} is no export format; it is one of {', '.join(FORMATS)}")
    if output.exists():
        raise ExportError(f"{output} already exists; nothing is overwritten, choose another folder")
    kind = read_meta(directory).head_kind
    if kind != HEAD_KIND and format != "transformers":
        raise ExportError(
            f"{directory} holds {kind} heads, which depend on each other's guesses; {format} reads Medusa heads only. "
            "Serve them with `medusa serve`, or train Medusa's: train.heads.kind=medusa"
        )
    checkpoint = load_checkpoint(directory)
    if format == "transformers":
        digest = export_merged(directory, checkpoint, backbone, output)
        return Exported(output, (f"the merged weights are {digest}; heads pinned to them are in {output / HEADS}",))
    if checkpoint.meta.adapter is not None and backbone is None:
        raise ExportError(
            f"{directory} was trained together with its backbone (it has an adapter); export it with --format "
            f"transformers first, and give the merged model as --backbone"
        )
    notes = [f"read by {READERS[format]}", _check_backbone(checkpoint, backbone)]
    layout = _layout(directory, checkpoint, format, backbone)
    with whole_folder(output) as folder:
        write_layout(folder, layout)
    return Exported(output, tuple(note for note in notes if note))


def write_layout(folder: Path, layout: Layout) -> None:
    """The weights file and config.json. The reference's loader reads nothing but a torch archive: the one place where
    a pickle is written, of plain tensors only, so that torch's weights_only mode loads it."""
    if layout.weights_file == REFERENCE_WEIGHTS:
        torch.save(layout.tensors, folder / layout.weights_file)
    else:
        save_file(layout.tensors, folder / layout.weights_file, metadata={"format": "pt"})
    config = json.dumps(layout.config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")


def _layout(directory: Path, checkpoint: Checkpoint, format: Format, backbone: str | None) -> Layout:
    if format == "vllm":
        shared = checkpoint.config.vocabulary == "shared"
        return vllm_layout(checkpoint, _lm_head(directory, checkpoint, backbone) if shared and backbone else None)
    name = _located(checkpoint, format, backbone)
    return tgi_layout(checkpoint, name) if format == "tgi" else reference_layout(checkpoint, name)


def _check_backbone(checkpoint: Checkpoint, backbone: str | None) -> str | None:
    if backbone is None:
        return None
    if not Path(backbone).is_dir():
        return f"{backbone} is no folder here, so its digest was not checked"
    digest, reference = weights_digest(Path(backbone)), checkpoint.meta.backbone
    if digest != reference.weights_digest:
        raise CheckpointMismatchError(
            f"these heads belong to {reference.name} ({reference.weights_digest}), but {backbone} is {digest}; give "
            "the backbone that they were trained on"
        )
    return None


def _located(checkpoint: Checkpoint, format: Format, backbone: str | None) -> str:
    """What config.json names as the backbone: these programs load what it names."""
    name = backbone or checkpoint.meta.backbone.name
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if "/" not in name:
        raise ExportError(
            f"{format} loads the backbone that config.json names, but these heads only know it as {name!r}; give its "
            "folder or hub id (--backbone)"
        )
    return name


def _lm_head(directory: Path, checkpoint: Checkpoint, backbone: str) -> torch.Tensor:
    dtype = next(checkpoint.heads.parameters()).dtype
    loaded = Backbone.from_pretrained(backbone, dtype=dtype, device="cpu")
    load_checkpoint(directory, loaded)  # the pair, for a hub id whose files were not checked yet
    return loaded.lm_head_weight
