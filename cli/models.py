"""Which files to serve: a backbone folder and, from a folder or the registry, its heads, pinned by digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medusa.checkpoint import read_meta
from medusa.config import ConfigError
from registry.versions import Registry

DEFAULT_BACKBONE = "models/chat-8m"
DOWNLOADS = Path("runs/versions")  # folders named by digest: a version is fetched once


@dataclass(frozen=True)
class Served:
    """`version` and `digest` are set for heads from the registry."""

    backbone: str
    heads: str | None = None
    version: str | None = None
    digest: str | None = None

    @property
    def described(self) -> str:
        if self.heads is None:
            return "none (plain decoding)"
        return f"version {self.version} ({self.digest})" if self.version else self.heads


def served_model(model: str, heads: str | None, backbone: str | None, tracking_uri: str | None) -> Served:
    """Resolves what the command line asks for. Raises ConfigError for a combination that makes no sense, and the
    registry's errors."""
    if not model.startswith("models:/"):
        return Served(model, heads)
    if heads is not None:
        raise ConfigError(f"--heads {heads} and --model {model} both name heads; give one of them")
    if tracking_uri is None:
        raise ConfigError(f"--model {model} is in a registry: give --tracking-uri or MLFLOW_TRACKING_URI")
    registry = Registry(tracking_uri)
    ref = registry.resolve(model)
    folder = registry.download(ref, DOWNLOADS / ref.digest.removeprefix("sha256:")[:16])
    return Served(backbone or _backbone_of(folder), str(folder), str(ref.version), ref.digest)


def _backbone_of(heads: Path) -> str:
    """The backbone that the checkpoint names: a folder below models/, or a hub id."""
    name = read_meta(heads).backbone.name
    shipped = Path("models") / name
    if shipped.is_dir():
        return str(shipped)
    if "/" in name:
        return name
    raise ConfigError(f"these heads belong to {name}, which is no folder in models/; give its folder with --backbone")
