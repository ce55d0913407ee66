"""A Medusa checkpoint: a folder of safetensors and JSON that says which backbone it belongs to.

    medusa_lm_head.safetensors   the heads, in the names that the Medusa reference and TGI read (medusa/export)
    config.json                  the keys that those loaders need
    medusa.json                  backbone digests, calibration, trees, provenance (CheckpointMeta)
    README.md                    the model card
    adapter/                     Medusa-2 by LoRA only: what makes the base model the heads' backbone (peft's files)

Hydra heads keep keys of their own (`hydra.{head}...`) under a raised schema version and another model type, so that no
loader of Medusa heads takes them for such. Never pickle. Saving is atomic: the folder appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medusa.config import ConfigError, strict, to_dict, validate
from medusa.digests import directory_digest
from medusa.folders import to_disk, whole_folder
from medusa.heads import DraftHeads, HeadsConfig, MedusaHeads
from medusa.hydra import HydraHeads
from medusa.model import Backbone

SCHEMA_VERSIONS = {"medusa": 1, "hydra": 2}
SCHEMA_VERSION = SCHEMA_VERSIONS["medusa"]
HEADS: dict[str, type[DraftHeads]] = {"medusa": MedusaHeads, "hydra": HydraHeads}
ADAPTER = "adapter"
WEIGHTS = "medusa_lm_head.safetensors"
META = "medusa.json"
CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class CheckpointError(ValueError):
    """The folder is not a usable Medusa checkpoint; the message says what was found and what is needed."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint belongs to another backbone; the message holds both digests."""


@strict
@dataclass(frozen=True, kw_only=True)
class BackboneRef:
    """The backbone that the heads were trained on."""

    name: str
    weights_digest: str
    tokenizer_digest: str | None = None
    revision: str | None = None


@strict
@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`accuracy[head][rank]` over `num_positions` of the backbone's own replies at `temperature`, and the tokens a
    step that a walk over those replies measured for each tree of the ladder (empty: not measured).

    `growth` lists the paths in the order in which the largest tree grows, and `path_accuracy` how often each of them
    was right as a whole; an earlier release did not count that, and left both empty.
    """

    accuracy: list[list[float]]
    num_positions: int
    temperature: float = 0.0
    tokens_per_step: list[float] = field(default_factory=list)
    growth: list[list[int]] = field(default_factory=list)
    path_accuracy: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.growth) != len(self.path_accuracy):
            raise ValueError(
                f"growth lists {len(self.growth)} paths, path_accuracy {len(self.path_accuracy)}; each needs one"
            )


@strict
@dataclass(frozen=True, kw_only=True)
class AdapterRef:
    """The base model and the digest of the `adapter/` folder that together make the heads' backbone."""

    base: BackboneRef
    digest: str


@strict
@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """medusa.json. `trees` is the ladder as lists of paths; `training` tells what made the heads. `backbone` is what
    the heads run on: with an `adapter`, the base model with the adapter merged in."""

    heads: HeadsConfig
    backbone: BackboneRef
    schema_version: int = SCHEMA_VERSION
    head_kind: Literal["medusa", "hydra"] = "medusa"
    adapter: AdapterRef | None = None
    calibration: Calibration | None = None
    trees: list[list[list[int]]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        largest = max(self.trees, key=len, default=[])  # what an engine makes room for
        growth = self.calibration.growth if self.calibration and self.trees else []
        if strange := [path for path in growth if path not in largest]:
            raise ValueError(f"growth lists {strange[:3]}, which the largest of the trees does not have")

    @classmethod
    def of(cls, heads: DraftHeads, backbone: BackboneRef, **others: Any) -> CheckpointMeta:
        """The meta data of these heads, with their kind and its schema version."""
        version = SCHEMA_VERSIONS[heads.kind]
        return cls(heads=heads.config, backbone=backbone, schema_version=version, head_kind=heads.kind, **others)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, verified to hold finite weights."""

    heads: DraftHeads
    meta: CheckpointMeta

    @property
    def config(self) -> HeadsConfig:
        return self.meta.heads

    def on(self, backbone: Backbone) -> Checkpoint:
        """With the heads on the backbone's device, in its dtype. Whether the two belong together is not looked at."""
        return dataclasses.replace(self, heads=self.heads.to(backbone.device, backbone.dtype))


def save_checkpoint(
    directory: Path,
    heads: DraftHeads,
    meta: CheckpointMeta,
    *,
    readme: str | None = None,
    adapter: Path | None = None,
) -> None:
    """Writes the folder atomically; an existing folder is an error, since checkpoints are never changed in place.

    `adapter` is the folder of peft's files that `meta.adapter` speaks of.
    """
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory} already exists; checkpoints are not overwritten, choose another folder")
    if heads.config != meta.heads:
        raise CheckpointError(f"heads are {heads.config}, but the meta data says {meta.heads}")
    if (heads.kind, SCHEMA_VERSIONS[heads.kind]) != (meta.head_kind, meta.schema_version):
        raise CheckpointError(
            f"{heads.kind} heads with meta data of {meta.head_kind} heads, schema {meta.schema_version}"
        )
    if (adapter is None) != (meta.adapter is None):
        raise CheckpointError(f"the adapter's folder is {adapter}, but the meta data says {meta.adapter}")
    with whole_folder(directory) as folder:
        prefix = _key_prefix(meta)
        tensors = {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_loader_config(meta), indent=2) + "\n")
        (folder / META).write_text(json.dumps(to_dict(meta), indent=2) + "\n")
        (folder / "README.md").write_text(readme or _default_readme(meta))
        if adapter is not None:
            shutil.copytree(adapter, folder / ADAPTER)


def load_checkpoint(directory: Path, backbone: Backbone | None = None) -> Checkpoint:
    """Reads and verifies a checkpoint; with a backbone, also that the two belong together.

    Raises CheckpointError (missing or broken files, pickle, NaN) or CheckpointMismatchError (another backbone).
    """
    directory = Path(directory)
    meta = read_meta(directory)
    if backbone is not None:
        check_pair(meta, backbone)
    tensors = _read_weights(directory)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name} of {directory / WEIGHTS} holds NaN or infinite values; train again")
    try:
        heads = _heads_of(meta, tensors)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} does not fit its {META}: {error}") from error
    checkpoint = Checkpoint(heads.eval().requires_grad_(False), meta)
    return checkpoint if backbone is None else checkpoint.on(backbone)


def read_meta(directory: Path) -> CheckpointMeta:
    """medusa.json, checked."""
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint folder at {directory}")
    pickles = sorted(file.name for file in directory.rglob("*") if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} holds pickle files {pickles}, which can run code when loaded; only safetensors are read"
        )
    if not (directory / META).is_file():
        raise CheckpointError(f"{directory} has no {META}; it is not a Medusa checkpoint of this project")
    try:
        content = json.loads((directory / META).read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{directory / META} is not JSON: {error}") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found not in SCHEMA_VERSIONS.values():
        known = ", ".join(f"{version} ({name} heads)" for name, version in SCHEMA_VERSIONS.items())
        raise CheckpointError(f"{directory / META} has schema version {found}; this release reads {known}")
    try:
        meta = validate(CheckpointMeta, content, source=str(directory / META))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if found != SCHEMA_VERSIONS[meta.head_kind]:
        needed = SCHEMA_VERSIONS[meta.head_kind]
        raise CheckpointError(f"{directory / META} has schema version {found}; {meta.head_kind} heads have {needed}")
    if meta.adapter is not None:
        _check_adapter(directory / ADAPTER, meta.adapter)
    return meta


def update_meta(directory: Path, **changes: Any) -> CheckpointMeta:
    """Rewrites fields of medusa.json atomically (calibration and trees come after training)."""
    meta = dataclasses.replace(read_meta(directory), **changes)
    partial = directory / f".{META}.partial"
    partial.write_text(json.dumps(to_dict(meta), indent=2) + "\n")
    to_disk(partial)
    partial.rename(directory / META)
    return meta


def check_pair(meta: CheckpointMeta, backbone: Backbone, tokenizer_digest: str | None = None) -> None:
    """Raises CheckpointMismatchError unless the heads were trained on exactly these weights, and, where both sides
    name it, with this tokenizer and chat template."""
    if meta.backbone.weights_digest != backbone.digest:
        raise CheckpointMismatchError(
            f"these heads belong to {meta.backbone.name} ({meta.backbone.weights_digest}), but the backbone is "
            f"{backbone.name} ({backbone.digest}); heads guess well only on the weights they were trained on"
        )
    trained = meta.backbone.tokenizer_digest
    if trained is not None and tokenizer_digest is not None and trained != tokenizer_digest:
        raise CheckpointMismatchError(
            f"these heads were trained with the tokenizer and chat template {trained}, but {backbone.name} comes with "
            f"{tokenizer_digest}; serve them with the tokenizer they were trained with"
        )


def _check_adapter(folder: Path, reference: AdapterRef) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing, without which {reference.base.name} is not the heads' backbone")
    if (found := directory_digest(folder)) != reference.digest:
        raise CheckpointError(f"{folder} was changed: its digest is {found}, {META} says {reference.digest}")


def _key_prefix(meta: CheckpointMeta) -> str:
    return "" if meta.head_kind == "medusa" else f"{meta.head_kind}."


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(directory / WEIGHTS)
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} has no {WEIGHTS}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{directory / WEIGHTS} is damaged: {error}") from error


def _heads_of(meta: CheckpointMeta, tensors: dict[str, torch.Tensor]) -> DraftHeads:
    prefix = _key_prefix(meta)
    if foreign := sorted(name for name in tensors if not name.startswith(prefix)):
        raise ValueError(f"keys of {meta.head_kind} heads begin with {prefix!r}, got {foreign[:3]}")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    with torch.device("meta"):  # no memory and no random numbers for weights that are read
        heads = HEADS[meta.head_kind](meta.heads, tensors.get("token_map"))
    expected, found = set(heads.state_dict()), set(tensors)
    if expected != found:
        raise ValueError(f"missing {sorted(expected - found)}, unexpected {sorted(found - expected)}")
    heads = heads.to(tensors["0.0.linear.weight"].dtype).to_empty(device="cpu")
    heads.load_state_dict(tensors)
    return heads


def _loader_config(meta: CheckpointMeta) -> dict[str, Any]:
    """The superset of keys that other loaders read. Every "num…heads" must agree: vLLM folds them into one. No key
    "architectures": TGI takes a folder with one for another kind of speculator and loads no heads."""
    heads = meta.heads
    return {
        "model_type": meta.head_kind,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "num_heads": heads.num_heads,
        "num_medusa_heads": heads.num_heads,
        "num_hidden_layers": heads.num_layers,
        "medusa_fc_bias": True,
        "truncated_vocab_size": heads.head_vocab_size,
        "original_lm_head": heads.vocabulary == "shared",
        "base_model_name_or_path": meta.backbone.name,
    }


def _default_readme(meta: CheckpointMeta) -> str:
    return (
        f"# {meta.head_kind.capitalize()} heads for {meta.backbone.name}\n\n"
        f"{meta.heads.num_heads} heads of {meta.heads.num_layers} residual block(s), {meta.heads.vocabulary} "
        f"vocabulary. They guess tokens ahead for the backbone with weights\n`{meta.backbone.weights_digest}` "
        "and no other.\n"
    )
