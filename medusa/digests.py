"""Digests that name content: of one file, and of a folder of them."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Hex sha256 of the file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_digest(directory: Path) -> str:
    """sha256 over one line for each file below `directory`, in path order: its relative path and its own sha256."""
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(directory).rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(directory).as_posix()} {file_sha256(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"
