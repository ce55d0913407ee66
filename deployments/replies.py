"""Answers in OpenAI's shapes, made from the engine's outputs: whole ones, and the chunks of a stream.

Beyond OpenAI's fields: `usage.medusa` tells what speculation gained, and a choice carries its `seed`, which
draws the same reply again. A null that a client expects is set; a field that is not set is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from medusa import Completion, Output, TokenLogprob
from medusa.engine.sequence import FinishReason

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


class MedusaUsage(BaseModel):
    """`accepted_tokens` came out of `steps` decode steps (not the prefill's token); their ratio is the mean.

    `accepted_per_depth[d]` counts the steps that kept a guess of head d.
    """

    steps: int
    accepted_tokens: int
    mean_acceptance_length: float
    accepted_per_depth: list[int]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    medusa: MedusaUsage | None = None


class ChatLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class Choice(BaseModel):
    index: int
    finish_reason: FinishReason | None
    seed: int | None = None


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class TextChoice(Choice):
    text: str
    logprobs: TextLogprobs | None


class Answer(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None
    choices: Sequence[Any]
    usage: Usage | None = None

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


class ChatCompletion(Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class TextCompletion(Answer):
    """Whole or a chunk: the older API gives both one name."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class Tally:
    """The usage of one HTTP request over all of its replies, in tokens: a chunk may carry several."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._tokens: dict[int, int] = {}
        self._finished: list[Completion] = []

    def add(self, choice: int, output: Output) -> None:
        self._tokens[choice] = self._tokens.get(choice, 0) + len(output.token_ids)
        if output.finished is not None:
            self._tokens[choice] = len(output.finished.token_ids)
            self._finished.append(output.finished)

    def so_far(self) -> Usage:
        completion_tokens = sum(self._tokens.values())
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
        )

    def total(self) -> Usage:
        usage = self.so_far()
        accepted = [count for completion in self._finished for count in completion.accepted_per_step]
        usage.medusa = MedusaUsage(
            steps=len(accepted),
            accepted_tokens=sum(accepted),
            mean_acceptance_length=sum(accepted) / len(accepted) if accepted else 1.0,
            accepted_per_depth=[
                sum(count > depth for count in accepted) for depth in range(1, max(accepted, default=1))
            ],
        )
        return usage


class TokenTexts:
    """The text and bytes of single tokens, for logprobs; `hf` is the Hugging Face tokenizer."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._is_byte_level = hf.convert_tokens_to_string(["Ġ"]) == " "
        self._added = set(hf.get_added_vocab().values())

    def to_bytes(self, token_id: int) -> bytes:
        token = self._hf.convert_ids_to_tokens(token_id)
        if token is None:  # models pad their vocabulary beyond the tokenizer's
            return b""
        if token_id in self._added:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[character] for character in token)
        if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(fallback[1])
        return token.replace("▁", " ").encode()

    def to_text(self, token_id: int) -> str:
        """Half a character is shown as OpenAI shows it, such as `bytes:\\xe2\\x80`."""
        raw = self.to_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for the characters from 256 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class _Reply:
    """One HTTP request's answer: what its chunks and its whole form share."""

    def __init__(self, *, reply_id: str, created: int, model: str, fingerprint: str | None, texts: TokenTexts) -> None:
        self._head: dict[str, Any] = {
            "id": reply_id,
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._texts = texts


class ChatReply(_Reply):
    def __init__(self, **head: Any) -> None:
        super().__init__(**head)
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

    def chunks(self, choice: int, output: Output) -> Iterator[Answer]:
        if choice not in self._opened:
            self._opened.add(choice)
            yield self._chunk(choice, ChatDelta(role="assistant", content=""))
        if output.text or output.logprobs:
            yield self._chunk(choice, ChatDelta(content=output.text), self._logprobs(output.logprobs))
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
    def __init__(self, **head: Any) -> None:
        super().__init__(**head)
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

    def chunks(self, choice: int, output: Output) -> Iterator[Answer]:
        if output.text or output.logprobs:
            logprobs = self._logprobs(choice, output.logprobs)
            yield self._chunk(index=choice, text=output.text, logprobs=logprobs, finish_reason=None)
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
