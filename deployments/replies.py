"""Answers in OpenAI's shapes, made from the engine's outputs: whole ones, and the chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.answers import (
    Answer,
    CalledFunction,
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
    TextChoice,
    TextCompletion,
    TextLogprobs,
    ToolCallAnswer,
    Usage,
)
from deployments.token_texts import TokenTexts
from deployments.tool_calls import Call, PlainReader, Reader
from medusa import Completion, Output, TokenLogprob
from medusa.engine.sequence import FinishReason

_MARK = "the text"  # stands for it while the rest of a chunk is written
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


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


@dataclass(frozen=True)
class Echoed:
    """A prompt that stands before its replies."""

    text: str
    token_ids: list[int]


class _Reply:
    """One HTTP request's answer: what its chunks and its whole form share."""

    def __init__(self, head: Head) -> None:
        self._head = head.fields()
        self._texts = head.texts
        self._opened: set[int] = set()
        self._around: dict[tuple[int, bool], tuple[str, str]] = {}

    def text_chunk(self, choice: int, output: Output, *, null_usage: bool) -> str | None:
        """The JSON of a chunk that carries text and nothing else, as most do; None for any other output. It is what
        `chunks` gives, at a tenth of the cost: all but the text is written once a reply."""
        if choice not in self._opened or output.finished is not None or output.logprobs or not self._is_plain(choice):
            return None
        key = (choice, null_usage)
        if key not in self._around:
            chunk = self._of_text(choice, _MARK)
            if null_usage:
                chunk.usage = None
            before, _, after = chunk.to_json().partition(json.dumps(_MARK))
            self._around[key] = before, after
        before, after = self._around[key]
        return f"{before}{json.dumps(output.text, ensure_ascii=False)}{after}" if output.text else ""

    def _of_text(self, choice: int, text: str) -> Answer:
        raise NotImplementedError

    def _is_plain(self, choice: int) -> bool:
        return True


def _acceptance(output: Output, include: bool) -> dict[str, Any]:
    if not include:
        return {}
    return {"medusa": ChunkAcceptance(tokens=len(output.token_ids), accepted=output.num_draft_accepted)}


class ChatReply(_Reply):
    """`readers` find the calls of tools in the text of each of the request's replies."""

    def __init__(self, head: Head, readers: Sequence[Reader]) -> None:
        super().__init__(head)
        self._readers = readers
        self._calling: set[int] = set()

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Answer:
        choices = [
            ChatChoice(
                index=choice,
                message=self._message(choice, completion),
                logprobs=self._logprobs(completion.logprobs),
                finish_reason=self._reason(choice, completion),
                seed=completion.seed,
            )
            for choice, completion in enumerate(completions)
        ]
        return ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self._head)

    def chunks(self, choice: int, output: Output, *, include_acceptance: bool = False) -> Iterator[Answer]:
        if choice not in self._opened:
            self._opened.add(choice)
            yield self._chunk(choice, ChatDelta(role="assistant", content=""))
        content, calls = self._readers[choice].push(output.text, is_last=output.finished is not None)
        if content or output.logprobs:
            extra = _acceptance(output, include_acceptance)
            yield self._chunk(choice, ChatDelta(content=content), self._logprobs(output.logprobs), **extra)
        if calls:
            self._calling.add(choice)
            parts = [self._call(choice, call, index=call.index) for call in calls]
            yield self._chunk(choice, ChatDelta(tool_calls=parts))
        if (end := output.finished) is not None:
            yield self._chunk(choice, ChatDelta(), finish_reason=self._reason(choice, end), seed=end.seed)

    def usage_chunk(self, usage: Usage) -> Answer:
        return ChatCompletionChunk(object="chat.completion.chunk", choices=[], usage=usage, **self._head)

    def _of_text(self, choice: int, text: str) -> Answer:
        return self._chunk(choice, ChatDelta(content=text))

    def _is_plain(self, choice: int) -> bool:
        return isinstance(self._readers[choice], PlainReader)

    def _message(self, choice: int, completion: Completion) -> ChatMessage:
        content, calls = self._readers[choice].push(completion.text, is_last=True)
        if not calls:
            return ChatMessage(role="assistant", content=content, refusal=None)
        self._calling.add(choice)
        answers = [self._call(choice, call) for call in calls]
        return ChatMessage(role="assistant", content=content or None, refusal=None, tool_calls=answers)

    def _call(self, choice: int, call: Call, **place: int) -> ToolCallAnswer:
        if call.name is None:
            return ToolCallAnswer(function=CalledFunction(arguments=call.arguments), **place)
        call_id = f"call-{self._head['id'].partition('-')[2]}-{choice}-{call.index}"
        function = CalledFunction(name=call.name, arguments=call.arguments)
        return ToolCallAnswer(id=call_id, type="function", function=function, **place)

    def _reason(self, choice: int, completion: Completion) -> FinishReason | Literal["tool_calls"]:
        is_call = choice in self._calling and completion.finish_reason == "stop"
        return "tool_calls" if is_call else completion.finish_reason

    def _chunk(
        self,
        choice: int,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | Literal["tool_calls"] | None = None,
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
    """`echoed` are the prompts that their `n` replies begin with, if they are to."""

    def __init__(self, head: Head, echoed: Sequence[Echoed] | None, n: int) -> None:
        super().__init__(head)
        self._echoed = echoed
        self._n = n
        self._offsets: dict[int, int] = {}

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Answer:
        choices = [
            TextChoice(
                index=choice,
                text=self._prompt_of(choice) + completion.text,
                logprobs=self._logprobs(choice, completion.logprobs, completion.prompt_logprobs),
                finish_reason=completion.finish_reason,
                seed=completion.seed,
            )
            for choice, completion in enumerate(completions)
        ]
        return TextCompletion(object="text_completion", choices=choices, usage=usage, **self._head)

    def chunks(self, choice: int, output: Output, *, include_acceptance: bool = False) -> Iterator[Answer]:
        text = output.text
        if choice not in self._opened:
            self._opened.add(choice)
            text = self._prompt_of(choice) + text
        if text or output.logprobs:
            logprobs = self._logprobs(choice, output.logprobs, output.prompt_logprobs)
            extra = _acceptance(output, include_acceptance)
            yield self._chunk(index=choice, text=text, logprobs=logprobs, finish_reason=None, **extra)
        if (end := output.finished) is not None:
            yield self._chunk(index=choice, text="", logprobs=None, finish_reason=end.finish_reason, seed=end.seed)

    def usage_chunk(self, usage: Usage) -> Answer:
        return TextCompletion(object="text_completion", choices=[], usage=usage, **self._head)

    def _of_text(self, choice: int, text: str) -> Answer:
        return self._chunk(index=choice, text=text, logprobs=None, finish_reason=None)

    def _prompt_of(self, choice: int) -> str:
        return self._echoed[choice // self._n].text if self._echoed else ""

    def _chunk(self, **choice: Any) -> Answer:
        return TextCompletion(object="text_completion", choices=[TextChoice(**choice)], **self._head)

    def _logprobs(
        self, choice: int, entries: Sequence[TokenLogprob] | None, prompt: Sequence[TokenLogprob] | None
    ) -> TextLogprobs | None:
        if entries is None:
            return None
        first: list[str] = []
        if self._echoed and prompt is not None:
            first = [self._texts.to_text(self._echoed[choice // self._n].token_ids[0])]
            entries = [*prompt, *entries]
        tokens = first + [self._texts.to_text(entry.token_id) for entry in entries]
        nothing = [None] * len(first)  # nothing precedes the prompt's first token
        return TextLogprobs(
            tokens=tokens,
            token_logprobs=nothing + [max(entry.logprob, LOWEST_LOGPROB) for entry in entries],
            top_logprobs=nothing + [self._alternatives(entry) for entry in entries],
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
