"""A reply's tokens, text and end: whatever a step adds is kept or dropped everywhere alike. Host data only."""

from __future__ import annotations

import random

import pytest

from medusa import SamplingParams, TokenLogprob
from medusa.engine.sequence import Sequence
from medusa.tokenizer import ChatTokenizer

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return ChatTokenizer(make_tokenizer(), eos_token_ids=[EOS])


@pytest.fixture
def begin(tokenizer):
    def begin(max_new_tokens=100, **params):
        params = SamplingParams(max_tokens=100, **params)
        return Sequence("r", 0, [5, 6, 7], params, seed=3, tokenizer=tokenizer, max_new_tokens=max_new_tokens)

    return begin


@pytest.fixture
def ids(tokenizer):
    """Token ids of the pieces, each encoded by itself, so that a test chooses where tokens end."""

    def ids(*pieces):
        encoded = [tokenizer.hf.encode(piece, add_special_tokens=False) for piece in pieces]
        return [token for piece in encoded for token in piece]

    return ids


def test_a_step_without_an_end_adds_everything(begin, ids):
    sequence = begin()
    first, second = ids("Hello"), ids(" you")
    opening = sequence.append(first[:1], decoded=False)
    output = sequence.append([*first[1:], *second])
    assert (opening.token_ids, output.token_ids) == (first[:1], [*first[1:], *second])
    assert opening.num_draft_accepted == 0
    assert output.num_draft_accepted == len(first) + len(second) - 2
    assert opening.text + output.text == "Hello you"
    assert output.finished is None
    assert sequence.accepted_per_step == [len(first) + len(second) - 1]  # the prefill's token belongs to no step


@pytest.mark.parametrize("end", [EOS, 300])
def test_an_end_token_inside_a_run_trims_tokens_text_logprobs_and_counts_alike(begin, ids, end):
    sequence = begin(stop_token_ids=(300,), logprobs=1)
    run = [*ids("Yes"), end, *ids(" and more")]
    output = sequence.append(run, [TokenLogprob(token, -1.0, [(token, -1.0)]) for token in run])
    kept = run[: run.index(end) + 1]
    assert output.token_ids == kept and [l.token_id for l in output.logprobs] == kept
    completion = output.finished
    assert completion.finish_reason == "stop"
    assert completion.token_ids == kept  # the token that ended it is part of the reply, not of its text
    assert completion.text == output.text == "Yes"
    assert [l.token_id for l in completion.logprobs] == kept
    assert completion.accepted_per_step == [len(kept)] and completion.num_steps == 1
    assert output.num_draft_accepted == len(kept) - 1
    assert completion.mean_acceptance_length == len(kept)
    assert (completion.prompt_token_ids, completion.seed) == ([5, 6, 7], 3)


def test_ignored_eos_is_a_token_like_others(begin, ids):
    sequence = begin(ignore_eos=True)
    output = sequence.append([*ids("a"), EOS, *ids("b")])
    assert output.finished is None and len(output.token_ids) == 3
    assert output.text == "ab"


def test_ignored_eos_still_ends_a_reply_that_names_it_as_a_stop_token(begin):
    assert begin(ignore_eos=True, stop_token_ids=(EOS,)).append([9, EOS, 9]).finished.token_ids == [9, EOS]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("pieces", [["ab", "STOP", "cd"], ["a", "bS", "TOPc", "d"], ["abSTOPcd"], list("abSTOPcd")])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_stop_string_cuts_the_text_however_tokens_and_steps_fall(begin, ids, pieces, include, at_once):
    sequence = begin(stop=("STOP",), include_stop_str_in_output=include)
    steps = [ids(*pieces)] if at_once else [[token] for piece in pieces for token in ids(piece)]
    outputs = []
    for step in steps:
        outputs.append(sequence.append(step))
        if outputs[-1].finished:
            break
    completion = outputs[-1].finished
    assert completion.finish_reason == "stop"
    assert completion.text == "".join(output.text for output in outputs) == ("abSTOP" if include else "ab")
    tokens = [token for step in steps for token in step]
    assert completion.token_ids == tokens[: len(completion.token_ids)]
    assert "STOP" in sequence._detokenizer._tokenizer.decode(completion.token_ids)
    assert "STOP" not in sequence._detokenizer._tokenizer.decode(completion.token_ids[:-1])
    assert sum(completion.accepted_per_step) == len(completion.token_ids)


def test_the_first_stop_string_to_end_wins(begin, ids):
    completion = begin(stop=("bcde", "cd")).append(ids("abcdef")).finished
    assert completion.text == "ab"  # "cd" ends before "bcde" does


def test_what_may_become_a_stop_string_is_held_back_and_given_once_it_cannot(begin, ids):
    sequence = begin(stop=("\n\nUser",))
    assert sequence.append(ids("Hi.", "\n")).text == "Hi."
    assert sequence.append(ids("\n")).text == ""
    assert sequence.append(ids("Us")).text == ""
    assert sequence.append(ids("ually")).text == "\n\nUsually"


def test_text_held_back_is_given_when_the_reply_ends_otherwise(begin, ids):
    by_length = begin(stop=("abc",), max_new_tokens=3).append(ids(*"xab"))
    assert by_length.finished.finish_reason == "length"
    assert by_length.text == by_length.finished.text == "xab"
    by_eos = begin(stop=("abc",)).append([*ids("xab"), EOS])
    assert by_eos.text == by_eos.finished.text == "xab"


@pytest.mark.parametrize("seed", range(30))
def test_streamed_text_is_the_completions_text(begin, ids, tokenizer, seed):
    """Random texts over a small alphabet, random stops that often occur or almost do, random steps and ends."""
    rng = random.Random(seed)
    text = "".join(rng.choice(["a", "b", "ab", "ä", "🙂", " ", "\n"]) for _ in range(60))
    stops = tuple({"".join(rng.choice("ab \näö🙂") for _ in range(rng.randrange(1, 5))) for _ in range(3)})
    sequence = begin(stop=stops, min_tokens=rng.choice([0, 0, 20]), max_new_tokens=rng.choice([15, 200]))
    tokens, outputs = [*ids(text), EOS], []
    while not outputs or outputs[-1].finished is None:
        size = rng.randrange(1, 6)
        outputs.append(sequence.append(tokens[:size]))
        tokens = tokens[size:]
    completion = outputs[-1].finished
    assert "".join(output.text for output in outputs) == completion.text
    assert [token for output in outputs for token in output.token_ids] == completion.token_ids
    assert sum(completion.accepted_per_step) == len(completion.token_ids)
    whole = tokenizer.decode(completion.token_ids)
    assert whole.startswith(completion.text.rstrip("\ufffd"))
    if completion.finish_reason == "stop" and completion.token_ids[-1] != EOS:
        assert any(whole[len(completion.text) :].startswith(stop) for stop in stops)
    if not sequence.params.min_tokens:
        assert not any(stop in completion.text for stop in stops)


def test_a_run_is_cut_at_max_tokens(begin, ids):
    output = begin(max_new_tokens=3).append(ids(*"abcdef"))
    assert output.finished.token_ids == ids(*"abc")
    assert (output.finished.finish_reason, output.text) == ("length", "abc")
    assert output.finished.accepted_per_step == [3]


def test_a_stop_on_the_last_token_allowed_is_a_stop(begin, ids):
    assert begin(max_new_tokens=3).append([*ids("a", "b"), EOS]).finished.finish_reason == "stop"
    assert begin(max_new_tokens=3, stop=("bc",)).append(ids(*"abc")).finished.finish_reason == "stop"


def test_a_stop_after_the_last_token_allowed_is_none(begin, ids):
    assert begin(max_new_tokens=2).append([*ids("a", "b"), EOS]).finished.finish_reason == "length"
    completion = begin(max_new_tokens=2, stop=("bc",)).append(ids(*"abc")).finished
    assert (completion.finish_reason, completion.text) == ("length", "ab")


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [(0, "a"), (3, "a"), (4, "ab.c"), (5, "ab.c"), (6, "ab.c.d"), (7, "ab.c.d")],
)
def test_stop_strings_count_from_min_tokens_on(begin, ids, min_tokens, text):
    """A reply of seven tokens, a character each."""
    completion = begin(stop=("b.", "."), min_tokens=min_tokens).append(ids(*"ab.c.d.")).finished
    assert (completion.text, completion.finish_reason) == (text, "stop")
    assert len(completion.token_ids) >= min_tokens


def test_a_character_in_several_tokens_is_given_whole_or_at_the_end_as_it_stands(begin, ids):
    smile = ids("🙂")
    assert len(smile) > 1
    sequence = begin()
    assert [sequence.append([token]).text for token in smile] == [""] * (len(smile) - 1) + ["🙂"]
    cut = begin(max_new_tokens=len(smile) - 1).append(smile)
    assert cut.text == cut.finished.text and set(cut.text) == {"\ufffd"}


def test_an_abort_keeps_what_there_is(begin, ids):
    sequence = begin(stop=("xyz",), logprobs=0)
    tokens = ids("ab", "x")
    given = sequence.append(tokens, [TokenLogprob(token, -1.0) for token in tokens]).text
    output = sequence.abort()
    assert given + output.text == output.finished.text == "abx"
    assert output.token_ids == [] and output.num_draft_accepted == 0
    assert output.finished.finish_reason == "abort"
    assert output.finished.token_ids == tokens and len(output.finished.logprobs) == len(tokens)


def test_a_reply_without_decode_steps_has_an_acceptance_length_of_one(begin):
    completion = begin(max_new_tokens=1).append([9], decoded=False).finished
    assert (completion.num_steps, completion.mean_acceptance_length) == (0, 1.0)
    assert completion.logprobs is None


def test_what_has_to_be_cached_before_it_decodes_is_all_but_its_last_token(begin, ids):
    sequence = begin()
    assert sequence.num_to_fill == 3 and not sequence.is_filled
    tokens = ids(*"abcd")
    sequence.append(tokens[:1], decoded=False)
    assert sequence.num_to_fill == 3
    sequence.append(tokens[1:])
    assert sequence.num_to_fill == 3 + 3
    assert sequence.tokens(1, 5) == [6, 7, *tokens[:2]]
    assert sequence.tokens(0, 3) == [5, 6, 7] and sequence.tokens(4, 6) == tokens[1:3]
    sequence.num_cached = 6
    assert sequence.is_filled
    sequence.forget_cache()
    assert not sequence.is_filled and sequence.output_ids == tokens


def test_it_is_ending_when_what_is_launched_reaches_its_length(begin, ids):
    sequence = begin(max_new_tokens=4)
    sequence.append(ids(*"ab"))
    assert not sequence.is_ending
    sequence.least_ahead = 1
    assert not sequence.is_ending
    sequence.least_ahead = 2
    assert sequence.is_ending
    ended = begin(stop_token_ids=(9,))
    ended.append([9])
    assert ended.is_ending


@pytest.mark.parametrize("min_tokens", [0, 9])
def test_steps_of_any_width_give_what_single_tokens_give(begin, ids, min_tokens):
    """Also where text is taken at once for a whole step, as it is without stop strings."""
    script = [*ids("Zwei Wörter, "), *ids("€ 🙂 and so on"), 300, *ids(" and more")]
    for stop in ((), ("never",)):
        ends = []
        for width in (1, 2, 3, len(script)):
            sequence = begin(stop_token_ids=(300,), min_tokens=min_tokens, stop=stop)
            outputs = []
            for start in range(0, len(script), width):
                if sequence.finish_reason is None:
                    outputs.append(sequence.append(script[start : start + width]))
            end = outputs[-1].finished
            assert "".join(output.text for output in outputs) == end.text
            ends.append((end.token_ids, end.text, end.finish_reason))
        assert ends == [ends[0]] * 4
        assert ends[0][0] == script[: script.index(300) + 1] and ends[0][2] == "stop"


def test_the_length_ends_a_reply_inside_a_step(begin, ids):
    script = ids("one two three four five")
    sequence = begin(max_new_tokens=3)
    output = sequence.append(script)
    assert (output.token_ids, output.finished.finish_reason) == (script[:3], "length")
    assert output.text == output.finished.text == sequence._detokenizer._decode(script[:3])
