from __future__ import annotations

from pathlib import Path

import pytest

from medusa.digests import directory_digest
from registry.connection import MlflowUnavailable, shown
from registry.gate import GateRefused, GateResult
from registry.versions import DigestMismatchError, Registry, RegistryError, VersionRef

NAME = "medusa-tiny"


@pytest.fixture
def registry(mlflow_uri: str) -> Registry:
    return Registry(mlflow_uri)


@pytest.fixture
def add(registry: Registry, make_checkpoint, run_id: str):
    """Registers a checkpoint that passed the gate against the champion of the moment."""

    def add(content: str) -> VersionRef:
        ref = registry.register(NAME, make_checkpoint(content), {"medusa.tree_size": 16}, run_id)
        champion = registry.champion(NAME)
        return registry.record_gate(ref, GateResult(True), champion.digest if champion else None)

    return add


def test_a_digest_names_content_and_paths(make_checkpoint):
    folder = make_checkpoint("a")
    before = directory_digest(folder)
    (folder / "adapter" / "weights.safetensors").rename(folder / "adapter" / "other.safetensors")
    assert directory_digest(folder) != before


def test_a_checkpoint_comes_back_as_it_went_in(registry: Registry, make_checkpoint, run_id, tmp_path: Path):
    checkpoint = make_checkpoint("a")
    ref = registry.register(NAME, checkpoint, {"medusa.tree_size": 16}, run_id)
    assert ref == VersionRef(NAME, 1, directory_digest(checkpoint), f"models:/{NAME}/1")
    assert ref.tags["medusa.tree_size"] == "16"
    assert registry.resolve(f"models:/{NAME}/1") == ref

    target = tmp_path / "cache" / "a"
    assert registry.download(ref, target) == target
    assert directory_digest(target) == ref.digest
    assert registry.download(ref, target) == target  # kept, verified again
    assert list(target.parent.iterdir()) == [target]


def test_damaged_files_are_refused_with_both_digests(registry: Registry, add, tmp_path: Path):
    ref = add("a")
    [stored] = (tmp_path / "mlruns").rglob("weights.safetensors")
    stored.write_bytes(b"changed in the store")
    with pytest.raises(DigestMismatchError, match=ref.digest) as error:
        registry.download(ref, tmp_path / "cache" / "a")
    assert str(error.value).count("sha256:") == 2
    assert list((tmp_path / "cache").iterdir()) == []

    (tmp_path / "cache" / "b").mkdir()
    with pytest.raises(DigestMismatchError, match="remove the folder"):
        registry.download(ref, tmp_path / "cache" / "b")


def test_the_same_content_is_one_version(registry: Registry, make_checkpoint, run_id):
    checkpoint = make_checkpoint("a")
    first = registry.register(NAME, checkpoint, {"medusa.speedup": "1.5"}, run_id)
    again = registry.register(NAME, checkpoint, {"medusa.speedup": "1.6"}, run_id)
    assert again == first and again.tags["medusa.speedup"] == "1.6"
    assert registry.register(NAME, make_checkpoint("b"), {}, run_id).version == 2


def test_promotion_keeps_the_previous_champion_and_rollback_returns_to_it(registry: Registry, add):
    assert registry.champion(NAME) is None
    first = add("a")
    registry.set_challenger(first)
    registry.promote(NAME, first.version)
    assert registry.aliases(NAME) == {"champion": 1}

    second = add("b")
    registry.promote(NAME, str(second.version))
    assert registry.aliases(NAME) == {"champion": 2, "previous": 1}
    assert registry.resolve(f"models:/{NAME}@champion") == second
    registry.promote(NAME, 2)
    assert registry.aliases(NAME) == {"champion": 2, "previous": 1}, "promoting the champion changes nothing"

    assert registry.rollback(NAME) == first
    assert registry.aliases(NAME) == {"champion": 1, "previous": 2}


@pytest.mark.parametrize("kept_writes", [0, 1])
def test_a_kill_between_the_alias_writes_leaves_a_champion_and_can_be_completed(
    registry: Registry, add, monkeypatch, kept_writes: int
):
    registry.promote(NAME, add("a").version)
    registry.promote(NAME, add("b").version)
    candidate = add("c")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(registry, "_set_alias", killed_after(kept_writes, registry._set_alias))
        registry.promote(NAME, candidate.version)
    assert registry.aliases(NAME)["champion"] == 2, "the old champion still serves"
    registry.promote(NAME, candidate.version)
    assert registry.aliases(NAME) == {"champion": 3, "previous": 2}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(registry, "_set_alias", killed_after(1, registry._set_alias))
        registry.rollback(NAME)
    assert registry.aliases(NAME)["champion"] == 2, "the rollback has taken effect"
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.rollback(NAME)


def killed_after(writes: int, write):
    done = []

    def wrapper(*args):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(args)
        write(*args)

    return wrapper


def test_only_a_pass_against_the_current_champion_promotes(registry: Registry, add, make_checkpoint, run_id):
    ungated = registry.register(NAME, make_checkpoint("ungated"), {}, run_id)
    with pytest.raises(GateRefused, match="no result of the gate"):
        registry.promote(NAME, ungated.version)
    refused = registry.record_gate(ungated, GateResult(False, ("too slow",)), None)
    with pytest.raises(GateRefused, match="too slow"):
        registry.promote(NAME, refused.version)

    early, other = add("early"), add("other")
    registry.promote(NAME, other.version)
    with pytest.raises(GateRefused, match="passed against none, but champion is now"):
        registry.promote(NAME, early.version)
    assert registry.champion(NAME) == other


def test_what_is_not_there_is_named_with_what_is(registry: Registry, add):
    with pytest.raises(RegistryError, match=r"expected models:/NAME@champion or models:/NAME/3"):
        registry.resolve("medusa-tiny@champion")
    with pytest.raises(RegistryError, match="nope"):
        registry.resolve("models:/nope@champion")
    registry.promote(NAME, add("a").version)
    with pytest.raises(RegistryError, match=r"no alias previous; it has champion \(version 1\)"):
        registry.resolve(f"models:/{NAME}@previous")
    with pytest.raises(RegistryError, match="nothing to roll back to: medusa-tiny has champion 1, previous none"):
        registry.rollback(NAME)
    with pytest.raises(RegistryError, match="9"):
        registry.promote(NAME, 9)


def test_a_registry_that_does_not_answer_is_unavailable_within_seconds():
    with pytest.raises(MlflowUnavailable, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        Registry("http://127.0.0.1:9")
    assert shown("http://user:secret@host:5000/x") == "http://host:5000/x"
