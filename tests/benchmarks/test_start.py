"""`medusa bench start`: a start's parts add up, a replica that does not start says why, reports tell the conditions."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from typer.testing import CliRunner

from benchmarks import starting
from benchmarks.starting import ROOT, Plan, Start, measure_starts
from benchmarks.starting_report import write_report
from cli.bench import app
from deployments.config import ServerConfig
from medusa import HeadsConfig, MedusaHeads
from medusa.checkpoint import BackboneRef, CheckpointMeta, save_checkpoint
from medusa.model import Backbone

PARTS = ("imports_s", "weights_s", "heads_s", "engine_s", "other_loading_s", "listening_s", "request_s")


@pytest.fixture
def tiny_heads_of_another(make_backbone_dir, tmp_path_factory):
    """Untrained heads of a backbone like `tiny_llama` with other weights."""
    backbone = Backbone.from_pretrained(make_backbone_dir("llama", seed=1))
    config = HeadsConfig(num_heads=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    reference = BackboneRef(name="another", weights_digest=backbone.digest)
    folder = tmp_path_factory.mktemp("heads") / "of-another"
    save_checkpoint(folder, heads, CheckpointMeta.of(heads, reference))
    return folder


def start_of(total_s, state="empty", **changes):
    parts = dict.fromkeys(PARTS, total_s / len(PARTS))
    beside = {"digest_s": 0.5, "waited_for_digest_s": 0.25, "compiled_files": 7, "read_s": 1.0}
    return Start(**{"repeat": 1, "compile_cache": state, "total_s": total_s, **parts, **beside, **changes})


@pytest.mark.slow
def test_a_replica_is_started_twice_a_repeat_and_its_parts_add_up(tiny_llama, tmp_path):
    config = ServerConfig(model=str(tiny_llama), speculation="off", device="cpu", max_batch_size=2)
    kept, said = [], []
    starts = measure_starts(
        config, Plan(1, reply_tokens=3), tmp_path, keep=lambda sofar: kept.append(len(sofar)), say=said.append
    )
    assert [start.compile_cache for start in starts] == ["empty", "warm"]
    assert kept == [1, 2] and [line for line in said if line.startswith("start 2 of 2: compile cache warm")]
    for start in starts:
        assert sum(getattr(start, part) for part in PARTS) == pytest.approx(start.total_s)
        assert min(start.imports_s, start.weights_s, start.engine_s, start.listening_s, start.request_s) > 0
        assert start.digest_s > 0 and start.read_s > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start-1-empty.log", "start-1-warm.log"]


def test_a_replica_that_refuses_its_heads_is_no_start_and_says_why(tiny_llama, tiny_heads_of_another, tmp_path):
    config = ServerConfig(model=str(tiny_llama), heads=str(tiny_heads_of_another), speculation="off", device="cpu")
    with pytest.raises(RuntimeError, match=r"start-1-empty\.log[\s\S]*these heads belong to") as refused:
        measure_starts(config, Plan(1), tmp_path, keep=pytest.fail, say=lambda line: None)
    assert "has ended" in str(refused.value)


def test_what_a_start_tells_is_found_among_other_output(tmp_path):
    log = tmp_path / "start.log"
    told = '{"level": "WARNING", "start": {"loaded_s": 2.0}}'
    log.write_text(f'a warning\n{{"imported_at": 12.5}}\nLoading weights: 100%|##| 2/2{told}\n')
    assert starting._told(log) == (12.5, {"loaded_s": 2.0})


def test_the_report_has_medians_of_both_and_says_what_files_came_from(tmp_path, tiny_llama):
    config, plan = ServerConfig(model=str(tiny_llama), device="cpu"), Plan(2)
    starts = [start_of(total, state) for total, state in ((14, "empty"), (7, "warm"), (28, "empty"), (21, "warm"))]
    report = write_report(tmp_path, config, plan, starts).read_text()
    assert "| **empty, median** | 21.0 | 3.0 |" in report and "| **warm, median** | 14.0 | 2.0 |" in report
    assert "read just before each start" in report and "a start from a cold disk was not measured" in report
    assert "plain decoding, no heads" in report and "partial" not in report
    content = json.loads((tmp_path / "start.json").read_text())
    assert content["starts"] == [asdict(start) for start in starts] and content["partial"] is None
    assert content["medians"]["warm"]["weights_s"] == 2.0


def test_a_report_before_the_last_start_is_marked_as_partial(tmp_path, tiny_llama):
    plan = replace(Plan(2), read_first=False)
    report = write_report(tmp_path, ServerConfig(model=str(tiny_llama)), plan, [start_of(7)]).read_text()
    assert "**partial**: 1 of 4 starts" in report and "warm, median" not in report
    assert "whether the page cache had them is not known" in report


def test_neither_ray_nor_mlflow_is_needed(tmp_path):
    modules = "benchmarks.start, benchmarks.started, benchmarks.starting, benchmarks.starting_report"
    code = f"import sys; sys.modules |= dict.fromkeys(('ray', 'mlflow', 'rich')); import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_command_has_an_example():
    shown = CliRunner().invoke(app, ["start", "--help"])
    assert shown.exit_code == 0 and "medusa bench start --inflate vicuna-7b" in " ".join(shown.output.split())
