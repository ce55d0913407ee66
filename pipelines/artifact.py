"""Content-addressed, resumable steps: `<root>/<step>/<key>/`, with `manifest.json` written last.

The key is a digest of everything that decides a step's output, so a complete manifest means that the work is
done, whoever did it. An incomplete folder is kept as it is and resumed.

    with open_step(root, "distill", STEP_VERSION, config, {"prompts": digest}) as step_dir:
        if step_dir.complete:
            return step_dir.output
        ...                                   # write files below step_dir.path
        return step_dir.commit({"counts": {"written": 800}}, outputs=["table"])

What a step needs from storage is small: a lease (registry/lease.py) and one atomic move (pipelines/manifest.py).
Within `mirrored_to` an object store is the truth, and the folder here its scratch copy (pipelines/mirror.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medusa.config import canonical_json
from pipelines.manifest import MANIFEST, content_digest, describe, manifest_text, plain, publish, read_manifest
from pipelines.mirror import Mirror
from registry.lease import DEFAULT_TTL_S, Lease
from registry.object_store import ObjectFolder

FOLDER_KEY_LENGTH = 16
_only_complete: ContextVar[bool] = ContextVar("only_complete", default=False)
_store: ContextVar[ObjectFolder | None] = ContextVar("store", default=None)
_OURS = ("step", "version", "key", "config", "inputs", "outputs", "created", "digest")


class StepMissingError(FileNotFoundError):
    """A step was to be complete already, and is not."""


def step_key(step: str, version: int, config: Any, inputs: Mapping[str, str]) -> str:
    """sha256 (hex) of all that decides a step's output; its first 16 characters name the folder."""
    text = canonical_json({"step": step, "version": version, "config": config, "inputs": dict(inputs)})
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class StepOutput:
    """A complete step. `digest` names the content of its outputs: what later steps take as input digest."""

    step: str
    key: str
    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        return content_digest(self.manifest["outputs"])


@dataclass
class StepDir:
    """A step's folder while it is open: complete (then read only), or held by this process."""

    step: str
    key: str
    path: Path
    identity: dict[str, Any]
    manifest: dict[str, Any] | None = None
    lease: Lease | None = None
    mirror: Mirror | None = None

    @property
    def complete(self) -> bool:
        return self.manifest is not None

    @property
    def output(self) -> StepOutput:
        if self.manifest is None:
            raise ValueError(f"{self.path} is not complete yet: commit it first")
        return StepOutput(self.step, self.key, self.path, self.manifest)

    def ensure_held(self) -> None:
        """LeaseLostError once another process has taken the step over: long work may stop early."""
        with self._held().while_held():
            pass

    def commit(self, manifest: Mapping[str, Any] | None = None, *, outputs: Sequence[str] | None = None) -> StepOutput:
        """Completes the step: digests `outputs` and publishes the manifest in one atomic move.

        `manifest` holds what the step tells (`counts`, ...). `outputs` are files or folders relative to the
        step's; by default all there is, but for hidden and internal files. LeaseLostError when another
        process has taken over.
        """
        told = dict(manifest or {})
        taken = sorted(set(told) & set(_OURS))
        if taken:
            raise ValueError(f"{taken} are written by commit itself; outputs are given as outputs=[...]")
        complete = {**plain(told), **self.identity, "outputs": describe(self.path, outputs)}
        complete.setdefault("counts", {})
        complete["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        complete["digest"] = content_digest(complete)
        lease = self._held()
        with lease.while_held():
            if self.mirror is not None:
                self.mirror.publish(complete, manifest_text(complete))
            publish(self.path / MANIFEST, manifest_text(complete))
        self.manifest = complete
        return self.output

    def _held(self) -> Lease:
        if self.lease is None:
            raise ValueError(f"{self.path} is complete already and read only")
        return self.lease


@contextmanager
def open_step(
    root: Path,
    step: str,
    version: int,
    config: Any,
    inputs: Mapping[str, str],
    *,
    lease_ttl_s: float = DEFAULT_TTL_S,
) -> Iterator[StepDir]:
    """The step's folder: complete, or held under a lease until the block ends.

    LeaseHeldError while another process works on the same key; DamagedStepError when a complete step's files
    are not those that it committed (compared by size: reading all of them would cost what the skip saves).
    """
    key = step_key(step, version, config, inputs)
    path = Path(root) / step / key[:FOLDER_KEY_LENGTH]
    identity = plain({"step": step, "version": version, "key": key, "config": config, "inputs": dict(inputs)})
    mirror = _mirror(step, path)
    if mirror is not None:
        mirror.fetch_complete()
    step_dir = StepDir(step, key, path, identity, read_manifest(path, key), mirror=mirror)
    if step_dir.complete:
        yield step_dir
        return
    if _only_complete.get():
        raise StepMissingError(
            f"step {step} is not complete for this configuration (no {MANIFEST} in {path}); run it first, with "
            f"`--from {step}` or without --from"
        )
    path.mkdir(parents=True, exist_ok=True)
    lease = Lease(path, ttl_s=lease_ttl_s) if mirror is None else mirror.lease(lease_ttl_s)
    lease.acquire()
    try:
        if mirror is not None:
            mirror.fetch_complete()
        step_dir.manifest = read_manifest(path, key)  # the last holder may just have completed it
        step_dir.lease = None if step_dir.complete else lease
        with _kept_up_to_date(step_dir):
            yield step_dir
    finally:
        lease.release()


@contextmanager
def _kept_up_to_date(step_dir: StepDir) -> Iterator[None]:
    if step_dir.mirror is None or step_dir.complete:
        yield
        return
    step_dir.mirror.fetch_work()
    with step_dir.mirror.pushing():
        yield


@contextmanager
def mirrored_to(store: ObjectFolder | None) -> Iterator[None]:
    """Within this block steps are kept in `store`, below the same names as below `root`; None: only below `root`."""
    token = _store.set(store)
    try:
        yield
    finally:
        _store.reset(token)


def _mirror(step: str, path: Path) -> Mirror | None:
    store = _store.get()
    return None if store is None else Mirror(store.child(f"{step}/{path.name}"), path)


@contextmanager
def only_complete_steps() -> Iterator[None]:
    """Within this block, opening a step that is not complete is a StepMissingError instead of work."""
    token = _only_complete.set(True)
    try:
        yield
    finally:
        _only_complete.reset(token)


def read_output(path: Path) -> StepOutput | None:
    """The complete step in folder `path`, verified by size; None while it is not complete."""
    manifest = read_manifest(Path(path), None)
    return None if manifest is None else StepOutput(manifest["step"], manifest["key"], Path(path), manifest)
