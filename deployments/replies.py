"""Answers in OpenAI's shapes, made from the engine's outputs; and the usage they tell."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.answers import (
    Answer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChunkAcceptance,
    MedusaUsage,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    Usage,
)
from deployments.streams import HeadsVersion
from deployments.token_texts import TokenTexts
from medusa import Completion, Output, TokenLogprob
from medusa.engine.sequence import FinishReason

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


class Tally:
    """The usage of one HTTP request over all of its replies, in tokens: a chunk may carry several.

    `log` gets the same figures for the request's log line, when they are final.
    """

    def __init__(self, prompt_tokens: int, heads: HeadsVersion, log: MutableMapping[str, Any] | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self._heads = heads
        self._log = log if log is not None else {}
        self._tokens: dict[int, int] = {}
        self._decoded: dict[int, tuple[int, int]] = {}  # tokens of decode steps, and those steps
        self._finished: list[Completion] = []

    def add(self, choice: int, output: Output) -> None:
        before = self._tokens.get(choice, 0)
        decoded, steps = self._decoded.get(choice, (0, 0))
        gained = len(output.token_ids) - (before == 0)  # a reply's first token is the prefill's
        self._tokens[choice] = before + len(output.token_ids)
        self._decoded[choice] = (decoded + gained, steps + gained - output.num_draft_accepted)
        if (end := output.finished) is not None:
            self._tokens[choice] = len(end.token_ids)
            self._decoded[choice] = (sum(end.accepted_per_step), end.num_steps)
            self._finished.append(end)

    def so_far(self) -> Usage:
        tokens, steps = (sum(column) for column in zip(*self._decoded.values(), strict=True))
        return self._usage(tokens, steps)

    def total(self) -> Usage:
        accepted = [count for completion in self._finished for count in completion.accepted_per_step]
        usage = self._usage(sum(accepted), len(accepted))
        depths = range(1, max(accepted, default=1))
        usage.medusa.accepted_per_depth = [sum(count > depth for count in accepted) for depth in depths]
        self._log |= {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "steps": usage.medusa.steps,
            "heads_version": self._heads.version,
            "finish_reasons": [completion.finish_reason for completion in self._finished],
        }
        return usage

    def _usage(self, decoded: int, steps: int) -> Usage:
        completion_tokens = sum(self._tokens.values())
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
            medusa=MedusaUsage(
                steps=steps,
                accepted_tokens=decoded,
                mean_acceptance_length=decoded / steps if steps else 1.0,
                heads_version=self._heads.version,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Head:
    """What every part of an answer says, and the texts of tokens."""

    reply_id: str
    created: int
    model: str
    fingerprint: str | None
    texts: TokenTexts

    def fields(self) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class _Reply:
    """One HTTP request's answer: what its chunks and its whole form share."""

    def __init__(self, head: Head) -> None:
        self._head = head.fields()
        self._texts = head.texts


def _acceptance(output: Output, include: bool) -> dict[str, Any]:
    if not include:
        return {}
    return {"medusa": ChunkAcceptance(tokens=len(output.token_ids), accepted=output.num_draft_accepted)}


class ChatReply(_Reply):
    prefix = "chatcmpl"

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self._opened: set[int] = set()

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Answer:
        choices = [
            ChatChoice(
                index=choice,
                message=ChatMessage(role="assistant", content=completion.text, refusal=None),
                logprobs=self._logprobs(completion.logprobs),
                finish_reason=completion.finish_reason,
                seed=completion.seed,
            )
            for choice, completion in enumerate(completions)
        ]
        return ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self._head)

    def chunks(self, choice: int, output: Output, *, include_acceptance: bool = False) -> Iterator[Answer]:
        if choice not in self._opened:
            self._opened.add(choice)
            yield self._chunk(choice, ChatDelta(role="assistant", content=""))
        if output.text or output.logprobs:
            extra = _acceptance(output, include_acceptance)
            yield self._chunk(choice, ChatDelta(content=output.text), self._logprobs(output.logprobs), **extra)
        if (end := output.finished) is not None:
            yield self._chunk(choice, ChatDelta(), finish_reason=end.finish_reason, seed=end.seed)

    def usage_chunk(self, usage: Usage) -> Answer:
        return ChatCompletionChunk(object="chat.completion.chunk", choices=[], usage=usage, **self._head)

    def _chunk(
        self,
        choice: int,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | None = None,
        **extra: Any,
    ) -> Answer:
        only = ChatChunkChoice(index=choice, delta=delta, logprobs=logprobs, finish_reason=finish_reason, **extra)
        return ChatCompletionChunk(object="chat.completion.chunk", choices=[only], **self._head)

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
        if entries is None:
            return None
        content = [
            ChatTokenLogprob(
                **self._token(entry.token_id, entry.logprob),
                top_logprobs=[ChatLogprob(**self._token(*pair)) for pair in entry.top],
            )
            for entry in entries
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.to_bytes(token_id)
        return {
            "token": self._texts.to_text(token_id),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(raw),
        }


class TextReply(_Reply):
    prefix = "cmpl"

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self._offsets: dict[int, int] = {}

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Answer:
        choices = [
            TextChoice(
                index=choice,
                text=completion.text,
                logprobs=self._logprobs(choice, completion.logprobs),
                finish_reason=completion.finish_reason,
                seed=completion.seed,
            )
            for choice, completion in enumerate(completions)
        ]
        return TextCompletion(object="text_completion", choices=choices, usage=usage, **self._head)

    def chunks(self, choice: int, output: Output, *, include_acceptance: bool = False) -> Iterator[Answer]:
        if output.text or output.logprobs:
            logprobs = self._logprobs(choice, output.logprobs)
            extra = _acceptance(output, include_acceptance)
            yield self._chunk(index=choice, text=output.text, logprobs=logprobs, finish_reason=None, **extra)
        if (end := output.finished) is not None:
            yield self._chunk(index=choice, text="", logprobs=None, finish_reason=end.finish_reason, seed=end.seed)

    def usage_chunk(self, usage: Usage) -> Answer:
        return TextCompletion(object="text_completion", choices=[], usage=usage, **self._head)

    def _chunk(self, **choice: Any) -> Answer:
        return TextCompletion(object="text_completion", choices=[TextChoice(**choice)], **self._head)

    def _logprobs(self, choice: int, entries: Sequence[TokenLogprob] | None) -> TextLogprobs | None:
        if entries is None:
            return None
        tokens = [self._texts.to_text(entry.token_id) for entry in entries]
        return TextLogprobs(
            tokens=tokens,
            token_logprobs=[max(entry.logprob, LOWEST_LOGPROB) for entry in entries],
            top_logprobs=[self._alternatives(entry) for entry in entries],
            text_offset=[self._advance(choice, len(token)) for token in tokens],
        )

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """By text, with the token drawn: one more than asked for, unless it is among them."""
        pairs = [*entry.top, (entry.token_id, entry.logprob)]
        return {self._texts.to_text(token_id): max(logprob, LOWEST_LOGPROB) for token_id, logprob in pairs}

    def _advance(self, choice: int, length: int) -> int:
        """Where the next token of `length` characters begins in the reply."""
        start = self._offsets.get(choice, 0)
        self._offsets[choice] = start + length
        return start
