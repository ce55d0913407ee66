"""A backbone's folder, and the digest that names its weights: at once, or by a thread while they are loaded."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

# A thread that hashes asks for the interpreter twice a block, and waits for it where others compute: few blocks.
BLOCK_BYTES = 1 << 25


class ModelNotFoundError(FileNotFoundError):
    """There is no model where one was named, or it has no safetensors."""


def model_directory(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: the path itself, or the hub snapshot of an id (downloaded when missing)."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or str(name).startswith("."):
        raise ModelNotFoundError(f"no model folder at {name}; give one with config.json, or a hub id like org/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))


def weights_digest(directory: Path) -> str:
    """sha256 over the folder's safetensors files, in name order: one stream, so that only one thread can hash it."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelNotFoundError(f"{directory} holds no .safetensors file; convert the model's weights to safetensors")
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                digest.update(block[:count])
    return f"sha256:{digest.hexdigest()}"


class Hashing:
    """`weights_digest` of a folder, by a thread of its own that begins now and holds up no exit of the process.

    `seconds` is what it took, once it has ended; `waited_s` what callers of `result` had to wait for it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seconds = self.waited_s = 0.0
        self._digest: Future[str] = Future()
        Thread(target=self._hash, name="medusa-digest", daemon=True).start()

    @property
    def is_done(self) -> bool:
        return self._digest.done()

    def result(self) -> str:
        """The digest, waited for. Raises what reading the weights raised."""
        start = time.perf_counter()
        try:
            return self._digest.result()
        finally:
            self.waited_s += time.perf_counter() - start

    def _hash(self) -> None:
        start = time.perf_counter()
        try:
            digest = weights_digest(self.directory)
        except BaseException as error:  # noqa: BLE001 (whatever it was, who asks for the digest gets it)
            self._digest.set_exception(error)
            return
        self.seconds = time.perf_counter() - start
        self._digest.set_result(digest)
