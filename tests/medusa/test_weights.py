"""The digest of a backbone's weights: what it is of, by whom it is computed, and what becomes of a failing read."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from medusa import weights
from medusa.model import Backbone
from medusa.weights import Hashing, ModelNotFoundError, weights_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of weights, the first of three blocks and a bit, and files that are none."""
    for name, content in (("b-2.safetensors", b"tail"), ("a-1.safetensors", bytes(range(256)) * 3 + b"!")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 256)


def test_it_is_the_sha256_of_the_files_one_after_another_in_name_order(folder):
    content = bytes(range(256)) * 3 + b"!" + b"tail"
    assert weights_digest(folder) == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert Hashing(folder).result() == weights_digest(folder)


def test_a_thread_hashes_while_its_caller_goes_on(folder, hashing_gate):
    hashing = Hashing(folder)
    assert not hashing.is_done and hashing.seconds == 0.0
    hashing_gate.set()
    assert hashing.result() == weights_digest(folder)
    assert hashing.is_done and hashing.seconds > 0 and hashing.waited_s > 0


def test_what_a_failing_read_raises_is_raised_where_the_digest_is_asked_for(folder, monkeypatch):
    class Failing(io.BytesIO):
        def readinto(self, block):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Failing())
    hashing = Hashing(folder)
    for _ in range(2):  # who asks again is not told anything else
        with pytest.raises(OSError, match="Input/output error"):
            hashing.result()
    assert hashing.is_done


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="holds no .safetensors file"):
        Hashing(tmp_path).result()


def test_a_backbone_takes_the_digest_that_is_under_way_and_hashes_no_second_time(tiny_llama, monkeypatch):
    expected, hashing = weights_digest(tiny_llama), Hashing(tiny_llama)
    hashing.result()
    monkeypatch.delattr("medusa.model.weights_digest")
    assert Backbone.from_pretrained(tiny_llama, hashing=hashing).digest == expected


def test_the_digest_of_another_folder_is_refused(tiny_llama, folder):
    with pytest.raises(ValueError, match=f"hashing is of {folder}, but the weights to be loaded are in {tiny_llama}"):
        Backbone.from_pretrained(tiny_llama, hashing=Hashing(folder))
