"""One reply in the making: its tokens, its text, and when it ends. Host data alone; the runner has the model's."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal

import torch

from medusa.engine.acceptance import Acceptance
from medusa.engine.kv_cache import PAGE_SIZE
from medusa.engine.page_pool import chain
from medusa.grammar import Matcher
from medusa.sampling import SamplingParams
from medusa.tokenizer import ChatTokenizer

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution, with the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished reply. `token_ids` includes the EOS that ended it. `accepted_per_step` counts, for each decode step,
    the tokens that it added and that were kept: 1 is plain decoding's. The prefill's token belongs to no step.
    `num_drafted` are the guesses that those steps checked.
    `prompt_logprobs` begin with the prompt's second token: nothing precedes the first."""

    request_id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    seed: int
    accepted_per_step: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    num_drafted: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.accepted_per_step)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a decode step; 1.0 for a reply without decode steps."""
        return sum(self.accepted_per_step) / self.num_steps if self.num_steps else 1.0


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one reply. `finished` carries the whole reply when it ended with this step;
    `prompt_logprobs`, where asked for, come with the first."""

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    num_draft_accepted: int = 0
    logprobs: list[TokenLogprob] | None = None
    finished: Completion | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class Sequence:
    """A reply being decoded.

    While it runs, `row` is its place in the batch and `num_cached` its positions in the cache, as far as launches have
    been collected; launches not collected yet will add at least `least_ahead` tokens and at most `most_ahead`.
    """

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        seed: int,
        tokenizer: ChatTokenizer,
        max_new_tokens: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.prompt_ids = prompt_ids
        self.params = params
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self._matcher = matcher
        self.stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(tokenizer.eos_token_ids))
        self.age = 0  # its turn among those of the same priority; the scheduler gives it
        self.row = -1
        self.num_cached = self.least_ahead = self.most_ahead = 0
        self.output_ids: list[int] = []
        self.accepted_per_step: list[int] = []
        self.num_drafted = 0
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.acceptance = Acceptance()
        self.finish_reason: FinishReason | None = None
        self._detokenizer = tokenizer.detokenizer()
        self._digests: list[bytes] = []
        self._text = ""
        self._emitted = 0  # characters already given out

    @property
    def turn(self) -> tuple[int, int]:
        """Who comes first, last to give up its pages: the lower priority, then the older."""
        return self.params.priority, self.age

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_to_fill(self) -> int:
        """Positions to be cached before it decodes: all but the reply's last token, which is the next tree's root."""
        return len(self.prompt_ids) + max(len(self.output_ids) - 1, 0)

    @property
    def is_filled(self) -> bool:
        return self.num_cached >= self.num_to_fill

    @property
    def is_ending(self) -> bool:
        """Whether it has ended, or will have with what is launched, however little that gives."""
        return self.finish_reason is not None or len(self.output_ids) + self.least_ahead >= self.max_new_tokens

    @property
    def is_early(self) -> bool:
        """Whether the next token may not end the reply yet."""
        return len(self.output_ids) < self.params.min_tokens

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether its prompt is to be computed token by token, though its pages may be known."""
        return self.params.prompt_logprobs is not None and not self.output_ids

    def allowed(self, token_ids: Tokens[int], parents: Tokens[int]) -> torch.Tensor | None:
        """Which tokens its grammar lets follow each node of a tree, [N, V], after all tokens that it has; None without
        a grammar."""
        if self._matcher is None:
            return None
        self._matcher.advance(self.output_ids[self._matcher.num_tokens :])
        return self._matcher.allowed(token_ids, parents)

    def tokens(self, start: int, end: int) -> list[int]:
        """Of prompt and reply."""
        split = len(self.prompt_ids)
        return self.prompt_ids[start:end] + self.output_ids[max(start - split, 0) : max(end - split, 0)]

    def page_digests(self, root_digest: bytes, num_pages: int) -> list[bytes]:
        """Digests of its first pages, which must be full."""
        for start in range(len(self._digests) * PAGE_SIZE, num_pages * PAGE_SIZE, PAGE_SIZE):
            parent = self._digests[-1] if self._digests else root_digest
            self._digests.append(chain(parent, self.tokens(start, start + PAGE_SIZE)))
        return self._digests[:num_pages]

    def forget_cache(self) -> None:
        """It has lost its row and pages."""
        if self.needs_prompt_logprobs:
            self.prompt_logprobs.clear()
        self.row = -1
        self.num_cached = self.least_ahead = self.most_ahead = 0

    def append(
        self,
        token_ids: Tokens[int],
        logprobs: Tokens[TokenLogprob] = (),
        *,
        decoded: bool = True,
        num_drafted: int = 0,
    ) -> Output:
        """Takes a step's tokens up to the first that ends the reply; what follows is dropped everywhere alike.

        `decoded` is False for the prefill's token, which no decode step counts; `num_drafted` are the guesses
        that the step checked.
        """
        is_first = not self.output_ids
        kept = self._take_with_stops(token_ids) if self.params.stop else self._take(token_ids)
        self.logprobs.extend(logprobs[: len(kept)])
        self.num_drafted += num_drafted
        if decoded:
            self.accepted_per_step.append(len(kept))
        return Output(
            request_id=self.request_id,
            index=self.index,
            token_ids=kept,
            text=self._next_text(),
            num_draft_accepted=len(kept) - 1 if decoded else 0,
            logprobs=list(logprobs[: len(kept)]) if self.params.logprobs is not None else None,
            finished=self.completion() if self.finish_reason else None,
            prompt_logprobs=self._given_prompt_logprobs() if is_first else None,
        )

    def abort(self) -> Output:
        """Ends the reply where it is."""
        self.finish_reason = "abort"
        self._text += self._detokenizer.finish()
        return Output(self.request_id, self.index, [], self._next_text(), finished=self.completion())

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            request_id=self.request_id,
            index=self.index,
            prompt_token_ids=self.prompt_ids,
            token_ids=list(self.output_ids),
            text=self._text,
            finish_reason=self.finish_reason,
            seed=self.seed,
            accepted_per_step=list(self.accepted_per_step),
            logprobs=list(self.logprobs) if self.params.logprobs is not None else None,
            prompt_logprobs=self._given_prompt_logprobs(),
            num_drafted=self.num_drafted,
        )

    def _given_prompt_logprobs(self) -> list[TokenLogprob] | None:
        return list(self.prompt_logprobs) if self.params.prompt_logprobs is not None else None

    def _take(self, token_ids: Tokens[int]) -> list[int]:
        """Adds tokens up to the first that ends the reply, and their text at once: no part of it can end the reply."""
        kept = self._until_end(token_ids)
        self.output_ids += kept
        is_text = self.finish_reason != "stop"
        self._text += self._detokenizer.push(kept if is_text else kept[:-1])
        if self.finish_reason is not None:
            self._text += self._detokenizer.finish()
        return kept

    def _until_end(self, token_ids: Tokens[int]) -> list[int]:
        """Tokens up to a stop id or the reply's length; `finish_reason` tells which was met."""
        for count, token_id in enumerate(token_ids, start=1):
            total = len(self.output_ids) + count
            if token_id in self.stop_ids and total >= max(1, self.params.min_tokens):
                self.finish_reason = "stop"
            elif total >= self.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                return list(token_ids[:count])
        return list(token_ids)

    def _take_with_stops(self, token_ids: Tokens[int]) -> list[int]:
        """The same token by token: each one's text may complete a stop string."""
        kept: list[int] = []
        for token_id in token_ids:
            kept.append(token_id)
            self.output_ids.append(token_id)
            if self._ends_with(token_id):
                break
        return kept

    def _ends_with(self, token_id: int) -> bool:
        """Adds the last token's text and decides whether it ends the reply: stop id, stop string, then length."""
        may_stop = len(self.output_ids) >= max(1, self.params.min_tokens)
        if token_id in self.stop_ids and may_stop:
            self.finish_reason = "stop"
            self._text += self._detokenizer.finish()
        else:
            before = len(self._text)
            self._text += self._detokenizer.push([token_id])
            if may_stop and self._cut_at_stop_string(before):
                self.finish_reason = "stop"
            elif len(self.output_ids) >= self.max_new_tokens:
                self.finish_reason = "length"
                before = len(self._text)
                self._text += self._detokenizer.finish()
                if may_stop and self._cut_at_stop_string(before):
                    self.finish_reason = "stop"
        return self.finish_reason is not None

    def _cut_at_stop_string(self, before: int) -> bool:
        """Cuts the text at the first stop string that ends after `before` characters."""
        matches = []
        for stop in self.params.stop:
            start = self._text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                matches.append((start, stop))
        if not matches:
            return False
        start, stop = min(matches, key=lambda found: found[0] + len(found[1]))
        self._text = self._text[: start + len(stop)] if self.params.include_stop_str_in_output else self._text[:start]
        return True

    def _next_text(self) -> str:
        """Text that no later token can take back: the start of a possible stop string is held until it is decided."""
        end = len(self._text)
        if self.finish_reason is None and self.params.stop:
            end -= max(_overlap(self._text, stop) for stop in self.params.stop)
        delta, self._emitted = self._text[self._emitted : max(end, self._emitted)], max(end, self._emitted)
        return delta


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
