"""What quantising changes is measured right: against sums written out, and nothing where nothing changed."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from rich.console import Console

from cli import main as command
from medusa.model import Backbone
from medusa.quantization import dequantize, quantize
from pipelines import quantization_effect
from pipelines.prompt_files import PromptError
from pipelines.quantization_effect import EffectConfig, Text, measure_effects
from pipelines.run import ModelConfig

CONFIG = EffectConfig(kinds=["int8", "fp8"], limit=3, max_tokens=8)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"How many foxes make pack {n}?"}) + "\n" for n in range(5)))
    return path


@pytest.fixture(scope="module")
def model(make_backbone_dir):
    return ModelConfig(backbone=str(make_backbone_dir("llama", tie_word_embeddings=False)), device="cpu")


@pytest.fixture(scope="module")
def report(model, prompts):
    return measure_effects(model, prompts, CONFIG, Console(quiet=True))


def test_the_report_is_of_what_was_asked(report):
    assert [effect.quantization for effect in report.effects] == ["int8", "fp8"]
    assert (report.prompts, report.dtype) == (3, "float32")
    assert 3 <= report.positions <= 3 * 8
    int8, fp8 = report.effects
    assert 0 < int8.weight_error <= int8.worst_weight_error < fp8.weight_error < 0.04
    assert 0 < int8.kl < fp8.kl and int8.kl <= int8.kl_p99
    assert 0.25 < int8.weight_bytes / report.weight_bytes < 0.33  # tiny rows: their scales count
    assert all(0 <= share <= 1 for e in report.effects for share in (e.same_best, e.same_greedy_tokens))
    assert json.loads(json.dumps(report.to_dict()))["effects"][0]["quantization"] == "int8"


def test_weight_errors_are_the_norms_of_the_differences(model, report):
    decoder = Backbone.from_pretrained(model.backbone, device="cpu").model.base_model
    before = {name: module.weight for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}
    differences = {name: dequantize(quantize(weight, "int8")) - weight for name, weight in before.items()}
    whole = math.sqrt(
        sum(d.square().sum() for d in differences.values()) / sum(w.square().sum() for w in before.values())
    )
    worst = max(before, key=lambda name: differences[name].norm() / before[name].norm())
    int8 = report.effects[0]
    assert int8.weight_error == pytest.approx(whole, rel=1e-4)
    assert int8.worst_layer == worst
    assert int8.worst_weight_error == pytest.approx(float(differences[worst].norm() / before[worst].norm()), rel=1e-4)


def test_distributions_are_compared_at_the_positions_of_the_reply(model):
    original, quantized = model.load(), model.load("fp8")
    text = Text([7, 8, 9], [10, 11, 12, 13])
    compared = quantization_effect._compare(original, quantized, [text], Console(quiet=True))
    kl, loss = [], []
    for i, token in enumerate(text.reply_ids):
        ids = torch.tensor([[*text.prompt_ids, *text.reply_ids[:i]]])
        p, q = (b.logits(b.hidden_states(ids))[0, -1].double().softmax(-1) for b in (original, quantized))
        kl.append(float((p * (p / q).log()).sum()))
        loss.append(-math.log(q[token]))
    assert compared["kl"] == pytest.approx(sum(kl) / 4, rel=1e-3)
    assert compared["perplexity"] == pytest.approx(math.exp(sum(loss) / 4), rel=1e-4)


def test_a_model_beside_itself_changes_nothing(model):
    original = model.load()
    compared = quantization_effect._compare(original, original, [Text([7, 8], [9, 10])], Console(quiet=True))
    assert compared["kl"] == 0 and compared["same_best"] == 1
    assert compared["perplexity"] == compared["original_perplexity"]
    texts = [Text([1], [5, 6, 7]), Text([1], [8, 9])]
    assert quantization_effect._same_greedy(texts, texts) == {"same_greedy_tokens": 1, "same_greedy_replies": 1}
    changed = [Text([1], [5, 0, 7]), Text([1], [8, 9])]
    assert quantization_effect._same_greedy(texts, changed) == {"same_greedy_tokens": 0.6, "same_greedy_replies": 0.5}


def test_prompts_that_do_not_fit_are_an_error(model, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "fox " * 600}) + "\n")
    with pytest.raises(PromptError, match="no prompt"):
        measure_effects(model, path, CONFIG, Console(quiet=True))


@pytest.mark.parametrize("wrong", [{"kinds": ["int4"]}, {"kinds": []}, {"temperature": 0.0}, {"limit": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError):
        EffectConfig(**wrong)


def test_the_command_prints_a_table_and_writes_json(monkeypatch, capsys, model, prompts, tmp_path):
    output = tmp_path / "figures" / "quantization.json"
    arguments = ["--model", model.backbone, "--prompts", str(prompts), "--kind", "int8", "--limit", "2"]
    arguments += ["--max-tokens", "4", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["medusa", "bench", "quantization", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert not ended.value.code
    assert "int8" in capsys.readouterr().out
    assert json.loads(output.read_text())["prompts"] == 2


def test_the_command_refuses_what_it_does_not_know(monkeypatch, capsys, prompts):
    for option, value in (("--kind", "int4"), ("--dtype", "float8")):
        monkeypatch.setattr(sys, "argv", ["medusa", "bench", "quantization", "--prompts", str(prompts), option, value])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 2
        assert value in capsys.readouterr().err
