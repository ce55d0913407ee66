"""A step's `manifest.json`: what it names, how it is written, and that what it names is still there."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medusa.config import canonical_json
from medusa.digests import file_sha256
from medusa.folders import to_disk

MANIFEST = "manifest.json"
_INTERNAL = (MANIFEST, "lease.", "tracking.", ".")  # beginnings of the names in a step folder that are no output


class DamagedStepError(RuntimeError):
    """A step that was complete lacks files or holds changed ones; the message says which, and the remedy."""


def read_manifest(path: Path, key: str | None) -> dict[str, Any] | None:
    """Of the step folder `path`; None while there is none. DamagedStepError for one that was changed, is of another
    key, or names files that are not there in their size."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise _damaged(path, f"{MANIFEST} is not JSON ({error})") from error
    content = {name: value for name, value in manifest.items() if name != "digest"}
    if manifest.get("digest") != content_digest(content):
        raise _damaged(path, f"{MANIFEST} does not match its own digest: it was edited or cut off")
    if key is not None and manifest["key"] != key:
        raise _damaged(path, f"{MANIFEST} belongs to the key {manifest['key']}, not {key}")
    for name, output in manifest["outputs"].items():
        _check_size(path, name, output["bytes"])
    return manifest


def _check_size(path: Path, name: str, size: int) -> None:
    try:
        found = (path / name).stat().st_size
    except FileNotFoundError:
        raise _damaged(path, f"{name} is missing") from None
    if found != size:
        raise _damaged(path, f"{name} has {found} bytes, but was committed with {size}")


def _damaged(path: Path, what: str) -> DamagedStepError:
    return DamagedStepError(f"the complete step {path} is damaged: {what}; remove the folder to make it again")


def describe(path: Path, outputs: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Digest and size of each file of these outputs (None: of all there is, but for hidden and internal files), once
    their bytes are on the disk."""
    files = {file.relative_to(path).as_posix(): file for file in _output_files(path, outputs)}
    return {name: {"sha256": _hash_to_disk(files[name]), "bytes": files[name].stat().st_size} for name in sorted(files)}


def _output_files(path: Path, outputs: Sequence[str] | None) -> Iterator[Path]:
    if outputs is None:
        outputs = [entry.name for entry in path.iterdir() if not entry.name.startswith(_INTERNAL)]
    for name in outputs:
        target = path / name
        if not target.exists():
            raise FileNotFoundError(f"{name} was to be committed, but {target} does not exist")
        yield from (file for file in target.rglob("*") if file.is_file()) if target.is_dir() else [target]


def _hash_to_disk(file: Path) -> str:
    """The file's sha256, once its bytes are on the disk: a manifest must not outlive what it names."""
    to_disk(file)
    return file_sha256(file)


def manifest_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)


def publish(path: Path, text: str) -> None:
    """Writes the file in one atomic move, to the disk."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    to_disk(path.parent)


def plain(value: Any) -> Any:
    """As it will be read back from JSON, so that a digest made now equals one made then."""
    return json.loads(canonical_json(value))


def content_digest(content: Any) -> str:
    """Of whatever JSON can say, in one canonical form."""
    return f"sha256:{hashlib.sha256(canonical_json(content).encode()).hexdigest()}"
