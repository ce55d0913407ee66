"""Which tokens a grammar allows, along the paths of a tree, and grammars that cannot be used."""

from __future__ import annotations

import json
import sys
import threading

import pytest
import torch

from medusa import SamplingParams
from medusa.grammar import MAX_KEPT, Grammar, GrammarError, Grammars
from medusa.sampling import restrict
from medusa.tokenizer import ChatTokenizer

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
VOCAB = 600  # beyond the tokenizer's: models pad theirs


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return ChatTokenizer(make_tokenizer())


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB)


def ids_of(tokenizer, text):
    return [tokenizer.hf.convert_tokens_to_ids(character) for character in text]


def tokens(tokenizer, allowed_V):
    return {tokenizer.decode([i], skip_special_tokens=False) for i in allowed_V.nonzero().flatten().tolist()}


def test_what_may_come_next(grammars, tokenizer):
    matcher = grammars.start(Grammar("regex", "ab?c"))
    assert tokens(tokenizer, matcher.allowed([5], [-1])[0]) <= {"a", "ab", "ac", "abc"}
    matcher.advance(ids_of(tokenizer, "a"))
    assert {"b", "c"} <= tokens(tokenizer, matcher.allowed([5], [-1])[0]) <= {"b", "c", "bc"}
    matcher.advance(ids_of(tokenizer, "c"))
    assert matcher.allowed([5], [-1])[0].nonzero().flatten().tolist() == sorted(tokenizer.eos_token_ids)


def test_each_node_has_the_mask_of_its_own_path(grammars, tokenizer):
    """As if its path had been decoded plainly; the walk leaves the matcher where it was."""
    grammar = Grammar("regex", "a(bc|cb)a*")
    a, b, c, z = ids_of(tokenizer, "abcz")
    matcher = grammars.start(grammar)
    matcher.advance([a])
    #        0:a -> 1:b -> 3:c -> 6:a, 7:z ; 1:b -> 4:b (not allowed) -> 8 ; 0 -> 2:c -> 5:b
    token_ids, parents = [a, b, c, c, b, b, a, z, c], [-1, 0, 0, 1, 1, 2, 3, 3, 4]
    paths = {0: [], 1: [b], 2: [c], 3: [b, c], 5: [c, b], 6: [b, c, a]}
    for _ in range(2):
        allowed = matcher.allowed(token_ids, parents)
        for node, path in paths.items():
            alone = grammars.start(grammar)
            alone.advance([a, *path])
            assert torch.equal(allowed[node], alone.allowed([a], [-1])[0])
    for unreachable in (4, 7, 8):
        assert not allowed[parents[unreachable], token_ids[unreachable]] or parents[unreachable] == 4
        assert allowed[unreachable].all()


def test_an_end_in_the_tree_is_not_followed(grammars, tokenizer):
    matcher = grammars.start(Grammar("regex", "a*"))
    (eos,) = tokenizer.eos_token_ids
    (a,) = ids_of(tokenizer, "a")
    allowed = matcher.allowed([5, eos, a, eos], [-1, 0, 1, 0])
    assert allowed[0, eos] and allowed[1].all()
    matcher.advance([a, a])
    assert matcher.num_tokens == 2


def test_padding_never_stands_for_the_end(grammars, tokenizer):
    matcher = grammars.start(Grammar("regex", "a"))
    matcher.advance(ids_of(tokenizer, "a"))
    assert not matcher.allowed([5], [-1])[0, tokenizer.hf.pad_token_id]


def test_a_token_that_was_not_allowed_is_an_error(grammars, tokenizer):
    with pytest.raises(RuntimeError, match="none that the grammar allowed"):
        grammars.start(Grammar("regex", "a")).advance(ids_of(tokenizer, "z"))


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "[a"),
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[]"),
        Grammar("json_schema", '{"type": "nothing"}'),
        Grammar("json_schema", '{"type": "string", "format": "unheard-of"}'),
        Grammar("lark", "no start"),
    ],
    ids=lambda grammar: grammar.definition,
)
def test_grammars_that_cannot_be_used(grammars, grammar):
    with pytest.raises(GrammarError, match=f"the {grammar.kind} cannot be used: ."):
        grammars.start(grammar)


def test_without_the_extra_the_error_names_it(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"the extra `grammar`"):
        Grammars(tokenizer, VOCAB).start(Grammar("regex", "a"))


def test_requests_share_what_is_compiled_and_nothing_else(tokenizer):
    grammars = Grammars(tokenizer, VOCAB)
    compiled = []
    compile_one = grammars._compile
    grammars._compile = lambda grammar: compiled.append(grammar) or compile_one(grammar)
    first, second = [grammars.start(Grammar("regex", "ab")) for _ in range(2)]
    first.advance(ids_of(tokenizer, "a"))
    assert tokens(tokenizer, second.allowed([5], [-1])[0]) <= {"a", "ab"}
    assert len(compiled) == 1
    threads = [threading.Thread(target=grammars.start, args=[Grammar("regex", f"a{{{i}}}")]) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 9
    for i in range(MAX_KEPT + 5):
        grammars.start(Grammar("regex", f"x{{{i}}}"))
    assert len(grammars._compiled) == MAX_KEPT


def test_where_nothing_else_is_left_the_grammar_decides():
    logits = torch.tensor([[1.0, float("-inf"), 2.0], [1.0, 2.0, 3.0]])
    allowed = torch.tensor([[False, True, False], [True, True, False]])
    restricted = restrict(logits, allowed)
    assert restricted.argmax(-1).tolist() == [1, 1]
    assert restricted.isneginf().tolist() == [[True, False, True], [False, False, True]]


def test_ignoring_the_end_contradicts_a_grammar():
    with pytest.raises(ValueError, match="ignore_eos must be False under a grammar"):
        SamplingParams(grammar=Grammar("regex", "a"), ignore_eos=True)


def test_a_schema_allows_json_as_models_write_it(grammars, tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for text in ('{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'):
        matcher = grammars.start(Grammar("json_schema", json.dumps(schema)))
        matcher.advance(tokenizer.hf.encode(text, add_special_tokens=False))
        assert matcher.allowed([5], [-1])[0][sorted(tokenizer.eos_token_ids)].all()
