from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from medusa import Completion, Output, SamplingParams
from medusa.tokenizer import ChatTemplateError
from pipelines.answering import Answerer, Conversation, ReplyConfig, reply_seed
from pipelines.prompt_files import Prompt

EOS, END, USER, SYSTEM, ASSISTANT = 2, 3, 4, 5, 6
FIRST_LETTER = 10  # letters are ids from here on


class LetterTokenizer:
    """One id a character; chat marks are ids of their own."""

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        ids = []
        for message in messages:
            if message["content"] == "untold":
                raise ChatTemplateError("the chat template refuses these messages: untold")
            role = {"user": USER, "system": SYSTEM}[message["role"]]
            ids += [role, *map(letter, message["content"]), EOS]
        return [*ids, ASSISTANT]

    def next_turn(self, conversation_ids: Sequence[int], user_message: str) -> list[int]:
        end = [] if conversation_ids[-1] == EOS else [EOS]
        return [*conversation_ids, *end, END, USER, *map(letter, user_message), EOS, ASSISTANT]


def letter(character: str) -> int:
    return FIRST_LETTER + ord(character)


@dataclass
class FakeEngine:
    """Gives each request the reply that `reply(prompt_ids, params)` scripts, `burst` tokens a step."""

    reply: Callable[[list[int], SamplingParams], list[int]]
    max_batch_size: int = 4
    max_model_len: int = 200
    burst: int = 1
    fail_at_step: int | None = None
    tokenizer: LetterTokenizer = field(default_factory=LetterTokenizer)
    running: dict[str, tuple[list[int], list[int], SamplingParams]] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    added: int = 0

    def add(self, prompt: Sequence[int], params: SamplingParams) -> str:
        if len(prompt) + 1 > self.max_model_len:
            raise ValueError(f"prompt of {len(prompt)} tokens and 1 more exceed max_model_len {self.max_model_len}")
        assert len(self.running) < self.max_batch_size, "the batch was overfilled"
        self.added += 1
        self.running[f"r{self.added}"] = (list(prompt), [], params)
        return f"r{self.added}"

    def step(self) -> list[Output]:
        self.batch_sizes.append(len(self.running))
        if self.fail_at_step == len(self.batch_sizes):
            raise ZeroDivisionError("a kernel failed")
        return [self._advance(request_id) for request_id in list(self.running)]

    def abort(self, request_id: str) -> list[Output]:
        self.aborted.append(request_id)
        del self.running[request_id]
        return []

    def has_unfinished(self) -> bool:
        return bool(self.running)

    def _advance(self, request_id: str) -> Output:
        prompt, written, params = self.running[request_id]
        whole = self.reply(prompt, params)[: params.max_tokens]
        new = whole[len(written) : len(written) + self.burst]
        written += new
        if len(written) < len(whole):
            return Output(request_id, 0, new, "")
        del self.running[request_id]
        reason = "stop" if whole[-1] == EOS else "length"
        done = Completion(request_id, 0, prompt, written, "", reason, params.seed or 0, [])
        return Output(request_id, 0, new, "", finished=done)


def words(prompt: list[int], params: SamplingParams) -> list[int]:
    """A reply that depends on its seed alone: 1 to 12 different letters and the EOS."""
    rng = random.Random(params.seed)
    return [*rng.sample(range(FIRST_LETTER, FIRST_LETTER + 90), rng.randrange(1, 13)), EOS]


def talk(engine: FakeEngine, prompts: Sequence[Prompt], **config) -> list[Conversation]:
    return Answerer(lambda: engine, ReplyConfig(**config)).answer(prompts)


def test_each_turn_is_appended_as_token_ids() -> None:
    prompt = Prompt("a", ("hi", "and", "why"), system="be brief")
    (conversation,) = talk(FakeEngine(words), [prompt])
    first, second, third = conversation.turns
    assert first.prompt_ids[0] == SYSTEM and first.prompt_ids[-1] == ASSISTANT
    opened = [END, USER, letter("a"), letter("n"), letter("d"), EOS, ASSISTANT]
    assert second.prompt_ids == [*first.prompt_ids, *first.completion_ids, *opened]
    assert third.prompt_ids[: len(second.prompt_ids)] == second.prompt_ids
    assert {turn.finish_reason for turn in conversation.turns} == {"stop"}
    assert conversation.outcome == "written" and conversation.reason is None


def test_a_reply_depends_on_run_seed_id_and_turn_only() -> None:
    prompts = [Prompt(f"p{i}", ("x", "y")) for i in range(7)]
    alone = [talk(FakeEngine(words, max_batch_size=1), [prompt])[0].turns for prompt in prompts]
    together = talk(FakeEngine(words, max_batch_size=3), prompts[::-1])[::-1]
    assert [c.turns for c in together] == alone
    assert talk(FakeEngine(words), prompts, seed=1)[0].turns != alone[0]
    assert reply_seed(0, "p0", 0) == 1621241744227002355  # the same in every process and release
    assert len({reply_seed(s, i, t) for s in (0, 1) for i in ("a", "b", "1") for t in (0, 1)}) == 12


@pytest.mark.parametrize("burst", [1, 3, 5])
def test_a_looping_reply_is_cut_and_given_up_early(burst: int) -> None:
    loop = [letter(c) for c in "so wise, wise, wise, wise, wise, wise, wise, wise, "]
    engine = FakeEngine(lambda *_: loop, burst=burst)
    (conversation,) = talk(engine, [Prompt("a", ("hi", "again"))], max_tokens=500, cut_loops=True)
    assert [turn.finish_reason for turn in conversation.turns] == ["loop", "loop"]
    assert conversation.turns[0].completion_ids == [letter(c) for c in "so wise, wise,"]  # " wis" comes again
    assert len(engine.aborted) == 2 and not engine.running
    follow = conversation.turns[1].prompt_ids[len(conversation.turns[0].prompt_ids) :]
    assert follow[14] == EOS  # the template's, in the next prompt; never among the reply's own tokens


def test_loops_stay_when_they_are_to_stay() -> None:
    reply = [*[letter("x")] * 30, EOS]
    (conversation,) = talk(FakeEngine(lambda *_: reply), [Prompt("a", ("hi",))])
    assert conversation.turns[0].completion_ids == reply


@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_truncated_replies_carry_no_false_eos_or_are_dropped(truncated: str) -> None:
    def reply(prompt: list[int], params: SamplingParams) -> list[int]:
        return [*range(20, 40), EOS] if letter("l") in prompt else [20, EOS]

    prompts = [Prompt("long", ("l", "s")), Prompt("late", ("s", "l", "s")), Prompt("short", ("s",))]
    first, late, short = talk(FakeEngine(reply), prompts, max_tokens=5, truncated=truncated)
    assert short.outcome == "written" and short.reason is None
    if truncated == "keep":
        assert first.turns[0].completion_ids == [20, 21, 22, 23, 24]
        assert first.turns[0].finish_reason == "length" and len(first.turns) == 2
    else:
        assert (first.outcome, first.reason, first.turns) == ("skipped", "length", [])
        assert (late.outcome, late.reason, len(late.turns)) == ("written", "length", 1)


def test_a_conversation_that_fails_stops_no_other() -> None:
    prompts = [
        Prompt("ok", ("hi",)),
        Prompt("too long", ("x" * 300,)),
        Prompt("untold", ("untold",)),
        Prompt("too long later", ("hi", "x" * 300)),
    ]
    ok, too_long, untold, later = talk(FakeEngine(words), prompts)
    assert ok.outcome == "written"
    assert (too_long.outcome, too_long.reason) == ("failed", "prompt refused")
    assert "302" in too_long.detail or "303" in too_long.detail
    assert (untold.outcome, untold.reason) == ("failed", "chat template")
    assert (later.outcome, later.reason, len(later.turns)) == ("written", "prompt refused", 1)


def test_only_failing_conversations_end_too() -> None:
    prompts = [Prompt(str(i), ("untold",)) for i in range(20)]
    assert {c.outcome for c in talk(FakeEngine(words), prompts)} == {"failed"}


def test_an_exception_of_the_engine_reaches_every_caller() -> None:
    answerer = Answerer(lambda: FakeEngine(words, fail_at_step=2), ReplyConfig())
    with pytest.raises(ZeroDivisionError, match="a kernel failed"):
        answerer.answer([Prompt(str(i), ("hi",)) for i in range(9)])


def test_an_engine_that_cannot_be_built_says_so() -> None:
    def broken() -> FakeEngine:
        raise FileNotFoundError("no model folder")

    with pytest.raises(FileNotFoundError, match="no model folder"):
        Answerer(broken, ReplyConfig())


def test_a_request_that_the_engine_lost_is_noticed() -> None:
    engine = FakeEngine(words)
    engine.step = lambda: engine.running.clear() or []
    with pytest.raises(RuntimeError, match="nothing left to do"):
        talk(engine, [Prompt("a", ("hi",))])


def test_the_batch_stays_full_across_blocks() -> None:
    """Twelve blocks smaller than the batch: only the very end of them all runs below the full batch."""
    engine = FakeEngine(words, max_batch_size=6)
    answerer = Answerer(lambda: engine, ReplyConfig())
    blocks = [[Prompt(f"{b}.{i}", ("hi", "you")) for i in range(4)] for b in range(12)]
    gate = threading.Event()
    answerer._thread.submit(gate.wait)
    with ThreadPoolExecutor(12) as threads:
        results = threads.map(answerer.answer, blocks)
        while len(answerer._waiting) < 48:  # until every caller stands in line
            time.sleep(0.001)
        gate.set()
    assert [c.prompt.id for block in results for c in block] == [p.id for block in blocks for p in block]
    steps, stepped = answerer.take_counters()
    assert (steps, stepped) == (len(engine.batch_sizes), sum(engine.batch_sizes))
    longest_tail = 2 * 13  # two turns of the longest reply
    assert all(size == 6 for size in engine.batch_sizes[:-longest_tail])
    assert answerer.take_counters() == (0, 0)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"max_tokens": 0}, {"top_p": 0}])
def test_bad_sampling_is_refused_at_the_start(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ReplyConfig(**bad)
