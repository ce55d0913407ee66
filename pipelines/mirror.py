"""A step's folder in an object store, worked on in a local scratch folder.

    <root>/<step>/<key>/lease.json             who works on it (registry/lease.py, conditional PUT)
    <root>/<step>/<key>/work/...               the files of an unfinished step, brought up to date every few seconds
    <root>/<step>/<key>/objects/<sha256>       the outputs, by content
    <root>/<step>/<key>/manifest.json          one final PUT, on condition that there is none: the step is complete

Outputs are named by their content, so a holder that lost its lease without noticing can overwrite nothing: at most it
uploads objects that no manifest names. Whoever resumes the step, on whatever machine, starts from `work/`.

The scratch folder must be one that all of the step's processes see: one node, or a file system shared by the nodes.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.manifest import MANIFEST
from registry.lease import LOCK_FILE, Lease, LeaseLostError, ObjectRecord, TryAgain
from registry.object_store import ObjectFolder, ObjectStoreUnavailable

logger = logging.getLogger(__name__)

WORK, OBJECTS = "work", "objects"
PUSH_EVERY_S = 30.0


class StorageUnavailable(TryAgain):
    """The object store cannot be reached; what is on this machine is kept."""


class Mirror:
    """`path` is the local folder, `remote` the step's in the store."""

    def __init__(self, remote: ObjectFolder, path: Path, *, push_every_s: float = PUSH_EVERY_S) -> None:
        self._remote, self._path, self._push_every_s = remote, path, push_every_s
        self._sent: dict[str, tuple[int, int]] = {}  # name: (size, mtime) of what work/ holds
        self._pushing = threading.Lock()

    def lease(self, ttl_s: float) -> Lease:
        return Lease(ObjectRecord(self._remote), ttl_s=ttl_s)

    def fetch_complete(self) -> None:
        """Brings a complete step here; where the store has none, a local manifest does not count either."""
        with _or_try_again():
            found = self._remote.read(MANIFEST)
            if found is None:
                (self._path / MANIFEST).unlink(missing_ok=True)
                return
            for name, output in json.loads(found.content)["outputs"].items():
                target = self._path / name
                if not (target.is_file() and target.stat().st_size == output["bytes"]):
                    self._remote.download(f"{OBJECTS}/{_object_name(output)}", target)
        self._path.mkdir(parents=True, exist_ok=True)
        partial = self._path / f".{MANIFEST}.partial"
        partial.write_bytes(found.content)
        partial.replace(self._path / MANIFEST)

    def fetch_work(self) -> None:
        """What the last holder had done, where it is not here already."""
        with _or_try_again():
            for key in self._remote.names():
                folder, _, name = key.partition("/")
                target = self._path / name
                if folder == WORK and not target.exists():
                    self._remote.download(key, target)

    @contextmanager
    def pushing(self) -> Iterator[None]:
        """Keeps work/ up to date until the block ends, however it ends."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(self._push_every_s):
                self._push_or_warn()

        thread = threading.Thread(target=run, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if not (self._path / MANIFEST).exists():
                self._push_or_warn()

    def push_work(self) -> None:
        """Uploads what is new or changed, and removes what is gone."""
        with self._pushing:
            here = {name: file for name, file in _work_files(self._path)}
            for name, file in here.items():
                try:
                    state = (file.stat().st_size, file.stat().st_mtime_ns)
                    if self._sent.get(name) != state:
                        self._remote.upload(file, f"{WORK}/{name}")
                        self._sent[name] = state
                except FileNotFoundError:
                    continue  # removed or renamed meanwhile: the next round sees it
            for name in set(self._sent) - set(here):
                self._remote.delete(f"{WORK}/{name}")
                del self._sent[name]

    def publish(self, manifest: Mapping[str, Any], text: str) -> None:
        """The outputs, then the manifest; LeaseLostError where another holder has completed the step before."""
        with _or_try_again():
            for name, output in manifest["outputs"].items():
                target = f"{OBJECTS}/{_object_name(output)}"
                if not self._remote.exists(target):
                    self._remote.upload(self._path / name, target)
            if not self._remote.write_if(MANIFEST, text.encode(), etag=None):
                raise LeaseLostError(f"{self._remote.uri} was completed by another process; this result is dropped")
            for key in list(self._remote.names()):
                if key.startswith(f"{WORK}/"):
                    self._remote.delete(key)

    def _push_or_warn(self) -> None:
        try:
            self.push_work()
        except ObjectStoreUnavailable as error:
            logger.warning("%s. The step goes on; it is sent when the store is back", error)


def _work_files(path: Path) -> Iterator[tuple[str, Path]]:
    """Hidden files and folders are unfinished or of this machine alone."""
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts) and name.name != LOCK_FILE:
            yield name.as_posix(), file


def _object_name(output: Mapping[str, Any]) -> str:
    return str(output["sha256"]).removeprefix("sha256:")


@contextmanager
def _or_try_again() -> Iterator[None]:
    try:
        yield
    except ObjectStoreUnavailable as error:
        raise StorageUnavailable(f"{error}. What is done is kept; run the same command when it is back") from error
