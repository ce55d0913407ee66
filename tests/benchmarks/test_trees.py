"""Kinds of trees: where confidence tells which guess is right, trees that follow it win; where not, they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.tree_kinds import (
    WIDTH,
    Judged,
    at_fitted_temperature,
    by_fitted_model,
    measure,
    tokens_per_dynamic_step,
)
from cli.main import app
from medusa.calibration import ReplyGuesses, tokens_per_step
from medusa.checkpoint import save_checkpoint
from medusa.tree import grow
from tests.medusa.engine.support import build_engine, checkpoint_of, load

K, V = 3, 40


def judged(seed: int, *, telling: bool) -> list[Judged]:
    """Replies whose heads hold the true token at rank 0 in half of the places, and elsewhere anywhere among the first
    four. Heads that hold it at rank 0 are sure of it (`telling`), or as unsure as the others."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(30):
        reply = torch.randint(0, V, (25,), generator=generator)
        logits = torch.randn(25, K, V, generator=generator)
        for t in range(25):
            for k in range(K):
                likely = torch.randperm(V, generator=generator)[:4]
                truth = reply[t + k + 1] if t + k + 1 < 25 else likely[0]
                likely[torch.randint(0, 4, (), generator=generator)] = truth
                logits[t, k, likely] = 8.0 + 0.1 * torch.rand(4, generator=generator)
                if torch.rand((), generator=generator) < 0.5:
                    logits[t, k, truth] = 12.0 if telling else 8.2
        top = logits.log_softmax(-1).topk(WIDTH, -1)
        future = torch.full((25, K), -1)
        for k in range(K):
            future[: 25 - k - 1, k] = reply[k + 1 :]
        ranks = torch.arange(WIDTH).float().log1p().expand_as(top.values)
        features = torch.stack([top.values, ranks, torch.zeros_like(ranks), torch.ones_like(ranks)], -1)
        guesses = ReplyGuesses(reply.tolist(), top.indices.tolist())
        items.append(Judged(guesses, logits, features, top.indices == future[..., None], future >= 0))
    return items


def test_trees_of_every_step_win_where_confidence_tells() -> None:
    values = measure(judged(1, telling=True), judged(2, telling=True), [4, 8])
    assert min(values["confidence"]) > 1.02 * max(values["accuracies"][0], values["whole paths"][0])
    assert values["fitted"][0] > 1.02 * values["whole paths"][0]


def test_they_gain_nothing_where_it_does_not() -> None:
    values = measure(judged(3, telling=False), judged(4, telling=False), [4, 8])
    for size in (0, 1):
        assert values["fitted"][size] <= values["whole paths"][size] + 0.03


def test_equal_confidence_everywhere_is_a_static_tree() -> None:
    items = judged(5, telling=True)
    accuracy = [[0.5 / (k + 1) / (s + 1) for s in range(WIDTH)] for k in range(K)]
    static = tokens_per_step([item.guesses for item in items], grow(accuracy, 9))
    fixed = torch.tensor(accuracy).expand(25, K, WIDTH)
    assert tokens_per_dynamic_step(items, lambda item: fixed, 9) == pytest.approx(static)


def test_fitted_confidences_are_probabilities_of_being_right() -> None:
    items = judged(6, telling=True)
    right = torch.cat([item.right_TKS[:20].flatten() for item in items]).float()
    for confidence in (by_fitted_model(items), at_fitted_temperature(items)):
        stated = torch.cat([confidence(item)[:20].flatten() for item in items])
        assert stated.min() >= 0 and stated.max() <= 1
        assert stated.mean() == pytest.approx(float(right.mean()), abs=0.02)


@pytest.mark.parametrize("vocabulary", ["own", "truncated"])
def test_the_guesses_are_the_engines(tiny_llama: Path, vocabulary: str) -> None:
    engine = build_engine(tiny_llama, vocabulary=vocabulary)
    checkpoint, backbone = engine.checkpoint, engine.backbone
    prompt, reply = [7, 8, 9], [11, 12, 13, 14, 15, 16]
    item = Judged.of(backbone, checkpoint, prompt, reply)
    hidden = backbone.hidden_states(torch.tensor([prompt + reply]))[0, len(prompt) - 1 : -1]
    expected, _ = checkpoint.heads.guess(hidden, backbone.lm_head_weight, WIDTH, backbone.cap)
    assert item.guesses.guesses == expected.tolist()
    assert item.known_TK.sum(0).tolist() == [5, 4, 3, 2]


def test_the_command_prints_a_table(tiny_llama: Path, tmp_path: Path) -> None:
    backbone, _ = load(tiny_llama)
    checkpoint = checkpoint_of(backbone)
    save_checkpoint(tmp_path / "heads", checkpoint.heads, checkpoint.meta)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"How many {i}?"}) + "\n" for i in range(6)))
    arguments = ["bench", "trees", "--prompts", tmp_path / "prompts.jsonl", "--heads", tmp_path / "heads"]
    arguments += ["--model", tiny_llama, "--max-tokens", "12", "--sizes", "4,8", "--temperatures", "0"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| 0 |")]
    assert [row.split("|")[2].strip() for row in rows] == ["accuracies", "whole paths", "confidence", "fitted"]
