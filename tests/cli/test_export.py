"""`medusa export` and `medusa import` from the command line: folders, notes and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cli import main as command
from medusa.checkpoint import BackboneRef, CheckpointMeta, load_checkpoint, save_checkpoint
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.weights import weights_digest


@pytest.fixture
def heads(tmp_path: Path, tiny_llama: Path) -> Path:
    made = MedusaHeads(HeadsConfig(hidden_size=64, vocab_size=512, num_heads=2))
    reference = BackboneRef(name="org/tiny", weights_digest=weights_digest(tiny_llama))
    save_checkpoint(tmp_path / "heads", made, CheckpointMeta(heads=made.config, backbone=reference))
    return tmp_path / "heads"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["medusa", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_there_and_back(monkeypatch, capsys, heads, tiny_llama, tmp_path):
    assert run(monkeypatch, "export", heads, "--format", "tgi", "--backbone", tiny_llama) == 0
    written = tmp_path / "heads-tgi"
    assert json.loads((written / "config.json").read_text())["medusa_num_heads"] == 2
    assert "text-generation-inference" in capsys.readouterr().out
    assert run(monkeypatch, "import", written, "--backbone", tiny_llama, "--output", tmp_path / "back") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 heads of 1 block(s), own vocabulary" in told
    before, after = (load_checkpoint(folder) for folder in (heads, tmp_path / "back"))
    assert after.meta.backbone.tokenizer_digest is not None
    assert all(torch.equal(a, b) for a, b in zip(before.heads.parameters(), after.heads.parameters(), strict=True))


def test_what_cannot_be_written_is_a_usage_error(monkeypatch, capsys, heads, tmp_path):
    assert run(monkeypatch, "export", heads, "--format", "gguf") == 2
    assert "gguf" in capsys.readouterr().err
    assert run(monkeypatch, "export", heads, "--format", "transformers") == 2
    assert "nothing to merge" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "export", tmp_path / "none", "--format", "tgi") == 2
    assert run(monkeypatch, "export", heads, "--format", "tgi", "--output", heads) == 2
    assert "already exists" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]
