from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from medusa.config import ConfigError
from registry.gate import (
    ConcurrencyResult,
    Divergence,
    EvaluationSet,
    EvaluationSummary,
    GateConfig,
    GateRefused,
    check_champion,
    evaluate_gate,
)


def summary(**changes: Any) -> EvaluationSummary:
    good = EvaluationSummary(
        checkpoint_digest="sha256:new",
        lossless=True,
        divergences=(),
        evaluation_set=EvaluationSet(digest="sha256:set", num_prompts=95),
        dtype="float32",
        tree_size=16,
        speculation_chosen=True,
        acceptance_length=2.4,
        plain_tokens_per_second=100.0,
        medusa_tokens_per_second=170.0,
        speedup=1.7,
        by_concurrency={"1": ConcurrencyResult(plain_tokens_per_second=100, medusa_tokens_per_second=170, speedup=1.7)},
    )
    return replace(good, **changes)


def reasons(candidate: EvaluationSummary, champion: EvaluationSummary | None = None, **config: Any) -> str:
    result = evaluate_gate(candidate, champion, GateConfig(**config))
    assert result.passed == (not result.reasons)
    return "; ".join(result.reasons)


def test_a_first_version_needs_exactness_and_no_slowdown():
    assert reasons(summary()) == ""
    assert reasons(summary(speedup=1.0)) == ""
    assert "speedup 0.990 at concurrency 1 is below min_speedup 1" in reasons(summary(speedup=0.99))
    assert "not lossless" in reasons(summary(lossless=False))
    assert "the evaluation set is empty" in reasons(
        summary(evaluation_set=EvaluationSet(digest="sha256:set", num_prompts=0))
    )


def test_float32_allows_no_divergence_and_bfloat16_only_near_ties():
    tie = Divergence(id="p7", position=12, logit_gap=0.125)
    error = Divergence(id="p9", position=3, logit_gap=1.5)
    assert "in float32, where none may (first: prompt p7, position 12)" in reasons(summary(divergences=(tie,)))
    assert reasons(summary(dtype="bfloat16", divergences=(tie,))) == ""
    refused = reasons(summary(dtype="bfloat16", divergences=(tie, error)))
    assert "p9" in refused and "1.5" in refused and "p7" not in refused
    unknown = Divergence(id="p1", position=0, logit_gap=float("nan"))
    assert "p1" in reasons(summary(dtype="bfloat16", divergences=(unknown,)))


def test_speculation_switched_off_passes_on_exactness_alone_unless_a_gain_is_required():
    plain = summary(speculation_chosen=False, speedup=1.0, acceptance_length=1.0, tree_size=1)
    assert reasons(plain) == ""
    assert "require_speedup" in reasons(plain, require_speedup=True)
    assert "not lossless" in reasons(replace(plain, lossless=False))


def test_a_champion_must_be_matched_within_the_tolerances():
    champion = summary(checkpoint_digest="sha256:old")
    assert reasons(summary(), champion) == ""
    assert reasons(summary(acceptance_length=2.39, speedup=1.66), champion) == ""
    assert "acceptance length 2.300 is below the champion's 2.400" in reasons(summary(acceptance_length=2.3), champion)
    assert "speedup 1.600 is below the champion's 1.700" in reasons(summary(speedup=1.6), champion)
    assert reasons(summary(speedup=1.6), champion, speedup_tolerance=0.1) == ""


def test_numbers_of_different_sets_or_loads_are_not_compared():
    other_set = summary(evaluation_set=EvaluationSet(digest="sha256:other", num_prompts=95))
    assert "only numbers of one set compare" in reasons(summary(), other_set)
    assert "concurrency 1, the champion at 8" in reasons(summary(), summary(concurrency=8))


def test_a_changed_backbone_must_keep_its_own_quality():
    changed = summary(backbone_changed=True)
    assert "kl and perplexity were not measured" in reasons(changed)
    kept = replace(changed, kl=0.01, perplexity=5.0, base_perplexity=5.0)
    assert reasons(kept) == ""
    assert "max_kl" in reasons(replace(kept, kl=0.2))
    assert "perplexity 6" in reasons(replace(kept, perplexity=6.0))
    lost = replace(kept, task_accuracy=0.3, base_task_accuracy=0.5)
    assert "task accuracy 0.300 is below the base model's 0.500" in reasons(lost)


def test_the_champion_measured_must_be_the_one_to_replace():
    beside = summary(champion=summary(checkpoint_digest="sha256:old"))
    assert check_champion(beside, "sha256:old").passed
    assert check_champion(beside, None).passed
    moved = check_champion(beside, "sha256:newer")
    assert not moved.passed and "sha256:newer" in moved.reasons[0] and "sha256:old" in moved.reasons[0]
    assert "no champion" in check_champion(summary(), "sha256:old").reasons[0]


def test_a_refusal_names_every_reason():
    result = evaluate_gate(summary(lossless=False, speedup=0.5), None, GateConfig())
    with pytest.raises(GateRefused, match=r"models:/m/3 is refused by the gate: not lossless.*; speedup 0\.500"):
        result.require("models:/m/3")
    evaluate_gate(summary(), None, GateConfig()).require("models:/m/3")


def test_evaluation_json_is_read_strictly():
    data = asdict(summary(champion=summary(checkpoint_digest="sha256:old")))
    del data["champion"]["champion"]
    assert EvaluationSummary.from_dict(data) == summary(champion=EvaluationSummary.from_dict(data).champion)
    with pytest.raises(ConfigError, match="lossless: required but absent"):
        EvaluationSummary.from_dict({key: value for key, value in data.items() if key != "lossless"})
    with pytest.raises(ConfigError, match="perplexty: unknown key; did you mean perplexity"):
        EvaluationSummary.from_dict({**data, "perplexty": 3.0})
    with pytest.raises(ConfigError, match=r"champion\.speedup must be a positive number|speedup must be"):
        EvaluationSummary.from_dict({**data, "champion": {**data["champion"], "speedup": float("nan")}})
