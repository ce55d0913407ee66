"""What a decode benchmark asks: prompts, filled up to a context, and how long each reply is to be.

The model first answers every prompt plainly. Each reply is cut where it starts to loop (medusa/loops.py), and every
contender then decodes exactly that many tokens, so that neither loops nor differing lengths flatter one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medusa import Engine, SamplingParams
from medusa.config import ConfigError
from medusa.grammar import Grammar
from medusa.loops import cut_at_loop
from medusa.tokenizer import ChatTokenizer
from pipelines.prompt_files import Prompt, read_prompts

MIN_REPLY = 8  # a shorter reply is run past its end up to here: its prefill would leave nothing to time

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Question:
    """A user's turn, and the prompt that it makes by itself."""

    text: str
    prompt_ids: list[int]


@dataclass(frozen=True)
class Request:
    """A prompt, the seed of its noise, and the reply's length by temperature."""

    prompt_ids: list[int]
    seed: int
    lengths: dict[float, int] = field(default_factory=dict)

    def params(
        self, temperature: float, max_tokens: int | None = None, grammar: Grammar | None = None
    ) -> SamplingParams:
        """Of a reply of its length, or of at most `max_tokens`, whatever it says."""
        length = self.lengths[temperature]
        length = length if max_tokens is None else min(length, max_tokens)
        if grammar is not None:  # whose reply ends with an end: only the last token may be one
            return SamplingParams(
                max_tokens=length, min_tokens=length - 1, temperature=temperature, seed=self.seed, grammar=grammar
            )
        return SamplingParams(max_tokens=length, temperature=temperature, seed=self.seed, ignore_eos=True)


def pick_prompts(path: Path, exclude: Path | None, count: int) -> list[Prompt]:
    """`count` prompts of the file, evenly over it, without those whose first turn is in `exclude`."""
    prompts, _ = read_prompts(path)
    if exclude is not None:
        known = {prompt.turns[0] for prompt in read_prompts(exclude)[0]}
        prompts = [prompt for prompt in prompts if prompt.turns[0] not in known]
    if not prompts:
        raise ConfigError(f"{path} has no prompt left to decode; give another file, or another one to exclude")
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def encode(prompts: Sequence[Prompt], tokenizer: ChatTokenizer, longest: int) -> list[Question]:
    """First turns only; prompts above `longest` tokens are left out."""
    questions = []
    for prompt in prompts:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        ids = tokenizer.encode_chat([*system, {"role": "user", "content": prompt.turns[0]}])
        if len(ids) <= longest:
            questions.append(Question(prompt.turns[0], ids))
    if not questions:
        raise ConfigError(f"no prompt fits {longest} tokens beside the reply; lower --context or --max-tokens")
    return questions


def reply_lengths(
    engine: Engine, prompts: Sequence[list[int]], temperatures: Sequence[float], max_tokens: int, advance: Advance
) -> list[Request]:
    """Plain replies at each temperature, cut at loops, make the requests; the seeds are the prompts' numbers."""
    requests = [Request(ids, seed) for seed, ids in enumerate(prompts)]
    for temperature in temperatures:
        for request, reply in zip(requests, _answer(engine, requests, temperature, max_tokens, advance), strict=True):
            request.lengths[temperature] = max(min(MIN_REPLY, max_tokens), cut_at_loop(reply))
    return requests


def with_context(
    engine: Engine, questions: Sequence[Question], tokens: int, max_tokens: int, advance: Advance
) -> list[list[int]]:
    """The prompts as the last turn after other conversations: the questions that follow in the list, with the model's
    own replies. All come to `tokens` tokens (the earliest are cut off), unless a prompt alone is longer."""
    requests = [Request(question.prompt_ids, seed) for seed, question in enumerate(questions)]
    replies = _answer(engine, requests, 0.0, max_tokens, advance)
    exchanges = [
        (question, reply[: max(1, cut_at_loop(reply))]) for question, reply in zip(questions, replies, strict=True)
    ]
    return [_filled(engine.tokenizer, exchanges, i, tokens) for i in range(len(exchanges))]


def waves_of(requests: Sequence[Request], temperature: float, concurrency: int, count: int) -> list[list[Request]]:
    """`count` groups of `concurrency` requests that run together, each of similar reply lengths, so that all of a group
    end at about the same time: windows spread evenly over the requests in the order of their lengths (one alone is
    the middle). Where there are too few requests they come again."""
    needed = concurrency * count
    rounds = max(1, -(-needed // len(requests)))
    many = [_again(request, time) for time in range(rounds) for request in requests]
    ordered = sorted(many, key=lambda request: request.lengths[temperature])
    spare = len(ordered) - needed
    starts = [i * concurrency + spare * (2 * i + 1) // (2 * count) for i in range(count)]
    return [ordered[start : start + concurrency] for start in starts]


def queue_of(requests: Sequence[Request], waves: Sequence[Sequence[Request]]) -> list[Request]:
    """The requests of the waves in the order in which they came, with long and short replies mixed."""
    seeds = {request.seed for wave in waves for request in wave}
    return [request for request in requests if request.seed in seeds]


def _again(request: Request, time: int) -> Request:
    return request if time == 0 else Request(request.prompt_ids, request.seed + 1_000_003 * time, request.lengths)


def _answer(
    engine: Engine, requests: Sequence[Request], temperature: float, max_tokens: int, advance: Advance
) -> list[list[int]]:
    params = [SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=request.seed) for request in requests]
    done = engine.generate([r.prompt_ids for r in requests], params, on_finish=lambda *_: advance(1))
    return [completion.token_ids for completion in done]


def _filled(
    tokenizer: ChatTokenizer, exchanges: Sequence[tuple[Question, list[int]]], index: int, tokens: int
) -> list[int]:
    asked = exchanges[index][0]
    others = itertools.cycle([*exchanges[index + 1 :], *exchanges[:index]] or exchanges)
    if len(asked.prompt_ids) >= tokens:
        return asked.prompt_ids
    question, reply = next(others)
    history = [*question.prompt_ids, *reply]
    while len(filled := tokenizer.next_turn(history, asked.text)) < tokens:
        question, reply = next(others)
        history = [*tokenizer.next_turn(history, question.text), *reply]
    return [filled[0], *filled[len(filled) - tokens + 1 :]]
