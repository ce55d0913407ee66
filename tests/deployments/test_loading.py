"""What a replica loads: verified while it warms up, refused before it serves, and told in one line of the log."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from deployments import loading
from deployments.config import ServerConfig
from deployments.loading import load_service
from medusa import Engine, weights
from medusa.checkpoint import CheckpointMismatchError
from medusa.config import ConfigError


@pytest.fixture
def opened(monkeypatch, hashing_gate):
    """The digest becomes known only once the engine was built."""
    build = Engine._build_runner

    def build_and_open(engine):
        build(engine)
        hashing_gate.set()

    monkeypatch.setattr(Engine, "_build_runner", build_and_open)
    return hashing_gate


@pytest.fixture
def nothing_serves(monkeypatch):
    monkeypatch.delattr(loading, "AsyncEngine")


@pytest.fixture
def closed(monkeypatch):
    """How many engines were closed."""
    engines, close = [], Engine.close

    def note(engine):
        engines.append(engine)
        close(engine)

    monkeypatch.setattr(Engine, "close", note)
    return engines


def config_of(folder, **fields):
    return ServerConfig(model=str(folder), device="cpu", speculation="off", max_batch_size=1, **fields)


@pytest.mark.parametrize("with_heads", [False, True])
def test_a_start_is_told_in_one_line(tiny_llama, tiny_heads, opened, caplog, with_heads):
    service = load_service(config_of(tiny_llama, heads=str(tiny_heads) if with_heads else None))
    service.close()
    (record,) = [record for record in caplog.records if hasattr(record, "start")]
    parts = record.start
    assert record.getMessage().startswith(f"{tiny_llama.name} was loaded in ")
    assert set(parts) == {"loaded_s", "weights_s", "heads_s", "engine_s", "digest_s", "waited_for_digest_s"}
    assert 0 < parts["weights_s"] + parts["heads_s"] + parts["engine_s"] <= parts["loaded_s"] + 0.002
    assert parts["digest_s"] > 0


def test_heads_of_another_backbone_found_late_are_not_served(make_backbone_dir, tiny_heads, opened, nothing_serves):
    with pytest.raises(CheckpointMismatchError, match="these heads belong to"):
        load_service(config_of(make_backbone_dir("llama", seed=1), heads=str(tiny_heads)))
    assert opened.is_set()


def test_a_backbone_of_another_digest_found_late_is_not_served(tiny_llama, opened, nothing_serves, closed):
    with pytest.raises(CheckpointMismatchError, match="but sha256:00 was to be served"):
        load_service(config_of(tiny_llama, backbone_digest="sha256:00"))
    assert opened.is_set() and len(closed) == 1


@pytest.mark.parametrize("with_heads", [False, True])
def test_weights_that_cannot_be_read_to_their_end_are_not_served(
    tiny_llama, tiny_heads, monkeypatch, nothing_serves, with_heads
):
    def fail(directory):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(weights, "weights_digest", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_service(config_of(tiny_llama, heads=str(tiny_heads) if with_heads else None))


def test_what_was_started_ends_where_a_later_part_fails(tiny_llama, tmp_path):
    def threads():
        return {
            thread
            for thread in threading.enumerate()
            if thread.name in ("medusa-engine", "OtelBatchSpanRecordProcessor")
        }

    before, config = threads(), config_of(tiny_llama, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    service = load_service(config)
    assert len(threads() - before) == 2
    service.close()
    with pytest.raises(ConfigError, match="api_key_file .* cannot be read"):
        load_service(replace(config, api_key_file=str(tmp_path / "none")))
    assert threads() <= before
