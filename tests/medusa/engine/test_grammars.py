"""Replies under a grammar: token for token what plain decoding gives under the same one, beside free replies."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from medusa import Grammar, SamplingParams, Typical
from medusa.grammar import GrammarError
from tests.medusa.engine.support import TREES, Prepared, build_engine, gigabytes, greedy, random_prompts

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["quick", "brown", "lazy"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "kind", "tags"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
WORDS = Grammar("regex", "([a-z]{1,6} ){3,12}end")
PROMPTS = random_prompts([5, 40, 12, 23], seed=11)


def params_of(temperature):
    given = {"max_tokens": 400, "temperature": temperature, "seed": 5}
    return [
        SamplingParams(grammar=JSON, **given),
        SamplingParams(grammar=WORDS, **given),
        SamplingParams(**given),
        SamplingParams(grammar=JSON, repetition_penalty=1.2, logit_bias={70: 2.0}, min_tokens=10, **given),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_change_nothing_and_replies_follow_their_grammar(tiny_llama, temperature):
    prepared = Prepared(build_engine(tiny_llama, max_batch_size=4), PROMPTS, params_of(temperature), rate=0.9)
    for size in (8, 64):
        completions = prepared.decode(TREES[size])
        assert [c.token_ids for c in completions] == [c.token_ids for c in prepared.plain]
        assert max(completions[0].accepted_per_step) > 1
    for completion in (prepared.plain[0], prepared.plain[3]):
        if completion.finish_reason == "stop":
            jsonschema.validate(json.loads(completion.text), SCHEMA)
    if prepared.plain[1].finish_reason == "stop":
        assert re.fullmatch(WORDS.definition, prepared.plain[1].text)
    assert temperature == 0.0 or {prepared.plain[0].finish_reason, prepared.plain[1].finish_reason} == {"stop"}


def test_a_reply_ends_where_its_grammar_does(tiny_llama):
    engine = build_engine(tiny_llama)
    for size in (1, 8):
        engine.set_tree(TREES[size])
        (completion,) = engine.generate([PROMPTS[0]], greedy(grammar=Grammar("regex", "abc"), ignore_eos=False))
        assert (completion.text, completion.finish_reason) == ("abc", "stop")


def test_an_end_that_comes_before_min_tokens_is_the_grammars(tiny_llama):
    engine = build_engine(tiny_llama)
    params = greedy(grammar=Grammar("regex", "ab"), ignore_eos=False, min_tokens=20)
    (completion,) = engine.generate([PROMPTS[0]], params)
    assert completion.text.startswith("ab")
    assert completion.finish_reason in ("stop", "length")


def test_n_replies_follow_it_each_on_its_own(tiny_llama):
    engine = build_engine(tiny_llama)
    params = SamplingParams(grammar=WORDS, n=3, temperature=1.0, seed=1, max_tokens=120)
    completions = engine.generate([PROMPTS[0]], params)
    assert len({completion.text for completion in completions}) == 3
    for completion in completions:
        assert re.fullmatch(WORDS.definition, completion.text)


def test_a_sequence_that_lost_its_pages_goes_on_in_its_grammar(tiny_llama):
    few = build_engine(tiny_llama, max_batch_size=3, kv_cache_gb=gigabytes(tiny_llama, 6))
    many = build_engine(tiny_llama, max_batch_size=3)
    letters = Grammar("regex", "[a-z ]{400}")
    params = SamplingParams(grammar=letters, max_tokens=220, temperature=1.0, seed=3)
    prompts = random_prompts([60, 70, 80], seed=12)
    assert [c.text for c in few.generate(prompts, params)] == [c.text for c in many.generate(prompts, params)]
    assert few.stats().preemptions > 0


def test_typical_acceptance_follows_it_too(tiny_llama):
    engine = build_engine(tiny_llama, acceptance=Typical(epsilon=0.01))
    engine.set_tree(TREES[8])
    params = SamplingParams(grammar=WORDS, temperature=1.0, seed=1, max_tokens=120)
    (completion,) = engine.generate([PROMPTS[0]], params)
    assert re.fullmatch(WORDS.definition, completion.text)


def test_a_grammar_that_cannot_be_used_is_refused_when_it_comes(tiny_llama):
    engine = build_engine(tiny_llama)
    with pytest.raises(GrammarError):
        engine.add(PROMPTS[0], greedy(grammar=Grammar("regex", "[a"), ignore_eos=False))
    assert not engine.has_unfinished()
