"""`medusa serve` and `medusa bench serve`: what their options become, and what is refused before anything starts."""

from __future__ import annotations

import hashlib
import re
import sys

import pytest

from cli import main as command
from deployments.auth import hash_of


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["medusa", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_a_new_key_comes_with_its_hash(monkeypatch, capsys):
    assert run(monkeypatch, "serve", "--new-api-key") == 0
    printed = capsys.readouterr().out
    key, found = re.search(r"sk-medusa-\S+", printed)[0], re.search(r"[0-9a-f]{64}", printed)[0]
    assert hash_of(key) == found == hashlib.sha256(key.encode()).hexdigest()


def test_options_reach_the_service(monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr("deployments.one_process.serve_without_ray", served.append)
    keys = tmp_path / "keys"
    keys.write_text(hash_of("k"))
    options = ["--without-ray", "--port", "8123", "--max-queued", "7", "--speculation", "off", "--log-requests"]
    options += ["--tensor-parallel", "2", "--otlp-traces-endpoint", "http://collector:4318/v1/traces"]
    assert run(monkeypatch, "serve", *options, "--api-key-file", str(keys)) == 0
    (config,) = served
    assert (config.port, config.max_queued_requests, config.speculation, config.log_requests) == (8123, 7, "off", True)
    assert config.tensor_parallel == config.engine_arguments()["tensor_parallel"] == 2
    assert config.otlp_traces_endpoint == "http://collector:4318/v1/traces"
    assert config.all_key_hashes() == (hash_of("k"),)


def test_traces_to_what_is_no_url_are_bad_usage(monkeypatch, capsys):
    assert run(monkeypatch, "serve", "--without-ray", "--otlp-traces-endpoint", "collector:4317") == 2
    assert "such as http://collector:4318/v1/traces" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--concurrency", "1,x"], "numbers from 1 on"),
        (["--concurrency", "0"], "numbers from 1 on"),
        (["--through", "magic"], "uvicorn or ray"),
        (["--dtype", "int3"], "dtype"),
    ],
)
def test_bench_serve_refuses_what_makes_no_sense(monkeypatch, capsys, options, words):
    assert run(monkeypatch, "bench", "serve", *options) == 2
    assert words in " ".join(capsys.readouterr().err.split())
