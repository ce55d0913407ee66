"""Versions of Medusa checkpoints in the MLflow registry, and the aliases that say which one serves.

A version's source is the checkpoint folder as plain artifacts of a run (no pyfunc, no code); the tag
`medusa.digest` pins its content. Aliases: `champion` serves, `previous` is what `rollback` returns to,
`challenger` is the newest version that is not champion.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.digests import directory_digest
from registry.connection import connect, reaching, shown
from registry.gate import GateRefused, GateResult

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
DIGEST_TAG = "medusa.digest"
GATE_TAG = "medusa.gate"  # "passed", "refused", or "writing" while the tags below change
GATE_REASONS_TAG = "medusa.gate.reasons"
GATE_AGAINST_TAG = "medusa.gate.champion_digest"  # the champion that it was measured against, or "none"
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


class RegistryError(RuntimeError):
    """The registry does not hold what was asked for; the message says what it holds."""


class DigestMismatchError(RegistryError):
    """Downloaded files are not those that were registered; the message holds both digests."""


@dataclass(frozen=True)
class VersionRef:
    """One version, pinned: `uri` is models:/NAME/VERSION, `digest` that of the checkpoint folder."""

    name: str
    version: int
    digest: str
    uri: str
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)


class Registry:
    """The model registry of one MLflow. Raises MlflowUnavailable whenever it cannot be reached."""

    def __init__(self, tracking_uri: str) -> None:
        self.uri = tracking_uri
        self._client = connect(tracking_uri)

    def register(self, name: str, checkpoint_dir: Path, tags: Mapping[str, Any], run_id: str) -> VersionRef:
        """A version whose source is `checkpoint_dir`, stored with run `run_id`.

        Registering the same content again returns the version there is, with its tags brought up to date.
        """
        digest = directory_digest(checkpoint_dir)
        texts = {key: str(value) for key, value in tags.items()} | {DIGEST_TAG: digest}
        found = self.find(name, digest)
        if found is not None:
            return self.tag(found, texts)
        with self._asking(f"register {name}"):
            self._create_model(name)
            folder = f"checkpoint-{digest.removeprefix('sha256:')[:16]}"
            self._client.log_artifacts(run_id, str(checkpoint_dir), folder)
            source = f"runs:/{run_id}/{folder}"
            return _ref(self._client.create_model_version(name, source=source, run_id=run_id, tags=texts))

    def find(self, name: str, digest: str) -> VersionRef | None:
        """The version of `name` with this content, the oldest if there are several."""
        with self._asking(f"search {name}"):
            query = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
            found = [_ref(version) for version in self._client.search_model_versions(query)]
        return min(found, key=lambda ref: ref.version, default=None)

    def resolve(self, uri: str) -> VersionRef:
        """Pins models:/NAME@ALIAS or models:/NAME/VERSION to a version and its digest."""
        match = _MODEL_URI.fullmatch(uri)
        if match is None:
            raise RegistryError(f"{uri!r} is no model: expected models:/NAME@champion or models:/NAME/3")
        name, version = match["name"], match["version"]
        if match["alias"]:
            aliases = self.aliases(name)
            if match["alias"] not in aliases:
                held = ", ".join(f"{alias} (version {number})" for alias, number in aliases.items())
                raise RegistryError(f"{name} has no alias {match['alias']}; it has {held or 'none'}")
            version = aliases[match["alias"]]
        with self._asking(f"read {uri}"):
            return _ref(self._client.get_model_version(name, str(version)))

    def download(self, ref: VersionRef, directory: Path) -> Path:
        """Makes `directory` the version's checkpoint folder, verified; a verified one is kept as it is."""
        directory = Path(directory)
        if directory.exists():
            _verify(directory, ref)
            return directory
        partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir(parents=True)
        try:
            with self._asking(f"download {ref.uri}"):
                source = self._client.get_model_version(ref.name, str(ref.version)).source
                run_id, _, folder = source.removeprefix("runs:/").partition("/")
                fetched = Path(self._client.download_artifacts(run_id, folder, str(partial)))
            _verify(fetched, ref)
            fetched.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return directory

    def aliases(self, name: str) -> dict[str, int]:
        with self._asking(f"read {name}"):
            held = self._client.get_registered_model(name).aliases
        return {alias: int(version) for alias, version in held.items()}

    def champion(self, name: str) -> VersionRef | None:
        """The version that serves; None while there is none, or no model of that name."""
        with reaching(self.uri):
            models = self._client.search_registered_models(f"name = '{name}'")
        if not models or CHAMPION not in models[0].aliases:
            return None
        return self.resolve(f"models:/{name}@{CHAMPION}")

    def tag(self, ref: VersionRef, tags: Mapping[str, Any]) -> VersionRef:
        """Writes, in order, the tags that differ from those of `ref`; returns the version as it now is."""
        with self._asking(f"tag {ref.uri}"):
            for key, value in tags.items():
                if ref.tags.get(key) != str(value):
                    self._client.set_model_version_tag(ref.name, str(ref.version), key, str(value))
        return self.resolve(ref.uri)

    def record_gate(self, ref: VersionRef, result: GateResult, champion_digest: str | None) -> VersionRef:
        """Tags the version with what the gate said, and against which champion (None: there was none)."""
        tags = {
            GATE_TAG: "writing",  # so that a kill between two tags never leaves an old pass standing
            GATE_AGAINST_TAG: champion_digest or "none",
            GATE_REASONS_TAG: "; ".join(result.reasons) or "none",
        }
        marked = self.tag(ref, tags)
        return self.tag(marked, {GATE_TAG: "passed" if result.passed else "refused"})

    def set_challenger(self, ref: VersionRef) -> None:
        self._set_alias(ref.name, CHALLENGER, ref.version)

    def promote(self, name: str, version: int | str) -> VersionRef:
        """Makes a version that passed the gate the champion, and the champion so far `previous`.

        `previous` is written first: after a kill between the two the old champion still serves, and
        promoting again completes the move. The champion itself stays as it is. GateRefused unless the version
        passed the gate against the champion that it replaces.
        """
        candidate, champion = self.resolve(f"models:/{name}/{version}"), self.champion(name)
        if champion != candidate:
            _require_gate(candidate, champion)
            if champion is not None:
                self._set_alias(name, PREVIOUS, champion.version)
            self._set_alias(name, CHAMPION, candidate.version)
        if self.aliases(name).get(CHALLENGER) == candidate.version:
            with self._asking(f"take {CHALLENGER} from {candidate.uri}"):
                self._client.delete_registered_model_alias(name, CHALLENGER)
        return candidate

    def rollback(self, name: str) -> VersionRef:
        """Swaps `champion` and `previous`, without the gate: `previous` has served before.

        `champion` is written first: after a kill between the two the rollback has taken effect.
        """
        aliases = self.aliases(name)
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if champion is None or previous is None or champion == previous:
            held = f"champion {champion or 'none'}, previous {previous or 'none'}"
            raise RegistryError(f"nothing to roll back to: {name} has {held}")
        self._set_alias(name, CHAMPION, previous)
        self._set_alias(name, PREVIOUS, champion)
        return self.resolve(f"models:/{name}/{previous}")

    def _set_alias(self, name: str, alias: str, version: int) -> None:
        with self._asking(f"set {alias} of {name} to version {version}"):
            self._client.set_registered_model_alias(name, alias, str(version))

    def _create_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            with reaching(self.uri):
                yield
        except MlflowException as error:
            raise RegistryError(f"cannot {what} in MLflow at {shown(self.uri)}: {error.message}") from error


def _ref(version: ModelVersion) -> VersionRef:
    uri = f"models:/{version.name}/{version.version}"
    if DIGEST_TAG not in version.tags:
        raise RegistryError(f"{uri} has no tag {DIGEST_TAG}: it was not registered by `medusa register`")
    return VersionRef(version.name, int(version.version), version.tags[DIGEST_TAG], uri, dict(version.tags))


def _verify(directory: Path, ref: VersionRef) -> None:
    digest = directory_digest(directory)
    if digest != ref.digest:
        raise DigestMismatchError(
            f"{directory} holds {digest}, but {ref.uri} was registered as {ref.digest}; "
            "remove the folder and download again, or register the checkpoint anew"
        )


def _require_gate(candidate: VersionRef, champion: VersionRef | None) -> None:
    gate, against = candidate.tags.get(GATE_TAG), candidate.tags.get(GATE_AGAINST_TAG)
    if gate != "passed":
        reasons = candidate.tags.get(GATE_REASONS_TAG) if gate == "refused" else None
        raise GateRefused(candidate.uri, (reasons or "it has no result of the gate; run `medusa register`",))
    if against != (champion.digest if champion else "none"):
        current = f"champion is now {champion.uri} ({champion.digest})" if champion else "there is no champion"
        raise GateRefused(candidate.uri, (f"it passed against {against}, but {current}; evaluate again",))
