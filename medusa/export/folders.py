"""A folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medusa.checkpoint import CheckpointError


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """A folder to write into, which is `destination` after the block; an error in the block leaves nothing.

    CheckpointError when `destination` is there already.
    """
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination} already exists; nothing is overwritten, choose another folder")
    partial = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _to_disk(path)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _to_disk(destination.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
